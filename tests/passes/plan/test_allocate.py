"""The survey against the sweeps that it steers: their bytes, their errors, their overrides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.linears import linear_report
from eoracc.compiler.sweep.pipeline import Compressed, compress
from eoracc.compiler.sweep.survey import Survey
from eoracc.compiler.targets.onnxruntime.lower import lower
from eoracc.compiler.text.windows import Windows
from eoracc.errors import ConfigError, PassError
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.plan.allocate import Allocate
from eoracc.passes.quantize.quantization import EMBEDDING_BITS
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.plugins.op import FUSED_OP
from tests.passes.plan.surveys import survey_of
from tests.tiny_build import tiny_config
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence

CALIBRATE = {"calibrate": {"through": "original", "tokens": "equal", "precision": "float32"}}
GPTQ = {"quantize_gptq": {"group_size": 16, "embedding_bits": None}}
EORA = {"eora": {"rank": 4, "factor_type": "int8"}}
SWEEP: Sequence[Any] = (CALIBRATE, GPTQ, EORA)
RANKS = [0, 2, 4, 8]
RELATIVE = {"distortion": "relative"}


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
    loaded: LoadedModel, windows: Windows, folder: Path, passes: Sequence[Any]
) -> tuple[Compressed, dict[str, Any]]:
    config = tiny_config(passes)
    compressed = compress(config, loaded, windows, folder / "kept", SilentProgress())
    return compressed, compressed.surveys[0] if compressed.surveys else {}


def quantized(linears: Sequence[Linear]) -> list[Linear]:
    return [linear for linear in linears if linear.quantized is not None]


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_stored_takes_the_bytes_that_were_planned(
    scope: str, symmetric: bool, loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    allocate = {"bits_per_weight": 8.8, "ranks": RANKS, "scope": scope} | RELATIVE
    gptq = {"quantize_gptq": {**GPTQ["quantize_gptq"], "symmetric": symmetric}}
    compressed, found = run(
        loaded, windows, tmp_path, [{"allocate": allocate}, CALIBRATE, gptq, EORA]
    )
    linears = quantized(compressed.linears)
    stored = {linear.name: linear_report(linear).bytes for linear in linears}
    assert stored == {name: choice["bytes"] for name, choice in found["linears"].items()}
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    assert found["budget_bytes"] == int(weights * 8.8 / 8)
    assert found["bytes"] == sum(stored.values()) <= found["budget_bytes"]
    assert found["bits_per_weight"] == 8 * found["bytes"] / weights
    for linear in linears:
        assert linear.quantized is not None
        assert linear.plan["bits"] == linear.quantized.bits
        assert linear.plan["rank"] == (0 if linear.factors is None else linear.factors.rank)
        if scope == "per_layer":
            share = linear.in_features * linear.out_features / weights
            assert stored[linear.name] <= found["budget_bytes"] * share
    # Not one choice for all, or nothing would have been shown.
    assert len({(linear.plan["bits"], linear.plan["rank"]) for linear in linears}) > 1


@pytest.mark.parametrize("named", [False, True])
def test_a_budget_of_linears_includes_a_head_where_an_override_names_it(
    named: bool, loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    """Head and table are stored in 6 bits by default, beside the budget."""
    allocate = {"bits_per_weight": 8.8, "ranks": RANKS} | RELATIVE
    overrides = {"lm_head": {"bits": 8}} if named else {}
    gptq = {"quantize_gptq": {"group_size": 16, "overrides": overrides}}
    compressed, found = run(
        loaded, windows, tmp_path, [{"allocate": allocate}, CALIBRATE, gptq, EORA]
    )
    (head,) = (linear for linear in compressed.linears if linear.block is None)
    assert head.quantized is not None
    assert head.quantized.bits == (8 if named else EMBEDDING_BITS)
    counted = [linear for linear in compressed.linears if named or linear is not head]
    assert set(found["linears"]) == {linear.name for linear in counted}
    weights = sum(linear.in_features * linear.out_features for linear in counted)
    assert found["budget_bytes"] == int(weights * 8.8 / 8)
    stored = sum(linear_report(linear).bytes for linear in counted)
    assert found["bytes"] == stored <= found["budget_bytes"]


@pytest.mark.parametrize("shared", [False, True])
def test_linears_that_become_one_node_share_their_bits(
    *, shared: bool, windows: Windows, tmp_path: Path
) -> None:
    # Parts of whole tiles: others stay apart.
    model = tiny_model("smollm", tmp_path / "model", intermediate_size=96)
    loaded = load(str(model), work=tmp_path / "work")
    allocate = {"bits_per_weight": 4.6, "ranks": [0], "share_bits": shared}
    passes = [{"calibrate_outputs": {}}, {"allocate": allocate}, CALIBRATE, GPTQ]
    compressed, _ = run(loaded, windows, tmp_path / "kept", passes)
    found = compressed.surveys[1]
    bits: dict[str, set[int]] = {}
    for linear in quantized(compressed.linears):
        module, _, role = linear.name.rpartition(".")
        if role not in ("o_proj", "down_proj", "lm_head"):
            bits.setdefault(module, set()).add(linear.plan["bits"])
    assert all(len(widths) == 1 for widths in bits.values()) == shared
    assert found["bytes"] <= found["budget_bytes"]
    # The parts of a block's two nodes are q, k, v and gate, up: five linears become two.
    nodes = [node for node in lower(compressed.model).graph if node.op_type == FUSED_OP]
    parts = sum("parts" in node.attributes for node in nodes)
    assert (parts == len(bits)) == shared


def test_predicts_the_errors_that_an_ordinary_sweep_puts_on_record(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    allocate = {"bits_per_weight": 16.0, "ranks": RANKS, "widths": [2, 3]} | RELATIVE
    eora = {"eora": {"factor_type": "float16"}}
    compressed, found = run(
        loaded, windows, tmp_path, [{"allocate": allocate}, CALIBRATE, GPTQ, eora]
    )
    assert found["weighed_by"] == "relative"
    for linear in quantized(compressed.linears):
        predicted = found["linears"][linear.name]["distortion"] ** 0.5
        # float16 factors: each of the products that a weight is a sum of is off by two roundings.
        rounding = 8 * 2 * 2.0**-11 * linear.record.errors["quantize_gptq"]
        assert abs(linear.record.errors["eora"] - predicted) < rounding
        if linear.factors is not None:
            assert predicted < linear.record.errors["quantize_gptq"] - 10 * rounding
    assert any(linear.factors is not None for linear in compressed.linears)


def test_one_budget_leaves_no_more_than_equal_shares_or_one_kind_of_choice(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    def found(**options: Any) -> dict[str, Any]:  # noqa: ANN401
        allocate = {"bits_per_weight": 7.0, "ranks": RANKS, **RELATIVE, **options}
        return run(
            load(loaded.folder.as_posix(), work=tmp_path / "again"),
            windows,
            tmp_path / str(len(list(tmp_path.iterdir()))),
            [{"allocate": allocate}, *SWEEP],
        )[1]

    both = found()
    alternatives = both["alternatives"]
    assert set(alternatives) == {"bits alone", "rank alone, 2 bits", "rank alone, 3 bits"} | (
        {"rank alone, 4 bits"} & set(alternatives)
    )
    assert both["least_possible"] <= both["distortion"]
    for other in [*alternatives.values(), found(scope="per_layer")]:
        assert other["bytes"] <= both["budget_bytes"]
        assert both["distortion"] <= other["distortion"]
    assert both["distortion"] < 0.9 * alternatives["bits alone"]["distortion"]
    alone = found(ranks=[0])
    assert alone["alternatives"] == {}
    assert alone["distortion"] == alternatives["bits alone"]["distortion"]
    narrow = found(widths=[3])
    assert narrow["distortion"] == alternatives["rank alone, 3 bits"]["distortion"]
    assert narrow["bytes"] == alternatives["rank alone, 3 bits"]["bytes"]


def test_overrides_constrain_the_plan(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    gptq = {
        "quantize_gptq": {
            "group_size": 16,
            "embedding_bits": None,
            "overrides": {"*.down_proj": {"bits": 8}, "*.o_proj": {"skip": True}},
        }
    }
    eora = {"eora": {"overrides": {"*.q_proj": {"rank": 3}, "*.k_proj": {"skip": True}}}}
    allocate = {
        "allocate": {"bits_per_weight": 9.0, "ranks": RANKS, "factor_type": "int4"} | RELATIVE
    }
    compressed, found = run(loaded, windows, tmp_path, [allocate, CALIBRATE, gptq, eora])
    assert {linear.name for linear in quantized(compressed.linears)} == set(found["linears"])
    for linear in compressed.linears:
        choice = found["linears"].get(linear.name)
        if linear.role in {"o_proj", "lm_head"}:
            assert choice is None
            assert linear.quantized is None
            continue
        assert linear.quantized is not None
        assert choice["bytes"] == linear_report(linear).bytes
        if linear.role == "down_proj":
            assert linear.quantized.bits == 8
        if linear.role == "q_proj":
            assert linear.factors is not None
            assert (linear.factors.rank, linear.factors.factor_type) == (3, "int4")
        if linear.role == "k_proj":
            assert linear.factors is None


def test_group_sizes_can_be_chosen_too(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    allocate = {
        "allocate": {"bits_per_weight": 5.0, "ranks": [0], "group_sizes": [16, -1]} | RELATIVE
    }
    compressed, found = run(loaded, windows, tmp_path, [allocate, CALIBRATE, GPTQ])
    linears = quantized(compressed.linears)
    assert sum(linear_report(linear).bytes for linear in linears) == found["bytes"]
    assert {linear.plan["group_size"] for linear in linears} == {16, -1}
    for linear in linears:
        assert linear.quantized is not None
        whole = linear.quantized.scales.shape[1] == 1
        assert whole == (linear.plan["group_size"] == -1)


def context(
    loaded: LoadedModel, windows: Windows | None, folder: Path, passes: Sequence[Any] = SWEEP
) -> Survey:
    return survey_of(loaded, windows, folder, tiny_config(passes).passes)


def test_output_grams_say_what_errors_count_for(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    """With G = I what remains is the absolute error; a linear with a small G gets fewer bytes."""

    def found(name: str, grams: dict[str, float], distortion: str = "outputs") -> dict[str, Any]:
        seen = context(loaded, windows, tmp_path / name)
        for linear in seen.linears:
            if grams:
                scale = grams.get(linear.role, 1.0)
                identity = np.eye(linear.out_features, dtype=np.float32)
                linear.output_gram = lambda gram=scale * identity: gram
        options: dict[str, Any] = {"bits_per_weight": 6.4, "ranks": (0, 2, 4, 8)}
        return Allocate(distortion=distortion, **options).survey(seen)  # type: ignore[arg-type]

    absolute, identity = found("absolute", {}, "absolute"), found("identity", {"q_proj": 1.0})
    assert (absolute["weighed_by"], identity["weighed_by"]) == ("absolute", "outputs")
    np.testing.assert_allclose(identity["distortion"], absolute["distortion"], rtol=1e-4)
    quiet = found("quiet", {"q_proj": 1e-4})

    def spent(found: dict[str, Any]) -> int:
        return sum(o["bytes"] for name, o in found["linears"].items() if name.endswith("q_proj"))

    assert spent(quiet) < spent(identity)


def test_tokens_count_by_their_size_whatever_the_sweep_counts_them_for(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    """Else errors of linears with small inputs would weigh as much as those of large ones."""
    survey = Allocate(bits_per_weight=6.4, ranks=(0, 4), distortion="absolute")
    found = [
        survey.survey(
            context(
                loaded,
                windows,
                tmp_path / tokens,
                [{"calibrate": {"tokens": tokens, "precision": "float32"}}, GPTQ, EORA],
            )
        )
        for tokens in ("unit", "equal")
    ]
    assert found[0] == found[1]


def test_a_linear_without_an_output_gram_cannot_be_compared(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    def survey(overrides: dict[str, Any]) -> dict[str, Any]:
        gptq = {"quantize_gptq": {"group_size": 16, "overrides": overrides}}
        eora = {"eora": {"overrides": {"*.o_proj": {"skip": True}}}}
        seen = context(loaded, windows, tmp_path / str(len(overrides)), [CALIBRATE, gptq, eora])
        for linear in seen.linears:
            if linear.role != "o_proj":
                identity = np.eye(linear.out_features, dtype=np.float32)
                linear.output_gram = lambda gram=identity: gram
        return Allocate(bits_per_weight=6.4).survey(seen)

    with pytest.raises(PassError, match=r"o_proj: has no Gram of its outputs.*by overrides"):
        survey({})
    found = survey({"*.o_proj": {"bits": 8}})
    assert {
        choice["plan"]["bits"] for name, choice in found["linears"].items() if "o_p" in name
    } == {8}


def test_goes_on_from_what_it_has_kept(
    loaded: LoadedModel, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = Allocate(bits_per_weight=6.4, distortion="relative")
    first = context(loaded, windows, tmp_path)
    found = survey.survey(first)
    monkeypatch.setattr(Survey, "walk", None)
    again = context(loaded, windows, tmp_path)
    assert survey.survey(again) == found
    assert [linear.plan for linear in again.linears] == [linear.plan for linear in first.linears]


def test_what_cannot_be_done_says_why_and_what_to_do(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    survey = Allocate(bits_per_weight=6.4, distortion="relative")

    def refusal(survey: Allocate, seen: Survey) -> str:
        # A build has another key for each of these; here a folder does.
        with pytest.raises(PassError) as caught:
            survey.survey(replace(seen, folder=Path(mkdtemp(dir=tmp_path))))
        return str(caught.value)

    assert "put one after it" in refusal(
        survey, context(loaded, windows, tmp_path, [CALIBRATE, {"eora": {}}])
    )
    assert "set 'ranks: [0]'" in refusal(survey, context(loaded, windows, tmp_path, SWEEP[:2]))
    assert "give 'calibration'" in refusal(survey, context(loaded, None, tmp_path))
    assert "put 'calibrate_outputs' before it" in refusal(
        Allocate(bits_per_weight=6.4), context(loaded, windows, tmp_path)
    )
    skipping = [CALIBRATE, {"quantize_gptq": {"overrides": {"*": {"skip": True}}}}, EORA]
    assert "'quantize_gptq' leaves all linears out" in refusal(
        survey, context(loaded, windows, tmp_path, skipping)
    )
    scopes: dict[Literal["global", "per_layer"], str] = {
        "global": "allocate",
        "per_layer": "q_proj",
    }
    for scope, name in scopes.items():
        small = replace(survey, bits_per_weight=2.0, scope=scope)
        text = refusal(small, context(loaded, windows, tmp_path))
        assert name in text
        assert "not enough for what takes least" in text


@pytest.mark.parametrize(
    "budgets",
    [{}, {"bits_per_weight": 4.0, "bytes": 1000}, {"bits_per_weight": 4.0, "size": 10**6}],
)
def test_wants_one_budget(budgets: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give either 'size' or 'bits_per_weight' or 'bytes'"):
        Allocate(**budgets)


def test_an_interrupted_survey_goes_on_after_the_last_group_that_it_finished(
    loaded: LoadedModel, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [{"allocate": {"bits_per_weight": 6.4, "ranks": RANKS} | RELATIVE}, *SWEEP]
    asked: list[str] = []
    limit = 3
    quantize = QuantizeGptq.call

    def call(self: QuantizeGptq, group: LinearGroup) -> None:
        if group.name not in asked:
            if len(asked) == limit:
                raise KeyboardInterrupt
            asked.append(group.name)
        quantize(self, group)

    monkeypatch.setattr(QuantizeGptq, "call", call)
    with pytest.raises(KeyboardInterrupt):
        run(loaded, windows, tmp_path, passes)
    begun, limit = list(asked), 100
    asked.clear()
    resumed, found = run(
        load(loaded.folder.as_posix(), work=tmp_path / "again"), windows, tmp_path, passes
    )
    # The sweep after it quantizes all of them: what matters is who was asked first.
    assert len(begun) == 3
    assert asked[0] not in begun
    monkeypatch.undo()
    whole, expected = run(
        load(loaded.folder.as_posix(), work=tmp_path / "third"), windows, tmp_path / "whole", passes
    )
    assert found == expected
    for one, other in zip(resumed.linears, whole.linears, strict=True):
        np.testing.assert_array_equal(one.effective_weight(), other.effective_weight())
