"""Adapters as inputs of the op: its function in stock ONNX Runtime, and the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from eoracc.errors import PluginError
from eoracc.plugins.adapters import AdapterSlots, pack_adapter, stack_adapters
from eoracc.plugins.functions.overload import local_function
from eoracc.plugins.op import ADAPTER_INDEX, ADAPTER_OPERANDS, INPUTS
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.plugins.reference import fused_matmul
from tests.plugins.banks import (
    adapter_bound,
    merged_bank,
    random_adapter,
    random_typed_factors,
    slots_of,
)
from tests.plugins.fused_op import (
    assert_close,
    attributes_of,
    error_bound,
    fused_model,
    fused_operands,
    one_node_model,
    open_session,
    random_weight,
)

COLUMNS = 90
RANK = 32


def _by_operand(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.rpartition(".")[2]: array for name, array in arrays.items()}


def _model(
    slots: AdapterSlots,
    weight: NBitsWeight,
    factors: LowRank | None,
    bias: NDArray[Any] | None,
    *,
    dtype: type[np.generic] = np.float32,
    **fusions: Any,  # noqa: ANN401 - those of fused_matmul
) -> bytes:
    """A model whose inputs take adapters, and default to none."""
    fused = {name: fusions.pop(name) for name in ("norm_weight", "residual") if name in fusions}
    operands = fused_operands(weight, factors, bias, layout=1, **fused)
    operands |= _by_operand(stack_adapters(slots, []))
    operands[ADAPTER_INDEX] = np.zeros(1, np.int32)
    return one_node_model(
        "MatMulNBitsLowRank",
        {name: operands.get(name) for name in INPUTS["MatMulNBitsLowRank"][1:]},
        attributes_of(weight) | {"layout": 1} | fusions,
        dtype=dtype,
        graph_inputs=(*ADAPTER_OPERANDS, ADAPTER_INDEX),
    )


FUSIONS: Sequence[dict[str, Any]] = [
    {},
    {"bias": True, "residual": True, "norm": True},
    {"parts": (48, 16, 32), "norm": True, "bias": True},
    {"parts": (48, 48), "activation": "silu", "norm": True, "residual": True},
]
TYPES = {"int8": "int8", "int4": "int8", "float16": "float16"}


@pytest.mark.parametrize("baked", [None, "int4", "float16"])
@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: "-".join(fusion) or "none")
@pytest.mark.parametrize("factor_type", TYPES)
def test_each_row_uses_its_own(
    library: Path | None, factor_type: str, fusion: dict[str, Any], baked: str | None
) -> None:
    rng = np.random.default_rng(0)
    parts: tuple[int, ...] = fusion.get("parts", (37,))
    rows = sum(parts)
    slots = slots_of(TYPES[factor_type], parts, COLUMNS)
    ranks = [(17, 32, 5), (16, 0, 16), (3, 1, 0)]
    adapters = [random_adapter(rng, slots, ranks=own, factor_type=factor_type) for own in ranks]
    bank = _by_operand(
        stack_adapters(slots, [pack_adapter(slots, adapter) for adapter in adapters])
    )
    weight = random_weight(rng, (rows, COLUMNS), bits=3, group_size=24, zero_points=True)
    factors = None
    if baked is not None:
        shape = (rows, COLUMNS)
        whole = random_typed_factors(rng, shape, rank=16 * len(parts), factor_type=baked)
        factors = LowRank(
            lora_a=whole.lora_a,
            lora_b=whole.lora_b[:, :16],
            lora_a_scale=whole.lora_a_scale,
            lora_b_scale=whole.lora_b_scale,
            bits=whole.bits,
        )
    outputs = rows // 2 if "activation" in fusion else rows
    bias = rng.standard_normal(rows).astype(np.float32) if "bias" in fusion else None
    named: dict[str, Any] = {
        name: fusion[name] for name in ("parts", "activation") if name in fusion
    }
    if "norm" in fusion:
        named["norm_weight"] = rng.uniform(0.5, 2, COLUMNS).astype(np.float32)
        named["norm_epsilon"] = 1e-5
    residuals = rng.standard_normal((4, 3, outputs)).astype(np.float32)
    expected_bank = {"adapters": merged_bank(slots, adapters, rank=RANK)}
    for leading, index in (
        ((4, 3), [2, -1, 0, 1]),
        ((4, 3), [1]),
        ((4,), [0, 2, -5, 1]),
        ((3,), [0]),
        ((4, 1), [2, 2, 1, 2]),
    ):
        own: dict[str, Any] = dict(named)
        if "residual" in fusion:
            own["residual"] = residuals.reshape(-1, outputs)[: np.prod(leading)].reshape(
                *leading, outputs
            )
        session = open_session(_model(slots, weight, factors, bias, **own), library)
        x = rng.standard_normal((*leading, COLUMNS), np.float32)
        feeds = {"X": x, ADAPTER_INDEX: np.array(index, np.int32), **bank}
        (actual,) = session.run(None, feeds)
        given = {**own, **expected_bank, "adapter_index": index}
        expected = fused_matmul(x, weight, factors, bias, **given)
        assert_close(actual, expected, adapter_bound(x, weight, factors, bias, **given))


@pytest.mark.parametrize("slot_type", ["int8", "float16"])
def test_none_by_default(library: Path | None, slot_type: str) -> None:
    """Bit for bit what a model without slots gives."""
    rng = np.random.default_rng(1)
    slots = slots_of(slot_type, (16, 32), COLUMNS)
    weight = random_weight(rng, (48, COLUMNS), bits=4, group_size=32, zero_points=False)
    model = _model(slots, weight, None, None, parts=(16, 32))
    bare = fused_model(weight, None, layout=1, parts=(16, 32))
    for leading in ((1,), (2, 9), (0,), (0, 3)):
        x = rng.standard_normal((*leading, COLUMNS), np.float32)
        (actual,) = open_session(model, library).run(None, {"X": x})
        (expected,) = open_session(bare, library).run(None, {"X": x})
        np.testing.assert_array_equal(actual, expected)


def test_banks_of_any_size_rank_and_width_in_one_session(library: Path | None) -> None:
    rng = np.random.default_rng(2)
    slots = slots_of("int8", (48,), COLUMNS)
    weight = random_weight(rng, (48, COLUMNS), bits=2, group_size=32, zero_points=True)
    session = open_session(_model(slots, weight, None, None), library)
    x = rng.standard_normal((2, 3, COLUMNS), np.float32)
    for ranks, types, rank in (
        ((16,), ("int4",), 16),
        ((33, 8), ("int8", "int4"), 48),
        ((4, 16, 1, 2, 3), ("int4",) * 5, 16),
    ):
        adapters = [
            random_adapter(rng, slots, ranks=[own], factor_type=kind)
            for own, kind in zip(ranks, types, strict=True)
        ]
        bank = stack_adapters(slots, [pack_adapter(slots, adapter) for adapter in adapters])
        index = [len(ranks) - 1, 0]
        feeds = {"X": x, ADAPTER_INDEX: np.array(index, np.int32), **_by_operand(bank)}
        (actual,) = session.run(None, feeds)
        given: dict[str, Any] = {
            "adapters": merged_bank(slots, adapters, rank=rank),
            "adapter_index": index,
        }
        expected = fused_matmul(x, weight, None, **given)
        assert_close(actual, expected, adapter_bound(x, weight, None, None, **given))
    # None at all again: the session remembers nothing.
    (plain,) = session.run(None, {"X": x})
    assert_close(plain, fused_matmul(x, weight, None), error_bound(x, weight, None, None))


def test_weights_of_float_adapters(library: Path | None) -> None:
    """``adapter_a_scale`` multiplies what an adapter adds, whatever its type."""
    rng = np.random.default_rng(3)
    slots = slots_of("float16", (32, 16), COLUMNS)
    weight = random_weight(rng, (48, COLUMNS), bits=4, group_size=32, zero_points=True)
    adapter = random_adapter(rng, slots, ranks=(7, 12), factor_type="float16")
    arrays = _by_operand(pack_adapter(slots, adapter))
    arrays["adapter_a_scale"] = arrays["adapter_a_scale"] * np.float32(-2)
    session = open_session(_model(slots, weight, None, None, parts=(32, 16)), library)
    x = rng.standard_normal((5, COLUMNS), np.float32)
    (actual,) = session.run(None, {"X": x, **arrays})
    given: dict[str, Any] = {
        "parts": (32, 16),
        "adapters": merged_bank(slots, [adapter], rank=16),
        "adapter_index": [0],
    }
    scaled = fused_matmul(x, weight, None, adapter_scales=[np.full(32, -2.0)], **given)
    assert_close(actual, scaled, 2 * adapter_bound(x, weight, None, None, **given))


def test_index_beyond_the_bank_is_an_error(library: Path | None) -> None:
    rng = np.random.default_rng(4)
    slots = slots_of("int8", (48,), COLUMNS)
    weight = random_weight(rng, (48, COLUMNS), bits=4, group_size=32, zero_points=False)
    adapter = random_adapter(rng, slots, ranks=(16,), factor_type="int8")
    feeds = {"X": np.zeros((2, COLUMNS), np.float32), **_by_operand(pack_adapter(slots, adapter))}
    session = open_session(_model(slots, weight, None, None), library)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument):
        session.run(None, feeds | {ADAPTER_INDEX: np.array([0, 1], np.int32)})


@pytest.mark.parametrize("rank", [1, 16, 33])
@pytest.mark.parametrize("columns", [90, 5, 16])
def test_baked_int4_factors(library: Path | None, rank: int, columns: int) -> None:
    """Eight codes to a vector's four are told by the shape alone, of whatever rank and width."""
    rng = np.random.default_rng(5)
    weight = random_weight(rng, (37, columns), bits=3, group_size=16, zero_points=True)
    factors = random_typed_factors(rng, (37, columns), rank=rank, factor_type="int4")
    assert factors.tiles()["lora_a"].shape == (-(-rank // 16), -(-columns // 8), 64)
    session = open_session(fused_model(weight, factors, layout=1), library)
    for leading in ((0,), (3,), (2, 20)):
        x = rng.standard_normal((*leading, columns), np.float32)
        (actual,) = session.run(None, {"X": x})
        expected = fused_matmul(x, weight, factors)
        assert_close(actual, expected, error_bound(x, weight, factors, None))


def _node(present: Sequence[str], **attributes: Any) -> ir.Node:  # noqa: ANN401
    names = INPUTS["MatMulNBitsLowRank"]
    inputs = [ir.Value(name=name) if name in present else None for name in names]
    while inputs[-1] is None:
        inputs.pop()
    given = {"bits": 3, "layout": 1, "K": 64, "N": 32} | attributes
    return ir.node("MatMulNBitsLowRank", inputs, given, domain="eoracc", name="some.linear")


_WITH = partial(_node, ("X", "B", "scales", *ADAPTER_OPERANDS, ADAPTER_INDEX))


def test_overload_says_what_a_slot_takes() -> None:
    floats = _node(("X", "B", "scales", *ADAPTER_OPERANDS[:3], ADAPTER_INDEX))
    assert local_function(floats).overload == "bits3_tiles_slot"
    assert local_function(_WITH()).overload == "bits3_tiles_slot_slotscale"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (_node(("X", "B", "scales", "adapter_a", ADAPTER_INDEX)), "come together or not at all"),
        (_node(("X", "B", "scales", *ADAPTER_OPERANDS)), "come together or not at all"),
        (_WITH(layout=0), "only layout 1 is fused"),
    ],
)
def test_nodes_with_half_a_slot_are_refused(node: ir.Node, message: str) -> None:
    with pytest.raises(PluginError, match=f"node some.linear: .*{message}"):
        local_function(node)
