"""Budgets of ``eoracc compare``: bits per weight, a share of bytes removed, or a folder's size."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from eoracc.errors import ConfigError
from eoracc.passes.sizes import parse_size
from eoracc.printable import quoted

__all__ = ["Budget", "budget_bits", "budget_size", "parse_budget"]


def parse_budget(value: object) -> str:
    """A budget of ``eoracc compare`` in its shortest form.

    Args:
      value: bits per weight, as a number or a text; the share of 16-bit bytes that is removed, as
        a text that ends with ``%``; or the size of the artifact's folder, as a text with a unit.

    Raises:
      ConfigError: it is none of these.

    >>> parse_budget(3.50), parse_budget("30.0%"), parse_budget("99.99999%")
    ('3.5', '30%', '99.99999%')
    >>> parse_budget("90 MB")
    '90MB'
    """
    text = str(value).strip()
    if text.endswith("B"):
        return _parse_size(text)
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 < number < (100 if share else math.inf):
        raise ConfigError(
            f"{quoted(value)} is no budget: give bits per weight, 3.5, the share of 16-bit bytes "
            "that is removed, 30%, or the size of the folder, 90MB"
        )
    text = repr(number).removesuffix(".0")
    return f"{text}%" if share else text


def _parse_size(text: str) -> str:
    try:
        parse_size(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return text.replace(" ", "")


def budget_size(budget: str) -> int | None:
    """Bytes of the folder of a budget in the form of :func:`parse_budget`; None of another budget.

    >>> budget_size("90MB"), budget_size("3.5")
    (90000000, None)
    """
    return parse_size(budget) if budget.endswith("B") else None


def budget_bits(budget: str) -> float:
    """Bits per weight of a budget in the form of :func:`parse_budget` that is no size.

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
