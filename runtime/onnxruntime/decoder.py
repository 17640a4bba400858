"""A model in ONNX Runtime with the adapters that it runs with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.runtime.onnxruntime.rows import GraphRows

if TYPE_CHECKING:
    from eoracc.runtime.decode.bank import AdapterBank
    from eoracc.runtime.onnxruntime.graph import Graph

__all__ = ["GraphDecoder"]


class GraphDecoder:
    """A graph and the adapters that it runs with, as generating and scoring want it.

    Attributes:
      bank: the adapters.
      context_length: tokens of a row at most.
      vocabulary: width of the logits.
    """

    def __init__(self, graph: Graph, bank: AdapterBank) -> None:
        self._graph = graph
        self.bank = bank
        self.context_length = graph.context_length
        self.vocabulary = graph.vocabulary

    def new_rows(self) -> GraphRows:
        """A cache of its own, without a row yet."""
        return GraphRows(self._graph, self.bank)
