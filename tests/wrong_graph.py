"""A checkpoint whose graph computes something else, as a frontend that misses an option gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from eoracc.compiler.frontend.load import load

if TYPE_CHECKING:
    from eoracc.compiler.frontend.load import LoadedModel

__all__ = ["load_wrong"]


def load_wrong(source: str, **options: Any) -> LoadedModel:  # noqa: ANN401 - of load
    """As :func:`load`, with another scale in the first attention."""
    loaded = load(source, **options)
    attention = next(node for node in loaded.model.graph if node.op_type == "Attention")
    attention.attributes.add(ir.AttrFloat32("scale", 0.2))
    return loaded
