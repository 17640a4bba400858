"""The ranges of a request's fields, which may come from anywhere: a wrong type is out of range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from eoracc.errors import RequestError
from eoracc.printable import printable, quoted

__all__ = ["check_ranges", "check_weight"]

_MAX_WEIGHT = 10_000
"""Largest weight of an adapter; far beyond it, activations leave the range of float32."""

_SHOWN_CHARS = 64
"""Characters of a bad value that a text repeats."""

_LONGEST_INTEGER = 2**64
"""From here on, integers are too long to repeat."""


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 0


def _is_between(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether ``value`` is a finite number of the range."""
    if not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value) and least <= float(value) <= most
    except OverflowError:  # an integer beyond the range of floats
        return False


def _are_strings(value: object) -> bool:
    if isinstance(value, str) or not isinstance(value, Iterable):
        return False
    return all(isinstance(item, str) for item in value)


def _are_biases(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_whole(token) and _is_between(bias) for token, bias in value.items()
    )


_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_is_whole, "must be 0 or more"),
    "temperature": (lambda value: _is_between(value, 0), "must be 0 or more, and finite"),
    "top_k": (_is_whole, "must be 0 (all) or more"),
    "top_p": (
        lambda value: _is_between(value, 0, 1) and value > 0,
        "must be above 0 and at most 1",
    ),
    "min_p": (lambda value: _is_between(value, 0, 1), "must be from 0 to 1"),
    "seed": (lambda value: value is None or _is_whole(value), "must be 0 or more"),
    "logprobs": (lambda value: value is None or _is_whole(value), "must be 0 or more"),
    "stop": (_are_strings, "must be a list of strings"),
    "repetition_penalty": (
        lambda value: _is_between(value, 0) and value > 0,
        "must be above 0, and finite",
    ),
    "presence_penalty": (_is_between, "must be finite"),
    "frequency_penalty": (_is_between, "must be finite"),
    "logit_bias": (_are_biases, "must hold finite numbers"),
    "bad_words": (_are_strings, "must be a list of strings"),
}


def check_ranges(request: Any) -> None:  # noqa: ANN401 - its module imports this one
    """Check the fields of a :class:`eoracc.runtime.request.Request`.

    Raises:
      RequestError: a value is out of range; the text names the field.
    """
    for name, (fits, problem) in _RANGES.items():
        value = getattr(request, name)
        if not fits(value):
            raise RequestError(f"{name}: {problem}, not {_shown(value)}")
    least, most = request.min_new_tokens, request.max_new_tokens
    if not (_is_whole(least) and least <= most):
        raise RequestError(
            f"min_new_tokens: must be from 0 to max_new_tokens, {_shown(most)}, not {_shown(least)}"
        )


def check_weight(adapter: object, weight: object) -> None:
    """Check the weight of an adapter.

    Raises:
      RequestError: it is too large or no number.
    """
    if not (isinstance(adapter, str) and _is_between(weight, -_MAX_WEIGHT, _MAX_WEIGHT)):
        raise RequestError(
            f"adapter '{printable(adapter, _SHOWN_CHARS)}': its weight must be from "
            f"-{_MAX_WEIGHT} to {_MAX_WEIGHT}, not {_shown(weight)}"
        )


def _shown(value: object) -> str:
    """``value`` for a text: short, although its own text may be long or, for integers, refused."""
    if isinstance(value, Integral) and abs(int(value)) >= _LONGEST_INTEGER:
        return f"an integer of {int(value).bit_length()} bits"
    try:
        return quoted(value, _SHOWN_CHARS)
    except ValueError:  # such an integer inside
        return f"a {type(value).__name__}"
