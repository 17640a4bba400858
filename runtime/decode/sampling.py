"""Choose the next token, on arrays: greedily, or from a filtered distribution.

The only state is the caller's generator of random numbers, one for each request. Each token draws
one number, so that the tokens of a request do not depend on the rest of its batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from eoracc.errors import BackendError, EoraccError, RequestError
from eoracc.printable import printable
from eoracc.runtime.request import AdapterChoice, TokenLogprob, adapter_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = [
    "LogitsError",
    "choose",
    "distribution",
    "log_normalizer",
    "target_logprobs",
    "token_logprob",
]

_DEPTHS = (2.0, 4.0, 8.0, 16.0, np.inf)
"""Distances below the highest logit in which to search for the most likely tokens, in turn."""

_COLDEST = 1e-30
"""Lowest temperature to divide by; there the most likely token is practically certain."""


class LogitsError(BackendError):
    """Logits that are not finite: of a damaged model, or of an adapter with huge factors."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not finite: check the artifact (eoracc verify)")

    def of(self, adapter: AdapterChoice) -> EoraccError:
        """The error of a request: its own fault if it asks for an adapter."""
        names = [f"'{name}' by {weight:g}" for name, weight in adapter_weights(adapter)]
        if not names:
            return self
        return RequestError(
            f"adapter: {printable(' and '.join(names))} takes the logits beyond the range of "
            "float32: choose a smaller weight or another adapter"
        )


def choose(
    logits: NDArray[np.float32],
    draw: Callable[[], float],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """The next token.

    Args:
      logits: ``float32 [V]``.
      draw: a random number of [0, 1); called once, and not where the choice is certain.
      temperature: 0 chooses the most likely token, among equals the lowest id.
      top_k: see :func:`distribution`.
      top_p: see :func:`distribution`.
      min_p: see :func:`distribution`.

    Raises:
      LogitsError: a logit is NaN, or none is finite.
    """
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        raise LogitsError
    if temperature == 0 or top_k == 1:
        return best
    ids, probabilities = distribution(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    cumulative = probabilities.cumsum()
    # The last sum may be below 1 by rounding.
    place = cumulative.searchsorted(draw() * cumulative[-1], side="right")
    return int(ids[min(place, len(ids) - 1)])


@np.errstate(over="ignore")  # a tiny temperature leaves one token, and others at -inf
def distribution(
    logits: NDArray[np.float32],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The distribution that the next token is drawn from.

    The filters apply in the order of transformers: of the softmax of ``logits / temperature`` the
    ``top_k`` most likely tokens; of those, normalised, the fewest most likely ones that make up
    ``top_p``; and of those the ones at least ``min_p`` times as likely as the first. Among equally
    likely tokens lower ids come first. At least one token is left.

    Args:
      logits: ``float32 [V]``, one of them finite, none NaN.
      temperature: above 0.
      top_k: 0 for all.
      top_p: 1 for all.
      min_p: 0 for all.

    Returns:
      Ids in ascending order and their probabilities, ``float64``, which add up to 1.

    >>> logits = np.log(np.array([0.1, 0.4, 0.3, 0.2], np.float32))
    >>> ids, probabilities = distribution(logits, temperature=1.0, top_p=0.6)
    >>> ids.tolist(), probabilities.round(3).tolist()
    ([1, 2], [0.571, 0.429])
    """
    highest = logits.max()
    if 0 < top_k < len(logits):
        ids = _largest(logits, top_k)
    elif top_p < 1:
        ids = _head(logits, temperature, top_p)
    elif min_p > 0:
        # A few too many; those that are too unlikely are removed below.
        ids = np.flatnonzero(logits >= highest + 1.01 * temperature * math.log(min_p))
    else:
        weights = _weights(logits, highest, temperature)
        return np.arange(len(weights)), _normalized(weights)
    weights = _weights(logits[ids], highest, temperature)
    if top_p < 1 and 0 < top_k < len(logits):
        count = _count(weights, top_p * _total(weights))
        ids, weights = ids[:count], weights[:count]
    # The largest weight is exp(0).
    kept = weights >= min_p
    ids, weights = ids[kept], weights[kept]
    order = np.argsort(ids)
    return ids[order], _normalized(weights[order])


def _normalized(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    return weights / _total(weights)


def _total(weights: NDArray[np.float32]) -> np.float64:
    total: np.float64 = weights.sum(dtype=np.float64)
    return total


def _weights(
    logits: NDArray[np.float32], highest: np.float32, temperature: float
) -> NDArray[np.float32]:
    """``exp((logits - highest) / temperature)``, in float32 for speed: ``[V]`` is large."""
    scaled = logits - highest
    scaled /= np.float32(max(temperature, _COLDEST))
    weights: NDArray[np.float32] = np.exp(scaled, out=scaled)
    return weights


def _head(logits: NDArray[np.float32], temperature: float, top_p: float) -> NDArray[np.intp]:
    """The fewest most likely tokens that make up ``top_p``, most likely first.

    Sorts only tokens close to the most likely one, which are usually few.
    """
    highest = logits.max()
    wanted = top_p * _total(_weights(logits, highest, temperature))
    for depth in _DEPTHS:
        ids = np.flatnonzero(logits >= highest - depth * temperature)
        weights = _weights(logits[ids], highest, temperature)
        if _total(weights) >= wanted:
            break
    order = np.argsort(-weights, kind="stable")
    return ids[order[: _count(weights[order], wanted)]]


def _count(descending: NDArray[np.float32], wanted: float) -> int:
    """Number of leading values whose sum reaches ``wanted``; all if it never does."""
    cumulative = descending.cumsum(dtype=np.float64)
    return min(int(cumulative.searchsorted(wanted)) + 1, len(descending))


def _largest(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The ``count`` most likely tokens, most likely first, lower ids first among equals."""
    highest = logits.max()
    for depth in _DEPTHS:
        ids = np.flatnonzero(logits >= highest - depth)
        if len(ids) >= count:
            break
    order = np.argsort(-logits[ids], kind="stable")
    return ids[order[:count]]


def log_normalizer(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """``log(sum(exp(logits)))`` along the last axis.

    Args:
      logits: ``float32 [..., V]``.

    Returns:
      ``float64 [...]``.
    """
    highest = logits.max(axis=-1, keepdims=True)
    total = np.exp(logits - highest).sum(axis=-1, dtype=np.float64)
    result: NDArray[np.float64] = np.log(total) + highest[..., 0]
    return result


def token_logprob(
    logits: NDArray[np.float32], token: int, top: int, *, offset: int = 0
) -> TokenLogprob:
    """Log-probabilities of ``token`` and of the ``top`` most likely tokens.

    Args:
      logits: ``float32 [V]``.
      token: its id.
      top: number of most likely tokens to list, which may include ``token``.
      offset: of the token in its text, in characters.
    """
    normalizer = float(log_normalizer(logits))
    listed = _largest(logits, min(top, len(logits))) if top else ()
    return TokenLogprob(
        token,
        float(logits[token]) - normalizer,
        tuple((int(index), float(logits[index]) - normalizer) for index in listed),
        offset,
    )


def target_logprobs(
    logits: NDArray[np.float32], targets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probabilities of given tokens.

    Args:
      logits: ``float32 [N, V]``.
      targets: ``int64 [N]``.

    Returns:
      Natural logarithms of probabilities, ``float64 [N]``, and whether greedy decoding chooses the
      token, ``bool [N]``.

    Raises:
      LogitsError: a logit is NaN, or none is finite.
    """
    if not np.isfinite(logits.max(axis=-1)).all():
        raise LogitsError
    logprobs = logits[np.arange(len(targets)), targets] - log_normalizer(logits)
    return logprobs, logits.argmax(axis=-1) == targets
