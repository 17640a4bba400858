"""Random operands of the fused op, models of a single node, and the error they may make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from eoracc.plugins.functions.overload import local_function
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.plugins.reference import activate, fused_matmul, rms_norm

Array = NDArray[Any]
Float = type[np.float16] | type[np.float32]


_OPERANDS = (
    "B",
    "scales",
    "zero_points",
    "bias",
    "lora_a",
    "lora_b",
    "lora_a_scale",
    "lora_b_scale",
    "norm_weight",
    "residual",
)


def random_weight(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    bits: int,
    group_size: int,
    zero_points: bool,
    scales: type[np.float16 | np.float32] = np.float16,
) -> NBitsWeight:
    """A weight of ``shape`` (out_features, in_features)."""
    out_features, in_features = shape
    groups = -(-in_features // group_size)
    codes = rng.integers(0, 2**bits, (out_features, in_features), np.uint8)
    zeros = rng.integers(0, 2**bits, (out_features, groups), np.uint8) if zero_points else None
    steps = rng.uniform(0.5, 1.5, (out_features, groups)) / 2 ** (bits - 1)
    return NBitsWeight.from_codes(
        codes, steps.astype(scales), zeros, bits=bits, group_size=group_size
    )


def random_factors(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    rank: int,
    dtype: type[np.float16 | np.float32] = np.float16,
) -> LowRank:
    """Factors for a weight of ``shape`` (out_features, in_features)."""
    out_features, in_features = shape
    a: Array = (rng.standard_normal((rank, in_features)) / 4).astype(dtype)
    b: Array = (rng.standard_normal((out_features, rank)) / 4).astype(dtype)
    return LowRank(lora_a=a, lora_b=b)


def random_int8_factors(rng: np.random.Generator, shape: tuple[int, int], *, rank: int) -> LowRank:
    """int8 factors for a weight of ``shape`` (out_features, in_features)."""
    out_features, in_features = shape
    a_scale, b_scale = (
        (rng.uniform(1, 2, size) / 500).astype(np.float32) for size in (rank, out_features)
    )
    return LowRank(
        lora_a=rng.integers(-127, 128, (rank, in_features), np.int8),
        lora_b=rng.integers(-127, 128, (out_features, rank), np.int8),
        lora_a_scale=a_scale,
        lora_b_scale=b_scale,
    )


_ULP = float(np.finfo(np.float32).eps) / 2


def error_bound(
    x: Array,
    weight: NBitsWeight,
    factors: LowRank | None,
    bias: Array | None,
    **fusions: Any,  # noqa: ANN401 - those of fused_matmul
) -> NDArray[np.float64]:
    """How far a float32 computation of the op may be from the exact result, ``[..., N]``.

    A sum of n products, in any order, is off by at most n unit roundoffs of the sum of the
    products' magnitudes; a handful more cover dequantization, the scale and the final additions.
    The mean of squares of a norm is such a sum of K, of which the root halves the relative error.
    """
    norm_weight, length = fusions.get("norm_weight"), weight.in_features + 8
    magnitudes = np.abs(x).astype(np.float64)
    if norm_weight is not None:
        magnitudes = np.abs(rms_norm(x, norm_weight, fusions.get("norm_epsilon", 0.0)))
        length += weight.in_features // 2 + 8
    terms = magnitudes @ np.abs(weight.dequantize()).T.astype(np.float64)
    if factors is not None:
        terms += _low_rank_magnitudes(magnitudes, factors, fusions.get("parts"))
        length += factors.lora_b.shape[1]
        # Widening int8 codes takes a rounding of each factor.
        length += 4 * (factors.lora_a.dtype == np.int8)
    scales = fusions.get("adapter_scales") or [1.0] * len(fusions.get("adapters", ()))
    for adapter, scale in zip(fusions.get("adapters", ()), scales, strict=True):
        # As if each row used all of them.
        terms += _low_rank_magnitudes(magnitudes, adapter, fusions.get("parts"), scale)
        length += adapter.lora_b.shape[1] + 4
    if bias is not None:
        terms += np.abs(bias)
    bound: NDArray[np.float64] = terms * (length * _ULP)
    activation = fusions.get("activation", "")
    if activation:
        linear = {name: fusions[name] for name in fusions if name not in ("activation", "residual")}
        gate, up = np.split(fused_matmul(x, weight, factors, bias, **linear), 2, axis=-1)
        gate_bound, up_bound = np.split(bound, 2, axis=-1)
        gated = np.abs(activate(gate, activation))
        # Neither slope exceeds 1.13; the activation itself takes a few operations on |gate|.
        slope = 1.13 * gate_bound + 16 * _ULP * np.abs(gate)
        bound = slope * (np.abs(up) + up_bound) + gated * up_bound
    if fusions.get("residual") is not None:
        bound = bound + _ULP * np.abs(fused_matmul(x, weight, factors, bias, **fusions))
    return bound


def _low_rank_magnitudes(
    x: NDArray[np.float64],
    factors: LowRank,
    parts: Sequence[int] | None,
    scale: Array | float = 1.0,
) -> NDArray[np.float64]:
    """The sums of a low-rank term's products with all signs positive, ``[..., N]``."""
    parts = parts or (len(factors.lora_b),)
    rank, edges = factors.lora_b.shape[1], np.cumsum([0, *parts])
    down = x @ np.abs(factors.down()).T.astype(np.float64) * scale
    up = np.abs(factors.up()).T.astype(np.float64)
    own = [
        down[..., part * rank : (part + 1) * rank] @ up[:, start:stop]
        for part, (start, stop) in enumerate(pairwise(edges))
    ]
    return np.concatenate(own, axis=-1)


def assert_close(actual: Array, expected: NDArray[np.float64], bound: NDArray[np.float64]) -> None:
    """Within ``bound``, which must itself be far below the signal; float16 results are rounded."""
    assert actual.shape == expected.shape
    if actual.size == 0:
        return
    signal = np.sqrt(np.mean(expected**2))
    if actual.dtype == np.float16:
        bound = bound + np.abs(expected) * float(np.finfo(np.float16).eps)
    assert np.median(bound) < 1e-2 * signal
    excess = np.abs(actual - expected) - bound
    assert excess.max() <= 0, f"off by {np.abs(actual - expected).max():.3g} at signal {signal:.3g}"


def fused_operands(
    weight: NBitsWeight,
    factors: LowRank | None = None,
    bias: Array | None = None,
    *,
    layout: int = 0,
    norm_weight: Array | None = None,
    residual: Array | None = None,
) -> dict[str, Array | None]:
    """The op's inputs behind X, by name and in their order."""
    operands: dict[str, Array | None] = {"bias": bias}
    if layout:
        operands |= weight.tiles() | ({} if factors is None else factors.tiles())
    else:
        operands |= {
            "B": weight.packed,
            "scales": weight.scales,
            "zero_points": weight.zero_points,
        }
        if factors is not None:
            operands |= {
                name: getattr(factors, name)
                for name in ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale")
            }
    operands |= {"norm_weight": norm_weight, "residual": residual}
    return {name: operands.get(name) for name in _OPERANDS}


def one_node_model(
    op_type: str,
    operands: dict[str, Array | None],
    attributes: Mapping[str, Any],
    *,
    dtype: type[np.generic] = np.float32,
    output_dtype: type[np.generic] | None = None,
    graph_inputs: tuple[str, ...] = (),
    with_function: bool = True,
) -> bytes:
    """A model that applies the op to its input ``X``.

    ``graph_inputs`` names the operands that a run may override, so that they are no constants.
    """
    x = ir.Value(name="X", type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))))
    values: list[ir.Value | None] = [x]
    for name, array in operands.items():
        if array is None:
            values.append(None)
            continue
        free = name in graph_inputs
        values.append(
            ir.Value(
                name=name,
                const_value=ir.tensor(array, name=name),
                shape=ir.Shape([None] * array.ndim if free else array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            )
        )
    while values[-1] is None:
        values.pop()
    node = ir.node(op_type, values, attributes, domain="eoracc", name="fused")
    functions = []
    if with_function:
        functions.append(local_function(node))
        node.overload = functions[0].overload
    y = node.outputs[0]
    y.name = "Y"
    y.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(output_dtype or dtype)))
    initializers = [value for value in values[1:] if value is not None]
    graph = ir.Graph(
        [x, *(value for value in initializers if value.name in graph_inputs)],
        [y],
        nodes=[node],
        initializers=initializers,
        opset_imports={"": 24, "eoracc": 1},
        name="one_node",
    )
    model = ir.Model(graph, ir_version=10, functions=functions)
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized


def fused_model(
    weight: NBitsWeight,
    factors: LowRank | None = None,
    bias: Array | None = None,
    *,
    dtype: type[np.generic] = np.float32,
    graph_inputs: tuple[str, ...] = (),
    accuracy_level: int = 0,
    layout: int = 0,
    **fusions: Any,  # noqa: ANN401 - those of fused_matmul
) -> bytes:
    operands = {name: fusions.pop(name) for name in ("norm_weight", "residual") if name in fusions}
    attributes = attributes_of(weight) | {"accuracy_level": accuracy_level, "layout": layout}
    return one_node_model(
        "MatMulNBitsLowRank",
        fused_operands(weight, factors, bias, layout=layout, **operands),
        # None and nothing to say of are the same: ONNX has no type for an empty list.
        attributes | {name: value for name, value in fusions.items() if value},
        dtype=dtype,
        graph_inputs=graph_inputs,
    )


def attributes_of(weight: NBitsWeight) -> dict[str, int]:
    return {
        "K": weight.in_features,
        "N": weight.out_features,
        "bits": weight.bits,
        "block_size": weight.group_size,
    }


def open_session(
    model: bytes | str, library: Path | None, *, threads: int = 1
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
