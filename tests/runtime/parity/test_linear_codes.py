"""Codes of outputs, next to what float64 arithmetic says of errors in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest

from eoracc.runtime.parity.linear_codes import HALF_STEP, decode, encode
from eoracc.runtime.parity.record import ParityLinear

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS, SIZE = 2, 400


def made(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Outputs of some thousand tolerances, which are nearly a product of rows and outputs."""
    rng = np.random.default_rng(seed)
    of_rows, of_outputs = rng.uniform(1, 2, (ROWS, 1)), np.exp(0.4 * rng.standard_normal(SIZE))
    tolerance = 1e-5 * of_rows * of_outputs * rng.uniform(0.98, 1, (ROWS, SIZE))
    outputs = tolerance * rng.uniform(-9000, 9000, (ROWS, SIZE))
    return outputs.astype(np.float32), tolerance.astype(np.float32)


def coded(width: Literal[1, 2], rounding: NDArray[np.float32] | None = None) -> ParityLinear:
    outputs, tolerance = made()
    codes = encode(outputs, tolerance, rounding, width=width)
    return ParityLinear("q_proj", *decode(codes), codes=codes)


@pytest.mark.parametrize("width", [1, 2])
def test_outputs_are_kept_to_half_a_step_and_modulo_the_period(width: Literal[1, 2]) -> None:
    outputs, _ = made()
    linear = coded(width)
    assert linear.codes is not None
    assert linear.codes.period == 256**width / 4
    difference = (outputs.astype(np.float64) - linear.outputs) / linear.tolerance
    periods = np.rint(difference / linear.codes.period)
    # + float32 rounding of an output that is decoded, of 2^16 steps at most
    margin = HALF_STEP * (1 + 2.0**-7)
    assert np.abs(difference - linear.codes.period * periods).max() <= margin
    assert (periods != 0).any()


def test_tolerances_are_not_below_and_hardly_above() -> None:
    _, tolerance = made()
    decoded = coded(1).tolerance
    assert (decoded >= tolerance * (1 - 2.0**-22)).all()
    span = np.log2(tolerance.max(axis=1, keepdims=True) / tolerance).max()
    most = 2 ** (span / 15) / 0.98**2
    assert (decoded <= tolerance * most).all()
    assert most < 1.3


@pytest.mark.parametrize("width", [1, 2])
def test_errors_up_to_the_period_are_found_and_tolerable_ones_pass(width: Literal[1, 2]) -> None:
    outputs, tolerance = made()
    linear = coded(width)
    assert linear.codes is not None
    exact = outputs.astype(np.float64)
    rng = np.random.default_rng(1)
    for _ in range(20):
        sign = rng.choice((-1, 1), outputs.shape)
        right = exact + sign * rng.uniform(0, 0.99, outputs.shape) * tolerance
        assert linear.shares(right.astype(np.float32), rounded=False).max() <= 1
        # Of decoded tolerances, each of which an output may be off by half a step of.
        edge = 1 + 3 * HALF_STEP
        size = rng.uniform(edge, linear.codes.period - edge, outputs.shape)
        wrong = exact + sign * size * linear.tolerance
        assert np.isinf(linear.shares(wrong.astype(np.float32), rounded=False)).all()


def test_one_in_28_larger_errors_escapes_one_byte_and_none_two() -> None:
    outputs, _ = made()
    rng = np.random.default_rng(2)
    escaped = {}
    for width in (1, 2):
        linear = coded(width)
        errors = rng.uniform(100, 10_000, (100, ROWS, SIZE)) * linear.tolerance
        shares = [
            linear.shares(outputs + error.astype(np.float32), rounded=True) for error in errors
        ]
        escaped[width] = float(np.mean(np.stack(shares) <= 1))
    expected = 2 * (1 + HALF_STEP) / 64
    standard_error = np.sqrt(expected / (100 * ROWS * SIZE))
    assert abs(escaped[1] - expected) < 5 * standard_error < expected / 10
    assert expected < 1 / 28
    assert escaped[2] == 0


def test_not_a_number_fails() -> None:
    outputs, _ = made()
    for value in (np.nan, np.inf):
        outputs[1, 7] = value
        shares = coded(1).shares(outputs, rounded=True)
        assert np.isinf(shares[1, 7])
        assert (shares.ravel()[: SIZE + 7] <= 1).all()


def test_rounding_is_allowed_to_the_library_alone() -> None:
    outputs, tolerance = made()
    for times, width in ((3, 1), (100, 2)):
        linear = coded(1, rounding=times * tolerance)
        assert linear.rounding is not None
        assert linear.codes is not None
        assert len(linear.codes.outputs) == width, "one byte would not tell right from wrong"
        assert (linear.rounding >= times * tolerance * (1 - 2.0**-22)).all()
        shifted = outputs + times * tolerance
        assert linear.shares(shifted, rounded=True).max() <= 1
        assert np.isinf(linear.shares(shifted, rounded=False)).all()
        assert np.isinf(linear.shares(outputs + 3 * times * tolerance, rounded=True)).all()
    assert coded(1).rounding is None


def test_linear_of_zeros() -> None:
    zeros = np.zeros((ROWS, 5), np.float32)
    codes = encode(zeros, zeros, zeros)
    linear = ParityLinear("q_proj", *decode(codes), codes=codes)
    assert linear.shares(zeros, rounded=True).max() == 0
    # One code of the smallest weight in float16, times an input: multiples of 2^-32.
    assert 0 < linear.tolerance.max() < 2.0**-32
    for output in (2.0**-32, 127 * 2.0**-12, 1.0, 100.0):
        assert np.isinf(linear.shares(zeros + np.float32(output), rounded=False)).all()
