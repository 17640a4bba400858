"""Compile the Triton kernels to PTX and machine code; no GPU is needed."""

# ruff: noqa: PLC0415 - Triton is an extra, and takes long to import.

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eoracc.errors import PluginError
from eoracc.plugins.triton.tactics import DownTactic, Dtype, Tactic, Variant, down_arguments

if TYPE_CHECKING:
    from triton.compiler import ASTSource

__all__ = ["Compiled", "compile_down", "compile_kernel"]

_TYPES: Mapping[str, str] = {
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "uint8": "*u8",
    "uint32": "*u32",
    "int32": "i32",
}
_WARP = 32


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel for one compute capability.

    Attributes:
      name: name of the entry in the PTX.
      capability: major * 10 + minor.
      architecture: target of the PTX. If it ends in ``a``, the PTX runs on that capability only;
        otherwise it also runs on later ones.
      ptx: code whose entry takes exactly ``arguments``, in order.
      cubin: the same as machine code.
      arguments: names and types, as :attr:`~eoracc.plugins.triton.tactics.Variant.arguments`.
      num_warps: warps of a program; a thread block has 32 times as many threads.
      shared_bytes: dynamic shared memory that a launch has to request.
      registers: registers of a thread.
      spill_bytes: bytes that a thread stores to and loads from memory when registers run out.
    """

    name: str
    capability: int
    architecture: str
    ptx: str
    cubin: bytes
    arguments: tuple[tuple[str, str], ...]
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int

    @property
    def threads(self) -> int:
        """Threads of a block, all in its first dimension."""
        return self.num_warps * _WARP


@lru_cache(maxsize=256)
def compile_kernel(variant: Variant, tactic: Tactic, capability: int) -> Compiled:
    """Compile the fused kernel.

    Args:
      variant: the types and operands to compile for.
      tactic: the tiling, from :func:`~eoracc.plugins.triton.tactics.tactics`.
      capability: that of the GPU.

    Raises:
      PluginError: Triton is not installed or cannot compile this.
    """
    meta = {
        "BITS": variant.bits,
        "GROUP": variant.group_size,
        "BLOCK_M": tactic.block_m,
        "BLOCK_N": tactic.block_n,
        "BLOCK_K": tactic.block_k,
        "BLOCK_R": tactic.block_r,
    }
    aligned = ("K", "R") if variant.aligned else ()
    options = {"num_warps": tactic.num_warps, "num_stages": tactic.num_stages}
    return _compile("matmul_nbits_low_rank", variant.arguments, meta, aligned, options, capability)


@lru_cache(maxsize=64)
def compile_down(
    tactic: DownTactic,
    capability: int,
    *,
    dtype: Dtype = "float16",
    factor_dtype: Dtype = "float16",
    aligned: bool = True,
) -> Compiled:
    """Compile the first of two launches.

    Args:
      tactic: the tiling.
      capability: that of the GPU.
      dtype: type of X.
      factor_dtype: type of ``lora_a``.
      aligned: whether K and R are multiples of 16.

    Raises:
      PluginError: Triton is not installed or cannot compile this.
    """
    meta = {"BLOCK_M": tactic.block_m, "BLOCK_K": tactic.block_k, "BLOCK_R": tactic.block_r}
    divisible = ("K", "R", "span") if aligned else ("span",)
    options = {"num_warps": tactic.num_warps, "num_stages": tactic.num_stages}
    arguments = down_arguments(dtype, factor_dtype)
    return _compile("low_rank_down", arguments, meta, divisible, options, capability)


def _compile(
    kernel_name: str,
    arguments: tuple[tuple[str, str], ...],
    meta: Mapping[str, int],
    divisible: tuple[str, ...],
    options: Mapping[str, int],
    capability: int,
) -> Compiled:
    try:
        from triton.compiler import ASTSource

        from eoracc.plugins.triton import kernel
    except ImportError as error:
        raise PluginError(
            f"the GPU kernel is compiled with Triton, which is missing ({error}): "
            "run pip install 'eoracc[triton]'"
        ) from error

    given = {
        name if dtype == "int32" else f"{name}_ptr": _TYPES[dtype] for name, dtype in arguments
    }
    function = getattr(kernel, kernel_name)
    # Parameters without an argument are absent operands.
    constants = {name: meta.get(name) for name in function.arg_names if name not in given}
    signature = {name: given.get(name, "constexpr") for name in function.arg_names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, type_name) in enumerate(signature.items())
        if type_name.startswith("*") or name in divisible
    }
    source = ASTSource(function, signature, constants, attributes)
    # For occupancy, ptxas uses fewer registers than it may, and at times spills a few bytes. With
    # an explicit limit it does not.
    for limit in (None, 128, 255):
        compiled = _compile_once(source, arguments, {**options, "maxnreg": limit}, capability)
        if compiled.spill_bytes == 0:
            break
    return compiled


def _compile_once(
    source: ASTSource,
    arguments: tuple[tuple[str, str], ...],
    options: Mapping[str, int | None],
    capability: int,
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder, triton.knobs.compilation.scope():
        # Keep the paths of this machine out of the PTX: equal sources give equal bytes.
        triton.knobs.compilation.disable_line_info = True
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = folder
            try:
                compiled = triton.compile(
                    source, target=GPUTarget("cuda", capability, _WARP), options=dict(options)
                )
            except Exception as error:
                raise PluginError(
                    f"Triton cannot compile {source.name} for capability {capability} with "
                    f"{list(source.constants.values())}: {error}"
                ) from error
        ptx = _without_scratch(compiled.asm["ptx"], len(arguments))
        architecture = sm_arch_from_capability(capability)
        cubin, log = _assemble(get_ptxas(capability).path, ptx, architecture, Path(folder))
    metadata: Any = compiled.metadata
    return Compiled(
        name=metadata.name,
        capability=capability,
        architecture=architecture,
        ptx=ptx,
        cubin=cubin,
        arguments=arguments,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        registers=_number(r"Used (\d+) registers", log),
        spill_bytes=_number(r"(\d+) bytes spill stores", log)
        + _number(r"(\d+) bytes spill loads", log),
    )


def _without_scratch(ptx: str, count: int) -> str:
    """The PTX without Triton's last two parameters, scratch memory that these kernels do not use.

    TensorRT does not pass them.
    """
    parameters = re.findall(r"^\t\.param [^\n]*?(\w+_param_\d+),?\n", ptx, re.MULTILINE)
    for name in parameters[count:]:
        if len(re.findall(rf"\b{name}\b", ptx)) != 1:
            raise PluginError(f"Triton's code uses {name}, scratch memory that nobody provides")
        ptx = re.sub(rf",\n\t\.param [^\n]*\b{name}\b", "", ptx)
    return ptx


def _assemble(ptxas: str, ptx: str, architecture: str, folder: Path) -> tuple[bytes, str]:
    """Machine code of ``ptx``, and the assembler's report of its resources."""
    source, target = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx, encoding="utf-8")
    command = [
        ptxas,
        "-v",
        "--regAllocOptLevel=2",
        f"--gpu-name={architecture}",
        str(source),
        "-o",
        str(target),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        raise PluginError(f"ptxas does not take the kernel's PTX: {result.stderr.strip()}")
    return target.read_bytes(), result.stderr


def _number(pattern: str, log: str) -> int:
    match = re.search(pattern, log)
    if match is None:
        raise PluginError(f"ptxas says nothing that reads as {pattern!r}: {log.strip()}")
    return int(match.group(1))
