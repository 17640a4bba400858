"""Errors of the runtime."""

from __future__ import annotations

from eoracc import EoraccError

__all__ = ["ArtifactError", "BackendError", "BusyError", "RequestError"]


class ArtifactError(EoraccError):
    """An artifact folder that is missing, damaged, foreign, or cannot be written."""


class BackendError(EoraccError):
    """ONNX Runtime is not installed, or refuses the model."""


class RequestError(EoraccError):
    """A request that cannot be served: a bad value, no room, an unknown adapter."""


class BusyError(EoraccError):
    """An engine that has as many requests waiting as it may, or is closed: try again later."""
