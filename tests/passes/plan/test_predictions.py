"""What errors of logits cost, against the divergence itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from eoracc.passes.plan.predictions import prediction_losses, softmax

Float = np.ndarray[Any, np.dtype[np.float64]]


def divergence(logits: Float, errors: Float) -> Float:
    """KL(p || q) of each token, in float64."""

    def log_softmax(z: Float) -> Float:
        top = z.max(1, keepdims=True)
        found: Float = z - top - np.log(np.exp(z - top).sum(1, keepdims=True))
        return found

    before, after = log_softmax(logits), log_softmax(logits + errors)
    return np.asarray((np.exp(before) * (before - after)).sum(1), np.float64)


def test_half_of_it_is_the_divergence_of_small_errors() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((20, 300))
    for scale in (1e-1, 1e-2):
        errors = scale * rng.standard_normal(logits.shape)
        losses = prediction_losses(softmax(logits.astype(np.float32)), errors.astype(np.float32))
        exact = divergence(logits, errors)
        # The third-order term is at most the largest error times the second-order one.
        assert np.abs(losses / 2 / exact - 1).max() < np.abs(errors).max()


def test_what_all_logits_share_costs_nothing() -> None:
    rng = np.random.default_rng(1)
    probabilities = softmax(rng.standard_normal((5, 100)).astype(np.float32))
    errors = 1e-3 * rng.standard_normal((5, 100)).astype(np.float32)
    np.testing.assert_allclose(
        prediction_losses(probabilities, errors + np.float32(100)),
        prediction_losses(probabilities, errors),
        # Each error is rounded at 100.
        rtol=4 * 100 * 2.0**-24 / 1e-3 * 10,
    )
