"""Run artifacts: ``load(path).generate(prompt)``. Needs no PyTorch."""

from __future__ import annotations

from eoracc.errors import ArtifactError, BackendError, BusyError, RequestError
from eoracc.runtime.backends import Backend, BackendChoice
from eoracc.runtime.engine import Engine, EngineLoad, Generation
from eoracc.runtime.model import Model, load
from eoracc.runtime.request import (
    AdapterChoice,
    ChatOptions,
    Completion,
    ContinuationScore,
    Piece,
    Prompt,
    Request,
    Score,
    TokenLogprob,
)

__all__ = [
    "AdapterChoice",
    "ArtifactError",
    "Backend",
    "BackendChoice",
    "BackendError",
    "BusyError",
    "ChatOptions",
    "Completion",
    "ContinuationScore",
    "Engine",
    "EngineLoad",
    "Generation",
    "Model",
    "Piece",
    "Prompt",
    "Request",
    "RequestError",
    "Score",
    "TokenLogprob",
    "load",
]
