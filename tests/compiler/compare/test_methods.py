from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler.compare.methods import find_methods
from eoracc.errors import ConfigError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.zeroquant_v2 import ZeroQuantV2
from eoracc.passes.factorize.svd_llm import SvdLlm
from tests.compare_methods import QUANTIZE, config, method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eoracc.passes.base import Pass


def names(passes: Sequence[Pass]) -> list[str]:
    return [item.name for item in passes]


def test_compensations_take_the_place_of_the_one_that_is_there() -> None:
    override = {"*.k_proj": {"rank": 2}}
    passes = (
        "calibrate",
        QUANTIZE,
        {"eora": {"rank": 8, "energy": 0.1, "factor_type": "int8", "overrides": override}},
        {"quantize_factors": {"bits": 4}},
    )
    found = method("eora", *passes)
    assert found.family == "compensation"
    assert found.passes == config(*passes).passes
    found = method("zeroquant_v2", *passes)
    assert names(found.passes) == ["calibrate", "quantize_gptq", "zeroquant_v2", "quantize_factors"]
    other = found.passes[2]
    assert isinstance(other, ZeroQuantV2)
    assert other.factor_type == "int8"
    assert list(other.overrides) == ["*.k_proj"]
    assert names(method("svd", "calibrate", QUANTIZE).passes)[-1] == "svd"
    assert names(method("none", *passes).passes) == ["calibrate", "quantize_gptq"]


def test_factorisations_take_the_place_of_all_that_compresses() -> None:
    quantize = {"quantize_gptq": {"bits": 3, "overrides": {"*.k_proj": {"skip": True}}}}
    found = method("svd_llm", "calibrate", quantize, "eora")
    assert found.family == "factorization"
    assert names(found.passes) == ["calibrate", "svd_llm"]
    factorization = found.passes[1]
    assert isinstance(factorization, SvdLlm)
    assert factorization.overrides["*.k_proj"].skip
    again = ("calibrate", {"erc_svd": {"beta": 0.1}}, "calibrate", QUANTIZE, "eora")
    assert names(method("nsvd", *again).passes) == ["calibrate", "nsvd"]
    assert method("erc_svd", *again).passes[1] == config(*again).passes[1]


def test_saes_svd_is_given_the_statistics_that_it_needs() -> None:
    found = method("saes_svd", {"calibrate": {"through": "original"}}, QUANTIZE)
    assert found.passes[0] == Calibrate(match="outputs")


def test_recipes_stand_instead_of_the_passes() -> None:
    compare = {"methods": {"mine": ["calibrate", "erc_svd"], "fixed": [{"quantize_rtn": {}}]}}
    found = find_methods(config(compare=compare), ["fixed", "mine", "fixed", "none"])
    assert [(one.name, one.family, one.takes_budget) for one in found] == [
        ("fixed", "recipe", False),
        ("mine", "recipe", True),
        ("none", "quantization", False),
    ]


@pytest.mark.parametrize(
    ("name", "passes", "sentence"),
    [
        ("eroa", (), "there is no method 'eroa': did you mean 'eora'?"),
        ("calibrate", (), "there is no method 'calibrate': "),
        (
            "eora",
            ({"quantize_rtn": {}},),
            "method 'eora': eora: needs 'calibrate' before it: put it above",
        ),
        (
            "svd",
            ("calibrate", "erc_svd"),
            "method 'svd': there is nothing to compensate: put a quantize pass into 'passes'",
        ),
    ],
)
def test_methods_that_cannot_be(name: str, passes: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        method(name, *passes)
    assert str(raised.value).startswith(sentence)
