from __future__ import annotations

from typing import Any

import pytest

from eoracc.passes import load_passes
from eoracc.passes.base import Pass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.compensate.quantize_factors import QuantizeFactors
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.factorize.factorize_svd import FactorizeSvd
from eoracc.passes.factorize.svd_llm import SvdLlm
from eoracc.passes.pack_projections import PackProjections
from eoracc.passes.plan.allocate import Allocate
from eoracc.passes.plan.select_last_k import SelectLastK
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.recipe import Recipe

load_passes()

TWO_SWEEPS = [Calibrate(), FactorizeSvd(), Calibrate(through="original"), QuantizeGptq(), Eora()]


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ([Calibrate(), QuantizeGptq(), Eora()], [["calibrate", "quantize_gptq", "eora"]]),
        (
            TWO_SWEEPS,
            [["calibrate", "factorize_svd"], ["calibrate", "quantize_gptq", "eora"]],
        ),
        (
            [PackProjections(), FactorizeSvd(), Calibrate(), SvdLlm()],
            [["pack_projections"], ["factorize_svd", "calibrate", "svd_llm"]],
        ),
        (
            [SelectLastK(ratio=0.5), Calibrate(), SvdLlm()],
            [["select_last_k"], ["calibrate", "svd_llm"]],
        ),
    ],
)
def test_stages(passes: list[Pass], expected: list[list[str]]) -> None:
    assert [[item.name for item in members] for members in Recipe(passes).stages()] == expected


def test_passes_by_their_kind() -> None:
    recipe = Recipe(TWO_SWEEPS)
    assert recipe.calibrate is TWO_SWEEPS[0]
    assert recipe.last_calibrate is TWO_SWEEPS[2]
    assert recipe.factorization is TWO_SWEEPS[1]
    assert recipe.compression is recipe.quantization is TWO_SWEEPS[3]
    assert recipe.compensations == (Eora(),)
    assert recipe.reads_text


def test_a_recipe_may_lack_every_kind() -> None:
    recipe = Recipe([PackProjections()])
    assert recipe.calibrate is recipe.last_calibrate is None
    assert recipe.compression is recipe.quantization is None
    assert recipe.factorization is None
    assert recipe.compensations == ()
    assert not recipe.reads_text
    assert Recipe([Allocate(bits_per_weight=3)]).reads_text
    assert Recipe([]).stages() == []


@pytest.mark.parametrize(
    "passes",
    [
        TWO_SWEEPS,
        [PackProjections(), Allocate(bits_per_weight=3), Calibrate(), QuantizeRtn(), Svd()],
        [
            SelectLastK(ratio=0.5),
            Calibrate(),
            SvdLlm(),
            SelectLastK(average_bits=3),
            Calibrate(),
            QuantizeGptq(),
        ],
        [QuantizeRtn(), Svd(factor_type="float16"), QuantizeFactors()],
        [Calibrate(), SvdLlm(), Allocate(size=9), Calibrate(), QuantizeGptq(), Eora()],
        [Allocate(bytes=9), Calibrate(), QuantizeGptq(), Calibrate(), Eora()],
    ],
)
def test_orders_that_work(passes: list[Pass]) -> None:
    assert list(Recipe(passes).problems()) == []


@pytest.mark.parametrize(
    ("passes", "place", "problem"),
    [
        ([QuantizeRtn(), QuantizeRtn()], (1, "quantize_rtn"), "occurs twice"),
        ([Calibrate(), Calibrate()], (1, "calibrate"), "occurs twice"),
        ([Eora()], (0, "eora"), "needs 'calibrate' before it"),
        ([QuantizeRtn(), QuantizeFactors()], (1, "quantize_factors"), "'svd' or 'zeroquant_v2'"),
        ([SvdLlm()], (0, "svd_llm"), "needs 'calibrate' before it"),
        (
            [QuantizeRtn(), Allocate(bits_per_weight=3)],
            (1, "allocate"),
            "must come before 'quantize_rtn'",
        ),
        (
            [Allocate(bits_per_weight=3), PackProjections()],
            (1, "pack_projections"),
            "must come before 'allocate'",
        ),
        (
            [Calibrate(), QuantizeGptq(), QuantizeRtn()],
            (2, "quantize_rtn"),
            "compressed already by 'quantize_gptq'",
        ),
        (
            [Calibrate(through="original", match="outputs")],
            (0, "calibrate", "match"),
            "contradicts 'through: original'",
        ),
        (
            [QuantizeRtn(), Svd(factor_type="int4"), QuantizeFactors(bits=8)],
            (2, "quantize_factors"),
            "factors of 'svd' have 4 bits already",
        ),
        (
            [Allocate(size=9), Calibrate(), QuantizeGptq(), Calibrate(), Eora()],
            (3, "calibrate"),
            "whose bytes 'allocate' does not foresee in its budget of the folder",
        ),
    ],
)
def test_orders_that_do_not_work(passes: list[Pass], place: tuple[Any, ...], problem: str) -> None:
    found_place, found_problem = next(Recipe(passes).problems())
    assert found_place == place
    assert problem in found_problem
