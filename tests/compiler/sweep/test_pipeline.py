"""Builds of several stages: surveys that steer, and sweeps one after another."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from typing_extensions import override

from eoracc.compiler import driver
from eoracc.compiler.config.load import load_config
from eoracc.compiler.driver import BuildResult
from eoracc.compiler.kept.interval import SaveInterval
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.sweep.survey import Survey
from eoracc.errors import ConfigError, PassError
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.factorize.factorize_svd import FactorizeSvd
from eoracc.passes.graph.linears import Linear
from eoracc.passes.survey import SurveyContext, SurveyPass
from tests.tiny_build import tiny_config, tiny_workspace, without_folder

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import LinearGroup

QUICK: dict[str, Any] = {"windows": 1, "window_length": 16, "parity": False}
FACTORIZE = {"factorize_svd": {"ratio": 0.3}}
QUANTIZE = {"quantize_gptq": {"bits": 3, "group_size": 16}}
TWO_SWEEPS = ["calibrate", FACTORIZE, "calibrate", QUANTIZE, {"eora": {"rank": 2}}]


@dataclass(frozen=True, kw_only=True)
class Peek(SurveyPass):
    """Plans fewer bits for the down-projections; keeps what it was shown."""

    name: ClassVar[str] = "peek"
    seen: ClassVar[list[Survey]] = []
    made: ClassVar[list[str]] = []

    @override
    def survey(self, context: SurveyContext) -> dict[str, Any]:
        assert isinstance(context, Survey)
        self.seen.append(context)

        def make() -> dict[str, Any]:
            self.made.append(context.key)
            return {"bits": 2}

        found = context.remember("bits", make)
        for linear in context.linears:
            if linear.role == "down_proj":
                linear.plan |= found
        return found


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_workspace(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    Peek.seen.clear()
    Peek.made.clear()
    return Path(shutil.copytree(template, tmp_path / "workspace"))


def build(workspace: Path, passes: list[Any], **fields: Any) -> BuildResult:  # noqa: ANN401
    config = tiny_config(passes, verify=QUICK, **fields)
    return driver.build(config, config_dir=workspace, progress=SilentProgress())


def test_a_survey_ends_a_stage_and_sees_the_sweep_that_follows(workspace: Path) -> None:
    result = build(workspace, [Peek(), *TWO_SWEEPS])
    (context,) = Peek.seen
    assert [item.name for item in context.following] == ["calibrate", "factorize_svd"]
    assert context.windows is not None
    assert sum(len(batch.attention_mask) for batch in context.batches()) == 6
    assert [linear.whole for linear in context.linears] == [None] * len(context.linears)
    assert list(result.report.surveys) == [{"pass": "peek", "bits": 2}]


def test_a_plan_steers_the_linears_that_it_is_for(workspace: Path) -> None:
    overrides = {"model.layers.1.*": {"bits": 4}}
    quantize = {"quantize_gptq": {"bits": 3, "group_size": 16, "overrides": overrides}}
    linears = build(workspace, [Peek(), "calibrate", quantize]).report.linears
    bits = {linear.name: linear.bits for linear in linears}
    assert bits["model.layers.0.mlp.down_proj"] == 2
    assert bits["model.layers.0.mlp.up_proj"] == 3
    assert bits["model.layers.1.mlp.down_proj"] == 4, "what model.yaml says goes before a plan"


def test_trials_leave_the_model_as_it_is(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survey = Peek.survey

    def trial(self: Peek, context: Survey) -> dict[str, Any]:
        executor = context.executor()
        linear = executor.linears[0]
        linear.factorize(
            np.ones((linear.out_features, 1), np.float32),
            np.ones((1, linear.in_features), np.float32),
        )
        executor.run_to_head(context.batches(), Linear.effective_weight)
        return survey(self, context)

    plain = build(workspace, [Peek(), "calibrate", QUANTIZE])
    monkeypatch.setattr(Peek, "survey", trial)
    tried = build(workspace, [Peek(), "calibrate", QUANTIZE], output="tried")
    assert plain.manifest.files["model.onnx.data"] == tried.manifest.files["model.onnx.data"]


def test_trials_know_what_the_graphs_linears_know(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Linear] = []
    survey = Peek.survey

    def trial(self: Peek, context: Survey) -> dict[str, Any]:
        context.linears[0].output_gram = lambda: np.eye(1, dtype=np.float32)
        context.linears[0].plan["bits"] = 8
        found[:] = context.executor().linears[:2]
        found[0].plan["rank"] = 1
        assert "rank" not in context.linears[0].plan
        return survey(self, context)

    monkeypatch.setattr(Peek, "survey", trial)
    build(workspace, ["calibrate", FACTORIZE, Peek(), "calibrate", QUANTIZE])
    first, second = found
    assert [one.role for one in found] == ["q_proj.v", "q_proj.u"]
    assert first.whole is second.whole is not None
    assert first.output_gram is not None
    assert (first.plan, second.plan) == ({"bits": 8, "rank": 1}, {})


class _Stop:
    """Interrupts a pass, as Ctrl-C does, at its n-th group; counts the groups of both passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: tuple[str, int] | None = None
        self.calls: list[str] = []
        for kind in (FactorizeSvd, Eora):
            monkeypatch.setattr(kind, "call", self._counted(kind.name, kind.call))

    def _counted(self, name: str, call: Any) -> Any:  # noqa: ANN401 - a method
        def counted(layer_pass: Any, group: LinearGroup) -> bool:  # noqa: ANN401
            self.calls.append(name)
            if self.at == (name, self.calls.count(name)):
                raise KeyboardInterrupt
            done: bool = call(layer_pass, group)
            return done

        return counted


@pytest.mark.parametrize(
    ("stop", "factorizations"),
    [(("factorize_svd", 6), (6, 5)), (("eora", 9), (9, 0)), (("eora", 14), (9, 0))],
    ids=["in the first sweep", "at the beginning of the second", "in the midst of the second"],
)
def test_an_interrupted_build_goes_on_in_the_sweep_that_it_was_in(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: tuple[str, int],
    factorizations: tuple[int, int],
) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)
    whole = build(workspace, [Peek(), *TWO_SWEEPS])
    shutil.rmtree(whole.output)
    Peek.made.clear()
    watch = _Stop(monkeypatch)
    watch.at = stop
    with pytest.raises(KeyboardInterrupt):
        build(workspace, [Peek(), *TWO_SWEEPS])
    first = watch.calls.count("factorize_svd")
    watch.at, watch.calls = None, []
    resumed = build(workspace, [Peek(), *TWO_SWEEPS])
    assert (first, watch.calls.count("factorize_svd")) == factorizations
    assert len(Peek.made) == 1, "a finished survey is not made again"
    if stop == ("eora", 14):
        assert watch.calls.count("eora") < 17, "its first block was kept"
    assert resumed.manifest.digest == whole.manifest.digest
    assert resumed.report.linears == whole.report.linears
    assert resumed.report.factorized == whole.report.factorized
    assert without_folder(resumed.report.fidelity) == without_folder(whole.report.fidelity)


def test_a_second_sweep_compensates_what_the_first_has_quantized(workspace: Path) -> None:
    passes = ["calibrate", QUANTIZE, "calibrate", {"eora": {"rank": 4}}]
    report = build(workspace, passes).report
    for linear in report.linears[:-1]:
        assert 0 < linear.errors["eora"] < linear.errors["quantize_gptq"]


def test_a_sweep_keeps_nothing_of_what_it_has_not_reached(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of linears that an earlier sweep has compressed, too."""
    monkeypatch.setattr(SaveInterval, "is_due", True)
    passes = ["calibrate", QUANTIZE, "calibrate", {"eora": {"rank": 4}}]
    whole = build(workspace, passes)
    shutil.rmtree(whole.output)
    watch = _Stop(monkeypatch)
    # In the second block, and again at the head, when the second block has been kept as well.
    for groups in (6, 5):
        watch.at, watch.calls = ("eora", groups), []
        with pytest.raises(KeyboardInterrupt):
            build(workspace, passes)
    watch.at, watch.calls = None, []
    resumed = build(workspace, passes)
    assert len(watch.calls) == 1, "the head"
    assert resumed.manifest.digest == whole.manifest.digest
    assert resumed.report.linears == whole.report.linears


def test_a_calibration_with_nothing_between_is_refused(workspace: Path) -> None:
    path = workspace / "model.yaml"
    path.write_text(
        "model: model\noutput: out\ncalibration: {text: text.txt}\n"
        "passes:\n- calibrate\n- calibrate\n- quantize_gptq\n"
    )
    with pytest.raises(ConfigError, match=r":6: passes\.1\.calibrate: occurs twice: keep one"):
        load_config(path)


def test_quantizing_in_the_sweep_that_factorises_is_refused(workspace: Path) -> None:
    with pytest.raises(PassError, match="put another 'calibrate' before the pass that quantizes"):
        build(workspace, ["calibrate", FACTORIZE, QUANTIZE])
