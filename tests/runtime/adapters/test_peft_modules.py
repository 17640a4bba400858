from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.errors import ArtifactError
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.adapters.peft_modules import (
    ModuleLayout,
    linears_to_modules,
    modules_to_linears,
    read_layout,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PARTS = ModuleLayout(wholes=frozenset(), query_heads=3, key_heads=1)
WHOLE = ModuleLayout(wholes=frozenset({"qkv_proj", "gate_up_proj"}), query_heads=3, key_heads=1)
GATE_UP_WHOLE = ModuleLayout(wholes=frozenset({"gate_up_proj"}), query_heads=3, key_heads=1)
BLOCK = "model.layers.0"
ATTENTION = tuple(f"{BLOCK}.self_attn.{role}_proj" for role in "qkv")
MLP = tuple(f"{BLOCK}.mlp.{role}_proj" for role in ("gate", "up"))
QKV, GATE_UP, DOWN = (
    f"{BLOCK}.self_attn.qkv_proj",
    f"{BLOCK}.mlp.gate_up_proj",
    f"{BLOCK}.mlp.down_proj",
)
K = 10
ROWS = dict(zip((*ATTENTION, *MLP, QKV, GATE_UP, DOWN), (12, 4, 4, 6, 6, 20, 12, 7), strict=True))


def draw(*names: str) -> dict[str, LowRank]:
    rng = np.random.default_rng(0)
    return {
        name: LowRank(
            lora_a=rng.standard_normal((2 + index, K), np.float32),
            lora_b=rng.standard_normal((ROWS[name], 2 + index), np.float32),
        )
        for index, name in enumerate(names)
    }


def shapes(*names: str) -> dict[str, tuple[int, int]]:
    return {name: (ROWS[name], K) for name in names}


def stacked(factors: dict[str, LowRank], names: tuple[str, ...]) -> NDArray[np.float32]:
    """Products one below the other, zero where there are no factors."""
    return np.concatenate(
        [
            factors[name].product() if name in factors else np.zeros((ROWS[name], K), np.float32)
            for name in names
        ]
    )


def test_names_are_mostly_the_same() -> None:
    factors = draw(*ATTENTION, *MLP, DOWN)
    assert linears_to_modules(factors, PARTS) == factors
    linears = shapes(*ATTENTION, *MLP, DOWN)
    assert modules_to_linears(factors, linears, PARTS, place="a") == factors


@pytest.mark.parametrize("there", [ATTENTION, ATTENTION[1:], ATTENTION[::2]])
def test_parts_are_joined_for_a_family_that_stores_wholes(there: tuple[str, ...]) -> None:
    factors = draw(*there, *MLP, DOWN)
    modules = linears_to_modules(factors, WHOLE)
    assert set(modules) == {QKV, GATE_UP, DOWN}
    assert modules[QKV].rank == sum(factors[name].rank for name in there)
    np.testing.assert_allclose(modules[QKV].product(), stacked(factors, ATTENTION), rtol=1e-5)
    np.testing.assert_allclose(modules[GATE_UP].product(), stacked(factors, MLP), rtol=1e-5)
    assert modules[DOWN] is factors[DOWN]


def test_one_projection_is_stored_whole_and_the_other_in_parts() -> None:
    factors = draw(*ATTENTION, GATE_UP)
    assert linears_to_modules(factors, GATE_UP_WHOLE) == factors
    packed = draw(QKV, GATE_UP)
    modules = linears_to_modules(packed, GATE_UP_WHOLE)
    assert set(modules) == {*ATTENTION, GATE_UP}


def test_wholes_are_taken_apart_where_the_artifact_has_parts() -> None:
    modules = draw(QKV, GATE_UP)
    linears = modules_to_linears(modules, shapes(*ATTENTION, *MLP), WHOLE, place="a")
    assert set(linears) == {*ATTENTION, *MLP}
    np.testing.assert_allclose(stacked(linears, ATTENTION), modules[QKV].product(), rtol=1e-5)
    np.testing.assert_allclose(stacked(linears, MLP), modules[GATE_UP].product(), rtol=1e-5)


@pytest.mark.parametrize("there", [(*ATTENTION, *MLP), (ATTENTION[2], MLP[1])])
def test_parts_are_joined_where_the_artifact_packed_them(there: tuple[str, ...]) -> None:
    modules = draw(*there)
    linears = modules_to_linears(modules, shapes(QKV, GATE_UP), PARTS, place="a")
    np.testing.assert_allclose(linears[QKV].product(), stacked(modules, ATTENTION), rtol=1e-5)
    np.testing.assert_allclose(linears[GATE_UP].product(), stacked(modules, MLP), rtol=1e-5)


def test_what_was_packed_is_taken_apart_for_other_families() -> None:
    factors = draw(QKV, GATE_UP)
    modules = linears_to_modules(factors, PARTS)
    np.testing.assert_allclose(stacked(modules, ATTENTION), factors[QKV].product(), rtol=1e-5)
    np.testing.assert_allclose(stacked(modules, MLP), factors[GATE_UP].product(), rtol=1e-5)


def test_what_was_taken_apart_shares_its_ranks_again() -> None:
    factors = draw(QKV, GATE_UP)
    linears = shapes(QKV, GATE_UP)
    again = modules_to_linears(linears_to_modules(factors, PARTS), linears, PARTS, place="a")
    for name, one in factors.items():
        np.testing.assert_array_equal(again[name].lora_a, one.lora_a)
        np.testing.assert_array_equal(again[name].lora_b, one.lora_b)


@pytest.mark.parametrize(
    ("module", "linears"), [(ATTENTION[0], (QKV,)), (QKV, ATTENTION), (DOWN, (DOWN,))]
)
def test_factors_of_another_model(module: str, linears: tuple[str, ...]) -> None:
    one = draw(module)[module]
    larger = LowRank(lora_a=one.lora_a, lora_b=np.concatenate([one.lora_b, one.lora_b[:1]]))
    rows = ROWS[module]
    with pytest.raises(
        ArtifactError, match=rf"for a weight \[{rows + 1}, 10\], the artifact's is \[{rows}, 10\]"
    ):
        modules_to_linears({module: larger}, shapes(*linears), PARTS, place="a")


@pytest.mark.parametrize("name", ["lm_head", "model.layers.9.self_attn.q_proj", QKV])
def test_module_that_takes_no_adapter(name: str) -> None:
    one = draw(DOWN)[DOWN]
    with pytest.raises(ArtifactError, match=f"a: has factors of '{name}', which takes no adapter"):
        modules_to_linears({name: one}, shapes(DOWN, ATTENTION[0]), PARTS, place="a")


def test_layout_is_read_from_the_artifact(tmp_path: Path) -> None:
    decoder = {"head_size": 8, "num_attention_heads": 3, "num_key_value_heads": 1}
    # Heads of 4 are padded in the cache, which the rows of the projections are not.
    config = {"model": {"type": "decoder", "decoder": decoder}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    for family, expected in (("llama", PARTS), ("phi3", WHOLE), ("glm4", GATE_UP_WHOLE)):
        assert read_layout(tmp_path, family) == expected
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="does not describe a decoder"):
        read_layout(tmp_path, "llama")


def test_factors_of_a_weight_are_no_modules() -> None:
    one = draw(DOWN)[DOWN]
    with pytest.raises(ArtifactError, match=r"is a factor of the weight of 'model\.layers"):
        linears_to_modules({f"{DOWN}.v": one}, PARTS)
    linears = {f"{DOWN}.v": (3, 8), f"{DOWN}.u": (8, 3)}
    with pytest.raises(ArtifactError, match="whose weight is factorized into two matrices here"):
        modules_to_linears({DOWN: one}, linears, PARTS, place="a")
