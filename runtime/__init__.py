"""Run artifacts: ``load(path).generate(prompt)``. Needs ONNX Runtime and no PyTorch."""

from __future__ import annotations

from eoracc.runtime.errors import ArtifactError, BackendError
from eoracc.runtime.model import Model, load

__all__ = ["ArtifactError", "BackendError", "Model", "load"]
