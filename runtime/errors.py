"""Errors of the runtime."""

from __future__ import annotations

from eoracc import EoraccError

__all__ = ["ArtifactError", "BackendError"]


class ArtifactError(EoraccError):
    """An artifact folder that is missing, damaged, foreign, or cannot be written."""


class BackendError(EoraccError):
    """ONNX Runtime is not installed, or refuses the model."""
