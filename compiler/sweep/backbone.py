"""A graph with the views that passes, targets and adapters use."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from eoracc.passes.graph.embeddings import Embedding, find_embeddings
from eoracc.passes.graph.linears import Linear, find_linears

__all__ = ["Backbone"]


@dataclass(eq=False)
class Backbone:
    """A compressed graph.

    Attributes:
      model: the graph.
      linears: its linears in execution order, original weights still at hand.
      embeddings: its embedding tables.
    """

    model: ir.Model
    linears: list[Linear]
    embeddings: list[Embedding]

    @classmethod
    def of(cls, model: ir.Model) -> Backbone:
        """The view of ``model``, compressed or about to be."""
        return cls(model, find_linears(model), find_embeddings(model))
