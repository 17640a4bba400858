"""Give PTX the parameters with which TensorRT launches a kernel.

TensorRT passes a pointer to every input of a plugin, then the plugin's numbers, then a pointer to
every output. Triton's kernel has no parameter for an absent operand, so that parameter is declared
here. No instruction changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from eoracc.errors import PluginError

__all__ = ["launch_form"]

_ENTRY = re.compile(r"\.visible \.entry (?P<name>\w+)\(\n(?P<parameters>.*?)\n\)", re.DOTALL)


def launch_form(ptx: str, *, entry: str, present: Sequence[bool]) -> str:
    """``ptx`` with the parameters that TensorRT passes.

    Args:
      ptx: one kernel whose parameters are pointers to its inputs, then all others.
      entry: the kernel's new name, unique among all plugins of an engine.
      present: for each input of the plugin, whether the kernel has a parameter for it.

    Raises:
      PluginError: ``ptx`` does not hold such a kernel.
    """
    kernels = list(_ENTRY.finditer(ptx))
    if len(kernels) != 1:
        raise PluginError(f"{entry}: its PTX has {len(kernels)} kernels where one is launched")
    (kernel,) = kernels
    given = [line.rstrip(",") for line in kernel["parameters"].split("\n")]
    inputs = given[: sum(present)]
    if len(inputs) < sum(present) or not all(".param .u64 .ptr" in line for line in inputs):
        raise PluginError(f"{entry}: its PTX does not begin with {sum(present)} pointers")
    own = iter(inputs)
    declared = [
        next(own) if has else f"\t.param .u64 {entry}_without_{place}"
        for place, has in enumerate(present)
    ]
    parameters = ",\n".join([*declared, *given[len(inputs) :]])
    head = f".visible .entry {kernel['name']}(\n{parameters}\n)"
    arranged = ptx[: kernel.start()] + head + ptx[kernel.end() :]
    # The names of parameters and some comments contain the name of the kernel.
    return re.sub(rf"\b{kernel['name']}(?=\b|_param_)", entry, arranged)
