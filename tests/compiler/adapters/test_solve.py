from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from typing_extensions import override

from eoracc.compiler.adapters.scores import perplexities
from eoracc.compiler.adapters.solve import SolvedAdapter, Task, solve_adapter
from eoracc.compiler.config.sections import AdapterConfig
from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend import load as frontend
from eoracc.compiler.kept.interval import SaveInterval
from eoracc.compiler.progress import PassTimes, SilentProgress
from eoracc.compiler.sweep.backbone import Backbone
from eoracc.compiler.sweep.batch import WeightOf, make_batches
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.resume import AdapterState, SweepState
from eoracc.compiler.sweep.run import run_sweep
from eoracc.compiler.text.windows import Windows
from eoracc.errors import ConfigError, PassError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.adapter import AdapterSolver
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.graph.linears import Linear
from eoracc.passes.progress import Phase
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.solvers.gram import accumulate_gram
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FLOAT32 = Calibrate(tokens="equal", precision="float32")
OUTPUTS = Calibrate(match="outputs", tokens="equal", precision="float32")


def windows(seed: int, count: int = 6, *, lowest: int = 3, highest: int = VOCABULARY) -> Windows:
    ids = np.random.default_rng(seed).integers(lowest, highest, (count, 24))
    return Windows(ids, np.ones_like(ids))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("adapters") / "model")


@pytest.fixture(scope="module")
def backbone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """Two bits and a compensation of rank 3, calibrated on tokens of all kinds."""
    work = tmp_path_factory.mktemp("work")
    found = Backbone.of(frontend.load(str(source), work=work).model)
    text = windows(0)
    run_sweep(
        Executor(found.model, found.linears),
        [FLOAT32, QuantizeGptq(bits=2, group_size=16), Eora(rank=3)],
        make_batches(text.input_ids, text.attention_mask, size=4),
        comparators={},
        state=SweepState(work / "sweep", "key"),
        progress=SilentProgress(),
        times=PassTimes(),
    )
    return found


def task(calibration: Windows | None = None, **options: Any) -> Task:  # noqa: ANN401
    """A task whose text uses few tokens of the vocabulary."""
    config = AdapterConfig.model_validate({"text": "t", "rank": 6, **options})
    text = windows(1, highest=30) if calibration is None else calibration
    return Task("few", config, text, windows(2, 2, highest=30))


def solve(
    backbone: Backbone,
    what: Task,
    work: Path,
    progress: SilentProgress | None = None,
    *,
    weight_of: WeightOf = Linear.effective_weight,
    calibrate: Calibrate = FLOAT32,
) -> SolvedAdapter:
    return solve_adapter(
        backbone,
        what,
        work=work,
        progress=progress or SilentProgress(),
        calibrate=calibrate,
        weight_of=weight_of,
    )


def inputs_of(
    source: Path, backbone: Backbone, adapter: SolvedAdapter, text: Windows
) -> dict[str, NDArray[np.float32]]:
    """What enters each linear in eager PyTorch, with backbone and adapter in its weights."""
    weights = {}
    for linear in backbone.linears:
        if linear.compressed is not None:
            weights[linear.name] = linear.effective_weight()
            if linear.name in adapter.factors:
                weights[linear.name] = weights[linear.name] + adapter.factors[linear.name].product()
    model = load_eager(source, weights)
    seen: dict[str, NDArray[np.float32]] = {}
    for name in weights:

        def hook(_: Any, given: Any, name: str = name) -> None:  # noqa: ANN401
            seen[name] = given[0].flatten(0, 1).numpy()

        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.inference_mode():
        reference_logits(model, text.input_ids, text.attention_mask)
    return seen


def test_each_layer_is_solved_for_the_prefix_with_the_adapter(
    source: Path, backbone: Backbone, tmp_path: Path
) -> None:
    before = [linear.effective_weight() for linear in backbone.linears]
    solved = solve(backbone, task(factor_type="float16"), tmp_path)
    seen = inputs_of(source, backbone, solved, solved.task.calibration)
    solver = AdapterSolver(rank=6, factor_type="float16")
    assert len(solved.factors) == 14
    for linear, weight in zip(backbone.linears, before, strict=True):
        np.testing.assert_array_equal(linear.effective_weight(), weight, "the backbone is frozen")
        if linear.name not in solved.factors:
            assert linear.role == "lm_head"
            continue
        x = seen[linear.name]
        gram = accumulate_gram([(x, np.ones(len(x), np.float32))], linear.in_features)
        expected = solver.solve(linear, weight, gram)
        # Inputs agree to float32 rounding through the layers below: 2^-24 times the root of their
        # depths, and float16 factors show no more than their own rounding of it.
        found = solved.factors[linear.name].product()
        scale = np.abs(expected.factors.product()).max()
        np.testing.assert_allclose(found, expected.factors.product(), atol=4 * 2.0**-11 * scale)
        errors = solved.errors[linear.name]
        assert errors["with"] == pytest.approx(expected.error_with, rel=1e-3)
        assert errors["without"] == pytest.approx(expected.error_without, rel=1e-3)
    assert solved.mean_error("with") < 0.8 * solved.mean_error("without")


def test_with_outputs_matched_an_adapter_stands_in_for_the_target(
    source: Path, backbone: Backbone, tmp_path: Path
) -> None:
    what = task(factor_type="float16")
    solved = solve(backbone, what, tmp_path, calibrate=OUTPUTS)
    seen = inputs_of(source, backbone, solved, what.calibration)
    model = load_eager(source, {})
    originals: dict[str, NDArray[np.float32]] = {}
    for name in seen:

        def hook(_: Any, given: Any, name: str = name) -> None:  # noqa: ANN401
            originals[name] = given[0].flatten(0, 1).numpy()

        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.inference_mode():
        reference_logits(model, what.calibration.input_ids, what.calibration.attention_mask)
    plain = solve(backbone, what, tmp_path / "plain")
    moved = []
    for linear in backbone.linears:
        if linear.name not in solved.factors:
            continue
        x, original = (held[linear.name].astype(np.float64) for held in (seen, originals))
        gram = x.T @ x + 0.01 * (x**2).sum() / x.shape[1] * np.eye(x.shape[1])
        weight = linear.weight().astype(np.float64)
        target = weight + weight @ np.linalg.solve(gram, x.T @ (original - x)).T
        left = (target - linear.effective_weight() - solved.factors[linear.name].product()) @ x.T
        error = np.linalg.norm(left) / np.linalg.norm(target @ x.T)
        assert solved.errors[linear.name]["with"] == pytest.approx(error, rel=1e-3)
        moved.append(abs(error - plain.errors[linear.name]["with"]) / error)
    assert max(moved) > 0.05, "else the target might as well be the weight"


def test_the_prefix_matters(source: Path, backbone: Backbone, tmp_path: Path) -> None:
    """Without the adapter below, a later layer would be solved for other inputs."""
    solved = solve(backbone, task(factor_type="float16"), tmp_path)
    nothing = SolvedAdapter(solved.task, {}, {}, (), 0.0)
    with_it = inputs_of(source, backbone, solved, solved.task.calibration)
    without = inputs_of(source, backbone, nothing, solved.task.calibration)
    last = "model.layers.1.mlp.down_proj"
    moved = np.linalg.norm(with_it[last] - without[last]) / np.linalg.norm(without[last])
    assert moved > 0.05


def test_on_bare_weights_the_baked_factors_have_no_say(backbone: Backbone, tmp_path: Path) -> None:
    alone = solve(backbone, task(factor_type="float16"), tmp_path, weight_of=Linear.backbone_weight)
    first = backbone.linears[0]
    x = alone.errors[first.name]
    both = solve(backbone, task(factor_type="float16"), tmp_path / "both").errors[first.name]
    assert x["without"] > 1.05 * both["without"]


class Interrupted(SilentProgress):
    """Is stopped by the user at one step of the solve."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    @override
    def _show(self, name: str, total: int) -> Any:
        outer = super()._show(name, total)
        progress = self

        class Stopping:
            def __enter__(self) -> Phase:
                outer.__enter__()
                return self

            def __exit__(self, *_: object) -> None:
                return None

            def advance(self, note: str = "") -> None:
                del note
                progress.step -= 1
                if progress.step < 0:
                    raise KeyboardInterrupt

            def skip(self) -> None:
                raise AssertionError("nothing was done before")

        return Stopping()


@pytest.fixture
def save_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)


@pytest.mark.usefixtures("save_at_once")
@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_goes_on_after_the_last_finished_block(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor_type: str
) -> None:
    whole = solve(backbone, task(factor_type=factor_type), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        solve(backbone, task(factor_type=factor_type), tmp_path / "w", Interrupted(5))
    calls: list[str] = []
    inner = AdapterSolver.solve

    def count(self: AdapterSolver, linear: Linear, *rest: Any) -> Any:  # noqa: ANN401
        calls.append(linear.name)
        return inner(self, linear, *rest)

    monkeypatch.setattr(AdapterSolver, "solve", count)
    resumed = solve(backbone, task(factor_type=factor_type), tmp_path / "w")
    assert calls
    assert all(name.startswith("model.layers.1.") for name in calls)
    assert resumed.errors == whole.errors
    for name, factors in whole.factors.items():
        np.testing.assert_array_equal(resumed.factors[name].product(), factors.product())
    calls.clear()
    again = solve(backbone, task(factor_type=factor_type), tmp_path / "w")
    assert not calls, "what is finished is not solved twice"
    assert again.errors == whole.errors
    solve(backbone, task(windows(5), factor_type=factor_type), tmp_path / "w")
    assert len(calls) == 14, "another text is another adapter"


def test_key_covers_what_the_factors_depend_on(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []

    def stop(_: AdapterState, __: Path, key: str) -> None:
        keys.append(key)
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterState, "__init__", stop)
    text = windows(1, highest=30)
    heavy = Windows(text.input_ids, text.attention_mask, np.full(6, 2, np.float32))
    for what, weight_of in (
        (task(), Linear.effective_weight),
        (task(), Linear.effective_weight),
        (task(rank=5), Linear.effective_weight),
        (task(factor_type="int4"), Linear.effective_weight),
        (task(overrides={"*.q_proj": {"skip": True}}), Linear.effective_weight),
        (task(heavy), Linear.effective_weight),
        (task(), Linear.backbone_weight),
    ):
        with pytest.raises(KeyboardInterrupt):
            solve(backbone, what, tmp_path, weight_of=weight_of)
    with pytest.raises(KeyboardInterrupt):
        solve(backbone, task(), tmp_path, calibrate=OUTPUTS)
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1


def test_weights_of_windows_weigh_their_tokens(backbone: Backbone, tmp_path: Path) -> None:
    """A window of weight 2 counts like the same window given twice."""
    text = windows(1, 3, highest=30)
    doubled = Windows(
        np.concatenate([text.input_ids, text.input_ids[:1]]),
        np.concatenate([text.attention_mask, text.attention_mask[:1]]),
    )
    weighted = Windows(text.input_ids, text.attention_mask, np.array([2, 1, 1], np.float32))
    errors = [
        solve(backbone, task(one, factor_type="float16"), tmp_path / str(index)).errors
        for index, one in enumerate((doubled, weighted, text))
    ]
    for name, figures in errors[0].items():
        assert errors[1][name]["without"] == pytest.approx(figures["without"], rel=1e-4)
        assert errors[1][name]["with"] == pytest.approx(figures["with"], rel=5e-3)
    name = backbone.linears[0].name
    assert errors[2][name]["without"] != pytest.approx(errors[0][name]["without"], rel=1e-3)


def test_rank_zero_and_overrides(backbone: Backbone, tmp_path: Path) -> None:
    assert solve(backbone, task(rank=0), tmp_path).factors == {}
    overrides = {"*.mlp.*": {"skip": True}, "*.q_proj": {"rank": 2, "factor_type": "int4"}}
    solved = solve(backbone, task(overrides=overrides), tmp_path / "o")
    assert {name.rpartition(".")[2] for name in solved.factors} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    q = solved.factors["model.layers.1.self_attn.q_proj"]
    assert (q.rank, q.factor_type) == (2, "int4")
    with pytest.raises(
        ConfigError, match=r"adapters.few.overrides: no linear that takes an adapter .*'lm_head'"
    ):
        solve(backbone, task(overrides={"lm_head": {"rank": 2}}), tmp_path / "h")
    with pytest.raises(PassError, match=r"k_proj: rank 33 exceeds"):
        solve(backbone, task(rank=33), tmp_path / "r")


def test_too_few_tokens_are_noted(backbone: Backbone, tmp_path: Path) -> None:
    solved = solve(backbone, task(windows(1, 1)), tmp_path)
    (note,) = solved.notes
    assert "only 24 tokens" in note
    assert not solve(backbone, task(), tmp_path / "enough").notes


def test_scores_equal_those_of_weights_that_hold_the_adapter(
    source: Path, backbone: Backbone, tmp_path: Path
) -> None:
    solved = solve(backbone, task(factor_type="int8"), tmp_path)
    text = solved.task.held_out
    padded = Windows(text.input_ids, text.attention_mask.copy())
    padded.attention_mask[1, 15:] = 0
    found = perplexities(
        Executor(backbone.model, backbone.linears),
        Linear.effective_weight,
        {"few": text, "padded": padded},
        {"few": {"none": {}, "few": solved.factors}, "padded": {"few": solved.factors}},
        progress=SilentProgress(),
    )
    weights = {
        one.name: one.effective_weight() for one in backbone.linears if one.compressed is not None
    }
    adapted = weights | {
        name: weights[name] + one.product() for name, one in solved.factors.items()
    }
    for name, own, windows_ in (
        ("none", weights, text),
        ("few", adapted, text),
        ("few", adapted, padded),
    ):
        logits = reference_logits(load_eager(source, own), windows_.input_ids)[:, :-1]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        chances = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        kept = windows_.attention_mask[:, 1:].astype(bool)
        nll = -np.take_along_axis(chances, windows_.input_ids[:, 1:, None], axis=-1)[..., 0][kept]
        key = "few" if windows_ is text else "padded"
        assert found[key][name] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    assert abs(found["few"]["none"] / found["few"]["few"] - 1) > 0.01
