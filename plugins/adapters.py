"""Adapters as operands of the fused op: the slots of a model, packing, and banks of adapters.

An adapter consists of low-rank factors by linear. A lowered model has a *slot* at each fused node:
graph inputs whose default is an adapter of rank 0 (docs/op.md has their shapes). The model's
metadata list the slots under :data:`SLOTS_KEY`. An array goes into the input
``<slot>.<operand>``, ``operand`` out of :data:`~eoracc.plugins.op.ADAPTER_OPERANDS`, and the one
input :data:`~eoracc.plugins.op.ADAPTER_INDEX` picks each row's adapter out of the bank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eoracc.documents import Reader
from eoracc.errors import PluginError
from eoracc.plugins.op import ADAPTER_OPERANDS
from eoracc.plugins.operands.codes import CHUNK, TILE, VECTOR, untile_integers, untile_rows
from eoracc.plugins.operands.low_rank import LowRank, merge_factors, split_rows
from eoracc.printable import printable

__all__ = [
    "SLOTS_KEY",
    "AdapterSlot",
    "AdapterSlots",
    "pack_adapter",
    "stack_adapters",
    "unpack_adapter",
]

_READER = Reader(PluginError, "build the artifact again")
_Array = NDArray[np.generic]

SLOTS_KEY = "eoracc.adapters"
"""Key of the slots in a model's metadata; :meth:`AdapterSlots.to_json` is the value."""

_TYPES = {"int8": ("int8", "int4"), "float16": ("float16",)}
"""Factor types that slots accept, by the type of the slots."""


@dataclass(frozen=True)
class AdapterSlot:
    """The place for an adapter at one fused node.

    Attributes:
      name: name of the node.
      linears: names of its linears in the checkpoint, in the order of their rows.
      parts: rows of each part of the node: one part per linear, or several of a single linear.
      in_features: ``K``.
      out_features: ``N``, the sum of the parts.
    """

    name: str
    linears: tuple[str, ...]
    parts: tuple[int, ...]
    in_features: int
    out_features: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of each linear."""
        rows = self.parts if len(self.linears) > 1 else (self.out_features,)
        return {
            name: (size, self.in_features) for name, size in zip(self.linears, rows, strict=True)
        }

    def input(self, operand: str) -> str:
        """Name of the graph input that takes ``operand``."""
        return f"{self.name}.{operand}"


@dataclass(frozen=True)
class AdapterSlots:
    """All slots of a model.

    Attributes:
      type: ``int8``, whose slots take int8 and int4 factors, or ``float16``.
      slots: in the order of the graph.
    """

    type: str
    slots: tuple[AdapterSlot, ...]

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of every linear that an adapter may have factors for."""
        return {name: shape for slot in self.slots for name, shape in slot.shapes.items()}

    @property
    def operands(self) -> tuple[str, ...]:
        """Operands of a slot of this type."""
        return ADAPTER_OPERANDS if self.type == "int8" else ADAPTER_OPERANDS[:3]

    @property
    def factor_types(self) -> tuple[str, ...]:
        """Types of factors that a slot accepts."""
        return _TYPES[self.type]

    def to_json(self) -> str:
        """The slots as JSON, for the model's metadata."""
        slots = [
            {
                "name": slot.name,
                "linears": list(slot.linears),
                "parts": list(slot.parts),
                "K": slot.in_features,
                "N": slot.out_features,
            }
            for slot in self.slots
        ]
        return json.dumps({"type": self.type, "slots": slots})

    @classmethod
    def from_json(cls, text: str) -> AdapterSlots:
        """Inverse of :meth:`to_json`.

        Raises:
          PluginError: ``text`` is not the JSON of any slots.
        """
        place = f"metadata {SLOTS_KEY!r} of the model"
        content = _READER.as_object(_READER.parse(text, place), place)
        with _READER.refusing_form(place, "are damaged"):
            slots = cls(str(content["type"]), tuple(map(_slot_from, content["slots"])))
        if slots.type not in _TYPES:
            raise PluginError(
                f"metadata {SLOTS_KEY!r} name an unknown type '{printable(slots.type)}'"
            )
        return slots


def _slot_from(content: Mapping[str, Any]) -> AdapterSlot:
    slot = AdapterSlot(
        name=str(content["name"]),
        linears=tuple(map(str, content["linears"])),
        parts=tuple(map(int, content["parts"])),
        in_features=int(content["K"]),
        out_features=int(content["N"]),
    )
    if sum(slot.parts) != slot.out_features or len(slot.linears) not in (1, len(slot.parts)):
        raise ValueError(slot.name)
    return slot


# --- one adapter ----------------------------------------------------------------------------------


def pack_adapter(slots: AdapterSlots, factors: Mapping[str, LowRank]) -> dict[str, _Array]:
    """Pack an adapter's factors into arrays for the model's inputs, a bank of one.

    Linears of one slot are padded to the largest rank among them, and that to a multiple of 16.

    Args:
      slots: those of the model.
      factors: by linear. A linear without an entry, or of rank 0, gets no factors.

    Returns:
      Arrays by graph input, with ``A = 1``. A slot without any factors is left out: the model's
      default applies.

    Raises:
      PluginError: the factors do not fit the slots (an unknown linear, another shape or type) or
        are not finite.
    """
    for name, low_rank in factors.items():
        _check_factors(slots, name, low_rank)
    packed: dict[str, _Array] = {}
    for slot in slots.slots:
        own = [_or_none(factors.get(name)) for name in slot.linears]
        if any(own):
            packed |= _pack_slot(slot, own)
    return packed


def _check_factors(slots: AdapterSlots, name: str, factors: LowRank) -> None:
    shape = slots.linears.get(name)
    if shape is None:
        raise PluginError(f"linear '{name}': the model has no slot for an adapter of it")
    rows, columns = shape
    held = (*factors.lora_b.shape, *factors.lora_a.shape)
    if held != (rows, factors.rank, factors.rank, columns):
        raise PluginError(
            f"linear '{name}': factors {list(factors.lora_b.shape)} and "
            f"{list(factors.lora_a.shape)} do not fit its [{rows}, {columns}] weight"
        )
    if (
        factors.factor_type not in slots.factor_types
        or factors.lora_a.dtype != factors.lora_b.dtype
    ):
        raise PluginError(
            f"linear '{name}': has {factors.factor_type} factors, "
            f"the model takes {' or '.join(slots.factor_types)}"
        )
    arrays = (factors.lora_a, factors.lora_b, factors.lora_a_scale, factors.lora_b_scale)
    if not all(np.isfinite(array).all() for array in arrays if array is not None):
        raise PluginError(f"linear '{name}': its factors hold NaN or Inf")


def _or_none(factors: LowRank | None) -> LowRank | None:
    return factors if factors is not None and factors.rank else None


def _pack_slot(slot: AdapterSlot, factors: Sequence[LowRank | None]) -> dict[str, _Array]:
    if len(slot.linears) == 1 and len(slot.parts) > 1:
        factors = split_rows(factors[0], slot.parts)  # type: ignore[arg-type]
    ranks = [0 if own is None else own.rank for own in factors]
    rank = -(-max(ranks) // TILE) * TILE
    merged = merge_factors(factors, slot.parts, in_features=slot.in_features, rank=rank)
    tiled = merged.tiles()
    if "lora_a_scale" not in tiled:
        used = np.arange(rank) < np.array(ranks)[:, None]
        tiled["lora_a_scale"] = used.astype(np.float32).reshape(-1)
    return {
        slot.input(name.replace("lora", "adapter")): array[None] for name, array in tiled.items()
    }


def unpack_adapter(slots: AdapterSlots, arrays: Mapping[str, _Array]) -> dict[str, LowRank]:
    """Inverse of :func:`pack_adapter`.

    Trailing ranks whose scale is 0 count as padding and are left out.

    Args:
      slots: those of the model.
      arrays: by graph input, a bank of one.

    Returns:
      Factors by linear, for those that have any.

    Raises:
      PluginError: the arrays do not fit the model's slots.
    """
    factors: dict[str, LowRank] = {}
    for slot, bank in _banks(slots, arrays):
        if bank.size != 1:
            raise PluginError(f"slot '{slot.name}': holds {bank.size} adapters, not one")
        factors |= _unpack_slot(slot, bank)
    return factors


def _unpack_slot(slot: AdapterSlot, bank: _Bank) -> dict[str, LowRank]:
    parts, rank = len(slot.parts), bank.rank
    scale = bank.a_scale[0].reshape(parts, rank)
    a: NDArray[Any]
    b: NDArray[Any]
    if bank.b_scale is None:
        a = untile_rows(bank.a[0], parts * rank)
        b = untile_rows(bank.b[0], slot.out_features)
    else:
        columns = slot.in_features
        a = untile_integers(bank.a[0], bits=bank.bits, rows=parts * rank, columns=columns)
        b = untile_integers(bank.b[0], bits=bank.bits, rows=slot.out_features, columns=rank)
    a = a.reshape(parts, rank, slot.in_features)
    shared = len(slot.linears) == 1
    edges = np.cumsum([0, *([slot.out_features] if shared else slot.parts)])
    factors: dict[str, LowRank] = {}
    for part, name in enumerate(slot.linears):
        rows = slice(edges[part], edges[part + 1])
        own = int(np.flatnonzero(scale[part]).max(initial=-1)) + 1
        if own == 0:
            continue
        if bank.b_scale is None:
            weights = scale[part, :own]
            factors[name] = LowRank(
                lora_a=a[part, :own],
                lora_b=b[rows, :own],
                lora_a_scale=None if (weights == 1).all() else weights,
            )
        else:
            factors[name] = LowRank(
                lora_a=a[part, :own],
                lora_b=b[rows, :own],
                lora_a_scale=scale[part, :own],
                lora_b_scale=bank.b_scale[0, rows],
                bits=bank.bits,
            )
    return factors


# --- a bank of adapters ---------------------------------------------------------------------------


def stack_adapters(
    slots: AdapterSlots, adapters: Sequence[Mapping[str, _Array]]
) -> dict[str, _Array]:
    """Stack adapters into one bank, in their order.

    Ranks are padded to the largest of the slot. Where codes of 4 and 8 bits meet in a slot, all get
    8 bits.

    Args:
      slots: those of the model.
      adapters: results of :func:`pack_adapter`, or banks of this function. An empty sequence makes
      a
        bank of one adapter of rank 0.

    Returns:
      Arrays of every input of every slot, of rank 0 where no adapter has factors.

    Raises:
      PluginError: some arrays do not fit the model's slots.
    """
    filled = [dict(_banks(slots, arrays)) for arrays in adapters]
    # A bank that leaves a slot out has as many adapters there as at its other slots.
    sizes = [max((bank.size for bank in banks.values()), default=1) for banks in filled]
    stacked: dict[str, _Array] = {}
    for slot in slots.slots:
        banks = [
            banks.get(slot) or _empty_bank(slots, slot, size)
            for banks, size in zip(filled, sizes, strict=True)
        ]
        whole = _stack(slot, banks or [_empty_bank(slots, slot, 1)])
        arrays = (whole.a, whole.b, whole.a_scale, whole.b_scale)
        for operand, array in zip(slots.operands, arrays, strict=False):
            assert array is not None  # noqa: S101 - slots of integers have all four
            stacked[slot.input(operand)] = array
    return stacked


@dataclass(frozen=True, eq=False)
class _Bank:
    """The operands of one slot; docs/op.md has their shapes.

    Attributes:
      a, b, a_scale: as the op takes them.
      b_scale: scales of integer factors; None for float ones.
      rank: ``R``.
      bits: code width of integer factors.
    """

    a: NDArray[Any]
    b: NDArray[Any]
    a_scale: NDArray[np.float32]
    b_scale: NDArray[np.float32] | None
    rank: int
    bits: int

    @classmethod
    def of(cls, operands: Mapping[str, NDArray[Any]], *, rank: int, bits: int) -> _Bank:
        """The bank of checked arrays by operand."""
        return cls(
            a=operands["adapter_a"],
            b=operands["adapter_b"],
            a_scale=operands["adapter_a_scale"],
            b_scale=operands.get("adapter_b_scale"),
            rank=rank,
            bits=bits,
        )

    @property
    def size(self) -> int:
        """``A``."""
        return len(self.a)


def _banks(
    slots: AdapterSlots, arrays: Mapping[str, _Array]
) -> Iterator[tuple[AdapterSlot, _Bank]]:
    """The slots that ``arrays`` fill, each with its checked bank."""
    left = set(arrays)
    for slot in slots.slots:
        names = {operand: slot.input(operand) for operand in slots.operands}
        present = left & set(names.values())
        if not present:
            continue
        left -= present
        if missing := [name for name in names.values() if name not in present]:
            raise PluginError(f"slot '{slot.name}': its operand '{missing[0]}' is missing")
        yield slot, _bank(slots, slot, {key: arrays[name] for key, name in names.items()})
    if left:
        raise PluginError(f"operand '{min(left)}': the model has no slot that takes it")


def _bank(slots: AdapterSlots, slot: AdapterSlot, given: Mapping[str, _Array]) -> _Bank:
    a, parts = given["adapter_a"], len(slot.parts)
    if a.ndim != 4 or not len(a) or a.shape[1] % parts:
        raise PluginError(
            f"slot '{slot.name}': its operand 'adapter_a' has shape {list(a.shape)}, which is no "
            f"bank of adapters of {parts} parts"
        )
    rank = TILE * a.shape[1] // parts
    bits = _code_bits(a, slot.in_features)
    shapes = _bank_shapes(slots, slot, len(a), rank, bits)
    for operand, (shape, dtype) in shapes.items():
        array = given[operand]
        if array.shape != shape or array.dtype != dtype:
            raise PluginError(
                f"slot '{slot.name}': its operand '{operand}' is {array.dtype} "
                f"{list(array.shape)}, not {np.dtype(dtype)} {list(shape)}"
            )
        if array.dtype != np.uint8 and not np.isfinite(array).all():
            raise PluginError(f"slot '{slot.name}': its operand '{operand}' holds NaN or Inf")
    return _Bank.of(given, rank=rank, bits=bits)


def _bank_shapes(
    slots: AdapterSlots, slot: AdapterSlot, size: int, rank: int, bits: int
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shape and type of every operand of a bank."""
    parts, tiles = len(slot.parts), -(-slot.out_features // TILE)
    a_tiles = parts * rank // TILE
    if slots.type == "float16":
        return {
            "adapter_a": ((size, a_tiles, slot.in_features, TILE), np.float16),
            "adapter_b": ((size, tiles, rank, TILE), np.float16),
            "adapter_a_scale": ((size, parts * rank), np.float32),
        }
    chunk = CHUNK[bits]
    return {
        "adapter_a": ((size, a_tiles, -(-slot.in_features // chunk), VECTOR), np.uint8),
        "adapter_b": ((size, tiles, rank // chunk, VECTOR), np.uint8),
        "adapter_a_scale": ((size, parts * rank), np.float32),
        "adapter_b_scale": ((size, tiles * TILE), np.float32),
    }


def _code_bits(a: _Array, in_features: int) -> int:
    """8 or 4, by the chunks of ``adapter_a``; 8 where both have as many."""
    chunks = a.shape[2]
    return 4 if chunks == -(-in_features // CHUNK[4]) != -(-in_features // CHUNK[8]) else 8


def _empty_bank(slots: AdapterSlots, slot: AdapterSlot, size: int) -> _Bank:
    """Adapters of rank 0; with 4 bits, so that no other bank is widened for them."""
    shapes = _bank_shapes(slots, slot, size, 0, 4)
    arrays = {operand: np.zeros(shape, dtype) for operand, (shape, dtype) in shapes.items()}
    return _Bank.of(arrays, rank=0, bits=4)


def _stack(slot: AdapterSlot, banks: Sequence[_Bank]) -> _Bank:
    rank = max(bank.rank for bank in banks)
    bits = max(bank.bits for bank in banks) if rank else 8
    fitted = [_fit(slot, bank, rank, bits) for bank in banks]
    b_scales = [bank.b_scale for bank in fitted if bank.b_scale is not None]
    return _Bank(
        a=np.concatenate([bank.a for bank in fitted]),
        b=np.concatenate([bank.b for bank in fitted]),
        a_scale=np.concatenate([bank.a_scale for bank in fitted]),
        b_scale=np.concatenate(b_scales) if b_scales else None,
        rank=rank,
        bits=bits,
    )


def _fit(slot: AdapterSlot, bank: _Bank, rank: int, bits: int) -> _Bank:
    """``bank`` with codes of ``bits`` and padded to ``rank``."""
    a, b, zero = bank.a, bank.b, 0
    if bank.b_scale is not None:
        if bits > bank.bits:
            a = _widen(a, -(-slot.in_features // CHUNK[8]))
            b = _widen(b, bank.rank // CHUNK[8])
        zero = 128 if bits == 8 else 136  # at 4 bits: 8 in both halves of the byte
    parts = len(slot.parts)
    a = a.reshape(bank.size, parts, bank.rank // TILE, *a.shape[2:])
    a = _padded(a, 2, rank // TILE, zero)
    per_chunk = 1 if bank.b_scale is None else CHUNK[bits]
    scale = bank.a_scale.reshape(bank.size, parts, bank.rank)
    return _Bank(
        a=a.reshape(bank.size, parts * rank // TILE, *a.shape[3:]),
        b=_padded(b, 2, rank // per_chunk, zero),
        a_scale=_padded(scale, 2, rank, 0).reshape(bank.size, parts * rank),
        b_scale=bank.b_scale,
        rank=rank,
        bits=bits,
    )


def _widen(tiles: NDArray[np.uint8], chunks: int) -> NDArray[np.uint8]:
    """4-bit tiles ``[A, tiles, n, 64]`` as 8-bit ones ``[A, tiles, chunks, 64]``."""
    size, count, pairs, width = tiles.shape
    halves = np.stack([tiles & np.uint8(15), tiles >> np.uint8(4)], axis=3)
    # The code of the value 0 becomes 128 from 8.
    return halves.reshape(size, count, 2 * pairs, width)[:, :, :chunks] + np.uint8(120)


def _padded(array: NDArray[Any], axis: int, length: int, value: int) -> NDArray[Any]:
    """``array`` padded with ``value`` to ``length`` at the end of ``axis``."""
    shape = list(array.shape)
    shape[axis] = length - shape[axis]
    return np.concatenate([array, np.full(shape, value, array.dtype)], axis=axis)
