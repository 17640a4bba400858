"""What decides the rounding of a build besides its inputs: processor, libraries, threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

__all__ = ["SETTINGS", "build_machine", "processor_extensions", "processor_field"]

_CPUINFO = Path("/proc/cpuinfo")

_EXTENSIONS = (
    "sse4_2",
    "avx",
    "fma",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""Extensions of x86-64 and AArch64 that libraries have kernels for, as Linux names them."""

SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
)
"""Environment variables by which libraries choose kernels and threads."""


def build_machine() -> dict[str, Any]:
    """The kernels that this process computes with, for the manifest.

    Two builds of the same inputs give the same bytes if this and the versions of the packages are
    equal. ONNX Runtime does not say which kernels it chose: it goes by ``extensions``.

    Returns:
      ``architecture``; ``extensions`` of the instruction set; ``cores`` that the process may use,
      by which ONNX Runtime chooses its threads; ``libraries``, each with ``name``, ``version``,
      ``kernels`` and ``threads``; ``bfloat16``, whether ``precision: auto`` means bfloat16;
      ``settings``, the variables of :data:`SETTINGS` that are set.
    """
    import torch  # noqa: PLC0415 - writers of artifacts without a build do without it
    from threadpoolctl import threadpool_info  # noqa: PLC0415

    from eoracc.compiler.sweep.products import bfloat16_is_fast  # noqa: PLC0415

    libraries = {
        (
            pool["internal_api"],
            pool["version"],
            pool.get("architecture", "").lower() or None,
            pool["num_threads"],
        )
        for pool in threadpool_info()
        if pool["user_api"] == "blas"
    }
    libraries.add(
        (
            "torch",
            str(torch.__version__),
            torch.backends.cpu.get_cpu_capability().lower(),
            torch.get_num_threads(),
        )
    )
    keys = ("name", "version", "kernels", "threads")
    return {
        "architecture": platform.machine(),
        "extensions": processor_extensions(),
        "cores": _cores(),
        "libraries": [dict(zip(keys, found, strict=True)) for found in sorted(libraries, key=str)],
        "bfloat16": bfloat16_is_fast(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def _cores() -> int | None:
    """Cores that this process may use; None where the system does not say."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return os.cpu_count() if affinity is None else len(affinity(0))


def processor_extensions() -> list[str]:
    """Extensions of the instruction set that matter here; empty where Linux does not say."""
    flags = processor_field("flags", "Features").split()
    return [extension for extension in _EXTENSIONS if extension in flags]


def processor_field(*names: str) -> str:
    """The first field of one of ``names`` in what Linux says of the processor; empty without."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
