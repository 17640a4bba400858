"""The effect of errors of logits on the predictions that they make."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["prediction_losses", "softmax"]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities ``[tokens, V]`` of ``logits``; rows add up to 1."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    powers /= powers.sum(axis=1, keepdims=True)
    return np.asarray(powers, np.float32)


def prediction_losses(
    probabilities: NDArray[np.float32], errors: NDArray[np.float32]
) -> NDArray[np.float64]:
    """``dz^T (diag(p) - p p^T) dz`` of each token, the variance of ``dz`` under ``p``.

    Half of it is the divergence ``KL(p || softmax(z + dz))`` in nats, but for terms of third order:
    the Fisher information of a softmax at its logits is ``diag(p) - p p^T``.

    Args:
      probabilities: ``p``, ``[tokens, V]``, of the logits ``z``.
      errors: ``dz``, ``[tokens, V]``.

    >>> prediction_losses(np.array([[0.5, 0.5]], np.float32), np.array([[1.0, -1.0]], np.float32))
    array([1.])
    >>> prediction_losses(np.array([[0.5, 0.5]], np.float32), np.array([[3.0, 3.0]], np.float32))
    array([0.])
    """
    means = np.einsum("tv,tv->t", probabilities, errors, dtype=np.float64)
    # Around the mean, or two large squares would cancel.
    apart = errors - means[:, None].astype(np.float32)
    return np.asarray(
        np.einsum("tv,tv,tv->t", probabilities, apart, apart, dtype=np.float64), np.float64
    )
