"""Read the ONNX graph of an artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from eoracc.documents import Reader
from eoracc.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

__all__ = ["read_graph", "stored_array"]

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


def stored_array(value: ir.Value | None) -> NDArray[Any] | None:
    """The constant that a node reads, in the type that it reads; None where it reads no constant.

    Constants may be stored in a narrower type, from which a ``Cast`` gives what the node reads.

    Raises:
      OSError: the file with the weights is missing or cannot be read.
      ValueError: its path leads out of the artifact.
    """
    if value is None:
        return None
    node = value.producer()
    if node is not None and (node.domain, node.op_type) == ("", "Cast"):
        narrow = stored_array(node.inputs[0])
        wide = ir.DataType(node.attributes["to"].as_int()).numpy()
        return None if narrow is None else narrow.astype(wide)
    return None if value.const_value is None else value.const_value.numpy()
