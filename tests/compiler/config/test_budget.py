from __future__ import annotations

import pytest

from eoracc.compiler.config.budget import budget_bits, parse_budget
from eoracc.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "text", "bits"),
    [(3.5, "3.5", 3.5), ("4", "4", 4.0), ("30%", "30%", 11.2), (" 0.5 % ".strip(), "0.5%", 15.92)],
)
def test_budgets(value: object, text: str, bits: float) -> None:
    assert parse_budget(value) == text
    assert budget_bits(text) == pytest.approx(bits, rel=1e-15)


@pytest.mark.parametrize("value", ["", "many", "nan", "inf", 0, -3, "0%", "100%", True, "30 M"])
def test_no_budgets(value: object) -> None:
    with pytest.raises(ConfigError, match=r"is no budget: give bits per weight, 3\.5, the share"):
        parse_budget(value)
