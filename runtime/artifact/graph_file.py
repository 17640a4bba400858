"""Read the ONNX graph of an artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from eoracc.documents import Reader
from eoracc.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_graph"]

_READER = Reader(ArtifactError, "build the artifact again")
_MAX_BYTES = (1 << 31) - 1
"""Bytes of a protobuf message, which ends there; weights lie in a file of their own."""


def read_graph(path: Path) -> ir.Model:
    """The graph in an ONNX file; its weights stay in the file beside it.

    Raises:
      ArtifactError: the file is missing, no regular file, too large, or no ONNX graph.
    """
    with _READER.opened(path) as (_, size):
        if size > _MAX_BYTES:
            _READER.refuse(path, f"has more than {_MAX_BYTES:,} bytes, the limit for a graph")
    with _READER.refusing(path, "is no ONNX graph"):
        return ir.load(path)
