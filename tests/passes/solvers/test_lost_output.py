from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eoracc.passes.solvers.gram import Gram
from eoracc.passes.solvers.lost_output import LostOutput
from eoracc.plugins.operands.low_rank import LowRank

RNG = np.random.default_rng(5)
DELTA = RNG.standard_normal((6, 8)).astype(np.float32)
INPUTS = RNG.standard_normal((40, 8))
GRAM = Gram(INPUTS.T @ INPUTS, 40)
FACTORS = LowRank(
    lora_a=RNG.standard_normal((2, 8)).astype(np.float16),
    lora_b=RNG.standard_normal((6, 2)).astype(np.float16),
)
# A dot product over the inputs in float32, against a root that is rounded to float32.
TOLERANCE = 8 * 4 * 2.0**-24


def lost(**changes: object) -> LostOutput:
    whole = LostOutput(DELTA, GRAM, metric=GRAM, over_tokens=DELTA @ GRAM.root)
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_norm_is_the_output_error_over_the_tokens() -> None:
    expected = float(np.linalg.norm(DELTA @ INPUTS.T))
    assert np.linalg.norm(lost().weighted) == pytest.approx(expected, rel=TOLERANCE)
    assert expected > 2 * np.linalg.norm(DELTA)


def test_without_a_metric_all_inputs_weigh_alike() -> None:
    assert lost(metric=None).weighted is DELTA
    assert LostOutput(DELTA).weighted is DELTA


def test_what_is_known_over_the_tokens_is_not_computed_again() -> None:
    known = lost()
    assert known.weighted is known.over_tokens
    computed = lost(over_tokens=None)
    np.testing.assert_array_equal(computed.weighted, DELTA @ GRAM.root)
    assert computed.weighted is computed.weighted


def test_another_metric_weighs_by_its_own_root() -> None:
    metric = GRAM.top(3)
    np.testing.assert_array_equal(lost(metric=metric).weighted, DELTA @ metric.root)


@pytest.mark.parametrize("metric", [GRAM, GRAM.top(3), None])
def test_remainder_is_the_error_without_what_the_factors_restore(metric: Gram | None) -> None:
    rest = lost(metric=metric).remainder(FACTORS)
    expected = DELTA - FACTORS.product()
    np.testing.assert_array_equal(rest.delta, expected)
    weighted = expected if metric is None else expected @ metric.root
    scale = np.linalg.norm(DELTA) + np.linalg.norm(FACTORS.product())
    limit = TOLERANCE * scale * (1 if metric is None else np.linalg.norm(metric.root))
    assert np.linalg.norm(rest.weighted - weighted) <= limit
    assert limit < 1e-3 * np.linalg.norm(weighted)


def test_remainder_without_a_gram() -> None:
    rest = LostOutput(DELTA).remainder(FACTORS)
    assert rest.over_tokens is None
    np.testing.assert_array_equal(rest.weighted, DELTA - FACTORS.product())
