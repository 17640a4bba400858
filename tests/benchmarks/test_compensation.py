from __future__ import annotations

from typing import Any

import pytest

from benchmarks.compensation import VARIANTS, Variant
from eoracc.compiler.compare.methods import find_methods
from eoracc.compiler.config.sections import BuildConfig


def config(bits: int) -> BuildConfig:
    return BuildConfig.model_validate(
        {
            "model": "model",
            "calibration": {"text": "wiki.txt"},
            "passes": VARIANTS["eora"].passes(bits),
            "compare": {"methods": {name: one.passes(bits) for name, one in VARIANTS.items()}},
            "output": "artifact",
        }
    )


@pytest.mark.parametrize("bits", [2, 3])
def test_every_variant_is_a_method_that_spends_the_budget(bits: int) -> None:
    methods = find_methods(config(bits), list(VARIANTS))
    assert [method.name for method in methods] == list(VARIANTS)
    assert all(method.takes_budget for method in methods)
    # No two rows of the table measure the same.
    assert len({repr(method.passes) for method in methods}) == len(VARIANTS)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (
            Variant(),
            [
                {"calibrate": {}},
                {"quantize_gptq": {"bits": 3, "group_size": 64}},
                {"eora": {"factor_type": "int4"}},
            ],
        ),
        (
            Variant(outputs={}, allocate={"widths": []}, compensation={}),
            [
                {"calibrate_outputs": {}},
                {"allocate": {"bits_per_weight": 3, "widths": [3]}},
                {"calibrate": {}},
                {"quantize_gptq": {"bits": 3, "group_size": 64}},
            ],
        ),
    ],
    ids=["plain", "rank alone"],
)
def test_a_variant_is_a_list_of_passes(variant: Variant, expected: list[Any]) -> None:
    assert variant.passes(3) == expected
