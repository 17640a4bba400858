"""GPTQ against optimal brain quantization, column by column in float64 with explicit inverses."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.passes.solvers.factor_types import fit_scales, round_to_nearest
from eoracc.passes.solvers.factors import weighted_norm
from eoracc.passes.solvers.gptq import feedback, gptq, round_rows
from eoracc.passes.solvers.grid import find_grid, quantize, to_nbits
from eoracc.plugins.operands.codes import BITS
from eoracc.plugins.operands.weight import NBitsWeight
from tests.passes.groups import correlated

FLOAT_EPS = float(np.finfo(np.float32).eps)

Problem = tuple[NDArray[np.float32], NDArray[np.float64]]


def problem(rows: int = 20, columns: int = 72, tokens: int = 300, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    inputs = correlated(rng, tokens, columns).astype(np.float64)
    return weight, inputs.T @ inputs


def error_of(problem: Problem, quantized: NBitsWeight) -> float:
    weight, gram = problem
    return weighted_norm(weight - quantized.dequantize(), gram)


def rounded_to_nearest(problem: Problem, **options: object) -> NBitsWeight:
    weight, gram = problem
    grid = find_grid(weight, importance=np.diagonal(gram), **options)  # type: ignore[arg-type]
    return to_nbits(quantize(weight, grid), grid)


def steps_from_nearest(
    weight: NDArray[np.float32],
    gram: NDArray[np.float64],
    quantized: NBitsWeight,
    *,
    order: NDArray[np.intp],
    damping: float,
) -> NDArray[np.float64]:
    """How far, in steps, each code lies beyond the nearest one to what OBQ wants there.

    Frantar et al., arXiv:2210.17323, eq. 2-3, with the inverse updated by one elimination a column.
    It is given the codes that were chosen, so that one tie does not make all that follows differ.
    """
    columns = weight.shape[1]
    inverse = np.linalg.inv(gram + damping * np.diagonal(gram).mean() * np.eye(columns))
    wanted = weight.astype(np.float64)
    chosen = quantized.dequantize().astype(np.float64)
    scales = np.repeat(quantized.scales.astype(np.float64), quantized.group_size, 1)[:, :columns]
    codes = quantized.codes().astype(np.float64)
    top = 2**quantized.bits - 1
    excess = np.zeros(weight.shape)
    for column in order:
        away = (wanted[:, column] - chosen[:, column]) / scales[:, column]
        clipped = ((codes[:, column] == top) & (away > 0)) | ((codes[:, column] == 0) & (away < 0))
        excess[:, column] = np.where(clipped, 0, np.maximum(np.abs(away) - 0.5, 0))
        error = (wanted[:, column] - chosen[:, column]) / inverse[column, column]
        wanted -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column] = inverse[:, column] = 0
        inverse[column, column] = 1
    return excess


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 40, -1])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_is_the_nearest_to_what_obq_wants(
    bits: int, group_size: int, symmetric: bool, act_order: bool
) -> None:
    weight, gram = problem(columns=300, rows=5, tokens=700)
    quantized = gptq(
        weight,
        gram,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        damping=0.01,
    )
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(300)
    excess = steps_from_nearest(weight, gram, quantized, order=order, damping=0.01)
    # Float32 sums over the columns before, of terms no larger than a weight, in steps of a scale.
    smallest = float(quantized.scales.min())
    limit = 300 * FLOAT_EPS * 4 * float(np.abs(weight).max()) / smallest
    assert limit < 0.5
    assert excess.max() < limit


def test_the_oracle_notices_rounding_to_nearest() -> None:
    weight, gram = problem()
    quantized = rounded_to_nearest((weight, gram), bits=4, group_size=16)
    excess = steps_from_nearest(weight, gram, quantized, order=np.arange(72), damping=0.01)
    assert excess.max() > 0.2


def test_feedback_is_the_unit_triangular_factor_of_the_damped_gram() -> None:
    _, gram = problem()
    factored = feedback(gram, damping=0.02, act_order=True)
    unit = factored.weights.astype(np.float64).T
    damped = gram + 0.02 * np.diagonal(gram).mean() * np.eye(len(gram))
    np.testing.assert_allclose(
        (unit * factored.pivots) @ unit.T,
        damped[np.ix_(factored.order, factored.order)],
        rtol=0,
        atol=2 * FLOAT_EPS * np.trace(gram),
    )
    assert not np.tril(unit, -1).any()
    assert (np.diff(np.diagonal(gram)[factored.order]) <= 0).all()
    assert factored.damping == 0.02


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_an_identity_gram_rounds_to_nearest(
    group_size: int, symmetric: bool, act_order: bool
) -> None:
    weight, _ = problem()
    options = {"bits": 3, "group_size": group_size, "symmetric": symmetric}
    solved = gptq(weight, 5.0 * np.eye(72), act_order=act_order, **options)  # type: ignore[arg-type]
    nearest = rounded_to_nearest((weight, np.eye(72)), **options)
    np.testing.assert_array_equal(solved.codes(), nearest.codes())
    np.testing.assert_array_equal(solved.scales, nearest.scales)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("bits", BITS)
def test_the_output_error_is_below_that_of_rounding_to_nearest(
    bits: int, group_size: int, act_order: bool, seed: int
) -> None:
    case = problem(seed=seed)
    solved = gptq(*case, bits=bits, group_size=group_size, act_order=act_order)
    nearest = rounded_to_nearest(case, bits=bits, group_size=group_size)
    assert error_of(case, solved) < 0.8 * error_of(case, nearest)


def test_activation_order_does_not_depend_on_how_columns_are_numbered() -> None:
    weight, gram = problem()
    order = np.random.default_rng(3).permutation(72)
    options = {"bits": 3, "group_size": -1, "act_order": True, "clip_search": False}
    straight = gptq(weight, gram, **options)  # type: ignore[arg-type]
    shuffled = gptq(weight[:, order], gram[np.ix_(order, order)], **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(straight.codes()[:, order], shuffled.codes())


@pytest.mark.parametrize("act_order", [False, True])
def test_stacked_linears_are_solved_as_if_alone(act_order: bool) -> None:
    weight, gram = problem(rows=24)
    factored = feedback(gram, act_order=act_order)
    stacked = gptq(weight, factored, bits=3, group_size=24)
    alone = gptq(weight[8:], factored, bits=3, group_size=24)
    # The rows are independent; only the order of float32 sums may differ with their number.
    same = (stacked.codes()[8:] == alone.codes()).all(axis=1)
    assert same.mean() > 0.7
    assert error_of((weight[8:], gram), alone) == pytest.approx(
        weighted_norm(weight[8:] - stacked.dequantize()[8:], gram), rel=0.02
    )


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_are_rounded_to_nearest_and_disturb_nothing(act_order: bool) -> None:
    weight, gram = problem()
    dead = np.zeros(72, bool)
    dead[[3, 40, 71]] = True
    gram[dead] = gram[:, dead] = 0
    for damping in (0.0, 0.01):
        solved = gptq(weight, gram, bits=4, group_size=-1, act_order=act_order, damping=damping)
        step = solved.scales.astype(np.float32)
        assert (np.abs(solved.dequantize() - weight)[:, dead] <= step * 2).all()
        assert error_of((weight, gram), solved) < error_of(
            (weight, gram), rounded_to_nearest((weight, gram), bits=4, group_size=-1)
        )


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_singular_gram_raises_the_damping(tokens: int) -> None:
    weight, gram = problem(tokens=tokens)
    factored = feedback(gram, damping=0.0)
    assert factored.damping > 0
    assert np.isfinite(factored.weights).all()
    solved = gptq(weight, factored, bits=3, group_size=16)
    assert np.isfinite(solved.dequantize()).all()
    assert feedback(problem()[1], damping=0.0).damping == 0


def test_a_gram_of_zeros_rounds_to_nearest() -> None:
    weight, _ = problem()
    solved = gptq(weight, np.zeros((72, 72)), bits=4, group_size=16, damping=0.0)
    nearest = rounded_to_nearest((weight, np.eye(72)), bits=4, group_size=16)
    np.testing.assert_array_equal(solved.codes(), nearest.codes())


def test_rows_are_rounded_with_feedback() -> None:
    """Loses half of what rounding to nearest does; the same where columns are independent."""
    rng = np.random.default_rng(0)
    inputs = correlated(rng, 400, 150).astype(np.float64)
    gram = inputs.T @ inputs
    weight = rng.standard_normal((20, 150)).astype(np.float32)
    weight[3] = 0
    scale = fit_scales(weight.astype(np.float64), bits=4)
    nearest = round_to_nearest(weight.astype(np.float64), scale, bits=4)
    codes = round_rows(weight, feedback(gram), scale, largest=7)
    assert codes.dtype == np.int8
    assert np.abs(codes).max() <= 7
    assert not codes[3].any()

    def lost(rounded: NDArray[np.int8]) -> float:
        return weighted_norm(weight - rounded * scale[:, None], gram)

    assert lost(codes) < 0.5 * lost(nearest)
    alone = round_rows(weight, feedback(np.diag(np.arange(1.0, 151))), scale, largest=7)
    np.testing.assert_array_equal(alone, nearest)
