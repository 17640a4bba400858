"""Open a model in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from eoracc.errors import BackendError, reason
from eoracc.runtime.onnxruntime.own_memory import library_in_memory
from eoracc.runtime.packages import import_package

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["DTYPES", "open_inference", "ort_values"]

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
"""NumPy's types by ONNX Runtime's names, of every input and output that a model may have."""

_FATAL_ONLY = 4
"""Severity of ONNX Runtime's log. It prints the names of a graph as they are, control characters
too, and what it logs as an error is raised as well."""

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def open_inference(
    model: str | bytes,
    library: Path | None,
    threads: int | None,
    name: str,
    *,
    lean: bool = False,
    weights: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """Open an ``onnxruntime.InferenceSession``.

    Args:
      model: its path, or its content.
      library: the native library to register, or None.
      threads: that one operator uses; None for ONNX Runtime's default.
      name: of the model, for errors.
      lean: see :func:`eoracc.runtime.onnxruntime.session.open_session`.
      weights: folder of the weight files of a ``model`` given as bytes.
      defaults: of optional inputs, in place of the model's own (:func:`ort_values`). A run that
        uses them need not bind them, which saves half a microsecond each. They must live as long as
        the session.

    Raises:
      BackendError: ONNX Runtime is missing or rejects the model.
    """
    onnxruntime = import_package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        if library is not None:
            options.register_custom_ops_library(library_in_memory(library))
        # Otherwise DequantizeLinear and MatMul become a product that rounds activations to int8.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if weights is not None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights))
        for optional, value in (defaults or {}).items():
            options.add_initializer(optional, value)
        if lean:
            # An arena would keep the peak of memory, and idle threads would spin.
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(
            model,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"] if lean else None,
            # There is no other provider to fall back to; it would print to standard output.
            enable_fallback=0,
        )
    except Exception as error:
        raise BackendError(f"{name}: ONNX Runtime cannot load it: {reason(error)}") from error


def ort_values(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Any]:
    """Wrap C-contiguous arrays as ONNX Runtime's values, which share and keep their memory.

    Raises:
      BackendError: ONNX Runtime is missing.
    """
    onnxruntime = import_package("onnxruntime")
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
