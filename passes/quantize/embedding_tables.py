"""Quantize the embedding tables for which a compressing pass has options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from eoracc.plugins.operands.weight import NBitsWeight

if TYPE_CHECKING:
    from eoracc.passes.compression import Compression
    from eoracc.passes.graph.embeddings import Embedding
    from eoracc.passes.graph.linears import Linear

__all__ = ["embedding_options", "quantize_embedding_tables"]

_C = TypeVar("_C", bound="Compression")


def _rounded(options: Compression, embedding: Embedding) -> NBitsWeight:
    weight = options.requantize(embedding.weight(), None)
    assert isinstance(weight, NBitsWeight)  # noqa: S101 - passes that store floats leave tables alone
    return weight


def embedding_options(
    compression: _C, embedding: Embedding, linears: Iterable[Linear]
) -> tuple[_C | None, Linear | None]:
    """The options that hold for a table, and the head that it is stored together with.

    A table that a tied head multiplies with has the options of the head, unless a pattern names
    it; where the same options hold for both, it is stored once: the codes of the head then serve
    both.

    Args:
      compression: the pass.
      embedding: the table.
      linears: of the same graph, the tied head among them if there is one.

    Returns:
      The options, None where the table is left as it is, and the head, None where the table has
      codes of its own.
    """
    head = next((linear for linear in linears if linear.source is embedding.source), None)
    if head is None:
        return compression.options_for(embedding), None
    of_head = compression.options_for(head)
    options = compression.options_for(embedding) if compression.names(embedding) else of_head
    shared = options is not None and options == of_head
    return options, head if shared else None


def quantize_embedding_tables(
    compression: Compression,
    embeddings: Iterable[Embedding],
    linears: Sequence[Linear],
    solve: Callable[[Compression, Embedding], NBitsWeight] = _rounded,
) -> None:
    """Compress the tables for which ``compression`` has options (:func:`embedding_options`).

    Rows are looked up, not multiplied, so there is no Gram, and a quantizing pass rounds to
    nearest.

    The head is the last linear of a sweep, so the sweep itself runs on the original table.

    Args:
      compression: the pass, which stores codes.
      embeddings: the tables of a graph.
      linears: of the same graph, compressed.
      solve: compresses a table, with the options that hold for it.
    """
    for embedding in embeddings:
        options, head = embedding_options(compression, embedding, linears)
        if options is None:
            continue
        weight = None if head is None else head.quantized
        if weight is None:
            head, weight = None, solve(options, embedding)
        embedding.quantize(weight, tied=head)
