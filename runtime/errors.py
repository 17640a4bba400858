"""Errors of the runtime."""

from __future__ import annotations

from eoracc import EoraccError

__all__ = ["ArtifactError", "BackendError", "BusyError", "RequestError"]


class ArtifactError(EoraccError):
    """An artifact folder that is missing, damaged, foreign, or cannot be written."""


class BackendError(EoraccError):
    """This machine lacks what runs a model, a package or a driver, or that refuses or fails."""


class RequestError(EoraccError):
    """A request that cannot be served: a bad value, no room, an unknown adapter."""


class BusyError(EoraccError):
    """An engine that has as many requests waiting as it may, or is closed: try again later."""
