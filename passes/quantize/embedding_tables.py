"""Quantize the embedding tables for which a compressing pass has options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eoracc.passes.compression import Compression
    from eoracc.passes.graph.embeddings import Embedding
    from eoracc.passes.graph.linears import Linear
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["quantize_embedding_tables"]


def _rounded(options: Compression, embedding: Embedding) -> NBitsWeight:
    return options.requantize(embedding.weight(), None)


def quantize_embedding_tables(
    compression: Compression,
    embeddings: Iterable[Embedding],
    linears: Sequence[Linear],
    solve: Callable[[Compression, Embedding], NBitsWeight] = _rounded,
) -> None:
    """Compress the tables for which ``compression`` has options.

    Rows are looked up, not multiplied, so there is no Gram, and a quantizing pass rounds to
    nearest. A table that a tied head multiplies with has the options of the head, unless a pattern
    names it; where the same options hold for both, it is stored once: the codes of the head then
    serve both.

    The head is the last linear of a sweep, so the sweep itself runs on the original table.

    Args:
      compression: the pass.
      embeddings: the tables of a graph.
      linears: of the same graph, compressed.
      solve: compresses a table, with the options that hold for it.
    """
    for embedding in embeddings:
        head = next((linear for linear in linears if linear.source is embedding.source), None)
        named = head is None or compression.names(embedding)
        options = compression.options_for(embedding if named or head is None else head)
        if options is None:
            continue
        if head is not None and compression.options_for(head) == options:
            weight: NBitsWeight | None = head.compressed
        else:
            head = weight = None
        if weight is None:
            weight = solve(options, embedding)
        embedding.quantize(weight, tied=head)
