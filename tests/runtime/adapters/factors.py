"""Compare the factors of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eoracc.plugins.operands.low_rank import LowRank

__all__ = ["assert_same_factors"]


def assert_same_factors(actual: Mapping[str, LowRank], expected: Mapping[str, LowRank]) -> None:
    """The same linears, types and values."""
    assert set(actual) == set(expected)
    for name, factors in expected.items():
        assert actual[name].factor_type == factors.factor_type
        for part in ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale"):
            np.testing.assert_array_equal(getattr(actual[name], part), getattr(factors, part))
