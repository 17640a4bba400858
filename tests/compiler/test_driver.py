from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from eoracc.compiler import driver
from eoracc.compiler.driver import BuildResult
from eoracc.compiler.kept.claim import claimed
from eoracc.compiler.kept.interval import SaveInterval
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.content import Report
from eoracc.compiler.sweep.products import resolve_precision
from eoracc.compiler.sweep.resume import SweepState
from eoracc.errors import ArtifactError, ConfigError, DataError, GateError, ModelError, PassError
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.quantize.quantization import EMBEDDING_BITS
from eoracc.runtime.artifact.manifest import verify_manifest
from eoracc.runtime.parity.record import PARITY_FILE
from eoracc.runtime.parity.tokens import TOKENS_FILE
from tests.tiny_build import DEFAULT_LEVEL, EORA, tiny_config, tiny_workspace, without_folder
from tests.wrong_graph import load_wrong

if TYPE_CHECKING:
    from eoracc.compiler.config.sections import BuildConfig
    from eoracc.passes.compensate.base import Factors
    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.lost_output import LostOutput

QUICK: dict[str, Any] = {"windows": 1, "window_length": 16, "parity": False}
"""Gates that take no time, for builds that are about something else."""


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "workspace"))


def build(workspace: Path, config: BuildConfig) -> BuildResult:
    return driver.build(config, config_dir=workspace, progress=SilentProgress())


def left_over(workspace: Path) -> set[str]:
    return {path.name for path in workspace.iterdir()} - {"model", "text.txt"}


@pytest.mark.parametrize("fields", [{}, DEFAULT_LEVEL], ids=["float activations", "default"])
def test_builds_an_artifact_that_verifies(workspace: Path, fields: dict[str, Any]) -> None:
    chat = "{% for m in messages %}\n  {% if 'x' in m.content %}\nyes\n  {% endif %}\n{% endfor %}"
    (workspace / "model/chat_template.jinja").write_text(chat)
    (workspace / "model/additional_chat_templates").mkdir()
    (workspace / "model/additional_chat_templates/rag.jinja").write_text("R")
    limits = {"perplexity_ratio": 9.0, "top1_agreement": 0.01}
    verify = {"windows": 2, "window_length": 32, "compare": ["svd"], "limits": limits}
    config = tiny_config(verify=verify, **fields)
    result = build(workspace, config)
    assert left_over(workspace) == {"out"}
    assert result.output == workspace / "out"
    manifest = verify_manifest(result.output)
    assert manifest.digest == result.manifest.digest
    as_built = config.resolved()
    as_built["passes"][0]["calibrate"]["precision"] = resolve_precision("auto")
    assert manifest.config == as_built
    assert as_built["onnxruntime"]["accuracy_level"] == (4 if fields else 0)
    assert PARITY_FILE in manifest.files
    assert {"chat_template.jinja", "additional_chat_templates/rag.jinja"} <= manifest.files.keys()

    content = json.loads((result.output / "report.json").read_text())
    assert content == json.loads(json.dumps(result.report.as_dict()))
    stored = Report.from_dict(content)
    fidelity = stored.fidelity
    assert [row.name for row in fidelity.rows] == ["original", "quantized", "svd", "eora"]
    assert (fidelity.windows, fidelity.window_length) == (2, 32)
    assert (fidelity.limits, list(fidelity.exceeded)) == (limits, [])
    assert stored.parity["passed"]
    assert stored.chat["templates"] == ["default", "rag"]
    assert stored.chat["onnxruntime_genai"]["differences"] == []
    assert (
        "yes" in json.loads((result.output / "tokenizer_config.json").read_text())["chat_template"]
    )
    names = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    assert [linear.role for linear in stored.linears] == [*names, *names, "lm_head"]
    for linear in stored.linears[:-1]:
        assert (linear.bits, linear.group_size, linear.rank) == (3, 16, 4)
        assert 0 < linear.errors["eora"] < linear.errors["quantize_gptq"] < 1
    head = stored.linears[-1]
    assert (head.bits, head.group_size, head.rank) == (EMBEDDING_BITS, 48, 0)
    assert stored.build.peak_memory_bytes > 0
    phases = [phase["name"] for phase in stored.build.phases]
    assert phases == ["load", "check", "compress", "score", "record", "parity"]


def test_lean_differs_by_its_records_alone(workspace: Path) -> None:
    verify = {"windows": 1, "window_length": 16}
    config = tiny_config([{"quantize_rtn": {"bits": 4}}], verify=verify, **DEFAULT_LEVEL)
    whole = build(workspace, config)
    lean = driver.build(
        config.model_copy(update={"output": "lean"}),
        config_dir=workspace,
        progress=SilentProgress(),
        lean=True,
    )
    manifest = verify_manifest(lean.output)
    records = {PARITY_FILE, TOKENS_FILE}
    assert whole.manifest.files.keys() - manifest.files.keys() == records
    assert manifest.files.keys() < whole.manifest.files.keys()
    for name in manifest.files.keys() - {"report.json"}:
        assert manifest.files[name] == whole.manifest.files[name]
    assert manifest.parity == verify_manifest(whole.output).parity
    assert manifest.parity["passed"], "it is checked all the same"
    left_out = sum(whole.manifest.files[name].size for name in records)
    difference = sum(whole.report.folder_kinds.values()) - sum(lean.report.folder_kinds.values())
    assert abs(difference - left_out) < 1000, "entries of the manifest"
    assert lean.report.folder_bytes == sum(
        path.stat().st_size for path in lean.output.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", ["lm_head", "model.embed_tokens", "both"])
def test_head_and_embedding_by_override(
    template: Path, tmp_path: Path, *, tied: bool, pattern: str
) -> None:
    workspace = template if tied else tiny_workspace(tmp_path, "llama")
    patterns = ["lm_head", "model.embed_tokens"] if pattern == "both" else [pattern]
    overrides = {name: {"bits": 8, "group_size": 16} for name in patterns}
    quantize = {"bits": 3, "group_size": 16, "overrides": overrides, "embedding_bits": None}
    passes = ["calibrate", {"quantize_gptq": quantize}, {"eora": {"rank": 4}}]
    result = build(workspace, tiny_config(passes, output=str(tmp_path / "out")))
    assert result.report.parity["passed"]
    head = result.report.linears[-1]
    assert (head.bits, head.rank) == ((8, 0) if "lm_head" in patterns else (None, 0))
    original, *_, shipped = result.report.fidelity.rows
    table = 260 * 48 * 4
    # A tied table follows its head. It stays while the head multiplies with it.
    kept = 2 - len(patterns) if not tied else int("lm_head" not in patterns)
    blocks = sum(linear.bytes for linear in result.report.linears[:-1])
    assert shipped.bytes > kept * table + blocks
    assert shipped.bytes < (kept + 0.75) * table + blocks
    assert original.bytes > (1 if tied else 2) * table


@pytest.mark.parametrize(
    ("passes", "names", "ranks"),
    [
        (["pack_projections", *EORA], ["original", "quantized", "svd", "eora"], {4}),
        ([*EORA[:2], {"eora": {"rank": 0}}], ["original", "quantized", "svd", "eora"], {0}),
        (
            [*EORA[:2], {"svd": {"rank": 3, "factor_type": "float16"}}],
            ["original", "quantized", "svd"],
            {3},
        ),
        (
            ["calibrate", {"quantize_gptq": {"bits": 4, "group_size": -1}}, {"eora": {"rank": 2}}],
            ["original", "quantized", "svd", "eora"],
            {2},
        ),
        ([{"calibrate": {"through": "original"}}, *EORA[1:]], None, {4}),
        ([{"calibrate": {"match": "outputs"}}, *EORA[1:]], None, {4}),
        ([{"quantize_rtn": {"bits": 2, "symmetric": True}}], ["original", "quantized"], {0}),
        ([{"quantize_rtn": {"bits": 4}}, {"svd": {"rank": 2}}], None, {2}),
    ],
    ids=[
        "packed",
        "rank 0",
        "svd",
        "whole rows",
        "through original",
        "outputs",
        "rtn",
        "rtn and svd",
    ],
)
def test_combinations_of_passes(
    template: Path, tmp_path: Path, passes: list[Any], names: list[str] | None, ranks: set[int]
) -> None:
    fields: dict[str, Any] = {"output": str(tmp_path / "out")}
    if not any("calibrate" in item for item in passes):
        fields["calibration"] = None
        fields["verify"] = {"text": "text.txt", "windows": 2, "window_length": 32}
    result = build(template, tiny_config(passes, **fields))
    assert result.report.parity["passed"]
    in_blocks = [linear for linear in result.report.linears if linear.block is not None]
    assert {linear.rank for linear in in_blocks} == ranks
    if names is not None:
        compare = names if "calibration" not in fields else [n for n in names if n != "svd"]
        assert [row.name for row in result.report.fidelity.rows] == compare


def test_same_inputs_give_the_same_digest(template: Path, tmp_path: Path) -> None:
    config = tiny_config(verify=QUICK, output=str(tmp_path / "out"))
    first = build(template, config)
    shutil.rmtree(first.output)
    assert build(template, config).manifest.digest == first.manifest.digest


@pytest.mark.parametrize("match", ["weights", "outputs"])
def test_interrupted_build_goes_on_and_ends_the_same(
    workspace: Path, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)
    skip = {"model.layers.0.mlp.up_proj": {"skip": True}}
    quantize = {"quantize_gptq": {"bits": 3, "group_size": 16, "overrides": skip}}
    config = tiny_config([{"calibrate": {"match": match}}, quantize, EORA[2]], **DEFAULT_LEVEL)
    whole = build(workspace, config)
    shutil.rmtree(whole.output)
    call, seen = Eora.call, []

    def interrupted(self: Eora, group: LinearGroup) -> None:
        seen.append(group.name)
        if group.linears[0].block == 1 and len(seen) <= 5:
            raise KeyboardInterrupt
        call(self, group)

    monkeypatch.setattr(Eora, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(workspace, config)
    assert left_over(workspace) == {".out.work"}
    seen.append("again")
    resumed = build(workspace, config)
    first_again = seen[seen.index("again") + 1]
    assert first_again.startswith("model.layers.1."), "block 0 was to be taken from the checkpoint"
    assert resumed.manifest.digest == whole.manifest.digest
    assert resumed.report.linears == whole.report.linears
    assert without_folder(resumed.report.fidelity) == without_folder(whole.report.fidelity)
    assert resumed.report.warnings == whole.report.warnings
    assert whole.report.warnings
    assert left_over(workspace) == {"out"}


def test_factors_that_do_harm_on_held_out_text_are_dropped(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [*EORA[:2], {"eora": {"rank": 4, "factor_type": "float16"}}]
    solve = Eora.factors

    def opposed(self: Eora, lost: LostOutput, rank: int) -> Factors:
        b, a = solve(self, lost, rank)
        return -b, a

    monkeypatch.setattr(Eora, "factors", opposed)
    report = build(workspace, tiny_config(passes, verify=QUICK)).report
    blocks = [linear for linear in report.linears if linear.block is not None]
    dropped = [entry.linear for entry in report.warnings if entry.code == "factors_dropped"]
    assert dropped == [linear.name for linear in blocks]
    assert all(linear.rank == 0 for linear in blocks)
    assert not report.notes


def test_factors_are_shipped_unchecked_where_the_text_ends(workspace: Path) -> None:
    calibration = {"text": "text.txt", "samples": 6, "sequence_length": 32}
    verify = {"windows": 238, "window_length": 16, "parity": False}
    report = build(workspace, tiny_config(calibration=calibration, verify=verify)).report
    assert any("not checked on held-out text" in note for note in report.notes)
    assert all(linear.rank == 4 for linear in report.linears if linear.block is not None)


def test_full_disk_in_the_sweep(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SaveInterval, "is_due", True)
    monkeypatch.setattr(SweepState, "save", save)
    with pytest.raises(ArtifactError, match=r"out: the disk is full: free some space or choose"):
        build(workspace, tiny_config())
    assert "out" not in left_over(workspace)


def test_a_second_build_in_the_same_folder_is_refused(workspace: Path) -> None:
    with (
        claimed(workspace / ".out.work", "build"),
        pytest.raises(ArtifactError, match=r"\.out\.work: another build is running there \(this"),
    ):
        build(workspace, tiny_config())
    assert left_over(workspace) == set()


def test_work_of_an_earlier_version_is_discarded_with_one_line(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = workspace / ".out.work" / "sweep" / "0"
    sweep.mkdir(parents=True)
    (sweep / "state.json").write_text('{"key": "k", "operands": [], "activations": []}')
    (sweep / "operands-00004.safetensors").write_bytes(b"old")
    build(workspace, tiny_config(verify=QUICK))
    lines = [record.getMessage() for record in caplog.records if "discarded" in record.message]
    assert lines == [
        f"{sweep} was kept by another version of eoracc: it is discarded, and computed again"
    ]
    assert left_over(workspace) == {"out"}


def test_exceeded_limit_writes_no_artifact(workspace: Path) -> None:
    verify = {"windows": 2, "window_length": 32, "limits": {"kl": 1e-9, "top1_agreement": 0.0}}
    with pytest.raises(GateError, match=r"^kl \S+ is above verify\.limits\.kl 1e-09: no artifact"):
        build(workspace, tiny_config(verify=verify))
    assert left_over(workspace) == {".out.work"}
    report = Report.from_dict(json.loads((workspace / ".out.work" / "report.json").read_text()))
    assert len(report.fidelity.exceeded) == 1


def test_failed_parity_writes_no_artifact(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eoracc.plugins.operands.low_rank import LowRank

    product = LowRank.product
    # The eager model gets other weights than the artifact holds.
    monkeypatch.setattr(LowRank, "product", lambda self: 1.01 * product(self))
    with pytest.raises(GateError, match=r"^parity: FAILED, .* no artifact was written"):
        build(workspace, tiny_config())
    assert left_over(workspace) == {".out.work"}


def test_a_graph_that_differs_is_refused_before_any_work(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eoracc.compiler.inputs.load", load_wrong)
    progress = SilentProgress()
    with pytest.raises(ModelError, match=r"does not compute what transformers does: .* attention"):
        driver.build(tiny_config(verify=QUICK), config_dir=workspace, progress=progress)
    assert [time.name for time in progress.times] == ["load", "check"]
    assert left_over(workspace) == set()


def test_existing_output_is_refused_before_any_work(workspace: Path) -> None:
    (workspace / "out").mkdir()
    with pytest.raises(ArtifactError, match="exists: choose another 'output'"):
        build(workspace, tiny_config(model="missing"))
    assert left_over(workspace) == {"out"}


def test_output_in_the_folder_of_the_model(workspace: Path) -> None:
    config = tiny_config(["quantize_rtn"], verify=QUICK, output="model/out")
    first = build(workspace, config)
    assert first.output == workspace / "model" / "out"
    again = driver.build(config, config_dir=workspace, progress=SilentProgress(), force=True)
    assert again.manifest.digest == first.manifest.digest
    assert not [path for path in (workspace / "model").iterdir() if path.name.startswith(".")]


def test_output_that_is_the_folder_of_the_model(workspace: Path) -> None:
    config = tiny_config(["quantize_rtn"], verify=QUICK, output="model")
    before = sorted(workspace.rglob("*"))
    with pytest.raises(ArtifactError, match="model: exists and is no eoracc artifact"):
        driver.build(config, config_dir=workspace, progress=SilentProgress(), force=True)
    assert sorted(workspace.rglob("*")) == before


def test_windows_beyond_the_positions_of_the_model(workspace: Path) -> None:
    long, held_out = {"window_length": 129}, {"windows": 1, "window_length": 32}
    text = {"text": "text.txt", "samples": 2, "sequence_length": 32}
    task = {**text, "rank": 2, "verify": held_out}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("verify.window_length", {"verify": {**QUICK, **long}}),
        ("calibration.sequence_length", {"calibration": {**text, "sequence_length": 129}}),
        ("adapters.a.sequence_length", {"adapters": {"a": {**task, "sequence_length": 129}}}),
        ("adapters.a.verify.window_length", {"adapters": {"a": {**task, "verify": long}}}),
    ]
    for setting, fields in cases:
        config = tiny_config(**{"verify": QUICK, **fields})
        with pytest.raises(ConfigError, match=f"^{setting}: windows of 129 tokens .* 128 pos"):
            build(workspace, config)
        assert left_over(workspace) == set()


def test_text_with_a_token_beyond_the_embedding(workspace: Path) -> None:
    path = workspace / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {**content["added_tokens"][-1], "id": 260, "content": "<new>"}
    content["added_tokens"].append(token)
    path.write_text(json.dumps(content))
    text = (workspace / "text.txt").read_text()
    (workspace / "text.txt").write_text(f"{text[:100]}<new>{text[100:]}")
    with pytest.raises(DataError, match=r"text\.txt: holds '<new>', token 260 .* has 260 rows"):
        build(workspace, tiny_config(verify=QUICK))
    assert left_over(workspace) == set()


def test_weights_beyond_float16_scales(workspace: Path) -> None:
    path = workspace / "model" / "model.safetensors"
    arrays = load_file(path)
    for name, array in arrays.items():
        # The same function, with weights of 1e-9 and of 1e7.
        power = {"up_proj": -26, "down_proj": 26}.get(name.split(".")[-2], 0)
        arrays[name] = np.ldexp(array, power)
    save_file(arrays, path, metadata={"format": "pt"})
    quantize = {"bits": 8, "group_size": 16, "embedding_bits": None}
    passes = ["calibrate", {"quantize_gptq": quantize}]
    report = build(workspace, tiny_config(passes, verify={**QUICK, "parity": True})).report
    assert report.parity["passed"]
    assert report.fidelity.rows[-1].kl < 1e-4
    noted = {linear.role for linear in report.linears if linear.notes}
    assert noted == {"up_proj", "down_proj"}


def test_override_that_matches_nothing(workspace: Path) -> None:
    passes = ["calibrate", {"quantize_gptq": {"overrides": {"*.q_prj": {"bits": 4}}}}]
    with pytest.raises(ConfigError, match=r"no linear's name matches '\*\.q_prj': names are like"):
        build(workspace, tiny_config(passes))
    assert left_over(workspace) == set()


def test_rank_beyond_the_matrix(workspace: Path) -> None:
    with pytest.raises(PassError, match=r"q_proj: rank 49 exceeds .* give 48 at most"):
        build(workspace, tiny_config([*EORA[:2], {"eora": {"rank": 49}}]))
    assert left_over(workspace) == set()


@pytest.mark.parametrize(
    ("tensor", "value", "match"),
    [
        ("model.layers.0.mlp.up_proj.weight", np.nan, r"up_proj\.weight holds NaN or Inf"),
        ("model.embed_tokens.weight", np.inf, r"embed_tokens\.weight holds NaN or Inf"),
        ("model.norm.weight", np.nan, r"norm\.weight holds NaN or Inf"),
    ],
)
def test_weights_that_are_not_finite(
    workspace: Path, tensor: str, value: float, match: str
) -> None:
    path = workspace / "model" / "model.safetensors"
    arrays = load_file(path)
    arrays[tensor].reshape(-1)[7] = value
    save_file(arrays, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=match):
        build(workspace, tiny_config(verify=QUICK))
    assert "out" not in left_over(workspace)


def test_activations_that_are_not_finite(workspace: Path) -> None:
    path = workspace / "model" / "model.safetensors"
    arrays = load_file(path)
    # A finite weight whose product is not: float32 ends at 3.4e38.
    arrays["model.layers.1.input_layernorm.weight"][:] = 3e38
    save_file(arrays, path, metadata={"format": "pt"})
    with pytest.raises(PassError, match=r"layers\.1\.\S+q_proj.*: its input .* holds NaN or Inf"):
        build(workspace, tiny_config(verify=QUICK))
    assert "out" not in left_over(workspace)
