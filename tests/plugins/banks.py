"""Random adapters of one slot, and what the op gives and may be off by with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.adapters import AdapterSlot, AdapterSlots
from eoracc.plugins.operands.codes import LARGEST
from eoracc.plugins.operands.low_rank import LowRank, merge_factors
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.plugins.reference import fused_matmul
from tests.plugins.fused_op import error_bound, random_factors

__all__ = ["adapter_bound", "merged_bank", "random_adapter", "random_typed_factors", "slots_of"]

SLOT = "model.layers.0.proj"


def slots_of(
    slot_type: str, parts: Sequence[int], in_features: int, *, shared: bool = False
) -> AdapterSlots:
    """One slot; ``shared``: of one linear, although its node has several parts."""
    linears = (SLOT,) if shared else tuple(f"{SLOT}{part}" for part in range(len(parts)))
    slot = AdapterSlot(SLOT, linears, tuple(parts), in_features, sum(parts))
    return AdapterSlots(slot_type, (slot,))


def random_typed_factors(
    rng: np.random.Generator, shape: tuple[int, int], *, rank: int, factor_type: str
) -> LowRank:
    """Factors for a weight of ``shape`` (out_features, in_features)."""
    if factor_type in ("float16", "float32"):
        return random_factors(rng, shape, rank=rank, dtype=np.dtype(factor_type).type)
    bits = int(factor_type.removeprefix("int"))
    largest = LARGEST[bits]
    a_scale, b_scale = (
        (rng.uniform(1, 2, size) / (4 * largest)).astype(np.float32) for size in (rank, shape[0])
    )
    return LowRank(
        lora_a=rng.integers(-largest, largest + 1, (rank, shape[1]), np.int8),
        lora_b=rng.integers(-largest, largest + 1, (shape[0], rank), np.int8),
        lora_a_scale=a_scale,
        lora_b_scale=b_scale,
        bits=bits,
    )


def random_adapter(
    rng: np.random.Generator, slots: AdapterSlots, *, ranks: Sequence[int], factor_type: str
) -> dict[str, LowRank]:
    """Factors of ``ranks``, taken in turn, by linear; a linear of rank 0 has none."""
    return {
        name: random_typed_factors(rng, shape, rank=rank, factor_type=factor_type)
        for (name, shape), rank in zip(slots.linears.items(), ranks, strict=False)
        if rank
    }


def merged_bank(
    slots: AdapterSlots, adapters: Sequence[Mapping[str, LowRank]], *, rank: int
) -> list[LowRank]:
    """Adapters of the only slot as the oracle takes them, without a way through tiles."""
    (slot,) = slots.slots
    bank = []
    for factors in adapters:
        own = [factors.get(name) for name in slot.linears]
        widths = slot.parts if len(slot.linears) > 1 else (slot.out_features,)
        merged = merge_factors(own, widths, in_features=slot.in_features, rank=rank)
        if len(slot.parts) > len(slot.linears):
            copies = len(slot.parts)
            scale = merged.lora_a_scale
            merged = LowRank(
                lora_a=np.concatenate([merged.lora_a] * copies),
                lora_b=merged.lora_b,
                lora_a_scale=None if scale is None else np.concatenate([scale] * copies),
                lora_b_scale=merged.lora_b_scale,
                bits=merged.bits,
            )
        bank.append(merged)
    return bank


def adapter_bound(
    x: NDArray[Any],
    weight: NBitsWeight,
    factors: LowRank | None,
    bias: NDArray[Any] | None,
    *,
    adapters: Sequence[LowRank],
    adapter_index: Sequence[int],
    **fusions: Any,  # noqa: ANN401 - those of fused_matmul
) -> NDArray[np.float64]:
    """How far a float32 computation may be from the exact result, ``[..., N]``.

    A row's adapter counts as more ranks of the baked factors: that is what it is.
    """
    parts = fusions.get("parts") or (weight.out_features,)
    batch = x.shape[:1] if x.ndim == 2 else x.shape[:-2]
    index = np.broadcast_to(np.asarray(adapter_index), batch)
    residual = fusions.pop("residual", None)
    bound = np.zeros(fused_matmul(x, weight, None, bias, **fusions).shape)
    for place in np.ndindex(batch):
        chosen = int(index[place])
        used = [factors, adapters[chosen]] if chosen >= 0 else [factors]
        whole = _joined([own for own in used if own is not None], len(parts))
        own = {} if residual is None else {"residual": residual[place]}
        bound[place] = error_bound(x[place], weight, whole, bias, **fusions, **own)
    # Each integer factor's scale and the sum of two low-rank terms: a few roundings more.
    return bound * (1 + 8 / weight.in_features)


def _joined(factors: Sequence[LowRank], parts: int) -> LowRank | None:
    """Factors side by side, in float32."""
    if not factors:
        return None
    columns = factors[0].lora_a.shape[1]
    downs = [own.down().reshape(parts, -1, columns) for own in factors]
    down = np.concatenate(downs, axis=1).reshape(-1, columns)
    return LowRank(lora_a=down, lora_b=np.concatenate([own.up() for own in factors], axis=1))
