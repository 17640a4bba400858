"""What matching outputs makes of a weight, and what passes make of that target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.compiler.sweep.products import gram_products
from eoracc.errors import PassError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.compensate.lqer import Lqer
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.gram import accumulate_gram, output_matching
from tests.passes.groups import make_group, ones

if TYPE_CHECKING:
    from eoracc.passes.base import LayerPass
    from eoracc.passes.calibrate import Precision
    from eoracc.passes.graph.linears import LinearGroup

WIDTH = 24
HEIGHT = 40
NAME = "model.layers.0.self_attn.q_proj"
OUTPUTS = Calibrate(match="outputs", tokens="equal", precision="float32")

Float = NDArray[np.float32]
Double = NDArray[np.float64]


def inputs(tokens: int = 200) -> tuple[Float, Float]:
    """What the original model hands a linear, and what a prefix that has lost something does."""
    rng = np.random.default_rng(3)
    original = rng.standard_normal((tokens, WIDTH)).astype(np.float32)
    mixing = np.eye(WIDTH) + 0.2 * rng.standard_normal((WIDTH, WIDTH))
    return original, (original @ mixing + 0.01 * rng.standard_normal(original.shape)).astype(
        np.float32
    )


def shown(
    original: Float | None, seen: Float, weights: Float | None = None, *, name: str = NAME
) -> LinearGroup:
    """A group that has seen those activations, in two batches."""
    weight = np.random.default_rng(1).standard_normal((HEIGHT, WIDTH)).astype(np.float32)
    group = make_group({name: weight})
    counts = ones(len(seen)) if weights is None else weights
    cut = len(seen) // 3
    parts = (slice(None, cut), slice(cut, None))
    group.activations = lambda: iter([(seen[part], counts[part]) for part in parts])
    if original is not None:
        group.originals = lambda: iter([(original[part], counts[part]) for part in parts])
    return group


def target(group: LinearGroup) -> Float:
    assert group.gram is not None
    return group.gram.target(group.linears[0].weight())


def oracle(weight: Float, original: Float, seen: Float, counts: Float) -> Double:
    """The weight that a ridge regression of ``W X`` on ``X~`` finds, in float64, by least squares.

    No Gram is formed: minimise ``||T X~ - W X||^2 + ridge ||T - W||^2`` over the stacked rows.
    """
    roots = np.sqrt(counts.astype(np.float64))[:, None]
    wide, reached = roots * original, roots * seen
    ridge = 0.01 * (reached**2).sum() / WIDTH
    rows = np.concatenate([reached, np.sqrt(ridge) * np.eye(WIDTH)])
    wanted = np.concatenate([wide @ weight.T, np.sqrt(ridge) * weight.T])
    found: Double = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    return found


def tolerance(weight: Float, original: Float, seen: Float, counts: Float) -> float:
    """How far float32 products may move the target, in Frobenius norm.

    ``M = C G^-1`` moves by ``(|dC| + |M| |dG|) / min eigenvalue of G``. Sums of ``n`` products in
    float32 are off by ``n u`` of the sum of magnitudes, as are the differences that they start
    from by ``u``; the target itself is rounded once, and its product with W is one of ``K``.
    """
    unit = 2.0**-24
    roots = np.sqrt(counts.astype(np.float64))[:, None]
    wide, reached = roots * original, roots * seen
    gram, cross = reached.T @ reached, (wide - reached).T @ reached
    damped = gram + 0.01 * np.trace(gram) / WIDTH * np.eye(WIDTH)
    matching = np.linalg.solve(damped, cross.T).T
    count = len(seen) + 4
    moved_cross = count * unit * np.linalg.norm(np.abs(wide - reached).T @ np.abs(reached))
    moved_gram = count * unit * np.linalg.norm(np.abs(reached).T @ np.abs(reached))
    least = np.linalg.eigvalsh(damped)[0]
    moved = (moved_cross + np.linalg.norm(matching, 2) * moved_gram) / least
    rounding = (WIDTH + 2) * unit * (1 + np.linalg.norm(matching)) * np.linalg.norm(weight)
    return float(np.linalg.norm(weight, 2) * moved + rounding)


@pytest.mark.parametrize("tokens", [200, 40])
def test_target_is_the_ridge_regression_of_the_original_outputs(tokens: int) -> None:
    original, seen = inputs(tokens)
    group = shown(original, seen)
    OUTPUTS.call(group)
    weight = group.linears[0].weight()
    counts = ones(tokens)
    expected = oracle(weight, original, seen, counts)
    limit = tolerance(weight, original, seen, counts)
    assert limit < 0.02 * np.linalg.norm(expected - weight)
    assert np.linalg.norm(target(group) - expected) <= limit
    # Which brings outputs nearer, as is its purpose.
    drifted = np.linalg.norm((original - seen) @ weight.T)
    assert np.linalg.norm(original @ weight.T - seen @ target(group).T) < 0.5 * drifted


def test_tokens_count_by_their_weight_and_padding_for_nothing() -> None:
    original, seen = inputs()
    # Half of the tokens drift the other way, and count for little.
    original[:100], seen[:100] = seen[:100].copy(), original[:100].copy()
    counts = np.repeat(np.array([0, 0.25, 1, 2], np.float32), 50)
    weight = shown(None, seen).linears[0].weight()
    expected = oracle(weight, original, seen, counts)
    limit = tolerance(weight, original, seen, counts)
    assert limit < 0.02 * np.linalg.norm(expected - oracle(weight, original, seen, ones(200)))
    for held in (original, np.where(counts[:, None] > 0, original, np.float32(np.nan))):
        group = shown(held, seen, counts)
        OUTPUTS.call(group)
        assert np.linalg.norm(target(group) - expected) <= limit


def test_unit_tokens_count_alike_whatever_their_size() -> None:
    original, seen = inputs()
    # As attention sinks do, a few are larger by orders of magnitude, and drift another way.
    seen[:4] *= 300
    original[:4] = 2 * seen[:4]
    sizes = np.linalg.norm(seen.astype(np.float64), axis=1, keepdims=True)
    unit = (original / sizes).astype(np.float32), (seen / sizes).astype(np.float32)
    group = shown(original, seen)
    Calibrate(match="outputs", tokens="unit", precision="float32").call(group)
    assert group.gram is not None
    assert group.gram.tokens == 200
    # Each of n products is off by the rounding of its factors, their sum by n roundings.
    gram = unit[1].T.astype(np.float64) @ unit[1]
    bound = (200 + 8) * 2.0**-24 * np.abs(unit[1]).T @ np.abs(unit[1])
    assert (np.abs(group.gram.matrix - gram) <= bound).all()
    np.testing.assert_allclose(np.trace(group.gram.matrix), 200, rtol=1e-5)
    weight = group.linears[0].weight()
    expected = oracle(weight, *unit, ones(200))
    limit = 2 * tolerance(weight, *unit, ones(200))  # factors are rounded once more
    plain = shown(original, seen)
    OUTPUTS.call(plain)
    assert limit < 0.02 * np.linalg.norm(expected - weight)
    assert limit < 0.02 * np.linalg.norm(target(plain) - expected)
    assert np.linalg.norm(target(group) - expected) <= limit


def test_unit_tokens_may_be_zero_padding_or_beyond_the_range_of_squares() -> None:
    _, seen = inputs()
    counts = np.repeat(np.array([0, 1], np.float32), 100)
    expected = shown(None, seen[100:])
    unit = Calibrate(tokens="unit", precision="float32")
    unit.call(expected)
    assert expected.gram is not None
    for held in (np.nan, np.inf, 0.0):
        padded = seen * np.float32(2.0**70)
        padded[:100] = held
        group = shown(None, padded, counts)
        unit.call(group)
        assert group.gram is not None
        assert group.gram.tokens == 100
        # The same products in batches cut elsewhere.
        limit = 200 * 2.0**-24 * np.trace(expected.gram.matrix)
        assert np.linalg.norm(group.gram.matrix - expected.gram.matrix) < limit
    group = shown(None, np.zeros_like(seen))
    unit.call(group)
    assert group.gram is not None
    assert not group.gram.matrix.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unit_tokens_that_are_damaged_are_refused(bad: float) -> None:
    _, seen = inputs()
    seen[50, 3] = bad
    with pytest.raises(PassError, match="holds NaN or Inf"):
        Calibrate(tokens="unit").call(shown(None, seen))


def test_singular_grams_are_damped() -> None:
    original, seen = inputs(33)
    original[:, 5] = seen[:, 5] = 0
    seen[:, 7] = seen[:, 6]
    group = shown(original, seen)
    OUTPUTS.call(group)
    weight = group.linears[0].weight()
    assert np.linalg.matrix_rank(seen) < WIDTH
    expected = oracle(weight, original, seen, ones(33))
    limit = tolerance(weight, original, seen, ones(33))
    assert limit < 0.02 * np.linalg.norm(expected - weight)
    assert np.linalg.norm(target(group) - expected) <= limit
    # No token reaches that column: it has nothing to make good.
    np.testing.assert_allclose(target(group)[:, 5], weight[:, 5], rtol=0, atol=limit)


def test_inputs_that_are_always_zero_leave_the_weight() -> None:
    original, seen = inputs()
    group = shown(original, np.zeros_like(seen))
    OUTPUTS.call(group)
    np.testing.assert_array_equal(target(group), group.linears[0].weight())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_where_nothing_drifts_the_target_is_the_weight_bit_for_bit(precision: Precision) -> None:
    original, _ = inputs()
    group = shown(original, original.copy())
    group.products = gram_products(precision)
    Calibrate(match="outputs").call(group)
    np.testing.assert_array_equal(target(group), group.linears[0].weight())


def test_bfloat16_gives_the_target_of_float32_but_for_rounding() -> None:
    original, seen = inputs()
    found = {}
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        group = shown(original, seen)
        group.products = gram_products(precision)
        Calibrate(match="outputs").call(group)
        found[precision] = target(group) - group.linears[0].weight()
    error = np.linalg.norm(found["bfloat16"] - found["float32"])
    # Operands are off by 2^-9 each; the ridge, 1% of the mean, keeps that from growing far.
    assert 0 < error < 8 * 2.0**-9 * np.linalg.norm(found["float32"])


def test_weights_are_matched_by_default_and_where_the_original_was_not_run() -> None:
    original, seen = inputs()
    for calibrate, group in (
        (Calibrate(precision="float32"), shown(original, seen)),
        (OUTPUTS, shown(None, seen)),
    ):
        calibrate.call(group)
        np.testing.assert_array_equal(target(group), group.linears[0].weight())
        assert group.linears[0].record.notes == []


@pytest.mark.parametrize(("tokens", "matched"), [(31, False), (32, True)])
def test_too_few_tokens_are_matched_by_weight_and_noted(tokens: int, *, matched: bool) -> None:
    original, seen = inputs(tokens)
    group = shown(original, seen)
    OUTPUTS.call(group)
    assert np.array_equal(target(group), group.linears[0].weight()) is not matched
    note = (
        "calibrate: matched by its weight, for only 31 calibration tokens reached it "
        "(matching outputs asks for 32)."
    )
    assert group.linears[0].record.notes == ([] if matched else [note])
    head = shown(original[:31], seen[:31], name="lm_head")
    OUTPUTS.call(head)
    assert head.linears[0].record.notes == []


@pytest.mark.parametrize(
    ("value", "where", "match"),
    [
        (np.nan, "original", "its input in the original model holds NaN or Inf"),
        (np.inf, "original", "its input in the original model holds NaN or Inf"),
        (np.nan, "seen", "its input over the calibration text holds NaN or Inf"),
    ],
)
def test_activations_that_are_not_finite(value: float, where: str, match: str) -> None:
    original, seen = inputs()
    {"original": original, "seen": seen}[where][17, 3] = value
    with pytest.raises(PassError, match=f"^{NAME}: {match}"):
        OUTPUTS.call(shown(original, seen))


def test_no_drift_needs_no_solution() -> None:
    gram = accumulate_gram([(inputs()[0], ones(200))], WIDTH).matrix
    assert output_matching(gram, np.zeros_like(gram)) is None


@pytest.mark.parametrize(
    "quantize", [QuantizeGptq(bits=3, group_size=8), QuantizeRtn(bits=3, group_size=8)]
)
def test_quantization_approximates_the_target_and_records_what_it_lacks(
    quantize: QuantizeGptq | QuantizeRtn,
) -> None:
    original, seen = inputs()
    group = shown(original, seen)
    OUTPUTS.call(group)
    quantize.call(group)
    (linear,) = group.linears
    wanted, got = target(group), linear.effective_weight()
    lost = np.linalg.norm(seen @ (wanted - got).T) / np.linalg.norm(seen @ wanted.T)
    assert linear.record.errors[quantize.name] == pytest.approx(lost, rel=1e-3)
    plain = shown(None, seen)
    OUTPUTS.call(plain)
    quantize.call(plain)
    outputs = original @ linear.weight().T
    errors = [
        np.linalg.norm(outputs - seen @ one.linears[0].effective_weight().T)
        for one in (group, plain)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("method", [Eora, Svd, Lqer])
def test_compensation_of_full_rank_gives_the_target_back(method: type[Eora | Svd | Lqer]) -> None:
    group = shown(*inputs())
    passes: tuple[LayerPass, ...] = (
        OUTPUTS,
        QuantizeRtn(bits=2, group_size=8),
        method(rank=WIDTH, factor_type="float16"),
    )
    for one in passes:
        one.call(group)
    (linear,) = group.linears
    assert linear.factors is not None
    # A sum of K products of rounded factors.
    magnitude = np.abs(linear.factors.up()) @ np.abs(linear.factors.down())
    limit = 2.1 * 2.0**-11 * magnitude + 2.0**-20
    assert np.all(np.abs(linear.effective_weight() - target(group)) <= limit)
    assert np.abs(target(group) - linear.weight()).max() > 4 * limit.max()
    assert linear.record.errors[method.name] < 1e-2 * linear.record.errors["quantize_rtn"]
