from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.config.passes import comparator_names, method_names
from eoracc.compiler.config.sections import BuildConfig
from eoracc.passes.base import pass_names
from tests.compiler.config.files import MINIMAL, error, load

if TYPE_CHECKING:
    from pathlib import Path


def test_known_passes() -> None:
    BuildConfig.model_validate(
        {"model": "m", "passes": ["quantize_rtn"], "output": "o", "verify": {"text": "t"}}
    )
    assert {"calibrate", "eora", "quantize_gptq", "quantize_rtn", "svd"} <= set(pass_names())


def test_methods_are_compensations_and_factorizations() -> None:
    assert {"none", "eora", "caldera", "svd", "svd_llm", "erc_svd"} <= set(method_names())
    assert not {"quantize_gptq", "calibrate", "quantize_factors"} & set(method_names())


def test_comparators_are_compensations_that_leave_the_codes_alone() -> None:
    assert set(comparator_names()) < set(method_names())
    assert "caldera" not in comparator_names()


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("eroa", "did you mean 'eora'?"), ("caldera", "known here: activation_scaled, eora, ")],
)
def test_a_comparator_has_to_be_known(tmp_path: Path, name: str, suggestion: str) -> None:
    assert load(tmp_path, MINIMAL, "verify.compare=[lqer]").verify.compare == ("lqer",)
    problem = error(tmp_path, MINIMAL, f"verify.compare=[{name}]")
    assert f"verify.compare.0: no compensating pass '{name}' can be compared: " in problem
    assert suggestion in problem
