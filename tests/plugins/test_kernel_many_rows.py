"""The kernels for many rows of X, each at the accuracy levels for which it is chosen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typing_extensions import override

from eoracc.plugins.library import INSTRUCTION_SETS
from eoracc.plugins.operands.codes import BITS
from tests.plugins import native
from tests.plugins.cases import Case, assert_case, dequantize, random_case, wide_factors

KERNELS = [
    ("avx2", 0),
    ("avx2", 4),
    ("avx512", 0),
    ("avx512_vnni", 0),
    ("avx512_vnni", 4),
    ("amx", 0),
    ("amx", 4),
]
FACTOR_TYPES = [("float16", "float16"), ("float32", "int8"), ("int8", "float32"), ("int8", "int8")]

# Enough for every kernel to be chosen; no multiple of any block of rows.
MANY = 71

BFLOAT16 = 2.0**-8
"""Unit roundoff of bfloat16."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Bfloat16Case(Case):
    """A product of which X, the weights and the down-projected X are rounded to bfloat16."""

    @override
    def _sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums ``[M, N]`` and their bound.

        X is rounded to nearest, a weight truncated by up to two unit roundoffs, of which 0.72 are
        given back on average: a product is off by up to 2.28 of them, and by 2.5 with all float32
        roundings of sums of some thousand terms. The low-rank term has two such products.
        """
        sums, _ = super()._sums()
        x = np.abs(self._normalized)
        backbone = x @ np.abs(dequantize(self.weight)).T
        error = 2.5 * BFLOAT16 * backbone
        for users, factors in self._terms():
            a, b = (np.abs(factor) for factor in wide_factors(factors))
            rank, first = b.shape[1], 0
            for part, features in enumerate(self.parts or (self.weight.out_features,)):
                ranks = slice(part * rank, (part + 1) * rank)
                rows = np.arange(first, first + features)
                first += features
                error[np.ix_(users, rows)] += 5.1 * BFLOAT16 * (x[users] @ a[ranks].T) @ b[rows].T
        return sums, error


def rounded_as(case: Case, isa: str) -> Case:
    """``case`` with the bound of what ``isa`` does to many rows."""
    if isa != "amx" or case.accuracy_level == 0:
        return case
    return Bfloat16Case(**{field.name: getattr(case, field.name) for field in fields(Case)})


def check(case: Case, isa: str) -> None:
    actual = native.multiply(case, instruction_set=isa)
    assert_case(actual, rounded_as(case, isa))


@pytest.mark.parametrize(("isa", "level"), KERNELS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 16, 24, 32, 64, 128, 304])
def test_backbone(isa: str, level: int, bits: int, group_size: int) -> None:
    rng = np.random.default_rng(1)
    for zero_points, scales in ((True, np.float16), (False, np.float32)):
        case = random_case(
            rng,
            MANY,
            (45, 299),
            bits=bits,
            group_size=group_size,
            zero_points=zero_points,
            scales=scales,
            accuracy_level=level,
        )
        check(case, isa)


@pytest.mark.parametrize(("isa", "level"), KERNELS)
def test_every_number_of_rows(isa: str, level: int) -> None:
    """On both sides of where many rows begin, and each tail of a block of rows."""
    case = random_case(np.random.default_rng(2), 97, (33, 130), bits=3, accuracy_level=level)
    for rows in (*range(1, 50), 64, 65, 96, 97):
        check(replace(case, x=case.x[:rows]), isa)


@pytest.mark.parametrize(("isa", "level"), KERNELS)
@pytest.mark.parametrize("factor_types", FACTOR_TYPES)
@pytest.mark.parametrize("rank", [0, 1, 5, 16, 33, 300])
def test_low_rank(isa: str, level: int, rank: int, factor_types: tuple[str, str]) -> None:
    case = random_case(
        np.random.default_rng(3),
        MANY,
        (45, 130),
        rank=rank,
        factor_types=factor_types,
        bias=True,
        accuracy_level=level,
    )
    check(case, isa)


@pytest.mark.parametrize(("isa", "level"), KERNELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh"])
def test_a_decoder_layers_fusions(
    isa: str, level: int, dtype: type[np.generic], activation: str
) -> None:
    """Parts end inside a pair of tiles, and each has down-projected rows of its own."""
    rng = np.random.default_rng(4)
    for rank in (None, 48):
        case = random_case(
            rng,
            MANY,
            (224, 200),
            bits=2,
            rank=rank,
            parts=(112, 112) if activation else (144, 48, 32),
            activation=activation,
            bias=True,
            norm=True,
            residual=True,
            dtype=dtype,
            accuracy_level=level,
        )
        check(case, isa)


@pytest.mark.parametrize(("isa", "level"), KERNELS)
@pytest.mark.parametrize(
    ("rows", "shape"), [(550, (300, 700)), (550, (80, 1100)), (2100, (40, 100))]
)
def test_more_than_a_block_of_everything(
    isa: str, level: int, rows: int, shape: tuple[int, int]
) -> None:
    """Rows, columns, tiles, the second-level cache, and rows that are packed at a time."""
    case = random_case(
        np.random.default_rng(5),
        rows,
        shape,
        group_size=128,
        rank=70,
        residual=True,
        accuracy_level=level,
    )
    check(case, isa)


@pytest.mark.parametrize(("isa", "level"), KERNELS)
def test_threads_do_not_change_a_bit(isa: str, level: int) -> None:
    case = random_case(
        np.random.default_rng(6),
        MANY,
        (592, 640),
        rank=64,
        parts=(320, 272),
        factor_types=("int8", "float16"),
        norm=True,
        accuracy_level=level,
    )

    def together(_pool: int, count: int, task: Callable[[int, int], None], data: int) -> None:
        counts.append(count)
        threads = [threading.Thread(target=task, args=(data, index)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    counts: list[int] = []
    call = native.prepare(case)
    threads = native.Threads(native.Run(together), None)
    native.require(isa)
    assert native.call(call.matmul, INSTRUCTION_SETS[isa], threads) == native.OK
    alone = native.multiply(case, instruction_set=isa)
    backwards = native.multiply(
        case, instruction_set=isa, order=lambda count: list(reversed(range(count)))
    )
    assert len(counts) == 1
    np.testing.assert_array_equal(call.y, alone)
    np.testing.assert_array_equal(backwards, alone)


@pytest.mark.parametrize(("isa", "level"), KERNELS)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rank", [None, 16])
def test_nan_and_infinity_propagate(isa: str, level: int, special: float, rank: int | None) -> None:
    case = random_case(np.random.default_rng(7), MANY, (35, 99), rank=rank, accuracy_level=level)
    case.x[40, 98] = special
    actual = native.multiply(case, instruction_set=isa)
    assert np.isfinite(np.delete(actual, 40, axis=0)).all()
    if level == 4:
        assert np.isnan(actual[40]).all()
    elif rank is None:
        with np.errstate(invalid="ignore"):  # infinity times the code that means 0
            expected = case.expected
        np.testing.assert_array_equal(actual[40], expected[40].astype(np.float32))
    else:
        assert not np.isfinite(actual[40]).any()


@pytest.mark.parametrize(("isa", "level"), KERNELS)
def test_infinite_scale_of_a_short_group(isa: str, level: int) -> None:
    """What pads a group up to a panel's columns has no part in the product."""
    case = random_case(
        np.random.default_rng(8),
        MANY,
        (3, 81),
        bits=2,
        group_size=16,
        zero_points=False,
        accuracy_level=level,
    )
    case.weight.packed[:, 5] = 0b11
    case.weight.scales[1, 5] = np.inf
    case.x[:] = 1
    actual = native.multiply(case, instruction_set=isa)
    if (isa, level) == ("amx", 4):  # subtracts a multiple of the scale
        assert not np.isfinite(actual[:, 1]).any()
    else:
        assert (actual[:, 1] == np.inf).all()
    assert np.isfinite(actual[:, [0, 2]]).all()


@pytest.mark.parametrize(("isa", "level"), KERNELS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("in_features", [72, 136, 259])
def test_nothing_is_read_past_an_operand(isa: str, level: int, bits: int, in_features: int) -> None:
    for factor_types in (("float16", "float32"), ("int8", "int8")):
        case = random_case(
            np.random.default_rng(9),
            MANY,
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
        actual = native.multiply(case, instruction_set=isa, place=native.before_a_guard_page)
        assert_case(actual, rounded_as(case, isa))


@pytest.mark.parametrize(("isa", "level"), KERNELS)
def test_residual_may_be_the_output(isa: str, level: int) -> None:
    case = random_case(
        np.random.default_rng(10), MANY, (40, 64), residual=True, accuracy_level=level
    )
    call = native.prepare(case)
    assert case.residual is not None
    call.y[:] = case.residual
    call.matmul.residual = call.matmul.y
    native.require(isa)
    assert native.call(call.matmul, INSTRUCTION_SETS[isa]) == native.OK
    assert_case(call.y, rounded_as(case, isa))


@pytest.mark.parametrize("bits", BITS)
def test_bfloat16_is_as_exact_as_rounding_to_nearest(bits: int) -> None:
    """Truncated weights are neither too small nor further off than rounded ones, on average.

    Rounding to nearest is off by at most a unit roundoff, evenly spread: its mean square is a third
    of that of the bound, for X and for the weight. int8 is further off on such data.
    """
    case = random_case(np.random.default_rng(11), 128, (128, 1024), bits=bits, accuracy_level=4)
    actual = native.multiply(case, instruction_set="amx")
    expected = case.expected
    error = actual - expected
    signal = np.sqrt(np.mean(expected**2))
    assert np.sqrt(np.mean(error**2)) < BFLOAT16 * np.sqrt(2 / 3) * signal
    # Whether all weights are too small or too large; 16384 sums say so to a 128th of their error.
    assert abs(np.mean(error * expected)) / signal**2 < BFLOAT16 / 16
    int8 = native.multiply(case, instruction_set="avx512_vnni")
    assert np.mean((int8 - expected) ** 2) > np.mean(error**2)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    kernels = [kernel for kernel in KERNELS if kernel[0] in native.supported()]
    if not kernels:
        pytest.skip("this processor has no kernel for many rows")
    isa, level = draw(st.sampled_from(kernels))
    gated = draw(st.booleans())
    parts: tuple[int, ...] = (16 * draw(st.integers(1, 5)),) * 2 if gated else ()
    rank = draw(st.sampled_from([None, 0, 16, 48]) if gated else st.none() | st.integers(0, 70))
    case = random_case(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        draw(st.integers(8, 150)),
        (sum(parts) or draw(st.integers(1, 100)), draw(st.integers(64, 600))),
        bits=draw(st.sampled_from(BITS)),
        group_size=8 * draw(st.integers(1, 20)),
        zero_points=draw(st.booleans()),
        rank=rank,
        factor_types=draw(st.sampled_from(FACTOR_TYPES)),
        parts=parts,
        activation="silu" if gated else "",
        bias=draw(st.booleans()),
        norm=draw(st.booleans()),
        residual=draw(st.booleans()),
        accuracy_level=level,
    )
    check(case, isa)
