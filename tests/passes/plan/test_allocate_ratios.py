"""The survey of ratios, on a small model: its total, its types, what overrides settle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.sweep.batch import make_batches
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.pipeline import Compressed, compress
from eoracc.compiler.text.windows import Windows
from eoracc.errors import PassError
from eoracc.passes.graph.linears import find_linears
from eoracc.passes.plan.allocate_ratios import AllocateRatios
from eoracc.passes.solvers.factorization import factorized_rank
from eoracc.passes.solvers.ratio_allocation import ratios_by_loss
from tests.passes.plan.surveys import survey_of
from tests.tiny_build import tiny_config
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CALIBRATE = {"calibrate": {"tokens": "equal", "precision": "float32"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("smollm", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def loaded(folder: Path, tmp_path: Path) -> LoadedModel:
    return load(str(folder), work=tmp_path / "work")


@pytest.fixture(scope="module")
def windows() -> Windows:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (6, 24))
    return Windows(ids, np.ones_like(ids))


def run(
    loaded: LoadedModel, windows: Windows | None, folder: Path, passes: Sequence[Any]
) -> tuple[Compressed, dict[str, Any]]:
    config = tiny_config(passes)
    compressed = compress(config, loaded, windows, folder / "kept", SilentProgress())
    return compressed, compressed.surveys[0]


def test_gives_each_type_the_published_ratios_and_the_sweep_takes_them(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    shapes = {
        linear.name: (linear.out_features, linear.in_features)
        for linear in find_linears(loaded.model)
        if linear.block is not None
    }
    compressed, found = run(
        loaded, windows, tmp_path, ["allocate_ratios", CALIBRATE, {"svd_llm_v2": {"ratio": 0.3}}]
    )
    assert found["by"] == "loss"
    assert found["linears"].keys() == shapes.keys()
    ratios: dict[str, float] = {}
    for role in {name.rpartition(".")[2] for name in shapes}:
        members = [name for name in shapes if name.endswith(role)]
        losses = [found["linears"][name]["loss"] for name in members]
        sizes = [int(np.prod(shapes[name])) for name in members]
        ratios |= dict(zip(members, ratios_by_loss(losses, sizes, 0.3), strict=True))
    assert {name: one["ratio"] for name, one in found["linears"].items()} == pytest.approx(ratios)
    assert len(set(ratios.values())) > len({name.rpartition(".")[2] for name in shapes})
    inner = {
        linear.name.removesuffix(".v"): linear.out_features
        for linear in find_linears(compressed.model)
        if linear.name.endswith(".v")
    }
    assert inner == {name: factorized_rank(*shapes[name], ratios[name]) for name in shapes}
    # What is told of the whole is what the ranks make of it.
    whole = sum(int(np.prod(shape)) for shape in shapes.values())
    kept = sum(inner[name] * sum(shapes[name]) for name in shapes)
    assert found["removed"] == pytest.approx(1 - kept / whole, rel=1e-12)
    assert sum(ratios[name] * int(np.prod(shapes[name])) for name in shapes) == pytest.approx(
        0.3 * whole, rel=1e-9
    )


def test_the_loss_is_the_tail_of_the_outputs_singular_values(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    executor = Executor(loaded.model.clone())
    (batch,) = make_batches(windows.input_ids, windows.attention_mask, size=6)
    executor.start([batch])
    group = executor.levels[0][0]
    linear, inputs = group.linears[0], executor.inputs_of(group, batch)
    singular = np.linalg.svd(inputs.astype(np.float64) @ linear.weight().T, compute_uv=False)
    rank = factorized_rank(linear.out_features, linear.in_features, 0.3)
    expected = float(np.sqrt((singular[rank:] ** 2).sum()))

    passes = ["allocate_ratios", CALIBRATE, {"svd_llm": {"ratio": 0.3}}]
    _, found = run(loaded, windows, tmp_path, passes)
    # Products in float32 over 144 tokens, and a difference of squares.
    assert found["linears"][linear.name]["loss"] == pytest.approx(expected, rel=1e-4)


def test_energy_takes_no_more_than_the_same_parameters(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    before = _parameters(loaded)
    passes = [{"allocate_ratios": {"by": "energy"}}, CALIBRATE, {"svd_llm": {"ratio": 0.3}}]
    _, found = run(loaded, windows, tmp_path, passes)
    assert _parameters(loaded) <= 0.7 * before
    assert found["removed"] == pytest.approx(1 - _parameters(loaded) / before, rel=1e-12)
    assert len({one["ratio"] for one in found["linears"].values()}) > 2


@pytest.mark.parametrize("by", ["loss", "energy"])
def test_what_an_earlier_survey_has_planned_is_the_total(
    by: Literal["loss", "energy"], loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    """Unlike ratios: each type and ratio is shared out by itself, or all by one total."""
    passes = tiny_config([CALIBRATE, {"svd_llm": {"ratio": 0.3}}]).passes
    context = survey_of(loaded, windows, tmp_path, passes)
    sizes, planned = {}, {}
    for linear in context.linears:
        if linear.block is not None:
            # Most of the small weights, so that a mean over weights is not one over parameters.
            own = {"o_proj": 0.0, "k_proj": 0.8, "v_proj": 0.8}
            ratio = own.get(linear.role, 0.6 if linear.block else 0.1)
            linear.plan["ratio"] = planned[linear.name] = ratio
            sizes[linear.name] = linear.in_features * linear.out_features
    found = AllocateRatios(by=by).survey(context)["linears"]
    assert found.keys() == {name for name, ratio in planned.items() if ratio}
    asked = sum(sizes[name] * ratio for name, ratio in planned.items())
    removed = sum(sizes[name] * found[name]["ratio"] for name in found)
    if by == "loss":
        assert removed == pytest.approx(asked, rel=1e-9)
        for block in (0, 1):  # alone of their type and ratio
            name = f"model.layers.{block}.mlp.up_proj"
            assert found[name]["ratio"] == pytest.approx(planned[name])
    else:
        # Candidates are a hundredth apart.
        assert removed == pytest.approx(asked, abs=0.02 * sum(map(sizes.__getitem__, found)))


def test_what_an_override_settles_is_left_out(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    overrides = {"*.q_proj": {"ratio": 0.5}, "*.k_proj": {"skip": True}, "*.v_proj": {"ratio": 0.0}}
    _, found = run(
        loaded,
        windows,
        tmp_path,
        ["allocate_ratios", CALIBRATE, {"erc_svd": {"ratio": 0.3, "overrides": overrides}}],
    )
    assert {name.rpartition(".")[2] for name in found["linears"]} == {
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (["allocate_ratios", CALIBRATE, "quantize_gptq"], "put one after it"),
        (
            ["allocate_ratios", CALIBRATE, {"svd_llm": {"ratio": 0.0}}],
            "leaves all linears as they are",
        ),
        (["allocate_ratios", CALIBRATE, {"svd_llm": {"ratio": 0.97}}], "0.95 of a weight at most"),
    ],
)
def test_what_it_cannot_do_is_said(
    passes: list[Any], message: str, loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    with pytest.raises(PassError, match=message):
        run(loaded, windows, tmp_path, passes)


def test_without_a_text_the_way_out_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"give 'calibration' in model\.yaml"):
        run(loaded, None, tmp_path, ["allocate_ratios", {"factorize_svd": {"ratio": 0.3}}])


def _parameters(loaded: LoadedModel) -> int:
    return sum(
        linear.in_features * linear.out_features
        for linear in find_linears(loaded.model)
        if linear.block is not None
    )
