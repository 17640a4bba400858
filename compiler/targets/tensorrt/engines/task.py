"""The messages to and from the process that builds an engine, one line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["PARTIAL", "EngineTask", "ShapeRange", "parse_task"]

PARTIAL = ".partial"
"""Suffix, in place of the engine's own, of an engine that is being written."""

ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of an input."""


@dataclass(frozen=True)
class EngineTask:
    """An engine to build.

    Attributes:
      package: the module that builds it, ``tensorrt_rtx`` or ``tensorrt``.
      graph: the ONNX file, its weights beside it.
      engine: where the engine goes; it must not exist.
      log: where the builder's log goes.
      compute_capability: of the GPU, ``8.6``; empty for the one at hand.
      profiles: the ranges of every input whose shape is not fixed, per optimization profile.
      plugin_capability: of the GPU at hand, where the graph lies in a bundle of the target
        ``tensorrt``: its plugin is registered with kernels for it. Empty for a graph without.
    """

    package: str
    graph: Path
    engine: Path
    log: Path
    compute_capability: str
    profiles: tuple[Mapping[str, ShapeRange], ...]
    plugin_capability: str = ""

    def to_json(self) -> str:
        """One line that :func:`parse_task` reads."""
        return json.dumps(asdict(self), default=str)


def parse_task(line: str) -> EngineTask:
    """Inverse of :meth:`EngineTask.to_json`."""
    content = json.loads(line)
    paths = {name: Path(content[name]) for name in ("graph", "engine", "log")}
    return EngineTask(**{**content, **paths})
