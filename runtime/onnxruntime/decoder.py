"""The ONNX Runtime backend: a model with its bank of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.runtime.onnxruntime.rows import GraphRows

if TYPE_CHECKING:
    from eoracc.runtime.decode.bank import AdapterBank
    from eoracc.runtime.onnxruntime.graph import Graph

__all__ = ["GraphDecoder"]


class GraphDecoder:
    """A :class:`eoracc.runtime.decode.decoder.Decoder` in ONNX Runtime.

    Attributes:
      bank: the adapters.
      context_length: most tokens of a row.
      long_rope: at which length the rotary embedding of a text changes; None where it never does.
      vocabulary: number of logits of a token.
    """

    def __init__(self, graph: Graph, bank: AdapterBank) -> None:
        self._graph = graph
        self.bank = bank
        self.context_length = graph.context_length
        self.long_rope = graph.long_rope
        self.vocabulary = graph.vocabulary

    def new_rows(self) -> GraphRows:
        """A new cache without rows."""
        return GraphRows(self._graph, self.bank)
