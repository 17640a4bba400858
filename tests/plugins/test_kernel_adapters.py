"""Adapters in the kernels: each row with the factors of its own, or none."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eoracc.plugins.library import INSTRUCTION_SETS
from eoracc.plugins.operands.codes import BITS
from tests.plugins import native
from tests.plugins.cases import FEW_ROWS, Case, assert_case, random_case, with_adapters
from tests.plugins.test_kernel_many_rows import rounded_as

LEVELS = (0, 4)
TYPES = ("int8", "int4", "float16", "float32")
PARTS = {"": (), "merged": (48, 32, 16), "gated": (48, 48)}
ROWS = (1, 2, 5, 8, 9, 16, 21, 50)


def bounded(case: Case, isa: str) -> Case:
    """``case`` with the bound of the kernel that ``isa`` has for it."""
    many = len(case.x) > FEW_ROWS and case.weight.in_features >= 64
    return rounded_as(case, isa) if many else case


def check(case: Case, isa: str) -> None:
    assert_case(native.multiply(case, instruction_set=isa), bounded(case, isa))


def rows_of(case: Case, rows: int) -> Case:
    """The first rows, each with its own entry of the index."""
    residual = None if case.residual is None else case.residual[:rows]
    index = case.adapter_index[:rows]
    return replace(case, x=case.x[:rows], residual=residual, adapter_index=index)


def mixed_case(
    seed: int, isa_level: int, dtype: str, parts: tuple[int, ...] = (), **options: object
) -> Case:
    """Five adapters of ranks 16, 0, 48, 5 and 33 in a bank of rank 48, and rows without any."""
    rng = np.random.default_rng(seed)
    case = random_case(
        rng,
        max(ROWS),
        (sum(parts) or 85, 168),
        bits=3,
        parts=parts,
        bias=True,
        norm=True,
        residual=True,
        accuracy_level=isa_level,
        **options,  # type: ignore[arg-type]
    )
    index = rng.integers(-2, 5, max(ROWS))
    return with_adapters(rng, case, ranks=(16, 0, 48, 5, 33), index=index.tolist(), dtype=dtype)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("parts", PARTS)
def test_each_row_uses_its_own(isa: str, level: int, dtype: str, parts: str) -> None:
    activation = "silu" if parts == "gated" else ""
    for rank in (None, 32):
        case = mixed_case(1, level, dtype, PARTS[parts], rank=rank, activation=activation)
        for rows in ROWS:
            check(rows_of(case, rows), isa)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rank", [16, 48, 80])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_one_adapter_for_all_rows(isa: str, level: int, dtype: str, rank: int, count: int) -> None:
    rng = np.random.default_rng(2)
    for rows in (1, 3, 16, 40):
        case = random_case(rng, rows, (608, 320), accuracy_level=level)
        case = with_adapters(rng, case, ranks=[rank] * count, index=[count - 1], dtype=dtype)
        check(case, isa)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_sequences_of_a_batch(isa: str, level: int, dtype: type[np.generic]) -> None:
    """Runs of rows that end inside of a block of rows, and of what is packed at a time."""
    rng = np.random.default_rng(3)
    for length in (3, 23, 530):
        case = random_case(rng, 4 * length, (48, 72), rank=16, dtype=dtype, accuracy_level=level)
        check(with_adapters(rng, case, ranks=(16, 32), index=[1, -1, 0, 1]), isa)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 16, 17, 50])
def test_other_rows_adapters_do_not_change_a_bit(
    isa: str, level: int, dtype: str, rows: int
) -> None:
    case = rows_of(mixed_case(4, level, dtype, (48, 48), rank=16, activation="silu"), rows)
    mixed = native.multiply(case, instruction_set=isa)
    for adapter in range(-1, 5):
        same = native.multiply(replace(case, adapter_index=(adapter,)), instruction_set=isa)
        users = np.maximum(case.adapter_index, -1) == adapter
        np.testing.assert_array_equal(mixed[users], same[users])


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_no_adapter_changes_nothing(isa: str, level: int, rows: int) -> None:
    """A bank of rank 0, rows without an adapter, and adapters that only fill a bank."""
    rng = np.random.default_rng(5)
    bare = random_case(rng, rows, (96, 130), rank=16, parts=(48, 48), accuracy_level=level)
    expected = native.multiply(bare, instruction_set=isa)
    for ranks, rank, adapter in (((0,), 0, 0), ((16, 16), 16, -1), ((16, 0), 32, 1)):
        case = with_adapters(rng, bare, ranks=ranks, rank=rank, index=[adapter])
        np.testing.assert_array_equal(native.multiply(case, instruction_set=isa), expected)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_what_fills_up_a_bank_is_not_read(isa: str, level: int, dtype: str, rows: int) -> None:
    """A smaller adapter gives the same in a bank of a larger rank, whatever lies behind it."""
    rng = np.random.default_rng(6)
    case = random_case(rng, rows, (96, 130), parts=(48, 48), accuracy_level=level)
    small = with_adapters(rng, case, ranks=(16,), index=[0], dtype=dtype)
    call = native.prepare(replace(small, adapter_rank=64))
    a = call.arrays["adapter_a"]
    assert a is not None
    tiles = a.reshape(2, 4, -1)  # parts, and a tile of 16 ranks each
    tiles[:, 1:] = 255 if a.dtype == np.uint8 else np.nan
    expected = native.multiply(small, instruction_set=isa)
    assert native.call(call.matmul, INSTRUCTION_SETS[isa]) == native.OK
    np.testing.assert_array_equal(call.y, expected)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_broken_adapter_is_its_own_rows_problem(isa: str, level: int) -> None:
    """NaN in an adapter does not reach a row that uses another, be it in the same block of rows."""
    for rows in (4, 40):
        rng = np.random.default_rng(7)
        case = random_case(rng, rows, (48, 130), accuracy_level=level)
        index = [row % 3 - 1 for row in range(rows)]
        case = with_adapters(rng, case, ranks=(16, 16), index=index, dtype="float16")
        healthy = native.multiply(case, instruction_set=isa)
        for name in ("lora_a", "lora_b"):
            factors = case.adapters[1]
            broken = replace(factors, **{name: np.full_like(getattr(factors, name), np.nan)})
            actual = native.multiply(
                replace(case, adapters=(case.adapters[0], broken)), instruction_set=isa
            )
            bad = np.array(index) == 1
            assert (actual[bad] != healthy[bad]).any()
            np.testing.assert_array_equal(actual[~bad], healthy[~bad])


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 6, 60])
def test_order_of_tasks_does_not_matter(isa: str, level: int, rows: int) -> None:
    rng = np.random.default_rng(8)
    case = random_case(rng, rows, (608, 640), rank=64, accuracy_level=level)
    index = rng.integers(-1, 3, rows).tolist()
    case = with_adapters(rng, case, ranks=(32, 64, 16), index=index)
    backwards = native.multiply(
        case, instruction_set=isa, order=lambda count: list(reversed(range(count)))
    )
    np.testing.assert_array_equal(native.multiply(case, instruction_set=isa), backwards)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("in_features", [8, 20, 136, 259])
def test_nothing_is_read_past_an_operand(
    isa: str, level: int, dtype: str, in_features: int
) -> None:
    rng = np.random.default_rng(9)
    for rows in (1, 13, 40):
        case = random_case(rng, rows, (37, in_features), accuracy_level=level)
        index = rng.integers(-1, 3, rows).tolist()
        case = with_adapters(rng, case, ranks=(16, 3, 16), index=index, dtype=dtype)
        actual = native.multiply(case, instruction_set=isa, place=native.before_a_guard_page)
        assert (np.abs(actual - case.expected) <= bounded(case, isa).bound).all()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_bank(data: st.DataObject) -> None:
    draw = data.draw
    parts: tuple[int, ...] = ()
    activation = draw(st.sampled_from(["", "", "silu", "gelu_tanh"]))
    if activation:
        parts = (16 * draw(st.integers(1, 4)),) * 2
    elif draw(st.booleans()):
        parts = tuple(16 * n for n in draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    runs, length = draw(st.integers(0, 20)), draw(st.sampled_from([1, 1, 2, 7]))
    types = draw(st.sampled_from([("float16", "int8"), ("int8", "float32"), ("int4", "int4")]))
    case = random_case(
        rng,
        runs * length,
        (sum(parts) or draw(st.integers(1, 80)), draw(st.integers(1, 400))),
        bits=draw(st.sampled_from(BITS)),
        group_size=8 * draw(st.integers(1, 20)),
        rank=draw(st.sampled_from([None, 0, 16, 32])),
        factor_types=types,
        parts=parts,
        activation=activation,
        bias=draw(st.booleans()),
        norm=draw(st.booleans()),
        residual=draw(st.booleans()),
        accuracy_level=draw(st.sampled_from(LEVELS)),
    )
    ranks = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    index = rng.integers(-1, len(ranks), runs).tolist()
    case = with_adapters(rng, case, ranks=ranks, index=index, dtype=draw(st.sampled_from(TYPES)))
    isa = draw(st.sampled_from(native.supported()))
    actual = native.multiply(case, instruction_set=isa)
    assert (np.abs(actual - case.expected) <= bounded(case, isa).bound).all()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0},
        {"count": -1},
        {"count": 2**31},
        {"count": 1},  # row 1 uses the second one
        {"rank": -16},
        {"rank": 8},
        {"rank": 2**40},
        {"index_count": 3},
        {"index_count": -4},
        {"index_rows": 2},
        {"index_rows": -1},
        {"index_count": 2**62, "index_rows": 4},
        {"type": 0},
        {"type": 4},
        {"type": 6},
        {"a": None},
        {"b": None},
        {"a_scale": None},
        {"b_scale": None},
        {"index": None},
    ],
)
def test_bad_banks_are_refused(change: dict[str, int | None]) -> None:
    rng = np.random.default_rng(10)
    case = random_case(rng, 4, (32, 16))
    call = native.prepare(with_adapters(rng, case, ranks=(16, 16), index=[0, 1, -1, -(2**31)]))
    assert native.call(call.matmul, isa=1) == native.OK
    assert call.bank is not None
    for name, value in change.items():
        setattr(call.bank, name, value)
    assert native.call(call.matmul, isa=1) == native.BAD_OPERAND


def test_float_factors_need_no_scale_of_b() -> None:
    rng = np.random.default_rng(11)
    case = with_adapters(
        rng, random_case(rng, 1, (32, 16)), ranks=(16,), index=[0], dtype="float16"
    )
    call = native.prepare(case)
    assert call.bank is not None
    assert not call.bank.b_scale
    assert native.call(call.matmul, isa=1) == native.OK


def test_oracle_sees_another_adapter() -> None:
    """Rows or parts that swap theirs, and a weight that is left out, are beyond the bound."""
    rng = np.random.default_rng(12)
    case = random_case(rng, 2, (64, 256), parts=(32, 32))
    case = with_adapters(rng, case, ranks=(16, 16), index=[0, 1], dtype="float16")
    actual = native.multiply(case, instruction_set="scalar")
    assert_case(actual, case)
    first, second = case.adapters
    unweighted = replace(first, lora_a_scale=np.ones(32, np.float32))
    swapped = replace(first, lora_a=np.roll(first.lora_a, 16, axis=0))
    for wrong in (
        replace(case, adapter_index=(1, 0)),
        replace(case, adapter_index=(0, -1)),
        replace(case, adapters=(unweighted, second)),
        replace(case, adapters=(swapped, second)),
    ):
        assert (np.abs(actual - wrong.expected) > wrong.bound).any()
