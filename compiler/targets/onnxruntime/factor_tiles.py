"""The low-rank factors of linears that share a node, as operands in tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from eoracc.passes.graph.stored import constant_operand, stored_factors
from eoracc.plugins.op import Input
from eoracc.plugins.operands.codes import CHUNK, TILE, VECTOR
from eoracc.plugins.operands.low_rank import merge_factors, merged_bits, ranked_tiles, split_rows

__all__ = ["INTEGERS", "TiledOperand", "factor_operands", "own_ranks"]

INTEGERS = (ir.DataType.INT8, ir.DataType.INT4)
"""Types of integer factors in the plain layout."""

_Tiles = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False, kw_only=True)
class TiledOperand:
    """An operand whose shape is known before it is computed.

    Attributes:
      shape: of the array.
      dtype: of its elements.
      make: computes it, on each call.
    """

    shape: tuple[int, ...]
    dtype: ir.DataType
    make: Callable[[], NDArray[Any]]


def own_ranks(nodes: Sequence[ir.Node]) -> list[int]:
    """The attribute ``ranks`` of a node that merges ``nodes``: the rank of each of its parts.

    Empty, for no such attribute, for a single linear and where one rank of whole tiles serves all.
    """
    ranks = [_rank(node) for node in nodes]
    if len(nodes) == 1 or (len(set(ranks)) == 1 and ranks[0] % TILE == 0):
        return []
    return ranks


def factor_operands(nodes: Sequence[ir.Node]) -> dict[Input, TiledOperand]:
    """The factors of ``nodes``, plain linears of one input; empty if no rank is above 0.

    The factors are read now: a node may lose its operands before they are written.
    """
    if not any(_rank(node) for node in nodes):
        return {}
    ranks = own_ranks(nodes)
    return _ranked(nodes, ranks) if ranks else _merged(nodes)


def _merged(nodes: Sequence[ir.Node]) -> dict[Input, TiledOperand]:
    """Factors of one rank."""
    rank = _rank(nodes[0])
    # Each part has its own down-projection; parts packed before compression share one.
    parts = [node.attributes["N"].as_int() for node in nodes]
    if len(nodes) == 1:
        parts = list(nodes[0].attributes.get_ints("parts", parts))
    if len(parts) > 1:
        rank = -(-rank // TILE) * TILE  # so that no tile of A serves two parts
    columns = nodes[0].attributes["K"].as_int()
    factors = [stored_factors(node) for node in nodes]
    if len(nodes) == 1 and factors[0] is not None:
        factors = [*split_rows(factors[0], parts)]
    bits = merged_bits(factors, columns)

    def make() -> _Tiles:
        return merge_factors(factors, parts, in_features=columns, rank=rank).tiles()

    down, up = -(-len(parts) * rank // TILE), -(-sum(parts) // TILE)
    return _operands(
        nodes,
        make,
        {
            Input.lora_a: (down, *_columns(nodes, Input.lora_a, columns, bits)),
            Input.lora_b: (up, *_columns(nodes, Input.lora_b, rank, bits)),
            Input.lora_a_scale: (down * TILE,),
            Input.lora_b_scale: (up * TILE,),
        },
    )


def _ranked(nodes: Sequence[ir.Node], ranks: Sequence[int]) -> dict[Input, TiledOperand]:
    """Factors of which each linear has its own rank."""
    columns = nodes[0].attributes["K"].as_int()
    factors = [stored_factors(node) for node in nodes]
    bits = merged_bits(factors, columns)

    def make() -> _Tiles:
        return ranked_tiles(factors, in_features=columns)

    down = sum(-(-rank // TILE) for rank in ranks)
    up = vectors = lanes = 0
    for node, rank in zip(nodes, ranks, strict=True):
        if rank:
            tiles = node.attributes["N"].as_int() // TILE
            chunks, lanes = _columns(nodes, Input.lora_b, rank, bits)
            up += tiles
            vectors += tiles * chunks
    return _operands(
        nodes,
        make,
        {
            Input.lora_a: (down, *_columns(nodes, Input.lora_a, columns, bits)),
            Input.lora_b: (vectors, lanes),
            Input.lora_a_scale: (down * TILE,),
            Input.lora_b_scale: (up * TILE,),
        },
    )


def _operands(
    nodes: Sequence[ir.Node], make: Callable[[], _Tiles], shapes: Mapping[Input, tuple[int, ...]]
) -> dict[Input, TiledOperand]:
    """Those of the operands that the linears have."""
    found = {}
    for place, shape in shapes.items():
        dtype = _dtype(nodes, place)
        if dtype is not None:
            stored = ir.DataType.UINT8 if dtype in INTEGERS else dtype
            found[place] = TiledOperand(shape=shape, dtype=stored, make=_one(make, place.name))
    return found


def _one(make: Callable[[], _Tiles], name: str) -> Callable[[], NDArray[Any]]:
    return lambda: make()[name]


def _columns(nodes: Sequence[ir.Node], place: Input, columns: int, bits: int) -> tuple[int, int]:
    """The last two dimensions of a factor's tiles."""
    if _dtype(nodes, place) in INTEGERS:
        return -(-columns // CHUNK[bits]), VECTOR
    return columns, TILE


def _dtype(nodes: Sequence[ir.Node], place: Input) -> ir.DataType | None:
    """The type of the operand in the first of ``nodes`` that has it."""
    arrays = (constant_operand(node, place) for node in nodes)
    return next((tensor.dtype for tensor in arrays if tensor is not None), None)


def _rank(node: ir.Node) -> int:
    lora_a = constant_operand(node, Input.lora_a)
    return 0 if lora_a is None else lora_a.shape.numpy()[0]
