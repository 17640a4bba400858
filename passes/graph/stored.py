"""Weights and low-rank factors as operands of a node, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.errors import ModelError
from eoracc.plugins.op import DENSE_OP, FACTORS, DenseInput, Input
from eoracc.plugins.operands.dense import DenseWeight
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "DENSE_WEIGHT",
    "constant_operand",
    "dense_weight",
    "factor_arrays",
    "stored_factors",
    "stored_weight",
]

DENSE_WEIGHT = "dense_weight"
"""Last part of the name of an initializer that holds a compressed weight of floats, ``[K, N]``."""

_DENSE_FACTORS = tuple(DenseInput)[DenseInput.lora_a :]

_INT4 = ir.DataType.INT4.numpy()
"""NumPy type of the values of an int4 factor in the graph."""


def stored_weight(node: ir.Node) -> NBitsWeight:
    """The weight of an eoracc op of plain layout, a linear or a table, from its operands.

    Raises:
      ModelError: an operand is not an initializer.
    """
    packed, scales, zero_points = (
        _array(node, place) for place in (Input.B, Input.scales, Input.zero_points)
    )
    if packed is None or scales is None:
        raise ModelError(f"node {node.name}: its weight is not an initializer, so it is no linear")
    return NBitsWeight(
        packed=packed,  # type: ignore[arg-type]
        scales=scales,  # type: ignore[arg-type]
        zero_points=zero_points,  # type: ignore[arg-type]
        bits=node.attributes["bits"].as_int(),
        group_size=node.attributes["block_size"].as_int(),
        in_features=node.attributes["K"].as_int(),
    )


def dense_weight(node: ir.Node) -> DenseWeight | None:
    """The weight of a product with floats that compression has put in place; None for others."""
    value = node.inputs[DenseInput.weight]
    if value is None or not str(value.name).endswith(f".{DENSE_WEIGHT}"):
        return None
    array = _array(node, DenseInput.weight)
    return None if array is None else DenseWeight(array.T)  # type: ignore[arg-type]


def stored_factors(node: ir.Node) -> LowRank | None:
    """The low-rank factors of an eoracc linear of plain layout; None if it has none."""
    places = _DENSE_FACTORS if node.op_type == DENSE_OP else FACTORS
    lora_a, lora_b, lora_a_scale, lora_b_scale = (_array(node, place) for place in places)
    if lora_a is None or lora_b is None:
        return None
    bits = 4 if lora_a.dtype == _INT4 else 8
    if bits == 4:
        lora_a, lora_b = lora_a.astype(np.int8), lora_b.astype(np.int8)
    return LowRank(
        lora_a=lora_a,  # type: ignore[arg-type]
        lora_b=lora_b,  # type: ignore[arg-type]
        lora_a_scale=lora_a_scale,  # type: ignore[arg-type]
        lora_b_scale=lora_b_scale,  # type: ignore[arg-type]
        bits=bits,
    )


def factor_arrays(factors: LowRank) -> dict[str, NDArray[np.generic]]:
    """The operands that hold ``factors``, in plain layout, by the op's name of the input."""
    parts: dict[str, NDArray[np.generic] | None] = {
        "lora_a": factors.lora_a,
        "lora_b": factors.lora_b,
        "lora_a_scale": factors.lora_a_scale,
        "lora_b_scale": factors.lora_b_scale,
    }
    arrays = {part: array for part, array in parts.items() if array is not None}
    if factors.bits == 4:
        arrays |= {part: arrays[part].astype(_INT4) for part in ("lora_a", "lora_b")}
    return arrays


def constant_operand(node: ir.Node, place: int) -> ir.TensorProtocol | None:
    """The constant that ``node`` reads at ``place``; None where it reads nothing or no constant."""
    value = node.inputs[place] if place < len(node.inputs) else None
    return None if value is None else value.const_value


def _array(node: ir.Node, place: int) -> NDArray[np.generic] | None:
    tensor = constant_operand(node, place)
    return None if tensor is None else tensor.numpy()
