from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from typing_extensions import override

from eoracc.compiler import driver
from eoracc.compiler.adapters import add as adapter_add
from eoracc.compiler.adapters.add import solve_for_artifact
from eoracc.compiler.adapters.gates import adapter_warnings, check_adapters, refuse_adapters
from eoracc.compiler.cli import main
from eoracc.compiler.config.sections import AdapterConfig
from eoracc.compiler.kept.claim import claimed
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.content import AdapterParity, Report
from eoracc.errors import ArtifactError, ConfigError, GateError, ModelError
from eoracc.runtime.adapters.files import adapter_names, read_adapter
from eoracc.runtime.artifact.manifest import read_manifest, verify_manifest
from tests.tiny_build import DEFAULT_LEVEL, EORA, tiny_config, tiny_workspace
from tests.tiny_models import tiny_model
from tests.wrong_graph import load_wrong

if TYPE_CHECKING:
    from collections.abc import Sequence

HELD_OUT = {"windows": 2, "window_length": 32}
MATH: dict[str, Any] = {
    "text": "text.txt",
    "samples": 4,
    "sequence_length": 32,
    "rank": 5,
    "verify": HELD_OUT,
}
CODE: dict[str, Any] = {
    "mixture": [{"text": "text.txt", "weight": 3}, {"text": "text.txt", "samples": 2}],
    "samples": 3,
    "sequence_length": 32,
    "rank": 3,
    "factor_type": "int4",
    "overrides": {"*.q*_proj": {"rank": 8, "factor_type": "int8"}},
    "verify": {"text": "text.txt", "offset_tokens": 500, **HELD_OUT},
}


def build(workspace: Path, passes: Sequence[Any] = EORA, **fields: Any) -> driver.BuildResult:  # noqa: ANN401
    config = tiny_config(passes, **{"verify": {**HELD_OUT, "parity": False}, **fields})
    return driver.build(config, config_dir=workspace, progress=SilentProgress())


def add(workspace: Path, name: str = "math", config: dict[str, Any] = MATH, **options: Any) -> Any:  # noqa: ANN401
    return solve_for_artifact(
        workspace / "out",
        name,
        AdapterConfig.model_validate(config),
        data_dir=workspace,
        progress=SilentProgress(),
        **{"model": str(workspace / "model"), "parity": False, **options},
    )


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["adapter", "add", *map(str, arguments)])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact without adapters beside its checkpoint and text."""
    workspace = tiny_workspace(tmp_path_factory.mktemp("add"))
    build(workspace)
    return workspace


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "workspace"))


def test_a_second_run_for_the_same_adapter_is_refused(workspace: Path) -> None:
    with (
        claimed(workspace / ".out.math.work", "run"),
        pytest.raises(
            ArtifactError,
            match=r"another run that adds 'math' is running there .*: wait .* another name$",
        ),
    ):
        add(workspace)


def state(workspace: Path) -> dict[str, bytes]:
    return {
        path.relative_to(workspace).as_posix(): path.read_bytes()
        for path in sorted(workspace.rglob("*"))
        if path.is_file()
    }


def test_a_graph_that_differs_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_add, "load", load_wrong)
    with pytest.raises(ModelError, match="does not compute what transformers does"):
        add(workspace)
    assert not adapter_names(workspace / "out")


def test_code_of_the_model_runs_only_when_the_command_line_says_so(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    modules = workspace / "modules"
    modules.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)
    marker = workspace / "marker"
    model = workspace / "model"
    (model / "brought.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig\n"
        f"Path({str(marker)!r}).touch()\n"
        "class Brought(LlamaConfig):\n"
        "    pass\n"
    )
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "brought.Brought"}
    (model / "config.json").write_text(json.dumps(config))
    manifest_file = workspace / "out" / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    manifest["config"]["trust_remote_code"] = True
    manifest_file.write_text(json.dumps(manifest))

    command: list[str | Path] = [
        workspace / "out",
        "--name",
        "math",
        "--data",
        workspace / "text.txt",
    ]
    command += ["--model", model]
    refused = run(*command)
    assert refused.exit_code == 2
    assert "add --trust-remote-code if you trust it" in refused.stderr
    manifest["config"]["trust_remote_code"] = False
    manifest_file.write_text(json.dumps(manifest))
    assert "has digest" in run(*command).stderr  # config.json is another one now
    assert not marker.exists()
    assert "has digest" in run(*command, "--trust-remote-code").stderr
    assert marker.exists()


@pytest.mark.parametrize(
    "passes",
    [EORA, ["pack_projections", *EORA[:2], {"eora": {"rank": 5, "factor_type": "int8"}}]],
    ids=["plain", "packed"],
)
def test_build_and_add_give_equal_adapters(tmp_path: Path, passes: Sequence[Any]) -> None:
    built, added = (tiny_workspace(tmp_path / name) for name in ("built", "added"))
    result = build(built, passes, adapters={"math": MATH, "code": CODE})
    assert build(added, passes).manifest.digest == result.manifest.digest
    for name, config in (("math", MATH), ("code", CODE)):
        add(added, name, config)
    assert adapter_names(added / "out") == adapter_names(built / "out") == ["code", "math"]
    for name in ("math", "code"):
        one, other = (read_adapter(place / "out", name) for place in (built, added))
        assert one.factors.keys() == other.factors.keys()
        for linear, factors in one.factors.items():
            for part in ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale"):
                np.testing.assert_array_equal(
                    getattr(factors, part), getattr(other.factors[linear], part)
                )
        assert one.details["output_error"] == other.details["output_error"]
        assert one.details["perplexity"] == other.details["perplexity"]
        assert one.details["config"] == other.details["config"]


def test_the_backbone_stays_as_it_is(workspace: Path) -> None:
    before, digest = state(workspace), read_manifest(workspace / "out").digest
    added = add(workspace)
    after = state(workspace)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {
        "out/manifest.json",
        "out/report.json",
        "out/adapters/math.json",
        "out/adapters/math.onnx_adapter",
    }
    assert before.keys() <= after.keys(), "and no work folder is left"
    manifest = verify_manifest(workspace / "out")
    assert manifest.digest == digest == added.adapter.backbone
    report = Report.from_dict(json.loads(after["out/report.json"]))
    assert set(report.adapters.perplexity["math"]) == {"none", "math"}
    assert report.adapters.solved["math"].rank == 5
    stored = read_adapter(workspace / "out", "math")
    # report.json has seven digits.
    found = report.adapters.perplexity["math"]
    assert found == pytest.approx(stored.details["perplexity"], rel=5e-7)
    assert stored.details["from"] == "EoRA on 128 tokens of text.txt"


def test_figures_of_several_adapters_stand_side_by_side(workspace: Path) -> None:
    add(workspace)
    add(workspace, "code", CODE)
    path = workspace / "out" / "report.json"
    first = Report.from_dict(json.loads(path.read_text())).adapters
    assert set(first.perplexity) == set(first.solved) == set(first.original) == {"math", "code"}
    add(workspace, "math", {**MATH, "rank": 2}, force=True)
    second = Report.from_dict(json.loads(path.read_text())).adapters
    assert second.solved["math"].rank == 2
    assert second.solved["code"] == first.solved["code"]


def test_parity_with_the_adapter_is_recorded(workspace: Path) -> None:
    parity = add(workspace, parity=True).report.parity["math"]
    assert parity.passed
    assert {case["through"] for case in parity.cases} == {"library", "function"}
    # What is compared means something: float32 leaves far less than the adapter changes.
    for case in parity.cases:
        assert case["max_error"] <= case["tolerance"] < 0.01 * parity.adapter_effect


def test_an_adapter_that_rounding_hides_is_warned_of(tmp_path: Path) -> None:
    """At the default level the library's tolerance may be more than the adapter does."""
    workspace = tiny_workspace(tmp_path)
    none = {"nothing": {**MATH, "rank": 0}}
    passes = ("calibrate", {"quantize_gptq": {"bits": 2, "group_size": 16}})
    built = build(workspace, passes, verify=HELD_OUT, adapters=none, **DEFAULT_LEVEL).report
    assert built.parity["passed"]
    (warning,) = (one for one in built.warnings if one.code == "adapter_unproven")
    assert warning.message.startswith("adapter 'nothing': the native library may differ by")
    assert warning.figures["bound"] > warning.figures["adapter_effect"] == 0

    def stored() -> list[str]:
        report = Report.from_dict(json.loads((workspace / "out" / "report.json").read_text()))
        return [one.message[:11] for one in report.warnings if one.code == "adapter_unproven"]

    assert len(add(workspace, "empty", {**MATH, "rank": 0}, parity=True).warnings) == 1
    assert stored() == ["adapter 'no", "adapter 'em"]
    added = add(workspace, "empty", {**MATH, "rank": 32}, parity=True, force=True)
    parity = added.report.parity["empty"]
    assert parity.passed
    library, function = (
        max(case["tolerance"] for case in parity.cases if case["through"] == through)
        for through in ("library", "function")
    )
    assert function < 0.01 * library
    assert library < parity.adapter_effect
    assert not added.warnings
    assert stored() == ["adapter 'no"]


def test_an_adapter_that_is_computed_wrongly_is_not_stored(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(workspace / "out")

    def swapped(folder: Path, slots: Any, factors: Any, cases: Any, **rest: Any) -> Any:  # noqa: ANN401
        own = factors["math"]
        names = [name for name in own if name.endswith("q_proj")]
        other = {**own, names[0]: own[names[1]], names[1]: own[names[0]]}
        return check_adapters(folder, slots, {"math": other}, cases, **rest)

    monkeypatch.setattr(adapter_add, "check_adapters", swapped)
    with pytest.raises(GateError, match=r"adapter 'math': its logits are off by .*: it was not"):
        add(workspace, parity=True)
    assert state(workspace / "out") == before


class _Stop(SilentProgress):
    @override
    def phase(self, name: str, total: int) -> Any:
        if name.startswith("score"):
            raise KeyboardInterrupt
        return super().phase(name, total)


def test_an_interrupted_add_leaves_the_artifact_as_it_was(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(workspace / "out")
    with pytest.raises(KeyboardInterrupt):
        solve_for_artifact(
            workspace / "out",
            "math",
            AdapterConfig.model_validate(MATH),
            data_dir=workspace,
            progress=_Stop(),
            model=str(workspace / "model"),
        )
    assert state(workspace / "out") == before
    verify_manifest(workspace / "out")
    monkeypatch.setattr("eoracc.compiler.adapters.solve._solve_group", _must_not_run)
    add(workspace)  # what had been solved is taken from the work folder
    assert {path.name for path in workspace.iterdir()} == {"model", "out", "text.txt"}


def _must_not_run(*_: object) -> None:
    raise AssertionError


def test_a_full_disk_leaves_the_artifact_as_it_was(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(workspace / "out")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eoracc.compiler.sweep.resume.save_file", full)
    with pytest.raises(ArtifactError, match="the disk is full"):
        add(workspace)
    assert state(workspace / "out") == before


def test_refusals(workspace: Path, tmp_path: Path) -> None:
    before = state(workspace / "out")
    with pytest.raises(ArtifactError, match=r"takes adapters of int8 or int4 factors, not float16"):
        add(workspace, "math", {**MATH, "factor_type": "float16"})
    with pytest.raises(ArtifactError, match=r"adapter 'none': is no valid name"):
        add(workspace, "none")
    other = tiny_model("smollm", tmp_path / "other", vocab_size=260, seed=1)
    shutil.copy(workspace / "model" / "tokenizer.json", other)
    with pytest.raises(ArtifactError, match=r"other: has digest .*, the artifact was built from"):
        add(workspace, "math", MATH, model=str(other))
    with pytest.raises(ArtifactError, match=r"was built from 'model', which is not to be found"):
        add(workspace, "math", MATH, model=None)
    with pytest.raises(ConfigError, match="--sequence-length: windows of 129 tokens"):
        add(workspace, "math", {**MATH, "sequence_length": 129})
    assert state(workspace / "out") == before
    add(workspace)
    with pytest.raises(ArtifactError, match=r"has an adapter 'math': choose another name"):
        add(workspace)
    (workspace / "out" / "model.onnx").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        add(workspace, "other")


def test_an_artifact_without_slots_is_refused(tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path)
    build(workspace, onnxruntime={"adapter_type": "none"})
    with pytest.raises(ArtifactError, match=r"takes no adapters: build it again"):
        add(workspace)


def test_command(workspace: Path) -> None:
    out, model = workspace / "out", workspace / "model"
    base: list[str | Path] = [
        out,
        "--data",
        workspace / "text.txt",
        "--model",
        model,
        "--sequence-length",
        "32",
    ]
    base += ["--samples", "4", "--windows", "2", "--no-parity"]
    shown = run(*base, "--name", "a", "--rank", "2")
    assert shown.exit_code == 0, shown.output
    assert "adapter a: rank 2, int8" in shown.output
    assert f"added a to {out}" in shown.output.replace("\n", "")
    told = run(*base, "--name", "b", "--factor-type", "int4", "--seed", "1", "--held-out-offset",
               "600", "--json")  # fmt: skip
    assert told.exit_code == 0, told.output
    content = json.loads(told.stdout)
    assert content["name"] == "b"
    assert content["backbone"] == read_manifest(out).digest
    assert set(content["adapters"]["perplexity"]["b"]) == {"none", "b"}
    assert read_adapter(out, "b").factor_types == ("int4",)
    assert adapter_names(out) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--name", "a"], "has an adapter 'a'"),
        (["--name", "A"], "adapter 'A': is no valid name"),
        (["--name", "b", "--rank", "-1"], "--rank: must be greater than or equal to 0, not -1"),
        (["--name", "b", "--samples", "0"], "--samples: must be greater than or equal to 1"),
        (["--name", "b", "--windows", "0"], "--windows: must be greater than or equal to 1"),
        (["--name", "b", "--seed", "1"], "--seed: random windows come from anywhere"),
        (["--name", "b", "--field", "x", "--messages", "y"], "--messages: conflicts with --field"),
        (["--name", "b", "--rank", "999"], "rank 999 exceeds the smaller side"),
        (["--name", "b", "--samples", "9999"], "give more text or lower --samples"),
        (["--name", "b", "--factor-type", "float16"], "choose another --factor-type"),
    ],
)
def test_mistakes_are_one_sentence(workspace: Path, options: list[str], problem: str) -> None:
    out = workspace / "out"
    if "a" in options:
        add(workspace, "a")
    base: list[str | Path] = [out, "--data", workspace / "text.txt", "--model", workspace / "model"]
    base += ["--sequence-length", "32", "--no-parity", "--json"]
    samples = [] if "--samples" in options else ["--samples", "2"]
    result = run(*base, *samples, *options)
    assert result.exit_code == 2, result.output
    assert problem in json.loads(result.stdout)["error"]


def test_a_failed_gate_names_the_adapter() -> None:
    case = {"passed": False, "max_error": 3.0, "tolerance": 2.0}
    good = AdapterParity(cases=[{**case, "passed": True}], adapter_effect=1.0)
    bad = AdapterParity(cases=[{**case, "passed": True}, case], adapter_effect=1.0)
    (sentence,) = refuse_adapters({"good": good, "bad": bad})
    assert sentence.startswith("adapter 'bad': its logits are off by 1.5 times")


@pytest.mark.parametrize(("tolerance", "hides"), [(0.9, False), (1.0, True), (3.0, True)])
def test_only_tolerances_of_the_library_may_hide_an_adapter(tolerance: float, hides: bool) -> None:
    cases = [
        {"through": "library", "tolerance": 0.1},
        {"through": "library", "tolerance": tolerance},
        {"through": "function", "tolerance": 5.0},
    ]
    found = adapter_warnings({"one": AdapterParity(cases=cases, adapter_effect=1.0)})
    assert [one.figures for one in found] == [{"bound": tolerance, "adapter_effect": 1.0}] * hides
