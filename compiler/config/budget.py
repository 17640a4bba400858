"""Budgets of ``eoracc compare``: bits per weight, or the share of bytes that is removed."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from eoracc.errors import ConfigError
from eoracc.printable import quoted

__all__ = ["Budget", "budget_bits", "parse_budget"]


def parse_budget(value: object) -> str:
    """A budget of ``eoracc compare`` in its shortest form.

    Args:
      value: bits per weight, as a number or a text, or the share of 16-bit bytes that is removed,
        as a text that ends with ``%``.

    Raises:
      ConfigError: it is neither.

    >>> parse_budget(3.50), parse_budget("30.0%"), parse_budget("99.99999%")
    ('3.5', '30%', '99.99999%')
    """
    text = str(value).strip()
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 < number < (100 if share else math.inf):
        raise ConfigError(
            f"{quoted(value)} is no budget: give bits per weight, 3.5, or the share of 16-bit "
            "bytes that is removed, 30%"
        )
    text = repr(number).removesuffix(".0")
    return f"{text}%" if share else text


def budget_bits(budget: str) -> float:
    """Bits per weight of a budget in the form of :func:`parse_budget`.

    >>> budget_bits("3.5"), budget_bits("25%")
    (3.5, 12.0)
    """
    share = budget.endswith("%")
    return 16 * (1 - float(budget[:-1]) / 100) if share else float(budget)


def _in_config(value: object) -> str:
    try:
        return parse_budget(value)
    except ConfigError as error:
        raise PydanticCustomError("pass_budget", "{text}", {"text": str(error)}) from None


Budget = Annotated[str, BeforeValidator(_in_config)]
"""A budget in model.yaml, in the form of :func:`parse_budget`."""
