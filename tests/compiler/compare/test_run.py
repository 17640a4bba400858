from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler import driver
from eoracc.compiler.compare import run as module
from eoracc.compiler.compare.folder import WorkFolder
from eoracc.compiler.compare.result import Comparison, Row
from eoracc.compiler.compare.run import compare, work_folder
from eoracc.compiler.kept.interval import SaveInterval
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.fidelity import Scorer
from eoracc.compiler.sweep import pipeline
from eoracc.errors import ConfigError, DataError, ModelError, PassError
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.plan import allocate as allocation
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from tests.tiny_build import tiny_config, tiny_workspace
from tests.wrong_graph import load_wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eoracc.compiler.config.sections import BuildConfig
    from eoracc.compiler.report.content import FidelityReport
    from eoracc.compiler.report.fidelity import Scores, Variant
    from eoracc.compiler.sweep.pipeline import Compressed
    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.plan.items import Item

TEXT = {"windows": 2, "window_length": 32}

QUANTIZE = {"quantize_gptq": {"bits": 3, "group_size": 16}}

RECIPES: dict[str, Any] = {
    "none": None,
    "eora": None,
    "lqer": None,
    "svd_llm": None,
    "both": [{"calibrate": {"through": "original"}}, "svd_llm", "calibrate", QUANTIZE],
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "workspace"))


def config(through: str = "compressed", **section: Any) -> BuildConfig:  # noqa: ANN401
    ood = {"text": "text.txt", "offset_tokens": 3000, **TEXT}
    return tiny_config(
        [
            {"calibrate": {"through": through}},
            QUANTIZE,
            {"eora": {"rank": 1, "factor_type": "int8"}},
        ],
        compare={"methods": RECIPES, "ood": ood} | section,
        verify=TEXT | {"parity": False, "compare": ["svd"]},
    )


def run(
    workspace: Path,
    config: BuildConfig,
    methods: Sequence[str],
    budgets: Sequence[str] = ("6",),
    *,
    fresh: bool = False,
) -> Comparison:
    return compare(
        config,
        methods,
        budgets,
        config_dir=workspace,
        progress=SilentProgress(),
        fresh=fresh,
    )


def measured(row: Row) -> dict[str, Any]:
    """A row without what differs from run to run."""
    return {k: v for k, v in row.as_dict().items() if k not in {"seconds", "wall_s"}}


def built(workspace: Path, config: BuildConfig, row: Row, *, elsewhere: bool) -> FidelityReport:
    """What a build of the row's passes reports, on held-out text or on the other one."""
    assert config.compare is not None
    assert config.compare.ood is not None
    verify = config.compare.ood if elsewhere else config.verify
    alone = tiny_config(
        row.passes,
        verify={**verify.model_dump(exclude={"compare"}), "parity": False},
        output="alone",
    )
    result = driver.build(alone, config_dir=workspace, progress=SilentProgress(), force=True)
    return result.report.fidelity


def written(figure: float) -> float:
    """The figure as report.json has it."""
    return float(f"{figure:.7g}")


def test_rows_of_a_folders_size_are_builds_whose_folders_fit(workspace: Path) -> None:
    """Each method pays for its tables, the graph and the files."""
    allocate = {"size": "1GB", "ranks": [0, 2], "widths": [2, 3], "distortion": "relative"}
    mine = {"eora": None, "mine": [{"allocate": allocate}, "calibrate", QUANTIZE, "eora"]}
    settings = config(methods=mine, ood=None)
    (most,) = run(workspace, settings, ["eora"], ["1GB"]).rows
    assert most.rank == 32
    assert most.figures is not None
    size = most.figures.folder_bytes - 8_000
    for row in run(workspace, settings, ["eora", "mine"], [f"{size}B"]).rows:
        assert row.figures is not None
        assert row.figures.folder_bytes <= size
        # A rank beyond whole tiles begins another tile.
        assert row.rank == (16 if row.method == "eora" else None)
        alone = tiny_config(row.passes, verify=TEXT | {"parity": False}, output="alone")
        built = driver.build(alone, config_dir=workspace, progress=SilentProgress(), force=True)
        assert built.report.folder_bytes is not None
        # The records of the build are bounded, not known.
        assert 0 <= row.figures.folder_bytes - built.report.folder_bytes < 20_000


def test_budgets_of_a_method_share_its_survey(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = {"bits_per_weight": 4, "ranks": [0, 2], "distortion": "relative"}
    mine = {"mine": [{"allocate": allocate}, "calibrate", QUANTIZE, "eora"]}
    settings = config(methods=mine, ood=None)
    alone = [run(workspace, settings, ["mine"], [budget], fresh=True) for budget in ("4", "5")]
    surveyed: list[str] = []
    items = allocation._Trial.items

    def count(trial: allocation._Trial, group: LinearGroup) -> list[Item]:
        surveyed.append(group.name)
        return items(trial, group)

    monkeypatch.setattr(allocation._Trial, "items", count)
    together = run(workspace, settings, ["mine"], ["4", "5"], fresh=True)
    assert len(surveyed) == len(set(surveyed)) > 0
    for row, expected in zip(together.rows, alone, strict=True):
        assert row.figures is not None
        (one,) = expected.rows
        assert one.figures is not None
        assert row.figures.kl == one.figures.kl
        assert row.figures.linear_bytes == one.figures.linear_bytes
    assert not (work_folder(settings, workspace) / "surveys").exists()


def test_several_compensations_keep_to_a_budget(workspace: Path) -> None:
    sequence = ["calibrate", {"quantize_gptq": {"bits": 2}}, {"svd": {"rank": 1}}, "eora"]
    settings = config(methods={"sequence": sequence}, ood=None)
    (row,) = run(workspace, settings, ["sequence"]).rows
    assert row.figures is not None
    alone = tiny_config(row.passes, verify=TEXT | {"parity": False}, output="alone")
    built = driver.build(alone, config_dir=workspace, progress=SilentProgress(), force=True)
    # A build may drop factors of one pass, which do harm on held-out text; the other's fill tiles.
    shipped = built.report.fidelity.rows[-1]
    assert written(row.figures.bits_per_weight) == shipped.bits_per_weight
    assert row.figures.bits_per_weight <= 6
    assert row.rank == 15


@pytest.mark.parametrize("through", ["compressed", "original"])
def test_rows_are_what_builds_of_their_passes_report(workspace: Path, through: str) -> None:
    everything = config(through)
    comparison = run(workspace, everything, list(RECIPES))
    assert comparison.through == "both"  # of the recipe's sweeps one is of each kind
    assert (comparison.shared_s > 0) == (through == "original")
    assert [row.method for row in comparison.rows] == list(RECIPES)
    original = comparison.original
    for row in comparison.rows:
        if row.method in {"lqer", "none"}:
            continue  # nothing that the others have not: it takes time
        found = row.figures
        assert found is not None
        expected = built(workspace, everything, row, elsewhere=False)
        shipped = expected.rows[-1]
        # The same operations in the same order: no difference in what is written.
        for name in ("perplexity", "kl", "top1_agreement"):
            assert written(getattr(found, name)) == getattr(shipped, name), (row.method, name)
        assert found.bytes == shipped.bytes
        assert written(original.perplexity) == expected.rows[0].perplexity
        assert original.bytes == expected.rows[0].bytes
        # A build counts what is not quantized as the artifact stores it: float32.
        scale = 2 if row.method == "svd_llm" else 1
        assert written(scale * found.bits_per_weight) == shipped.bits_per_weight
        assert found.bits_per_weight == pytest.approx(
            16 * found.linear_bytes / original.linear_bytes, rel=1e-12
        )
        assert row.budget is None or found.bits_per_weight <= 6
        assert found.seconds > 0
        if row.method == "eora":
            expected = built(workspace, everything, row, elsewhere=True)
            assert found.perplexity_ood is not None
            assert found.kl_ood is not None
            assert original.perplexity_ood is not None
            assert written(found.perplexity_ood) == expected.rows[-1].perplexity
            assert written(found.perplexity_ood) != written(found.perplexity)
            assert written(found.kl_ood) == expected.rows[-1].kl
            assert written(original.perplexity_ood) == expected.rows[0].perplexity


def test_shared_statistics_change_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []
    call = QuantizeGptq.call

    def counted(self: QuantizeGptq, group: LinearGroup) -> None:
        solved.append(group.name)
        call(self, group)

    monkeypatch.setattr(QuantizeGptq, "call", counted)
    methods, budgets = ["none", "lqer", "eora"], ["9", "12"]
    together = run(workspace, config("original"), methods, budgets)
    groups = 2 * 4 + 1  # the head's, which is left out, too
    assert len(solved) == groups
    monkeypatch.setattr(module, "sweep_together", lambda *_: 0.0)
    alone = run(workspace, config("original"), methods, budgets, fresh=True)
    assert len(solved) == groups + 5 * groups
    assert list(map(measured, alone.rows)) == list(map(measured, together.rows))


def test_budgets_that_cannot_be_kept_are_told(workspace: Path) -> None:
    rows = run(workspace, config(), ["none", "eora"], ["2", "9"]).rows
    assert [(row.budget, row.skipped is None) for row in rows] == [
        (None, True),
        ("2", False),
        ("9", True),
    ]
    skipped = rows[1].as_dict()
    assert skipped["skipped"].startswith("the quantized weights take 5.12 bits")
    assert skipped["perplexity"] is None
    assert skipped["rank"] is None
    assert set(skipped) == set(rows[2].as_dict())
    with pytest.raises(ConfigError, match=r"^no budget can be kept: method 'eora' at 2: the quant"):
        run(workspace, config(), ["eora"], ["2", "1"])


def test_a_method_that_fails_costs_its_own_row_only(workspace: Path) -> None:
    allocate = {"allocate": {"bits_per_weight": 4, "distortion": "relative"}}
    recipe = [allocate, "calibrate", QUANTIZE, "eora"]
    methods = {"allocated": recipe, "none": None}
    failed, none = run(workspace, config(methods=methods), list(methods), ["1"]).rows
    assert failed.skipped is not None
    assert "not enough for what takes least" in failed.skipped
    assert none.figures is not None


def interrupt(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Interrupt EoRA once, after ``times`` groups; the list tells which it has seen."""
    call = Eora.call
    seen: list[str] = []

    def interrupted(self: Eora, group: LinearGroup) -> None:
        if len(seen) == times:
            seen.append("interrupted")
            raise KeyboardInterrupt
        seen.append(group.name)
        call(self, group)

    monkeypatch.setattr(Eora, "call", interrupted)
    return seen


@pytest.mark.parametrize("through", ["compressed", "original"])
def test_an_interrupted_comparison_goes_on(
    workspace: Path, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)
    methods = ["none", "eora"]
    whole = run(workspace, config(through), methods)
    shutil.rmtree(work_folder(config(through), workspace))
    seen = interrupt(monkeypatch, times=5)
    with pytest.raises(KeyboardInterrupt):
        run(workspace, config(through), methods)
    again = run(workspace, config(through), methods)
    resumed = seen[seen.index("interrupted") + 1 :]
    assert all(name.startswith(("model.layers.1.", "lm_head")) for name in resumed)
    assert list(map(measured, again.rows)) == list(map(measured, whole.rows))


def test_what_was_begun_together_can_be_finished_alone(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)
    whole = run(workspace, config("original"), ["eora", "lqer", "none"])
    shutil.rmtree(work_folder(config(), workspace))
    seen = interrupt(monkeypatch, times=5)
    with pytest.raises(KeyboardInterrupt):
        run(workspace, config("original"), ["eora", "none"])
    (alone,) = run(workspace, config("original"), ["eora"]).rows
    assert seen[seen.index("interrupted") + 1].startswith("model.layers.0.")
    assert measured(alone) == measured(whole.rows[0])
    # One that joins later has it all to do, while the other goes on.
    rows = run(workspace, config("original"), ["none", "lqer"]).rows
    assert list(map(measured, rows)) == [measured(whole.rows[2]), measured(whole.rows[1])]


def test_finished_rows_are_kept(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, ...]] = []

    def counted(variant: BuildConfig, *rest: Any, **options: Any) -> Any:  # noqa: ANN401
        done.append(tuple(item.name for item in variant.passes))
        return pipeline.compress(variant, *rest, **options)

    monkeypatch.setattr(module, "compress", counted)
    first = run(workspace, config(), ["none", "eora"])
    assert len(done) == 2
    assert run(workspace, config(), ["none", "eora"]).as_dict() == first.as_dict()
    assert len(done) == 2
    more = run(workspace, config(), ["lqer", "none"])
    assert [item[-1] for item in done[2:]] == ["lqer"]
    assert more.rows[1] == first.rows[0]
    # Whatever a figure depends on makes it another row.
    run(workspace, config(ood=None), ["none"])
    assert len(done) == 4
    run(workspace, config(), ["none"], fresh=True)
    assert len(done) == 5
    kept = list((work_folder(config(), workspace) / "rows").iterdir())
    assert len(kept) == 2  # the original, and the row


@pytest.mark.parametrize(
    "changed", [{"onnxruntime": {"adapter_type": "none"}}, {"verify": TEXT | {"parity": True}}]
)
def test_rows_of_another_folder_are_computed_anew(workspace: Path, changed: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"verify": TEXT | {"parity": False}, "compare": {}}
    before = tiny_config(["calibrate", QUANTIZE, "eora"], **fields)
    after = tiny_config(["calibrate", QUANTIZE, "eora"], **fields | changed)
    (first,) = run(workspace, before, ["eora"]).rows
    (second,) = run(workspace, after, ["eora"]).rows
    (again,) = run(workspace, after, ["eora"], fresh=True).rows
    assert first.figures is not None
    assert second.figures is not None
    assert second.figures.folder_bytes != first.figures.folder_bytes
    assert measured(second) == measured(again)


def test_no_other_text(workspace: Path) -> None:
    comparison = run(workspace, config(ood=None), ["none"])
    assert comparison.original.perplexity_ood is None
    assert comparison.rows[0].as_dict()["perplexity_ood"] is None


@pytest.mark.parametrize(
    ("section", "methods", "budgets", "kind", "sentence"),
    [
        ({}, [], ["6"], ConfigError, r"^there are no methods to compare: give --methods none"),
        ({}, ["eora"], [], ConfigError, r"^there are no budgets to compare at: give --budgets 3"),
        (
            {"ood": {"text": "gone.txt", "window_length": 32}},
            ["none"],
            [],
            DataError,
            r"gone\.txt",
        ),
        (
            {"ood": {"text": "text.txt", "windows": 9000, "window_length": 32}},
            ["none"],
            [],
            DataError,
            r"compare\.ood\.windows",
        ),
        (
            {"ood": {"text": "text.txt", "window_length": 129}},
            ["none"],
            [],
            ConfigError,
            r"compare\.ood\.window_length: windows of 129 tokens",
        ),
    ],
)
def test_what_cannot_be_compared(
    template: Path,
    section: dict[str, Any],
    methods: list[str],
    budgets: list[str],
    kind: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(kind, match=sentence):
        run(template, config(**section), methods, budgets)


def test_a_full_disk_is_told(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Callable[..., None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WorkFolder, "keep", full)
    with pytest.raises(Exception, match=r"the disk is full: free some space"):
        run(workspace, config(), ["none"])


def test_a_budget_that_is_given_twice_is_one_row(workspace: Path) -> None:
    rows = run(workspace, config(), ["none", "none", "svd_llm"], ["6", "7", "6"]).rows
    assert [(row.method, row.budget) for row in rows] == [
        ("none", None),
        ("svd_llm", "6"),
        ("svd_llm", "7"),
    ]


def test_predictions_that_overflow_are_told(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Scorer.score
    scored = []

    def overflowing(self: Scorer, variant: Variant) -> Scores:
        scored.append(score(self, variant))
        if len(scored) > 1:
            return scored[-1]
        # As the scorer does, of logits that are far apart: a warning, were nobody to expect it.
        return replace(scored[-1], perplexity=float(np.exp(np.float64(1000))))

    monkeypatch.setattr(Scorer, "score", overflowing)
    row, other = run(workspace, config(), ["none", "svd_llm"]).rows
    assert other.figures is not None
    assert row.skipped == "the compressed model: predicts values that are not finite"
    assert row.as_dict()["perplexity"] is None


def test_a_comparison_without_figures_says_why(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> Compressed:
        raise PassError("some.linear", "cannot be done")

    monkeypatch.setattr(module, "compress", failing)
    sentence = "^no method can do it here: 'none': some.linear: cannot be done$"
    with pytest.raises(ConfigError, match=sentence):
        run(workspace, config(), ["none", "svd_llm"])


def test_an_original_that_overflows_is_told(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Scorer.original

    def overflowing(self: Scorer) -> Scores:
        return replace(original(self), perplexity=float(np.exp(np.float64(1000))))

    monkeypatch.setattr(Scorer, "original", overflowing)
    with pytest.raises(ModelError, match=r"^model: predicts values that are not finite: there is"):
        run(workspace, config(), ["none"])


def test_nothing_is_left_of_what_could_not_begin(workspace: Path) -> None:
    with pytest.raises(DataError, match="gone"):
        run(workspace, config(ood={"text": "gone.txt", **TEXT}), ["none"])
    assert not work_folder(config(), workspace).exists()


def test_a_graph_that_differs_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eoracc.compiler.compare.run.load", load_wrong)
    with pytest.raises(ModelError, match="does not compute what transformers does"):
        run(workspace, config(), ["none"])


def test_rows_are_numbered_in_progress(workspace: Path) -> None:
    progress = SilentProgress()
    compare(
        config(methods={"a name of many characters": ["calibrate", "svd_llm"], "none": None}),
        ["none", "a name of many characters"],
        ["6"],
        config_dir=workspace,
        progress=progress,
    )
    assert [time.name for time in progress.times[3:]] == [
        "1/2 none: compress",
        "1/2 none: score",
        "2/2 a name of many char… 6: compress",
        "2/2 a name of many char… 6: score",
    ]
