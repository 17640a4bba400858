from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
from typing_extensions import override

from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.caldera import Caldera
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.compensate.quantize_factors import QuantizeFactors
from eoracc.passes.held_out import FACTORS_DROPPED, call_checked, error_change, squared_error
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.alternation import Iterate
from eoracc.passes.solvers.factor_types import store_factors
from eoracc.passes.solvers.gram import HeldOut
from tests.passes.groups import correlated, make_group

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.compensate.base import Factors
    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.lost_output import LostOutput

NAMES = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
ROWS, COLUMNS, TOKENS = 24, 32, 200
RNG = np.random.default_rng(11)
SEEN = correlated(RNG, TOKENS, COLUMNS)


@dataclass(frozen=True, kw_only=True)
class Opposed(Compensation):
    """Adds the error once more where it should take it away."""

    name: ClassVar[str] = "opposed"

    @override
    def factors(self, lost: LostOutput, rank: int) -> Factors:
        u, s, v = np.linalg.svd(np.float64(lost.delta), full_matrices=False)
        return -u[:, :rank] * s[:rank], v[:rank]


@dataclass(frozen=True, kw_only=True)
class Tossed(Opposed):
    """Takes the error away from some linears, and adds it to others."""

    name: ClassVar[str] = "tossed"

    @override
    def factors(self, lost: LostOutput, rank: int) -> Factors:
        b, a = super().factors(lost, rank)
        return (b if lost.delta[0, 0] > 0 else -b), a


def quantized(held_out: NDArray[np.float32] | None) -> LinearGroup:
    """Two linears, rounded to two bits, with ``held_out`` tokens."""
    weights = {name: RNG.standard_normal((ROWS, COLUMNS)).astype(np.float32) for name in NAMES}
    group = make_group(weights, SEEN)
    QuantizeRtn(bits=2, group_size=16).call(group)
    if held_out is not None:
        hold_out(group, held_out)
    return group


def hold_out(group: LinearGroup, tokens: NDArray[np.float32]) -> None:
    assert group.gram is not None
    group.gram = replace(group.gram, held_out=HeldOut(tokens))


def codes(linear: Linear) -> list[str]:
    return [warning.code for warning in linear.record.warnings]


def held_out_error(linear: Linear, inputs: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(inputs @ (linear.weight() - linear.effective_weight()).T))


def test_factors_that_help_are_kept() -> None:
    group = quantized(correlated(RNG, 50, COLUMNS))
    call_checked(Eora(rank=4), group)
    assert all(linear.factors is not None and not codes(linear) for linear in group.linears)


def test_factors_that_do_harm_are_dropped_and_reported() -> None:
    tokens = correlated(RNG, 50, COLUMNS)
    group = quantized(tokens)
    bare = [held_out_error(linear, tokens) for linear in group.linears]
    call_checked(Opposed(rank=4, factor_type="float16"), group)
    for linear, error in zip(group.linears, bare, strict=True):
        assert linear.factors is None
        assert held_out_error(linear, tokens) == error
        assert linear.record.errors["opposed"] == linear.record.errors["quantize_rtn"]
        (warning,) = linear.record.warnings
        assert warning.code == FACTORS_DROPPED
        norm = float(np.linalg.norm(tokens @ linear.weight().T))
        figures = warning.figures
        assert figures["held_out_tokens"] == len(tokens)
        assert figures["held_out_error_without"] == pytest.approx(error / norm, rel=1e-4)
        assert figures["held_out_error_with"] > figures["held_out_error_without"]
        assert "'opposed'" in warning.message


def test_the_decision_is_that_of_the_errors() -> None:
    weights = {
        f"model.layers.{block}.mlp.up_proj": RNG.standard_normal((ROWS, COLUMNS)).astype(np.float32)
        for block in range(8)
    }
    group = make_group(weights, SEEN)
    QuantizeRtn(bits=2, group_size=16).call(group)
    solver = Tossed(rank=4, factor_type="float16")
    tokens = correlated(RNG, 50, COLUMNS)
    before = [held_out_error(linear, tokens) for linear in group.linears]
    solver.call(group)
    after = [held_out_error(linear, tokens) for linear in group.linears]
    for linear in group.linears:
        linear.compensate(None)
    hold_out(group, tokens)
    call_checked(solver, group)
    dropped = [linear.factors is None for linear in group.linears]
    assert dropped == [new > old for new, old in zip(after, before, strict=True)]
    assert 0 < sum(dropped) < len(dropped)


def test_without_held_out_text_nothing_is_dropped() -> None:
    group = quantized(None)
    call_checked(Opposed(rank=4, factor_type="float16"), group)
    assert all(linear.factors is not None and not codes(linear) for linear in group.linears)


def test_earlier_factors_are_kept_where_further_ones_do_harm() -> None:
    group = quantized(correlated(RNG, 50, COLUMNS))
    call_checked(Eora(rank=4, factor_type="float16"), group)
    first = [linear.factors for linear in group.linears]
    call_checked(Opposed(rank=4, factor_type="float16"), group)
    assert [linear.factors for linear in group.linears] == first
    assert all(codes(linear) == [FACTORS_DROPPED] for linear in group.linears)


def test_rounded_factors_are_compared_with_none() -> None:
    tokens = correlated(RNG, 50, COLUMNS)
    group = quantized(tokens)
    call_checked(Eora(rank=4, factor_type="float16"), group)
    exact = [held_out_error(linear, tokens) for linear in group.linears]
    call_checked(QuantizeFactors(bits=4), group)
    rounded = [held_out_error(linear, tokens) for linear in group.linears]
    assert any(worse > error for worse, error in zip(rounded, exact, strict=True))
    assert all(linear.factors is not None and linear.factors.bits == 4 for linear in group.linears)


def test_codes_that_were_chosen_with_the_factors_go_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = quantized(correlated(RNG, 50, COLUMNS))
    weights = [linear.compressed for linear in group.linears]
    errors = [linear.record.errors["quantize_rtn"] for linear in group.linears]

    def alternate(
        target: NDArray[np.float32], *_: object, **__: object
    ) -> tuple[Iterate, list[float]]:
        weight = QuantizeRtn(bits=2, group_size=16).requantize(2 * target, None)
        up, down = np.ones((ROWS, 1)), np.ones((1, COLUMNS))
        return Iterate(weight, store_factors(up, down, "float16"), 0.0), []

    monkeypatch.setattr("eoracc.passes.compensate.caldera.alternate", alternate)
    call_checked(Caldera(rank=1), group)
    assert [linear.compressed for linear in group.linears] == weights
    assert all(linear.factors is None for linear in group.linears)
    assert [linear.record.errors["caldera"] for linear in group.linears] == errors


@pytest.mark.parametrize("match", ["weights", "outputs"])
@pytest.mark.parametrize("tokens", ["unit", "equal"])
def test_held_out_tokens_count_as_those_of_calibration(tokens: str, match: str) -> None:
    group = quantized(None)
    sizes = np.geomspace(1, 100, 2 * TOKENS, dtype=np.float32)[:, None]
    shown, original = np.vstack([SEEN, SEEN]) * sizes, np.vstack([SEEN, -SEEN]) * sizes
    weights = np.repeat(np.array([1, 0], np.float32), TOKENS)  # the second half is padding
    group.activations = group.held_out = lambda: iter([(shown, weights)])
    group.originals = group.held_out_originals = lambda: iter([(original + 1, weights)])
    Calibrate(tokens=tokens, match=match).call(group)  # type: ignore[arg-type]
    assert group.gram is not None
    held_out = group.gram.held_out
    assert held_out is not None
    scale = np.linalg.norm(SEEN * sizes[:TOKENS], axis=1) if tokens == "unit" else np.ones(TOKENS)
    tolerance = COLUMNS * 2.0**-24
    np.testing.assert_allclose(held_out.inputs, shown[:TOKENS] / scale[:, None], rtol=tolerance)
    if match == "weights":
        assert held_out.differences is None
    else:
        assert held_out.differences is not None
        expected = (original + 1 - shown)[:TOKENS] / scale[:, None]
        np.testing.assert_allclose(held_out.differences, expected, rtol=tolerance)


def test_factors_for_matched_outputs_are_measured_on_those() -> None:
    # The target of calibration is far from what held-out text asks for.
    group = quantized(None)
    tokens = correlated(RNG, 50, COLUMNS)
    assert group.gram is not None
    matching = np.float32(3) * np.eye(COLUMNS, dtype=np.float32)
    exact, fitted = (
        replace(group.gram, matching=matching, held_out=HeldOut(tokens, factor * tokens))
        for factor in (np.float32(0), np.float32(3))
    )
    for gram, kept in ((exact, False), (fitted, True)):
        group.gram = gram
        for linear in group.linears:
            linear.compensate(None)
        call_checked(Eora(rank=8, factor_type="float16"), group)
        assert [linear.factors is not None for linear in group.linears] == [kept, kept]


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_change_is_the_difference_of_the_errors(tokens: int, matched: bool, weighed: bool) -> None:
    rng = np.random.default_rng(3)
    rows, columns, rank = 12, 20, 5
    inputs, differences, weight, present, root = (
        np.asarray(rng.standard_normal(shape), np.float32)
        for shape in ((tokens, columns),) * 2 + ((rows, columns),) * 2 + ((rows, rows),)
    )
    held_out = HeldOut(inputs, differences if matched else None)
    factors = store_factors(
        rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns)), "float16"
    )
    wide: NDArray[np.float64] = root.astype(np.float64) if weighed else np.eye(rows)
    original: NDArray[np.float64] = inputs.astype(np.float64) + (
        differences.astype(np.float64) if matched else 0
    )

    def error(product: np.ndarray) -> float:
        left: NDArray[np.float64] = weight @ original.T - (present + product) @ inputs.T.astype(
            np.float64
        )
        return float(np.linalg.norm(wide @ left) ** 2)

    before = error(np.zeros((rows, columns)))
    after = error(factors.up().astype(np.float64) @ factors.down())
    # Three products of float32 follow one another; the terms are of the size of either error.
    tolerance = 3 * (rows + columns + rank) * 2.0**-24 * (before + after)
    assert tolerance < 0.01 * abs(after - before)
    chosen = root if weighed else None
    change = error_change(held_out, weight, present, factors, chosen)
    assert abs(change - (after - before)) < tolerance
    assert abs(squared_error(held_out, weight, present, chosen) - before) < tolerance


def test_no_factors_change_nothing() -> None:
    ones = np.ones((2, 3), np.float32)
    assert error_change(HeldOut(ones), ones, 0 * ones, None) == 0.0
