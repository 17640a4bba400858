"""The survey against building every candidate from scratch, on a random model of five blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.sweep import trials
from eoracc.compiler.sweep.activation_store import ActivationStore
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.pipeline import Compressed, compress
from eoracc.compiler.sweep.survey import Survey, calibration_batches
from eoracc.compiler.text.windows import Windows
from eoracc.errors import ConfigError, PassError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.factorize.base import RatioOverride
from eoracc.passes.factorize.factorize_svd import FactorizeSvd
from eoracc.passes.plan.select_last_k import SelectLastK
from eoracc.passes.quantize.quantization import QuantizeOverride
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from tests.graph_session import padded_mask
from tests.passes.plan.surveys import survey_of
from tests.tiny_build import tiny_config
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from eoracc.passes.base import LayerPass
    from eoracc.passes.graph.linears import Linear

BLOCKS = 5
LINEARS_PER_BLOCK = 7
LENGTHS = (24, 17, 24, 9, 24, 24)

ROUNDING = BLOCKS * LINEARS_PER_BLOCK * 88 * 2.0**-24
"""Linears on the way, of at most 88 columns each, in float32."""

FLOAT32 = Calibrate(precision="float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Whose graph nobody may change."""
    work = tmp_path_factory.mktemp("select")
    return load(str(tiny_model("llama", work / "model", num_hidden_layers=BLOCKS)), work=work)


@pytest.fixture(scope="module")
def windows() -> Windows:
    """Of unlike lengths and weights."""
    ids = np.random.default_rng(5).integers(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)))
    mask = padded_mask(LENGTHS, max(LENGTHS), left=False)
    return Windows(ids, mask, np.linspace(0.5, 2, len(LENGTHS), dtype=np.float32))


def built(source: LoadedModel, windows: Windows, work: Path, passes: Sequence[Any]) -> Compressed:
    """What the ordinary pipeline makes of the model."""
    loaded = replace(source, model=source.model.clone())
    folder = work / f"kept{len(list(work.iterdir()))}"
    return compress(
        tiny_config(passes, verify={"compare": []}), loaded, windows, folder, SilentProgress()
    )


def outputs(executor: Executor, weights: Mapping[str, Any], windows: Windows) -> Mapping[int, Any]:
    """What the next block's first linears, or the head, see, by block: tokens scaled by weight."""

    def weight_of(linear: Linear) -> Any:  # noqa: ANN401
        return weights[linear.name] if linear.name in weights else linear.effective_weight()

    batches = calibration_batches(windows)
    executor.start(batches)
    found = {}
    for level in range(executor.head_level):
        executor.step(level, batches, weight_of)
        group = executor.levels[level + 1][-1]
        before = executor.levels[level][0].linears[0].block
        assert before is not None
        if group.linears[0].block != before:
            roots = [np.sqrt(batch.token_weights.astype(np.float64))[:, None] for batch in batches]
            rows = [executor.inputs_of(group, batch) for batch in batches]
            found[before] = np.concatenate([a * b for a, b in zip(roots, rows, strict=True)])
    return found


def error_of(
    compressed: Compressed | Mapping[str, Any], source: LoadedModel, windows: Windows
) -> Mapping[int, float]:
    """By block, of a built model or of the original one with other weights."""
    executor = Executor(source.model)
    original = outputs(executor, {}, windows)
    if isinstance(compressed, Compressed):
        lossy = outputs(Executor(compressed.model), {}, windows)
    else:
        lossy = outputs(executor, compressed, windows)
    return {
        block: float(np.linalg.norm(lossy[block] - whole) / np.linalg.norm(whole))
        for block, whole in original.items()
    }


def context(
    source: LoadedModel, windows: Windows | None, work: Path, following: Sequence[LayerPass]
) -> Survey:
    copy = replace(source, model=source.model.clone())
    return survey_of(copy, windows, work / "survey", following)


def skipping(blocks: Sequence[int]) -> dict[str, Any]:
    return {f"model.layers.{block}.*": {"skip": True} for block in blocks}


@pytest.mark.parametrize(
    ("factorize", "calibrate"),
    [
        ("factorize_svd", {}),
        ("erc_svd", {"match": "outputs"}),
        ("svd_llm", {"through": "original"}),
    ],
)
def test_the_curve_is_that_of_models_built_one_by_one(
    factorize: str,
    calibrate: Mapping[str, Any],
    source: LoadedModel,
    windows: Windows,
    tmp_path: Path,
) -> None:
    calibrate = {"calibrate": {"precision": "float32", **calibrate}}
    survey = {"select_last_k": {"ratio": 0.3, "step": 1, "all_blocks": True}}
    compressed = built(source, windows, tmp_path, [survey, calibrate, factorize])
    (found,) = compressed.surveys
    assert found["infeasible"] == [{"k": 1, "ratio": 1.5}]
    assert [one["k"] for one in found["curve"]] == [0, 2, 3, 4, 5]
    expected = {}
    for one in found["curve"][1:]:
        k = one["k"]
        assert one["ratio"] == pytest.approx(0.3 * BLOCKS / k, rel=1e-12)
        overrides = skipping(range(BLOCKS - k))
        passes = [calibrate, {factorize: {"ratio": one["ratio"], "overrides": overrides}}]
        scratch = built(source, windows, tmp_path, passes)
        expected[k] = error_of(scratch, source, windows)[BLOCKS - 1]
        assert one["error"] == pytest.approx(expected[k], rel=ROUNDING)
        assert one["errors"] == {str(BLOCKS - 1): one["error"]}
    assert found["curve"][0]["error"] == 0
    ordered = sorted(expected.values())
    assert min(np.diff(ordered)) > 2 * ROUNDING * ordered[-1]
    chosen = found["chosen"]
    assert chosen["k"] == min(expected, key=expected.__getitem__)
    # And what was chosen has been done.
    done = {one.whole.block for one in compressed.linears if one.whole is not None}
    assert done == set(chosen["blocks"]) == set(range(BLOCKS - chosen["k"], BLOCKS))
    built_error = error_of(compressed, source, windows)[BLOCKS - 1]
    assert built_error == pytest.approx(chosen["error"], rel=ROUNDING)


@pytest.mark.parametrize("calibrate", [{}, {"match": "outputs"}])
def test_blocks_of_lower_bits_are_those_of_models_built_one_by_one(
    calibrate: Mapping[str, Any], source: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    """Several widths, each with the ``k`` it needs, and compensation after quantization."""
    passes = [
        {"calibrate": {"precision": "float32", **calibrate}},
        {"quantize_gptq": {"bits": 4, "group_size": 16, "embedding_bits": None}},
        {"eora": {"rank": 2}},
    ]
    survey = {"select_last_k": {"average_bits": 3.6, "low_bits": [2, 3]}}
    compressed = built(source, windows, tmp_path, [survey, *passes])
    (found,) = compressed.surveys
    base, *curve = found["curve"]
    assert [(one["k"], one["bits"]) for one in curve] == [(1, 2), (2, 3)]
    assert base["average_bits"] == 4
    for one in found["curve"]:
        low = {f"model.layers.{block}.*": {"bits": one["bits"]} for block in one["blocks"]}
        passes[1]["quantize_gptq"]["overrides"] = low
        scratch = built(source, windows, tmp_path, passes)
        widths = {
            linear.block: linear.quantized.bits
            for linear in scratch.linears
            if linear.quantized is not None
        }
        assert one["average_bits"] == pytest.approx(np.mean(list(widths.values())))
        expected = error_of(scratch, source, windows)[BLOCKS - 1]
        assert one["error"] == pytest.approx(expected, rel=ROUNDING)
        if one["k"] == found["chosen"]["k"] > 0:
            assert {
                linear.block: linear.quantized.bits
                for linear in compressed.linears
                if linear.quantized is not None
            } == widths
    assert found["chosen"]["error"] == min(one["error"] for one in curve)


@pytest.mark.parametrize("calibrate", [{}, {"match": "outputs"}, {"through": "original"}])
def test_factors_take_lower_bits_too(
    calibrate: Mapping[str, Any], source: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    """A second survey and sweep, after one that has factorised: errors are the original model's."""
    factorize = [
        {"select_last_k": {"ratio": 0.2, "step": 2}},
        {"calibrate": {"precision": "float32"}},
        "svd_llm",
    ]
    survey = {"select_last_k": {"average_bits": 3.5, "blocks": "free", "probes": {0: 1, 4: 1}}}
    quantize: list[Any] = [
        {"calibrate": {"precision": "float32", **calibrate}},
        {"quantize_gptq": {"bits": 4, "group_size": 16, "embedding_bits": None}},
    ]
    compressed = built(source, windows, tmp_path, [*factorize, survey, *quantize])
    found = compressed.surveys[1]
    for one in [*found["curve"], *found["free"]]:
        low = {f"model.layers.{block}.*": {"bits": 2} for block in one["blocks"]}
        quantize[1]["quantize_gptq"]["overrides"] = low
        scratch = built(source, windows, tmp_path, [*factorize, *quantize])
        expected = error_of(scratch, source, windows)
        for block in (0, 4):
            assert one["errors"][str(block)] == pytest.approx(expected[block], rel=ROUNDING)
        if one["blocks"] == found["chosen"]["blocks"]:
            assert {
                linear.block
                for linear in compressed.linears
                if linear.quantized is not None and linear.quantized.bits == 2
            } == set(one["blocks"])


def test_a_free_set_is_grown_by_what_each_block_costs(
    source: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    """A block's cost is the error with it at fewer bits and all after it as they were."""
    first_pass = [{"calibrate": {"precision": "float32"}}]
    plain = built(
        source,
        windows,
        tmp_path,
        [*first_pass, {"quantize_gptq": {"group_size": 16, "embedding_bits": None}}],
    )
    base = {linear.name: linear.effective_weight() for linear in plain.linears}
    costs = {}
    for block in range(BLOCKS):
        overrides = {f"model.layers.{block}.*": {"bits": 2}}
        gptq = {"quantize_gptq": {"group_size": 16, "embedding_bits": None, "overrides": overrides}}
        lower = built(source, windows, tmp_path, [*first_pass, gptq])
        mixed = base | {
            linear.name: linear.effective_weight()
            for linear in lower.linears
            if linear.block == block
        }
        costs[block] = error_of(mixed, source, windows)[BLOCKS - 1]
    least = sorted(costs, key=costs.__getitem__)[:2]
    third = sorted(costs.values())[2]
    assert third - costs[least[1]] > 10 * ROUNDING, "what is left out is told apart"

    survey = SelectLastK(average_bits=2.8, low_bits=2, blocks="free", step=2)
    shown = context(source, windows, tmp_path, [FLOAT32, QuantizeGptq(group_size=16)])
    found = survey.survey(shown)
    first, last = found["free"]
    assert first["costs"] == {
        str(block): pytest.approx(cost, rel=ROUNDING) for block, cost in costs.items()
    }
    assert first["added"] == least
    assert last["blocks"] == sorted(first["added"] + last["added"])
    assert (len(last["added"]), last["k"], last["average_bits"]) == (1, 3, pytest.approx(2.8))
    # Sets are measured as they will be built, every block after them solved anew.
    for one in found["free"]:
        overrides = {f"model.layers.{block}.*": {"bits": 2} for block in one["blocks"]}
        gptq = {"quantize_gptq": {"group_size": 16, "embedding_bits": None, "overrides": overrides}}
        scratch = built(source, windows, tmp_path, [*first_pass, gptq])
        expected = error_of(scratch, source, windows)[BLOCKS - 1]
        assert one["error"] == pytest.approx(expected, rel=ROUNDING)
    better = min((found["curve"][1], last), key=lambda one: one["error"])
    assert found["chosen"]["blocks"] == better["blocks"]
    planned = {one.block for one in shown.linears if one.plan.get("bits") == 2}
    assert planned == set(better["blocks"])


def test_a_free_set_removes_as_much_as_the_last_blocks(
    source: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    shown = context(source, windows, tmp_path, [FLOAT32, FactorizeSvd()])
    found = SelectLastK(ratio=0.3, step=2, blocks="free").survey(shown)
    last = found["free"][-1]
    assert last["k"] * last["ratio"] == pytest.approx(0.3 * BLOCKS)
    assert last["k"] <= found["chosen"]["k"] or last["error"] >= found["chosen"]["error"]
    (one,) = {linear.plan["ratio"] for linear in shown.linears if linear.plan.get("ratio")}
    assert one == found["chosen"]["ratio"]
    assert all("ratio" in linear.plan for linear in shown.linears if linear.block is not None)


def test_a_free_set_of_unequal_blocks_removes_no_more_than_was_asked_for(
    source: LoadedModel, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the ratio of the last blocks the set gains too much: its own is lower."""
    # Of equals the first are taken: the last two blocks, and blocks 0 and 1 as a free set.
    monkeypatch.setattr(trials.SweepTrials, "errors", lambda *_, **__: {BLOCKS - 1: 0.5})
    overrides = {"model.layers.4.mlp.*": RatioOverride(skip=True)}
    shown = context(source, windows, tmp_path, [FLOAT32, FactorizeSvd(overrides=overrides)])
    found = SelectLastK(ratio=0.3, step=1, blocks="free").survey(shown)
    weights = dict.fromkeys(range(BLOCKS), 0)
    for linear in shown.linears:
        if linear.block is not None and "ratio" in linear.plan:
            weights[linear.block] += linear.in_features * linear.out_features
    last = found["chosen"]
    free = [one for one in found["free"] if one["grown_at"] == last["ratio"]][-1]
    assert (last["blocks"], free["blocks"]) == ([3, 4], [0, 1])
    assert free["ratio"] < 0.8 * last["ratio"]
    for one in (last, free):
        removed = one["ratio"] * sum(weights[block] for block in one["blocks"])
        assert removed == pytest.approx(0.3 * sum(weights.values()), rel=1e-9)


def test_probes_weigh_the_outputs_of_several_blocks(
    source: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    survey = SelectLastK(ratio=0.2, step=3, probes={-1: 1.0, 1: 0.5, 3: 0.25})
    found = survey.survey(context(source, windows, tmp_path, [FLOAT32, FactorizeSvd()]))
    first_pass = [
        {"calibrate": {"precision": "float32"}},
        {"factorize_svd": {"ratio": 1 / 3, "overrides": skipping([0, 1])}},
    ]
    expected = error_of(built(source, windows, tmp_path, first_pass), source, windows)
    (_, one) = found["curve"]
    assert one["errors"] == {
        "1": 0.0,  # nothing has been compressed up to there
        "3": pytest.approx(expected[3], rel=ROUNDING),
        "4": pytest.approx(expected[4], rel=ROUNDING),
    }
    whole = one["errors"]
    assert one["error"] == pytest.approx(whole["4"] + 0.5 * whole["1"] + 0.25 * whole["3"])


def test_the_prefix_is_gone_through_once(
    source: LoadedModel, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = Executor.step

    def counted(self: Executor, level: int, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        steps.append(level)
        step(self, level, *arguments, **options)

    monkeypatch.setattr(Executor, "step", counted)
    shown = context(source, windows, tmp_path, [FLOAT32, FactorizeSvd()])
    SelectLastK(ratio=0.3, step=1, all_blocks=True).survey(shown)
    levels = 4  # a block has (q, k, v), (o), (gate, up), (down)
    assert len(steps) == levels * (BLOCKS + 2 + 3 + 4 + 5)


def test_activations_may_lie_on_disk_and_are_deleted(
    source: LoadedModel, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = [Calibrate(precision="float32", match="outputs"), QuantizeGptq(group_size=16)]
    survey = SelectLastK(average_bits=3, low_bits=2, blocks="free", step=2)
    expected = survey.survey(context(source, windows, tmp_path / "memory", following))
    monkeypatch.setattr(trials, "ActivationStore", partial(ActivationStore, limit=0))
    shown = context(source, windows, tmp_path / "disk", following)
    assert survey.survey(shown) == expected
    assert not (shown.folder / "activations").exists()


def test_goes_on_after_the_last_candidate_that_was_tried(
    source: LoadedModel, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = [FLOAT32, FactorizeSvd()]
    survey = SelectLastK(ratio=0.3, step=1, blocks="free")
    expected = survey.survey(context(source, windows, tmp_path / "once", following))
    errors = trials.SweepTrials.errors
    calls: list[Any] = []
    stops = [3, 9, 0]

    def counted(self: trials.SweepTrials, *arguments: Any, **options: Any) -> Mapping[int, float]:  # noqa: ANN401
        calls.append(arguments)
        if len(calls) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        return errors(self, *arguments, **options)

    monkeypatch.setattr(trials.SweepTrials, "errors", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            survey.survey(context(source, windows, tmp_path / "again", following))
    assert survey.survey(context(source, windows, tmp_path / "again", following)) == expected
    whole = len(calls) - 2  # those that were interrupted
    assert survey.survey(context(source, windows, tmp_path / "again", following)) == expected
    assert len(calls) - 2 == whole, "all is known by now"
    calls.clear()
    survey.survey(context(source, windows, tmp_path / "anew", following))
    assert len(calls) == whole, "nothing was tried twice"


def test_leaves_the_graph_as_it_is(source: LoadedModel, windows: Windows, tmp_path: Path) -> None:
    shown = context(source, windows, tmp_path, [FLOAT32, QuantizeGptq(group_size=16)])
    nodes = [(node.name, node.op_type) for node in shown.model.graph]
    names = set(shown.model.graph.initializers)
    SelectLastK(average_bits=3.6).survey(shown)
    assert [(node.name, node.op_type) for node in shown.model.graph] == nodes
    assert set(shown.model.graph.initializers) == names
    assert not any(one.quantized or one.record.errors for one in shown.linears)


def test_the_first_of_equal_candidates_is_taken(
    source: LoadedModel, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials.SweepTrials, "errors", lambda *_, **__: {BLOCKS - 1: 0.5})
    shown = context(source, windows, tmp_path, [FLOAT32, FactorizeSvd()])
    assert SelectLastK(ratio=0.3, step=1).survey(shown)["chosen"]["k"] == 2


@pytest.mark.parametrize(("free", "taken"), [(0.1, "free"), (0.2, "last"), (0.3, "last")])
def test_a_free_set_is_taken_if_it_costs_less(
    free: float,
    taken: str,
    source: LoadedModel,
    windows: Windows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def errors(
        _: trials.SweepTrials,
        schedule: Mapping[int, float],
        *,
        base: Mapping[int, float],
        **__: bool,
    ) -> Mapping[int, float]:
        del schedule
        # The base has blocks of its own while a set is grown.
        return {BLOCKS - 1: free if any(base.values()) else 0.2}

    monkeypatch.setattr(trials.SweepTrials, "errors", errors)
    shown = context(source, windows, tmp_path, [FLOAT32, FactorizeSvd()])
    found = SelectLastK(ratio=0.3, step=2, blocks="free").survey(shown)
    grown = [
        one["blocks"] for one in found["free"] if one["grown_at"] == found["curve"][1]["ratio"]
    ]
    assert grown == [[0, 1]]
    assert found["chosen"]["blocks"] == (grown[0] if taken == "free" else [3, 4])


@pytest.mark.parametrize("seed", range(4))
def test_a_free_set_is_the_best_of_all_sets_where_costs_add_up(
    seed: int,
    source: LoadedModel,
    windows: Windows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Costs that add up make greedy sets the best of their size: all sets are the oracle."""
    weights = np.random.default_rng(seed).uniform(1, 2, BLOCKS)
    weights[2:] *= 9  # the last blocks cost much: alone they are best taken many at a time

    def error(ratios: Mapping[int, float]) -> float:
        return sum(float(weights[block]) * ratio**2 for block, ratio in ratios.items())

    def errors(
        _: trials.SweepTrials, schedule: Mapping[int, float], **__: object
    ) -> Mapping[int, float]:
        return {BLOCKS - 1: error(schedule)}

    monkeypatch.setattr(trials.SweepTrials, "errors", errors)
    shown = context(source, windows, tmp_path, [FLOAT32, FactorizeSvd()])
    found = SelectLastK(ratio=0.3, step=1, all_blocks=True, blocks="free").survey(shown)
    sets = {
        blocks: error(dict.fromkeys(blocks, 0.3 * BLOCKS / count))
        for count in range(2, BLOCKS + 1)  # one block alone would lose more than it has
        for blocks in combinations(range(BLOCKS), count)
    }
    best = min(sets, key=sets.__getitem__)
    last = min(found["curve"][1:], key=lambda one: one["error"])
    assert last["k"] != len(best), "the ratio that wins for last blocks is not the best one"
    assert found["chosen"]["blocks"] == list(best)
    assert found["chosen"]["error"] == pytest.approx(sets[best], rel=1e-12)
    assert all(one["k"] < BLOCKS for one in found["free"]), "all blocks have no other set"


def test_a_ratio_of_one_leaves_nothing_and_is_no_candidate(
    source: LoadedModel, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials.SweepTrials, "errors", lambda *_, **__: {BLOCKS - 1: 0.5})
    shown = context(source, windows, tmp_path, [FLOAT32, FactorizeSvd()])
    found = SelectLastK(ratio=0.2, step=1).survey(shown)
    assert found["infeasible"] == [{"k": 1, "ratio": 1.0}]
    assert [one["k"] for one in found["curve"]] == [0, 2, 3, 4]


@pytest.mark.parametrize(("step", "ks"), [(1, [2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (6, [5])])
def test_all_blocks_are_a_candidate_if_asked_for(
    step: int,
    ks: list[int],
    source: LoadedModel,
    windows: Windows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials.SweepTrials, "errors", lambda *_, **__: {BLOCKS - 1: 0.5})
    shown = context(source, windows, tmp_path, [FLOAT32, FactorizeSvd()])
    curve = SelectLastK(ratio=0.3, step=step, all_blocks=True).survey(shown)["curve"]
    assert [one["k"] for one in curve[1:]] == ks
    assert curve[-1]["ratio"] == pytest.approx(0.3, rel=1e-12)


def test_what_overrides_settle_is_none_of_the_total(
    source: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    overrides = {
        "*.down_proj": QuantizeOverride(bits=8),
        "model.layers.4.*": QuantizeOverride(skip=True),
    }
    gptq = QuantizeGptq(group_size=16, overrides=overrides)
    shown = context(source, windows, tmp_path, [FLOAT32, gptq])
    found = SelectLastK(average_bits=3.5).survey(shown)
    # Four blocks count; one of them at 2 bits in place of 4 brings the average to 3.5, and the
    # last block is on the way to it without giving anything.
    assert found["chosen"]["blocks"] == [3, 4]
    assert found["chosen"]["average_bits"] == 3.5
    planned = {linear.name for linear in shown.linears if linear.plan}
    assert len(planned) == LINEARS_PER_BLOCK - 1
    assert all(name.startswith("model.layers.3.") for name in planned)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ratio": 0.5, "step": 6}, "step: no k of 6, 12, ... up to 4 blocks can give 0.5"),
        (
            {"ratio": 0.9, "step": 2},
            "k must be above 4.5; take a smaller step or ratio, or 'all_blocks: true'",
        ),
        ({"ratio": 0.2, "step": 2, "probes": {5: 1.0}}, "no decoder block 5: give one of 0..4"),
        ({"ratio": 0.2, "step": 2, "probes": {-6: 1.0}}, "no decoder block -6"),
        ({"average_bits": 4}, "codes have 4 bits on average, not more than 4: ask for less"),
        ({"average_bits": 2.5, "low_bits": (2, 3)}, "with 3 bits in all blocks codes still have"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(
    options: Mapping[str, Any], sentence: str, source: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    following = [FLOAT32, FactorizeSvd() if "ratio" in options else QuantizeGptq(group_size=16)]
    with pytest.raises(PassError, match=r"^select_last_k: ") as caught:
        SelectLastK(**options).survey(context(source, windows, tmp_path, following))
    assert sentence in str(caught.value)


def test_needs_text_a_pass_to_steer_and_linears_that_it_may(
    source: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    survey = SelectLastK(ratio=0.2, step=1)
    with pytest.raises(PassError, match="give 'calibration' in model"):
        survey.survey(context(source, None, tmp_path, [FLOAT32, FactorizeSvd()]))
    with pytest.raises(PassError, match=r"ratio steers a pass .* put 'erc_svd' below it"):
        survey.survey(context(source, windows, tmp_path, [FLOAT32, QuantizeGptq()]))
    with pytest.raises(PassError, match="average_bits steers a pass"):
        SelectLastK(average_bits=3).survey(
            context(source, windows, tmp_path, [FLOAT32, FactorizeSvd()])
        )
    settled = QuantizeGptq(overrides={"model.*": QuantizeOverride(bits=4)})
    with pytest.raises(PassError, match="overrides of 'quantize_gptq' settle every linear"):
        SelectLastK(average_bits=3).survey(context(source, windows, tmp_path, [FLOAT32, settled]))


@pytest.mark.parametrize("options", [{}, {"ratio": 0.2, "average_bits": 3}])
def test_needs_one_target(options: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give either 'ratio' or 'average_bits'"):
        SelectLastK(**options)


def test_all_blocks_is_an_option_of_the_ratio() -> None:
    with pytest.raises(ConfigError, match="takes 'all_blocks' with 'ratio' alone: leave it out"):
        SelectLastK(average_bits=3, all_blocks=True)
