from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.errors import PluginError
from eoracc.plugins.adapters import (
    SLOTS_KEY,
    AdapterSlot,
    AdapterSlots,
    pack_adapter,
    stack_adapters,
    unpack_adapter,
)
from eoracc.plugins.operands.codes import untile_integers
from eoracc.plugins.operands.low_rank import LowRank
from tests.plugins.banks import SLOT, random_adapter, random_typed_factors, slots_of

PARTS = (32, 16, 48)
COLUMNS = 50
TYPES = {"int8": "int8", "int4": "int8", "float16": "float16"}


def assert_same(actual: Mapping[str, LowRank], expected: Mapping[str, LowRank]) -> None:
    """Equal to the last bit, type included."""
    assert actual.keys() == expected.keys()
    for name, factors in expected.items():
        assert actual[name].factor_type == factors.factor_type
        for part in ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale"):
            np.testing.assert_array_equal(getattr(actual[name], part), getattr(factors, part))


@pytest.mark.parametrize("factor_type", TYPES)
@pytest.mark.parametrize("ranks", [(5, 16, 33), (0, 4, 0), (16, 16, 16)])
def test_unpack_gives_back_what_was_packed(factor_type: str, ranks: tuple[int, ...]) -> None:
    slots = slots_of(TYPES[factor_type], PARTS, COLUMNS)
    factors = random_adapter(np.random.default_rng(0), slots, ranks=ranks, factor_type=factor_type)
    packed = pack_adapter(slots, factors)
    assert {name.rpartition(".")[0] for name in packed} == {SLOT}
    rank = -(-max(ranks) // 16) * 16
    scale = packed[f"{SLOT}.adapter_a_scale"]
    assert scale.shape == (1, len(PARTS) * rank)
    for part, own in enumerate(ranks):
        ends = scale[0, part * rank : (part + 1) * rank]
        assert ends[:own].all(), "a rank that is used has a scale"
        assert not ends[own:].any(), "padding has none"
    assert_same(unpack_adapter(slots, packed), factors)


@pytest.mark.parametrize("factor_type", TYPES)
def test_one_linear_of_several_parts(factor_type: str) -> None:
    """Packed before compression: its parts share lora_a, of which each has a copy."""
    slots = slots_of(TYPES[factor_type], (48, 48), COLUMNS, shared=True)
    assert slots.linears == {SLOT: (96, COLUMNS)}
    factors = random_adapter(np.random.default_rng(1), slots, ranks=(20,), factor_type=factor_type)
    packed = pack_adapter(slots, factors)
    a = packed[f"{SLOT}.adapter_a"]
    assert a.shape[1] == 2 * 32 // 16
    np.testing.assert_array_equal(a[:, :2], a[:, 2:])
    assert_same(unpack_adapter(slots, packed), factors)


def test_an_adapter_without_factors_packs_to_nothing() -> None:
    slots = slots_of("int8", PARTS, COLUMNS)
    empty = random_typed_factors(
        np.random.default_rng(2), (PARTS[0], COLUMNS), rank=0, factor_type="int4"
    )
    assert pack_adapter(slots, {}) == {}
    assert pack_adapter(slots, {f"{SLOT}0": empty}) == {}
    assert unpack_adapter(slots, {}) == {}


def test_int4_beside_int8_in_one_slot_becomes_int8() -> None:
    rng = np.random.default_rng(3)
    slots = slots_of("int8", PARTS, COLUMNS)
    narrow, wide = (
        random_adapter(rng, slots, ranks=(6, 6, 6), factor_type=kind) for kind in ("int4", "int8")
    )
    mixed = {f"{SLOT}0": narrow[f"{SLOT}0"], f"{SLOT}2": wide[f"{SLOT}2"]}
    found = unpack_adapter(slots, pack_adapter(slots, mixed))
    assert_same(found, {name: replace(own, bits=8) for name, own in mixed.items()})


# --- banks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [50, 60, 4])
@pytest.mark.parametrize(
    ("slot_type", "kinds"),
    [
        ("float16", ("float16", "float16", "float16")),
        ("int8", ("int8", "int8", "int8")),
        ("int8", ("int4", "int4", "int4")),
        ("int8", ("int4", "int8", "int4")),
    ],
)
def test_stacked_adapters_can_be_told_apart(
    slot_type: str, kinds: tuple[str, ...], columns: int
) -> None:
    """Each place of the bank, taken out, is the adapter that went in; ranks are the largest."""
    rng = np.random.default_rng(4)
    slots = slots_of(slot_type, PARTS, columns)
    ranks = [(16, 3, 40), (0, 1, 0), (7, 0, 20)]
    adapters = [
        random_adapter(rng, slots, ranks=own, factor_type=kind)
        for own, kind in zip(ranks, kinds, strict=True)
    ]
    bank = stack_adapters(slots, [pack_adapter(slots, adapter) for adapter in adapters])
    assert bank[f"{SLOT}.adapter_a_scale"].shape == (3, len(PARTS) * 48)
    # With four columns nothing in the shape would tell int4 from int8: they are stored in 8 bits.
    narrow = set(kinds) == {"int4"} and columns > 4
    for place, expected in enumerate(adapters):
        one = {name: array[place : place + 1] for name, array in bank.items()}
        wanted = expected if narrow else {n: replace(f, bits=8) for n, f in expected.items()}
        assert_same(unpack_adapter(slots, one), wanted)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_padding_of_a_bank_has_the_value_0(kind: str) -> None:
    rng = np.random.default_rng(9)
    slots = slots_of("int8", PARTS, COLUMNS)
    adapters = [random_adapter(rng, slots, ranks=(rank,) * 3, factor_type=kind) for rank in (4, 40)]
    bank = stack_adapters(slots, [pack_adapter(slots, adapter) for adapter in adapters])
    bits = 8 if kind == "int8" else 4
    a, b = (
        untile_integers(bank[f"{SLOT}.{operand}"][0], bits=bits, rows=rows, columns=columns)
        for operand, rows, columns in (("adapter_a", 3 * 48, COLUMNS), ("adapter_b", 96, 48))
    )
    assert not a.reshape(3, 48, COLUMNS)[:, 4:].any()
    assert not b[:, 4:].any()


def test_a_bank_of_banks() -> None:
    rng = np.random.default_rng(5)
    slots = slots_of("int8", PARTS, COLUMNS)
    packed = [
        pack_adapter(slots, random_adapter(rng, slots, ranks=(rank,) * 3, factor_type="int8"))
        for rank in (4, 20, 16)
    ]
    whole = stack_adapters(slots, packed)
    nested = stack_adapters(slots, [stack_adapters(slots, packed[:2]), packed[2]])
    assert whole.keys() == nested.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, nested[name])


def test_every_slot_of_a_bank_has_every_adapter() -> None:
    """Slots that an adapter leaves out still count it: an index must hold for all of them."""
    two = AdapterSlots(
        "int8",
        (AdapterSlot("s", ("q",), (32,), 40, 32), AdapterSlot("t", ("o",), (16,), 24, 16)),
    )
    rng = np.random.default_rng(6)
    only_q = pack_adapter(
        two, {"q": random_typed_factors(rng, (32, 40), rank=3, factor_type="int4")}
    )
    assert set(only_q) == {f"s.{operand}" for operand in two.operands}
    bank = stack_adapters(two, [{}, only_q, {}])
    assert {len(array) for array in bank.values()} == {3}
    assert bank["t.adapter_a"].shape == (3, 0, 6, 64), "as the model's own default, of int8"
    empty = stack_adapters(two, [])
    assert {len(array) for array in empty.values()} == {1}
    assert not any(array.size for name, array in empty.items() if "b_scale" not in name)
    floats = stack_adapters(replace(two, type="float16"), [])
    assert floats["s.adapter_a"].shape == (1, 0, 40, 16)
    assert "s.adapter_b_scale" not in floats


# --- what is refused ------------------------------------------------------------------------------


def _factors(**changes: Any) -> LowRank:  # noqa: ANN401
    whole = random_typed_factors(
        np.random.default_rng(7), (PARTS[0], COLUMNS), rank=4, factor_type="int8"
    )
    return replace(whole, **changes)


@pytest.mark.parametrize(
    ("name", "factors", "message"),
    [
        ("elsewhere", _factors(), "linear 'elsewhere': the model has no slot"),
        (
            f"{SLOT}1",
            _factors(),
            r"factors \[32, 4\] and \[4, 50\] do not fit its \[16, 50\] weight",
        ),
        (f"{SLOT}0", _factors(lora_a=np.zeros((5, 50), np.int8)), "do not fit"),
        (
            f"{SLOT}0",
            LowRank(lora_a=np.zeros((4, 50), np.float16), lora_b=np.zeros((32, 4), np.float16)),
            "has float16 factors, the model takes int8 or int4",
        ),
        (f"{SLOT}0", _factors(lora_a_scale=np.full(4, np.nan, np.float32)), "hold NaN or Inf"),
    ],
)
def test_factors_without_a_place_are_refused(name: str, factors: LowRank, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        pack_adapter(slots_of("int8", PARTS, COLUMNS), {name: factors})


def _damaged(operand: str, array: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
    slots = slots_of("int8", PARTS, COLUMNS)
    factors = random_adapter(np.random.default_rng(8), slots, ranks=(4, 4, 4), factor_type="int8")
    packed = pack_adapter(slots, factors)
    name = f"{SLOT}.{operand}"
    if array is None:
        del packed[name]
    else:
        packed[name] = array
    return packed


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other.adapter_a": np.zeros(1)}, "'other.adapter_a': the model has no slot"),
        (_damaged("adapter_b", None), f"its operand '{SLOT}.adapter_b' is missing"),
        (_damaged("adapter_a", np.zeros((1, 4, 13, 64), np.uint8)), "no bank of adapters of 3"),
        (_damaged("adapter_a", np.zeros((0, 3, 13, 64), np.uint8)), "no bank of adapters"),
        (_damaged("adapter_a", np.zeros((3, 13, 64), np.uint8)), "no bank of adapters"),
        (_damaged("adapter_a", np.zeros((1, 3, 12, 64), np.uint8)), r"not uint8 \[1, 3, 13, 64\]"),
        (_damaged("adapter_a", np.zeros((1, 3, 50, 16), np.float16)), "not uint8"),
        (_damaged("adapter_a_scale", np.ones((1, 48))), r"float64 \[1, 48\], not float32"),
        (_damaged("adapter_b_scale", np.ones((1, 80), np.float32)), r"not float32 \[1, 96\]"),
        (_damaged("adapter_b", np.zeros((2, 6, 4, 64), np.uint8)), r"not uint8 \[1, 6, 4, 64\]"),
        (
            _damaged("adapter_a_scale", np.full((1, 48), np.inf, np.float32)),
            "'adapter_a_scale' holds NaN or Inf",
        ),
    ],
)
def test_damaged_operands_are_refused(arrays: dict[str, NDArray[Any]], message: str) -> None:
    slots = slots_of("int8", PARTS, COLUMNS)
    with pytest.raises(PluginError, match=message):
        unpack_adapter(slots, arrays)
    with pytest.raises(PluginError, match=message):
        stack_adapters(slots, [arrays])


def test_a_bank_is_not_one_adapter() -> None:
    slots = slots_of("float16", PARTS, COLUMNS)
    with pytest.raises(PluginError, match="holds 2 adapters, not one"):
        unpack_adapter(slots, stack_adapters(slots, [{}, {}]))


# --- metadata -------------------------------------------------------------------------------------


def test_slots_survive_json() -> None:
    slots = slots_of("float16", PARTS, COLUMNS)
    assert AdapterSlots.from_json(slots.to_json()) == slots
    assert json.loads(slots.to_json())["slots"][0] == {
        "name": SLOT,
        "linears": [f"{SLOT}0", f"{SLOT}1", f"{SLOT}2"],
        "parts": [32, 16, 48],
        "K": 50,
        "N": 96,
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("slots"),
        lambda content: content.update(type="int2"),
        lambda content: content["slots"][0].update(N=95),
        lambda content: content["slots"][0].update(linears=["a", "b"]),
        lambda content: content["slots"][0].update(K="wide"),
        lambda content: content.update(slots=5),
    ],
)
def test_damaged_metadata_are_refused(change: Any) -> None:  # noqa: ANN401
    content = json.loads(slots_of("int8", PARTS, COLUMNS).to_json())
    change(content)
    with pytest.raises(PluginError, match=f"metadata '{SLOTS_KEY}'"):
        AdapterSlots.from_json(json.dumps(content))
    with pytest.raises(PluginError, match="is not valid JSON"):
        AdapterSlots.from_json("{")
