"""Packages that eoracc runs models with, imported when they are first needed.

None of them is required to install eoracc: ONNX Runtime's builds for CPU and GPU exclude each
other, and TensorRT needs an NVIDIA GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from eoracc.errors import BackendError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["import_package"]

_ONNXRUNTIME = "pip install 'eoracc[cpu]' (or 'eoracc[gpu]')"
_INSTALL = {
    "onnxruntime": _ONNXRUNTIME,
    "onnxruntime_genai": _ONNXRUNTIME,
    "tensorrt": "pip install 'eoracc[tensorrt]'",
    "tensorrt_rtx": "pip install 'eoracc[tensorrt-rtx]'",
}


def import_package(name: str) -> ModuleType:
    """Import ``onnxruntime``, ``onnxruntime_genai``, ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
      BackendError: it is not installed; the text says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        problem = "is not installed" if error.name == name else f"cannot be loaded ({error})"
        raise BackendError(f"{name.replace('_', '-')} {problem}: {_INSTALL[name]}") from None
