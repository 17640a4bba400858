"""The parameters of a Llama 3 rope scaling, from the divisors that GGUF stores in their place.

A frequency of wavelength ``w`` is divided by 1 where ``w <= original / high_freq_factor``, by
``factor`` where ``w >= original / low_freq_factor``, and between them by
``1 / ((1 - s) / factor + s)`` with ``s = (original / w - low) / (high - low)``. So ``1 / divisor``
is linear in ``1 / w`` between two thresholds, and only these and the factor can be recovered:
``original``, ``low`` and ``high`` enter as two quotients.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["llama3_divisors", "recover_llama3"]

_TOLERANCE = 1e-6
"""Of ``1 / divisor``, which lies in (0, 1]: some roundings of the float32 that wrote it."""

_PUBLISHED_FACTORS = (8.0, 32.0, 16.0, 4.0, 2.0)
_USUAL_LENGTHS = (8192, *(1 << power for power in range(4, 21)))
_LOW, _HIGH = 1.0, 4.0


def llama3_divisors(
    *, theta: float, dims: int, factor: float, low: float, high: float, original: float
) -> np.ndarray:
    """What each frequency is divided by.

    Args:
      theta: the base of the frequencies.
      dims: dimensions that are rotated.
      factor: ``factor`` of the configuration.
      low: ``low_freq_factor``.
      high: ``high_freq_factor``, above ``low``.
      original: ``original_max_position_embeddings``.

    Returns:
      float64 ``[dims / 2]``.

    Example:
      >>> options = {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 32}
      >>> llama3_divisors(theta=10000.0, dims=8, **options).round(3).tolist()
      [1.0, 8.0, 8.0, 8.0]
    """
    smooth = np.clip((original * _per_wavelength(theta, dims) - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def recover_llama3(
    divisors: np.ndarray, *, theta: float, dims: int, hints: Sequence[int] = ()
) -> dict[str, Any] | None:
    """The ``rope_parameters`` that give these divisors, None if there are none.

    Args:
      divisors: float32 ``[dims / 2]``.
      theta: the base of the frequencies.
      dims: dimensions that are rotated.
      hints: lengths that ``original_max_position_embeddings`` may be.

    Returns:
      ``rope_type``, ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
      ``original_max_position_embeddings``, compared with the divisors by computing them again.

    Example:
      >>> options = {"theta": 10000.0, "dims": 64}
      >>> divisors = llama3_divisors(factor=8.0, low=1.0, high=4.0, original=512, **options)
      >>> found = recover_llama3(divisors, **options)
      >>> found["factor"], found["original_max_position_embeddings"]
      (8.0, 512)
    """
    largest = float(divisors.max())
    if divisors.min() < 1 or largest == 1:
        return None
    lengths = dict.fromkeys([*hints, *_USUAL_LENGTHS])
    for factor in dict.fromkeys([largest, *_PUBLISHED_FACTORS]):
        published = ((_LOW, _HIGH, length) for length in lengths)
        solved = _solutions(divisors, _per_wavelength(theta, dims), factor)
        for low, high, original in itertools.chain(published, solved):
            again = llama3_divisors(
                theta=theta, dims=dims, factor=factor, low=low, high=high, original=original
            )
            if np.abs(1 / again - 1 / divisors.astype(np.float64)).max() <= _TOLERANCE:
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    return None


def _per_wavelength(theta: float, dims: int) -> np.ndarray:
    """``1 / w`` of each frequency, descending."""
    return theta ** (-np.arange(0, dims, 2) / dims) / (2 * np.pi)


def _solutions(
    divisors: np.ndarray, per_wavelength: np.ndarray, factor: float
) -> Iterator[tuple[float, float, int]]:
    """Candidates for low, high and original, from the ramp or from the step in its place."""
    smooth = (1 / divisors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    ramp = (smooth > _TOLERANCE) & (smooth < 1 - _TOLERANCE)
    above = per_wavelength[smooth >= 1 - _TOLERANCE].min(initial=2 * per_wavelength.max())
    below = per_wavelength[smooth <= _TOLERANCE].max(initial=0.0)
    x, s = per_wavelength[ramp], smooth[ramp]
    if x.size >= 2:
        slope, offset = np.polyfit(x, s, 1)
        starts, ends = [-offset / slope], [(1 - offset) / slope]
    elif x.size == 1:
        # One equation for two thresholds: any that keep the other frequencies on their side.
        ends = [float(end) for end in np.geomspace(x[0], above, 66)[1:]]
        starts = [(x[0] - s[0] * end) / (1 - s[0]) for end in ends]
    else:
        starts, ends = [below + 0.25 * (above - below)], [below + 0.75 * (above - below)]
    for start, end in zip(starts, ends, strict=True):
        if start <= 0 or end <= start:
            continue
        # `low` is 1 where that makes `original` a whole number, as published models have it.
        original = round(1 / start)
        if abs(original * start - 1) < 1e-4:
            high = original * end
            if abs(high - round(high, 2)) < 1e-3:
                yield 1.0, round(high, 2), original
            yield 1.0, float(high), original
        for original in (8192, 1):
            yield float(original * start), float(original * end), original
