from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eoracc.plugins.library import INSTRUCTION_SETS
from eoracc.plugins.operands.codes import BITS
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from tests.plugins import native
from tests.plugins.cases import FEW_ROWS, Array, Case, assert_case, random_case, with_ranks

LEVELS = (0, 4)
FACTOR_TYPES = [
    ("float16", "float16"),
    ("float32", "float32"),
    ("int8", "int8"),
    ("int8", "float16"),
    ("float32", "int8"),
]

# Each number of rows that has code of its own, and more than one block of them.
ROWS = (1, 2, 3, 4, 5, 8, 13, 16, 17, 40)


def check(case: Case, isa: str) -> None:
    actual = native.multiply(case, instruction_set=isa)
    assert_case(actual, case)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 16, 24, 64, 128, 304])
def test_backbone(isa: str, level: int, bits: int, group_size: int) -> None:
    rng = np.random.default_rng(1)
    for zero_points in (True, False):
        case = random_case(
            rng,
            max(ROWS),
            (37, 299),
            bits=bits,
            group_size=group_size,
            zero_points=zero_points,
            accuracy_level=level,
        )
        for rows in ROWS:
            check(replace(case, x=case.x[:rows]), isa)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 16, 32, 128, 304])
def test_level_4_is_exact_where_int8_is(isa: str, bits: int, group_size: int) -> None:
    """Activations that are a step of their block times an integer lose nothing."""
    rng = np.random.default_rng(18)
    case = random_case(rng, 16, (37, 299), bits=bits, group_size=group_size, rank=5)
    x = rng.integers(-127, 128, case.x.shape).astype(np.float32)
    x[:, ::8] = 127  # the largest of every block
    x *= 2.0 ** rng.integers(-3, 4, (16, 1))
    case = replace(case, x=x)
    for rows in (1, 5, 8):  # AMX rounds more rows to bfloat16 instead
        part = replace(case, x=x[:rows])
        check(replace(part, accuracy_level=0), isa)
        actual = native.multiply(replace(part, accuracy_level=4), instruction_set=isa)
        assert_case(actual, part)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 32, 304])
@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_of_the_largest_products_fit(isa: str, bits: int, group_size: int, sign: int) -> None:
    """Level 4 adds up products in 16 bits on some processors; the largest ones are all alike."""
    rng = np.random.default_rng(19)
    case = random_case(rng, 8, (37, 299), bits=bits, group_size=group_size, accuracy_level=4)
    weight = NBitsWeight.from_codes(
        np.full((37, 299), 2**bits - 1, np.uint8),
        case.weight.scales,
        np.zeros_like(case.weight.zero_points),
        bits=bits,
        group_size=group_size,
    )
    x = np.full(case.x.shape, sign, np.float32)  # which is 127 steps of each block
    for rows in (1, 5, 8):
        check(replace(case, weight=weight, x=x[:rows]), isa)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (1, 8), (3, 7), (33, 9)])
def test_tiny_and_odd_sizes(isa: str, level: int, out_features: int, in_features: int) -> None:
    rng = np.random.default_rng(2)
    for bits in BITS:
        shape = (out_features, in_features)
        case = random_case(rng, 5, shape, bits=bits, group_size=16, accuracy_level=level)
        # Weights and activations away from zero, so that a single product is a signal.
        weight = NBitsWeight.from_codes(
            rng.integers(1, 2**bits, shape, np.uint8),
            case.weight.scales,
            np.zeros_like(case.weight.zero_points),
            bits=bits,
            group_size=16,
        )
        x = rng.uniform(1, 2, case.x.shape).astype(np.float32)
        for rows in (1, 2, 5):
            check(replace(case, weight=weight, x=x[:rows]), isa)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("factor_types", FACTOR_TYPES)
@pytest.mark.parametrize("rank", [0, 1, 5, 16, 33, 300])
def test_low_rank(isa: str, level: int, rank: int, factor_types: tuple[str, str]) -> None:
    rng = np.random.default_rng(3)
    case = random_case(
        rng,
        max(ROWS),
        (45, 130),
        bits=3,
        rank=rank,
        factor_types=factor_types,
        bias=True,
        accuracy_level=level,
    )
    for rows in (1, 2, 7, 16, 40):
        check(replace(case, x=case.x[:rows]), isa)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", BITS)
def test_scales_of_either_type(isa: str, level: int, bits: int) -> None:
    for scales in (np.float16, np.float32):
        rng = np.random.default_rng(4)
        case = random_case(
            rng, 3, (45, 130), bits=bits, scales=scales, zero_points=False, accuracy_level=level
        )
        check(case, isa)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh"])
@pytest.mark.parametrize("factor_types", [("float16", "float16"), ("int8", "int8")])
def test_a_decoder_layers_fusions(
    isa: str, level: int, dtype: type[np.generic], activation: str, factor_types: tuple[str, str]
) -> None:
    rng = np.random.default_rng(5)
    for rank in (None, 0, 48):
        case = random_case(
            rng,
            max(ROWS),
            (96, 200),
            bits=3,
            rank=rank,
            factor_types=factor_types,
            parts=(48, 48) if activation else (64, 16, 16),
            activation=activation,
            bias=True,
            norm=True,
            residual=True,
            dtype=dtype,
            accuracy_level=level,
        )
        for rows in (1, 4, 40):
            check(replace(case, x=case.x[:rows], residual=_rows(case.residual, 0, rows)), isa)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "factor_types",
    [("float16", "float32"), ("int8", "int8"), ("int4", "int4"), ("float32", "int8")],
)
def test_parts_with_ranks_of_their_own(isa: str, level: int, factor_types: tuple[str, str]) -> None:
    """Nothing of what another rank would take is stored, so none may be read."""
    rng = np.random.default_rng(19)
    for parts, ranks, activation in (
        ((64, 16, 16), (8, 24, 0), ""),
        ((64, 16, 16), (0, 5, 33), ""),
        ((96, 96), (40, 8), "silu"),
        ((96, 96), (0, 16), "gelu_tanh"),
    ):
        case = random_case(
            rng,
            max(ROWS),
            (sum(parts), 200),
            bits=3,
            rank=max(ranks),
            factor_types=factor_types,
            parts=parts,
            activation=activation,
            norm=True,
            accuracy_level=level,
        )
        case = with_ranks(case, ranks)
        for rows in (1, 4, 40):
            part = replace(case, x=case.x[:rows])
            actual = native.multiply(part, instruction_set=isa, place=native.before_a_guard_page)
            assert_case(actual, part)


def _rows(array: Array | None, start: int, stop: int) -> Array | None:
    return None if array is None else array[start:stop]


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
def test_large_enough_for_every_run_of_tiles(isa: str, level: int) -> None:
    rng = np.random.default_rng(6)
    for parts in ((), (400, 208)):
        case = random_case(
            rng, 70, (608, 1024), rank=80, parts=parts, group_size=128, accuracy_level=level
        )
        for rows in (1, 70):
            check(replace(case, x=case.x[:rows]), isa)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("factor_types", [None, ("int8", "int8"), ("float16", "float16")])
def test_level_4_gives_a_row_what_it_gets_alone(
    isa: str, factor_types: tuple[str, str] | None
) -> None:
    """To the bit, for all that are decoded together: rounding to int8 would make more of it."""
    rng = np.random.default_rng(14)
    for bits in BITS:
        case = random_case(
            rng,
            FEW_ROWS,
            (288, 1056),
            bits=bits,
            rank=None if factor_types is None else 48,
            factor_types=factor_types or ("float16", "float16"),
            norm=True,
            residual=True,
            accuracy_level=4,
        )
        alone = [
            native.multiply(
                replace(case, x=case.x[[row]], residual=_rows(case.residual, row, row + 1)),
                instruction_set=isa,
            )
            for row in range(FEW_ROWS)
        ]
        for rows in (2, 3, 5, FEW_ROWS):
            together = replace(case, x=case.x[:rows], residual=_rows(case.residual, 0, rows))
            actual = native.multiply(together, instruction_set=isa)
            for row in range(rows):
                np.testing.assert_array_equal(actual[[row]], alone[row])


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_order_of_tasks_does_not_matter(isa: str, level: int, rows: int) -> None:
    rng = np.random.default_rng(7)
    case = random_case(
        rng, rows, (600, 640), bits=3, rank=70, factor_types=("int8", "int8"), accuracy_level=level
    )
    counts: list[int] = []

    def backwards(count: int) -> list[int]:
        counts.append(count)
        return list(reversed(range(count)))

    forwards = native.multiply(case, instruction_set=isa)
    shuffled = native.multiply(case, instruction_set=isa, order=backwards)
    assert max(counts) > 1
    np.testing.assert_array_equal(forwards, shuffled)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_propagate(isa: str, level: int, rows: int, special: float) -> None:
    rng = np.random.default_rng(8)
    case = random_case(rng, rows, (35, 43), group_size=16, accuracy_level=level)
    case.x[1, 42] = special
    actual = native.multiply(case, instruction_set=isa)
    assert np.isfinite(np.delete(actual, 1, axis=0)).all()
    if level == 4:
        assert np.isnan(actual[1]).all()
        return
    with np.errstate(invalid="ignore"):  # infinity times the code that means 0
        expected = case.expected
    np.testing.assert_array_equal(actual[1], expected[1].astype(np.float32))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
def test_activations_of_any_size(isa: str, level: int) -> None:
    """Blocks of zeros, of subnormals and of huge values beside ordinary ones."""
    rng = np.random.default_rng(9)
    case = random_case(rng, 5, (16, 160), rank=16, factor_types=("int8", "int8"))
    case = replace(case, accuracy_level=level)
    for block, size in enumerate((0, 1e-42, 1e-30, 1e30)):
        case.x[block, 32 * block : 32 * (block + 1)] *= size
    case.x[4] = 0
    actual = native.multiply(case, instruction_set=isa)
    assert (actual[4] == 0).all()
    # What is below the smallest normal float counts as 0.
    assert (np.abs(actual - case.expected) <= case.bound + 1e-30).all()


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 20])
def test_infinite_scale_of_a_short_group(isa: str, level: int, rows: int) -> None:
    rng = np.random.default_rng(10)
    case = random_case(
        rng, rows, (3, 17), bits=2, group_size=16, zero_points=False, accuracy_level=level
    )
    case.weight.packed[:, 1] = 0b11
    case.weight.scales[1, 1] = np.inf
    case.x[:] = 1
    actual = native.multiply(case, instruction_set=isa)
    assert (actual[:, 1] == np.inf).all()
    assert np.isfinite(actual[:, [0, 2]]).all()


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_half_is_widened_and_rounded(isa: str, dtype: type[np.generic]) -> None:
    """Subnormals, infinities and NaN included."""
    halves = np.arange(2**16, dtype=np.uint16).view(dtype)
    weight = NBitsWeight.from_codes(
        np.ones((16, 8), np.uint8),
        np.ones((16, 1), np.float32),
        np.zeros((16, 1), np.uint8),
        bits=2,
        group_size=8,
    )
    x = np.zeros((len(halves), 8), dtype)
    x[:, 0] = halves
    actual = native.multiply(Case(x=x, weight=weight), instruction_set=isa)
    values = halves.astype(np.float32)
    np.testing.assert_array_equal(actual[:, 3].astype(np.float32), values)
    odd = np.float32(0.7)
    scaled = replace(weight, scales=np.full((16, 1), odd, np.float32))
    actual = native.multiply(Case(x=x, weight=scaled), instruction_set=isa)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (values * odd).astype(dtype)
    np.testing.assert_array_equal(actual[:, 3].astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("in_features", [8, 24, 136, 259])
def test_nothing_is_read_past_an_operand(isa: str, level: int, bits: int, in_features: int) -> None:
    """Weights may be mapped from a file that ends with its page; a read too far is a crash."""
    rng = np.random.default_rng(11)
    for factor_types in (("float16", "float32"), ("int8", "int8")):
        case = random_case(
            rng,
            13,
            (5, in_features),
            bits=bits,
            group_size=8,
            rank=3,
            factor_types=factor_types,
            bias=True,
            norm=True,
            residual=True,
            accuracy_level=level,
        )
        for rows in (1, 13):
            part = replace(case, x=case.x[:rows], residual=_rows(case.residual, 0, rows))
            actual = native.multiply(part, instruction_set=isa, place=native.before_a_guard_page)
            assert_case(actual, part)


@pytest.mark.parametrize("isa", native.ISAS)
def test_residual_may_be_the_output(isa: str) -> None:
    case = random_case(np.random.default_rng(12), 3, (40, 64), residual=True)
    call = native.prepare(case)
    assert case.residual is not None
    call.y[:] = case.residual
    call.matmul.residual = call.matmul.y
    native.require(isa)
    assert native.call(call.matmul, INSTRUCTION_SETS[isa]) == native.OK
    assert_case(call.y, case)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    parts: tuple[int, ...] = ()
    activation = draw(st.sampled_from(["", "", "silu", "gelu_tanh"]))
    if activation:
        parts = (16 * draw(st.integers(1, 4)),) * 2
    elif draw(st.booleans()):
        parts = tuple(16 * n for n in draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)))
    rank = draw(st.none() | st.integers(0, 40))
    if rank is not None and parts:
        rank = rank // 8 * 16
    case = random_case(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        draw(st.integers(0, 30)),
        (sum(parts) or draw(st.integers(1, 80)), draw(st.integers(1, 400))),
        bits=draw(st.sampled_from(BITS)),
        group_size=8 * draw(st.integers(1, 20)),
        zero_points=draw(st.booleans()),
        rank=rank,
        factor_types=draw(st.sampled_from(FACTOR_TYPES)),
        parts=parts,
        activation=activation,
        bias=draw(st.booleans()),
        norm=draw(st.booleans()),
        residual=draw(st.booleans()),
        scales=np.float16 if draw(st.booleans()) else np.float32,
        accuracy_level=draw(st.sampled_from(LEVELS)),
    )
    actual = native.multiply(case, instruction_set=draw(st.sampled_from(native.supported())))
    assert (np.abs(actual - case.expected) <= case.bound).all()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"rows": -1},
        {"in_features": 0},
        {"out_features": 0},
        {"out_features": 2**31},
        {"rank": -1},
        {"rank": 4},
        {"bits": 5},
        {"group_size": 12},
        {"group_size": 0},
        {"accuracy_level": 1},
        {"activation": 1},
        {"activation": 3},
        {"part_count": -1},
        {"part_count": 2},
        {"part_count": 9},
        {"x_type": 3},
        {"scales_type": 0},
        {"scales_type": 4},
        {"codes": None},
        {"scales": None},
        {"x": None},
    ],
)
def test_bad_operands_are_refused(change: dict[str, int | None]) -> None:
    data = np.zeros(64, np.uint8).ctypes.data
    good = {
        "rows": 1,
        "in_features": 8,
        "out_features": 1,
        "bits": 4,
        "group_size": 8,
        "x_type": 1,
        "scales_type": 1,
        "x": data,
        "y": np.zeros(1, np.float32).ctypes.data,
        "codes": data,
        "scales": data,
    }
    assert native.call(native.Matmul(**good), isa=1) == native.OK
    assert native.call(native.Matmul(**(good | change)), isa=1) == native.BAD_OPERAND


@pytest.mark.parametrize(
    ("parts", "activation", "rank"),
    [
        ((16, 8), "", 16),
        ((16, 32), "", 16),
        ((48, -16), "", 16),
        ((16, 16), "", 8),
        ((16, 0, 16), "", 16),
        ((16, 8, 8), "silu", 16),
    ],
)
def test_bad_parts_are_refused(parts: tuple[int, ...], activation: str, rank: int) -> None:
    case = random_case(np.random.default_rng(13), 1, (32, 16), rank=16, parts=(16, 16))
    call = native.prepare(case)
    assert native.call(call.matmul, isa=1) == native.OK
    array = np.array(parts, np.int64)
    call.matmul.parts, call.matmul.part_count = array.ctypes.data, len(parts)
    call.matmul.activation, call.matmul.rank = native.ACTIVATIONS[activation], rank
    assert native.call(call.matmul, isa=1) == native.BAD_OPERAND


@pytest.mark.parametrize("ranks", [(16, -1), (16, 17), (8, 8), (16, 2**31)])
def test_bad_ranks_are_refused(ranks: tuple[int, ...]) -> None:
    case = random_case(np.random.default_rng(13), 1, (32, 16), rank=16, parts=(16, 16))
    call = native.prepare(case)
    fits, array = np.array((8, 16), np.int64), np.array(ranks, np.int64)
    call.matmul.ranks = fits.ctypes.data
    assert native.call(call.matmul, isa=1) == native.OK
    call.matmul.ranks = array.ctypes.data
    assert native.call(call.matmul, isa=1) == native.BAD_OPERAND


def test_factors_without_data_are_refused() -> None:
    case = random_case(np.random.default_rng(14), 1, (32, 16), rank=4, factor_types=("int8",) * 2)
    for name in ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale"):
        call = native.prepare(case)
        setattr(call.matmul, name, None)
        assert native.call(call.matmul, isa=1) == native.BAD_OPERAND


def test_unknown_instruction_set_is_refused() -> None:
    case = random_case(np.random.default_rng(15), 1, (1, 8))
    assert native.call(native.prepare(case).matmul, isa=99) == native.NO_SUCH_ISA


def test_no_rows_is_no_error() -> None:
    case = random_case(np.random.default_rng(16), 0, (5, 8), rank=2)
    actual = native.multiply(case, instruction_set="scalar")
    assert actual.shape == (0, 5)


def test_oracle_sees_an_error() -> None:
    """A factor, a part or a zero point that is off by one is beyond the bound."""
    case = random_case(np.random.default_rng(17), 4, (64, 256), rank=16, parts=(32, 32))
    actual = native.multiply(case, instruction_set="scalar")
    assert_case(actual, case)
    assert case.factors is not None
    assert case.weight.zero_points is not None
    swapped = LowRank(lora_a=np.roll(case.factors.lora_a, 16, axis=0), lora_b=case.factors.lora_b)
    raised = case.weight.zero_points.copy()
    raised[40, 3] += 1
    for wrong in (
        replace(case, factors=swapped),
        replace(case, weight=replace(case.weight, zero_points=raised)),
    ):
        assert (np.abs(actual - wrong.expected) > wrong.bound).any()
