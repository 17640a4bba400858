from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.adapters.adapter import Adapter, check_adapter_name, combine
from eoracc.runtime.adapters.files import read_adapter
from eoracc.runtime.adapters.store import add_adapter
from tests.runtime.adapters.factors import assert_same_factors
from tests.slots_artifact import LAYER, random_factors, write_slots_artifact

if TYPE_CHECKING:
    from pathlib import Path

DOWN = f"{LAYER}.mlp.down_proj"


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "a..b", "x" * 64])
def test_good_names(name: str) -> None:
    check_adapter_name(name)


@pytest.mark.parametrize("name", ["none", "A", "-a", ".a", "a b", "ä", "x" * 65, "a\n"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ArtifactError, match="is no valid name: use up to 64"):
        check_adapter_name(name)


def test_sum_of_adapters_is_that_of_their_products() -> None:
    one = Adapter("one", random_factors("float16", seed=1), "ab" * 32)
    two = Adapter("two", random_factors("float16", seed=2, linears=(DOWN,)), "ab" * 32)
    both = combine([(one, 0.5), (two, -2.0)], "both")
    assert set(both.factors) == set(one.factors)
    for name in one.factors:
        expected = 0.5 * one.factors[name].product()
        if name == DOWN:
            expected = expected - 2 * two.factors[name].product()
        # Powers of two: the weights change no mantissa.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(both.factors[name].product(), expected, atol=2e-6 * scale)
    assert both.details == {
        "sum_of": [{"adapter": "one", "weight": 0.5}, {"adapter": "two", "weight": -2.0}]
    }
    assert (both.name, both.backbone) == ("both", "ab" * 32)


@pytest.mark.parametrize(
    ("slots", "factor_type"), [("int8", "int8"), ("int8", "int4"), ("float16", "float16")]
)
def test_sum_can_be_stored(tmp_path: Path, slots: str, factor_type: str) -> None:
    digest = write_slots_artifact(tmp_path / "a", adapter_type=slots).digest
    terms = [
        (Adapter(str(seed), random_factors(factor_type, seed=seed), digest), 0.3 + seed)
        for seed in range(2)
    ]
    total = combine(terms, "sum")
    add_adapter(tmp_path / "a", total)
    assert_same_factors(read_adapter(tmp_path / "a", "sum").factors, total.factors)


def test_sums_that_cannot_be() -> None:
    one = Adapter("one", random_factors("int8"), "ab" * 32)
    with pytest.raises(ArtifactError, match="is a sum of no adapters"):
        combine([], "sum")
    with pytest.raises(ArtifactError, match="the weight of 'one' is nan"):
        combine([(one, float("nan"))], "sum")
    with pytest.raises(ArtifactError, match="of several backbones: abababababab, cdcdcdcdcdcd"):
        combine([(one, 1.0), (replace(one, backbone="cd" * 32), 1.0)], "sum")
    other = replace(one, factors=random_factors("float16"))
    with pytest.raises(ArtifactError, match="'sum': factors that are summed have one type"):
        combine([(one, 1.0), (other, 1.0)], "sum")
