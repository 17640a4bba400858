"""The table of targets.

A target has a function ``require``, which reports before anything is loaded what this machine
lacks, and a function ``emit``, which lowers the graph and writes it. ``onnxruntime`` writes at the
artifact's root, every other target into a folder of its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from eoracc.compiler.config.sections import TargetName
from eoracc.compiler.targets.job import Emitted, Job
from eoracc.compiler.targets.onnxruntime import emit as onnxruntime
from eoracc.compiler.targets.tensorrt import bundle as tensorrt
from eoracc.compiler.targets.tensorrt import rtx as tensorrt_rtx

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """How a target is written.

    Attributes:
      require: raises an EoraccError, one sentence with the way out, where this machine lacks what
        the target is built with. It is called before anything is loaded.
      emit: lowers and writes; with ``verify.parity``, the parity record too. Raises an EoraccError
        where the target cannot take this model.
    """

    require: Callable[[], None]
    emit: Callable[[Job], Emitted]


TARGETS: Mapping[TargetName, Target] = {
    "onnxruntime": Target(onnxruntime.require, onnxruntime.emit),
    "tensorrt_rtx": Target(tensorrt_rtx.require, tensorrt_rtx.emit),
    "tensorrt": Target(tensorrt.require, tensorrt.emit),
}
"""By the name in model.yaml."""
