"""Builds with a budget of bytes of the folder, against the folders that they write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler import driver
from eoracc.compiler.config.contradictions import contradictions
from eoracc.compiler.kept.claim import claimed
from eoracc.compiler.kept.interval import SaveInterval
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.sweep import survey as survey_module
from eoracc.compiler.targets import planned_folder
from eoracc.compiler.targets.planned_folder import PlannedFolder
from eoracc.compiler.targets.weights_file import DATA_FILE, graph_bytes
from eoracc.errors import ArtifactError, PassError
from eoracc.passes.plan import allocate as allocate_module
from eoracc.runtime.artifact.manifest import verify_manifest
from tests.kept_builds import InterruptedProgress
from tests.tiny_build import tiny_config, tiny_workspace

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from eoracc.compiler.driver import BuildResult

SWEEP: tuple[Any, ...] = (
    "calibrate",
    {"quantize_gptq": {"group_size": 16}},
    {"eora": {"factor_type": "int4"}},
)
QUICK: dict[str, Any] = {"windows": 1, "window_length": 16}


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return {
        tied: tiny_workspace(tmp_path_factory.mktemp("tied"), tie_word_embeddings=tied)
        for tied in (True, False)
    }


def files_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build(
    workspace: Path, passes: tuple[Any, ...], *, lean: bool = False, surveys: Path | None = None
) -> BuildResult:
    return driver.build(
        tiny_config(passes, verify=QUICK),
        config_dir=workspace,
        progress=SilentProgress(),
        force=True,
        lean=lean,
        surveys=surveys,
    )


class Recorded:
    """What was planned of the files, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders: list[int] = []
        self.graphs: list[int] = []
        nbytes, graph = PlannedFolder.nbytes, graph_bytes

        def record(folder: PlannedFolder, model: ir.Model) -> int:
            self.folders.append(nbytes(folder, model))
            return self.folders[-1]

        def record_graph(model: ir.Model) -> int:
            self.graphs.append(graph(model))
            return self.graphs[-1]

        monkeypatch.setattr(PlannedFolder, "nbytes", record)
        monkeypatch.setattr(planned_folder, "graph_bytes", record_graph)


def check(built: BuildResult, planned: Recorded, size: int) -> int:
    """The folder is within ``size``, and just below what was planned, which is returned."""
    survey = built.report.surveys[1]
    assert survey["size"]["budget_bytes"] == size
    chosen: int = survey["bytes"] + survey["size"]["other_bytes"]
    total = files_bytes(built.output)
    graph = sum((built.output / name).stat().st_size for name in ("model.onnx", DATA_FILE))
    assert planned.graphs[planned.folders.index(chosen)] == graph
    assert total <= chosen <= size
    # The difference is that of the records, which are small in any other folder.
    assert chosen - total < 0.01 * total
    assert built.report.folder_bytes == total
    verify_manifest(built.output)
    return chosen


def bits_of(built: BuildResult) -> dict[str, int]:
    linears = built.report.surveys[1]["linears"]
    return {name: choice["plan"]["bits"] for name, choice in linears.items()}


def test_the_folder_takes_what_was_planned_and_no_more_than_its_budget(
    workspaces: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = Recorded(monkeypatch)
    allocate = {"ranks": [0, 4, 8], "widths": [2, 3, 4]}
    passes = ({"calibrate_outputs": {}}, {"allocate": {"size": "1GB"} | allocate}, *SWEEP)
    large = build(workspaces[True], passes)
    most = check(large, planned, 10**9)
    # The table is one of the items, and the codes that head and embedding share are those planned.
    assert bits_of(large)["lm_head"] == 8
    head = next(linear for linear in large.report.linears if linear.name == "lm_head")
    assert (head.bits, head.rank) == (8, 0)
    size = most - 20_000
    passes = ({"calibrate_outputs": {}}, {"allocate": {"size": size} | allocate}, *SWEEP)
    small = build(workspaces[True], passes)
    chosen = check(small, planned, size)
    # Of the 20 kB that had to be saved, a step of gate and up, which share their bits, at most is
    # saved too much: a bit of their weights in each of two nodes.
    assert size - chosen < 15_000
    assert sum(bits_of(small).values()) < sum(bits_of(large).values())
    assert small.report.surveys[1]["distortion"] > large.report.surveys[1]["distortion"]


def test_an_override_of_a_tied_head_settles_its_table(
    workspaces: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = Recorded(monkeypatch)
    quantize = {"quantize_gptq": {"group_size": 16, "overrides": {"lm_head": {"bits": 8}}}}
    allocate = {"size": "1GB", "ranks": [0, 4, 8], "widths": [2, 3, 4]}
    sweep = (SWEEP[0], quantize, SWEEP[2])
    built = build(workspaces[True], ({"calibrate_outputs": {}}, {"allocate": allocate}, *sweep))
    # The table is planned and paid once, as it is stored: the sum of both is that of the files.
    check(built, planned, 10**9)
    assert bits_of(built)["lm_head"] == 8
    assert "model.embed_tokens" not in bits_of(built)


def test_a_lean_folder_of_untied_tables(
    workspaces: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = Recorded(monkeypatch)
    allocate = {"size": "1GB", "ranks": [0, 4], "widths": [3]}
    built = build(
        workspaces[False], ({"calibrate_outputs": {}}, {"allocate": allocate}, *SWEEP), lean=True
    )
    check(built, planned, 10**9)
    assert {"lm_head", "model.embed_tokens"} < set(bits_of(built))


def test_a_build_that_resumes_with_another_plan_begins_its_sweep_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits the folder depends on ``--lean``, which the configuration does not have."""
    planned = Recorded(monkeypatch)
    monkeypatch.setattr(SaveInterval, "is_due", True)

    def run(size: int, folder: str, *, lean: bool, stop: int | None = None) -> BuildResult | None:
        workspace = tmp_path / folder
        if not workspace.exists():
            tiny_workspace(workspace)
        allocate = {"size": size, "widths": [2, 3, 4], "ranks": [0, 4, 8]}
        passes = ({"calibrate_outputs": {}}, {"allocate": allocate}, *SWEEP)
        config = tiny_config(passes, verify=QUICK)
        progress = SilentProgress() if stop is None else InterruptedProgress("compress", stop)
        try:
            return driver.build(config, config_dir=workspace, progress=progress, lean=lean)
        except KeyboardInterrupt:
            return None

    assert run(10**9, "most", lean=False, stop=1) is None
    size = planned.folders[-1] - 20_000
    # The first block is finished and saved.
    assert run(size, "resumed", lean=False, stop=6) is None
    assert (tmp_path / "resumed/.out.work/sweep/2/state.json").exists()
    resumed, fresh = (run(size, folder, lean=True) for folder in ("resumed", "fresh"))
    assert resumed is not None
    assert fresh is not None
    bits = bits_of(resumed)
    assert bits == bits_of(fresh)
    stored = {linear.name: linear.bits for linear in resumed.report.linears}
    assert {name: stored[name] for name in bits} == bits
    for name in ("model.onnx", DATA_FILE):
        assert (resumed.output / name).read_bytes() == (fresh.output / name).read_bytes()


def allocated(options: dict[str, Any]) -> tuple[Any, ...]:
    return {"calibrate_outputs": {}}, {"allocate": {"ranks": [0, 4]} | options}, *SWEEP


def test_builds_with_other_budgets_share_a_survey(
    workspaces: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surveys = tmp_path / "surveys"
    first = build(workspaces[True], allocated({"size": "1GB"}), surveys=surveys)
    largest = bits_of(first)
    size = files_bytes(first.output) - 20_000
    alone = build(workspaces[True], allocated({"size": size}))
    files = {name: (alone.output / name).read_bytes() for name in ("model.onnx", DATA_FILE)}
    chosen = bits_of(alone)
    assert chosen != largest
    with monkeypatch.context() as surveyed_once:
        surveyed_once.setattr(survey_module, "load_eager", refuse)
        surveyed_once.setattr(allocate_module._Trial, "items", refuse)
        again = build(workspaces[True], allocated({"size": size}), surveys=surveys)
        assert bits_of(again) == chosen
        for name, content in files.items():
            assert (again.output / name).read_bytes() == content
        # A way to compress that was not tried needs a survey of its own, and so do budgets that
        # leave embedding and head alone.
        for passes in (
            allocated({"size": size, "widths": [2, 4]}),
            allocated({"bits_per_weight": 3.5}),
        ):
            with pytest.raises(AssertionError, match="surveyed again"):
                build(workspaces[True], passes, surveys=surveys)


def test_a_build_whose_budget_was_too_small_goes_on_with_another(
    workspaces: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PassError, match="raise the budget"):
        build(workspaces[False], allocated({"bits_per_weight": 1.0}))
    monkeypatch.setattr(allocate_module._Trial, "items", refuse)
    assert build(workspaces[False], allocated({"bits_per_weight": 3.5})).report.surveys


def test_a_folder_of_surveys_serves_one_build_at_a_time(
    workspaces: dict[bool, Path], tmp_path: Path
) -> None:
    with (
        claimed(tmp_path, "build"),
        pytest.raises(ArtifactError, match="choose another folder for '--keep-surveys'"),
    ):
        build(workspaces[True], allocated({"size": "1GB"}), surveys=tmp_path)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("surveyed again")


def test_a_budget_below_all_choices_ends_before_the_sweep(workspaces: dict[bool, Path]) -> None:
    allocate = {"size": "1MB", "distortion": "relative"}
    with pytest.raises(PassError, match=r"a folder of 1,000,000 bytes leaves 0 of them for what"):
        build(workspaces[True], ({"allocate": allocate}, *SWEEP))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"targets": ["onnxruntime", "tensorrt_rtx"]}, "hold what 'size' cannot foresee"),
        (
            {"adapters": {"one": {"text": "text.txt"}}, "onnxruntime": {"adapter_type": "int8"}},
            "are not counted by 'size'",
        ),
    ],
)
def test_what_a_budget_cannot_foresee_is_refused(fields: dict[str, Any], problem: str) -> None:
    config = tiny_config(
        ({"calibrate_outputs": {}}, {"allocate": {"size": "1GB"}}, *SWEEP), **fields
    )
    assert any(problem in text for _, text in contradictions(config))
