"""Quantize the embedding tables that a quantizing pass's overrides name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from eoracc.passes.solvers.grid import round_to_nearest

if TYPE_CHECKING:
    from eoracc.passes.graph.embeddings import Embedding
    from eoracc.passes.graph.linears import Linear
    from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
    from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["quantize_embedding_tables"]


def quantize_embedding_tables(
    layer_pass: QuantizeGptq | QuantizeRtn,
    embeddings: Iterable[Embedding],
    linears: Sequence[Linear],
) -> None:
    """Round the tables that ``layer_pass``'s overrides name.

    Rows are looked up, not multiplied, so there is no Gram and rounding to nearest is all there is
    to do. A table that a tied head multiplies with is stored once where both have the same bits,
    groups and symmetry: the head's codes then serve both.
    """
    for embedding in embeddings:
        options = layer_pass.options_for(embedding)
        if options is None:
            continue
        head = next((linear for linear in linears if linear.source is embedding.source), None)
        if head is not None and layer_pass.options_for(head) == options:
            weight: NBitsWeight | None = head.compressed
        else:
            head = weight = None
        if weight is None:
            weight = round_to_nearest(
                embedding.weight(),
                bits=options.bits,
                group_size=options.group_size,
                symmetric=options.symmetric,
                clip_search=options.clip_search,
            )
        embedding.quantize(weight, tied=head)
