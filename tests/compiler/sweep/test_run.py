from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from typing_extensions import override

from eoracc.compiler.eager.model import load_eager
from eoracc.compiler.frontend import load as frontend
from eoracc.compiler.kept.interval import SaveInterval
from eoracc.compiler.progress import PassTimes, SilentProgress
from eoracc.compiler.sweep.batch import make_batches
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.products import resolve_precision
from eoracc.compiler.sweep.resume import SweepState
from eoracc.compiler.sweep.run import Comparisons, run_sweep
from eoracc.errors import ArtifactError, PassError
from eoracc.passes import load_passes
from eoracc.passes.base import LayerPass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import compensation_solver
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.factorize.factorize_svd import FactorizeSvd
from eoracc.passes.graph.linears import find_again
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.factor_types import FactorType
from tests.damage import DAMAGES
from tests.graph_session import padded_mask
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import LinearGroup

load_passes()

LENGTHS = (13, 8, 13, 5, 11)
GPTQ = QuantizeGptq(bits=3, group_size=16)


@dataclass(frozen=True, kw_only=True)
class Watch(LayerPass):
    """Records what it is shown; raises where it is told to."""

    name: ClassVar[str] = "watch"
    seen: list[tuple[str, NDArray[np.float64] | None]]
    inputs: list[tuple[NDArray[np.float32], ...]] = field(default_factory=list)
    stop_at: str = "nowhere"

    @override
    def call(self, group: LinearGroup) -> None:
        if self.stop_at in group.name:
            raise KeyboardInterrupt
        self.seen.append((group.name, None if group.gram is None else group.gram.matrix))
        if group.activations is not None and group.originals is not None:
            both = (group.activations, group.originals)
            self.inputs.append(tuple(_kept_rows(each()) for each in both))


def _kept_rows(
    batches: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> NDArray[np.float32]:
    return np.concatenate([rows[weights > 0] for rows, weights in batches])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("sweep") / "model")


def windows() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids = np.random.default_rng(5).integers(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)))
    return ids, padded_mask(LENGTHS, max(LENGTHS), left=False)


def sweep(
    source: Path,
    work: Path,
    *passes: LayerPass,
    key: str = "key",
    comparators: Mapping[str, Any] | None = None,
) -> tuple[Executor, Comparisons]:
    calibrate = next((one for one in passes if isinstance(one, Calibrate)), None)
    executor = Executor(
        frontend.load(str(source), work=work).model,
        precision="float32" if calibrate is None else resolve_precision(calibrate.precision),
    )
    found = run_sweep(
        executor,
        passes,
        make_batches(*windows(), size=2) if calibrate is not None else [],
        comparators=comparators or {},
        state=SweepState(work / "sweep", key),
        progress=SilentProgress(),
        times=PassTimes(),
    )
    return executor, found


def eager_grams(
    source: Path, names: list[str], weights: Callable[[], Mapping[str, NDArray[np.float32]]]
) -> dict[str, NDArray[np.float64]]:
    """Grams of the modules' inputs in the eager model with ``weights``, in float64."""
    return {name: x.T @ x for name, x in eager_inputs(source, names, weights()).items()}


def eager_inputs(
    source: Path, names: list[str], weights: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float64]]:
    """The modules' inputs in the eager model with ``weights``, padding left out."""
    ids, mask = windows()
    model = load_eager(source, weights)
    found: dict[str, NDArray[np.float64]] = {}
    keep = mask.astype(bool)

    def hook(name: str) -> Callable[..., None]:
        def record(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = inputs[0].double().numpy()[keep]

        return record

    modules = dict(model.named_modules())
    for name in names:
        modules[name].register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    return found


@pytest.mark.parametrize("through", ["compressed", "original"])
def test_statistics_are_taken_through_the_prefix_that_was_asked_for(
    source: Path, tmp_path: Path, through: str
) -> None:
    seen: list[tuple[str, NDArray[np.float64] | None]] = []
    calibrate = Calibrate(
        through="compressed" if through == "compressed" else "original",
        tokens="equal",
        precision="float32",
    )
    executor, _ = sweep(source, tmp_path, calibrate, GPTQ, Watch(seen=seen))
    firsts = [name.split(", ")[0] for name, _ in seen]
    assert len(firsts) == 9
    compressed = {
        one.name: one.effective_weight() for one in executor.linears if one.quantized is not None
    }
    # Causal: with every weight compressed, what reaches a linear comes through those before it.
    expected = eager_grams(source, firsts, lambda: compressed if through == "compressed" else {})
    other = eager_grams(source, firsts, lambda: {} if through == "compressed" else compressed)
    for position, (name, (_, gram)) in enumerate(zip(firsts, seen, strict=True)):
        assert gram is not None
        scale = float(np.diagonal(expected[name]).max())
        # Activations are off by about 8 sqrt(n) u relative to their largest, their products twice.
        tolerance = 2 * 8 * 4000**0.5 * 2.0**-24 * scale * np.sqrt(len(gram))
        np.testing.assert_allclose(gram, expected[name], rtol=0, atol=tolerance)
        if position > 0:
            assert np.abs(other[name] - expected[name]).max() > 10 * tolerance


def test_bfloat16_statistics_are_those_of_float32_but_for_rounding(
    source: Path, tmp_path: Path
) -> None:
    grams: dict[str, list[NDArray[np.float64]]] = {}
    for precision in ("float32", "bfloat16"):
        seen: list[tuple[str, NDArray[np.float64] | None]] = []
        calibrate = Calibrate(through="original", tokens="equal", precision=precision)
        sweep(source, tmp_path / precision, calibrate, QuantizeRtn(bits=8), Watch(seen=seen))
        grams[precision] = [gram for _, gram in seen if gram is not None]
    for exact, rounded in zip(grams["float32"], grams["bfloat16"], strict=True):
        # Eight roundings stand between the embedding and a Gram at most; they add like noise.
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        assert 0 < error < 8 * 2.0**-9


def test_matching_outputs_shows_what_the_original_and_the_compressed_model_hand_a_linear(
    source: Path, tmp_path: Path
) -> None:
    calibrate = Calibrate(match="outputs", precision="float32")
    watch = Watch(seen=[])
    executor, _ = sweep(source, tmp_path, calibrate, GPTQ, Eora(rank=2), watch)
    firsts = [name.split(", ")[0] for name, _ in watch.seen]
    assert len(watch.inputs) == len(firsts) == 9
    weights = {
        one.name: one.effective_weight() for one in executor.linears if one.quantized is not None
    }
    compressed = eager_inputs(source, firsts, weights)
    original = eager_inputs(source, firsts, {})
    for position, (name, (through, beside)) in enumerate(zip(firsts, watch.inputs, strict=True)):
        # Activations are off by about 8 sqrt(n) u relative to their largest.
        tolerance = 8 * 4000**0.5 * 2.0**-24 * float(np.abs(original[name]).max())
        np.testing.assert_allclose(through, compressed[name], rtol=0, atol=tolerance)
        np.testing.assert_allclose(beside, original[name], rtol=0, atol=tolerance)
        if position == 0:
            np.testing.assert_array_equal(beside, through)
        else:
            assert np.abs(beside - through).max() > 10 * tolerance


def test_the_original_goes_beside_the_factors_of_an_earlier_sweep(
    source: Path, tmp_path: Path
) -> None:
    first, _ = sweep(source, tmp_path, FactorizeSvd(ratio=0.4))
    linears = find_again(first._model, first.linears)
    watch = Watch(seen=[])
    run_sweep(
        Executor(first._model, linears),
        [Calibrate(match="outputs", precision="float32"), watch],
        make_batches(*windows(), size=2),
        comparators={},
        state=SweepState(tmp_path / "second", "key"),
        progress=SilentProgress(),
        times=PassTimes(),
    )
    by_name = {linear.name: linear for linear in linears}
    weights = {name: one.weight() for name, one in by_name.items() if one.whole is not None}
    firsts = [name.split(", ")[0] for name, _ in watch.seen]
    # A block's inputs, what its seven weights hand from v to u, and the head's.
    assert len(firsts) == len(watch.inputs) == 2 * (4 + 7) + 1
    factorized = eager_inputs(source, firsts, weights)
    wholes = {name: (by_name[name].whole or by_name[name]).name for name in firsts}
    original = eager_inputs(source, sorted(set(wholes.values())), {})
    for name, (through, beside) in zip(firsts, watch.inputs, strict=True):
        expected = original[wholes[name]]
        if name.endswith(".u"):
            expected = expected @ weights[f"{wholes[name]}.v"].astype(np.float64).T
        tolerance = 8 * 4000**0.5 * 2.0**-24 * float(np.abs(expected).max())
        np.testing.assert_allclose(through, factorized[name], rtol=0, atol=tolerance)
        np.testing.assert_allclose(beside, expected, rtol=0, atol=tolerance)
        is_first = name.startswith("model.layers.0.self_attn") and "o_proj" not in name
        if not is_first:  # before anything is lost
            assert np.abs(beside - through).max() > 10 * tolerance


def test_the_original_is_not_run_where_weights_are_matched(source: Path, tmp_path: Path) -> None:
    watch = Watch(seen=[])
    sweep(source, tmp_path, Calibrate(), GPTQ, watch)
    assert (len(watch.seen), watch.inputs) == (9, [])


def test_passes_run_in_order_on_every_group(source: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    @dataclass(frozen=True, kw_only=True)
    class Named(LayerPass):
        name: ClassVar[str] = "named"
        label: str

        @override
        def requires(self, group: LinearGroup) -> None:
            calls.append(f"{self.label} requires")

        @override
        def call(self, group: LinearGroup) -> None:
            calls.append(f"{self.label} {group.linears[0].role}")

    sweep(source, tmp_path, Named(label="a"), Named(label="b"))
    block = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    expected = [
        text
        for role in [*block, *block, "lm_head"]
        for text in ("a requires", f"a {role}", "b requires", f"b {role}")
    ]
    assert calls == expected


def test_the_pass_that_breaks_the_graph_is_named(source: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Breaks(LayerPass):
        name: ClassVar[str] = "breaks"

        @override
        def call(self, group: LinearGroup) -> None:
            if group.linears[0].role == "o_proj":
                group.linears[0].node.op_type = "Sin"

    seen: list[tuple[str, NDArray[np.float64] | None]] = []
    with pytest.raises(
        PassError, match=r"^after breaks, node .*: operator eoracc::Sin is not allowed in"
    ):
        sweep(source, tmp_path, QuantizeRtn(bits=4), Breaks(), Watch(seen=seen))
    # The check is per group: the first group passed, and nothing after the fault was run.
    assert len(seen) == 1


def test_without_calibration_there_are_no_statistics(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, NDArray[np.float64] | None]] = []
    executor, _ = sweep(source, tmp_path, QuantizeRtn(bits=4), Watch(seen=seen))
    assert [gram for _, gram in seen] == [None] * 9
    assert all(one.quantized is not None for one in executor.linears[:-1])


def test_comparators_get_the_rank_and_type_of_each_linear_and_change_nothing(
    source: Path, tmp_path: Path
) -> None:
    overrides: dict[str, Any] = {
        "*.down_proj": {"rank": 2, "factor_type": "int8"},
        "*.o_proj": {"skip": True},
    }
    eora = TypeAdapter(Eora).validate_python({"rank": 5, "overrides": overrides})
    solver = compensation_solver("svd")
    executor, found = sweep(source, tmp_path, Calibrate(), GPTQ, eora, comparators={"svd": solver})
    alone, none = sweep(source, tmp_path / "alone", Calibrate(), GPTQ, eora)
    assert none == {}
    ranks = {name: factors.rank for name, factors in found["svd"].items()}
    for linear, same in zip(executor.linears, alone.linears, strict=True):
        np.testing.assert_array_equal(linear.effective_weight(), same.effective_weight())
        if linear.role in ("o_proj", "lm_head"):
            assert linear.name not in ranks
            continue
        rank = 2 if linear.role == "down_proj" else 5
        factor_type: FactorType = "int8" if linear.role == "down_proj" else "int4"
        assert ranks[linear.name] == rank
        assert found["svd"][linear.name].factor_type == factor_type
        expected = solver(linear, None, rank, factor_type)
        np.testing.assert_array_equal(found["svd"][linear.name].product(), expected.product())


@pytest.mark.parametrize(
    "calibrate",
    [Calibrate(), Calibrate(through="original"), Calibrate(match="outputs")],
    ids=["compressed", "original", "outputs"],
)
def test_resumed_sweep_ends_bit_for_bit_the_same(
    source: Path, tmp_path: Path, calibrate: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)
    passes = (calibrate, GPTQ, Eora(rank=4))
    solver = {"svd": compensation_solver("svd")}
    whole, compared = sweep(source, tmp_path / "whole", *passes, comparators=solver)
    stop = Watch(seen=[], stop_at="layers.1.self_attn.o_proj")
    with pytest.raises(KeyboardInterrupt):
        sweep(source, tmp_path, *passes, stop, comparators=solver)
    watch = Watch(seen=[])
    resumed, again = sweep(source, tmp_path, *passes, watch, comparators=solver)
    assert watch.seen[0][0].startswith("model.layers.1.self_attn.q_proj")
    for one, other in zip(whole.linears, resumed.linears, strict=True):
        np.testing.assert_array_equal(one.effective_weight(), other.effective_weight())
        assert (one.record.errors, one.record.notes) == (other.record.errors, other.record.notes)
    assert list(again["svd"]) == list(compared["svd"])
    for name, factors in compared["svd"].items():
        np.testing.assert_array_equal(again["svd"][name].product(), factors.product())


@pytest.mark.parametrize("match", ["weights", "outputs"])
def test_damaged_state_is_made_again_from_what_is_sound(
    source: Path,
    tmp_path: Path,
    match: Literal["weights", "outputs"],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)
    passes = (Calibrate(match=match), GPTQ)
    whole, _ = sweep(source, tmp_path / "finished", *passes)
    stop = Watch(seen=[], stop_at="layers.1.self_attn.o_proj")
    with pytest.raises(KeyboardInterrupt):
        sweep(source, tmp_path / "interrupted", *passes, stop)
    # The linears from which the passes go on, forward through all that is sound.
    for state, file, first in (
        ("interrupted", "activations-00004-0001.safetensors", "model.layers.1.self_attn.q_proj"),
        ("interrupted", "operands-00004.safetensors", "model.layers.0.self_attn.q_proj"),
        ("finished", "operands-00008.safetensors", "model.layers.1.self_attn.q_proj"),
        ("finished", "operands-00009.safetensors", "lm_head"),
        ("finished", "state.json", "model.layers.0.self_attn.q_proj"),
    ):
        work = Path(shutil.copytree(tmp_path / state, tmp_path / f"{state} {file}"))
        DAMAGES["bit in the middle"](work / "sweep" / file)
        caplog.clear()
        watch = Watch(seen=[])
        resumed, _ = sweep(source, work, *passes, watch)
        assert watch.seen[0][0].startswith(first)
        (line,) = (record.getMessage() for record in caplog.records)
        assert line == (
            f"{work / 'sweep' / file} has another content than was kept: it is discarded, "
            "and computed again"
        )
        for one, other in zip(whole.linears, resumed.linears, strict=True):
            np.testing.assert_array_equal(one.effective_weight(), other.effective_weight())
            assert one.record.errors == other.record.errors
    # The last one is sound again.
    caplog.clear()
    watch = Watch(seen=[])
    sweep(source, work, *passes, watch)
    assert (watch.seen, caplog.records) == ([], [])


class _Disk:
    """Flushes files until it fails."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails_at: int | None = None
        self._fsync = os.fsync

    def fsync(self, descriptor: int) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(descriptor)


def test_a_failing_disk_leaves_the_state_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)
    disk = _Disk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    passes = (Calibrate(), GPTQ)
    whole, _ = sweep(source, tmp_path / "whole", *passes)
    for call in range(1, disk.calls + 1, 3):
        work = tmp_path / str(call)
        disk.calls, disk.fails_at = 0, call
        with pytest.raises(ArtifactError, match="cannot be kept there: Input/output error: free"):
            sweep(source, work, *passes)
        disk.fails_at = None
        begun = any(work.rglob("state.json"))
        watch = Watch(seen=[])
        resumed, _ = sweep(source, work, *passes, watch)
        assert (len(watch.seen) < 9) == begun, "what was kept before is used"
        for one, other in zip(whole.linears, resumed.linears, strict=True):
            np.testing.assert_array_equal(one.effective_weight(), other.effective_weight())


def test_checkpoint_of_other_inputs_is_not_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)
    sweep(source, tmp_path, Calibrate(), GPTQ, key="old")
    watch = Watch(seen=[])
    rounded = QuantizeRtn(bits=8, embedding_bits=8)
    executor, _ = sweep(source, tmp_path, Calibrate(), rounded, watch, key="new")
    assert len(watch.seen) == 9
    assert {one.quantized.bits for one in executor.linears if one.quantized} == {8}


def test_statistics_go_when_their_group_is_done(source: Path, tmp_path: Path) -> None:
    executor, _ = sweep(source, tmp_path, Calibrate(match="outputs"), GPTQ)
    groups = [group for level in executor.levels for group in level]
    assert [group.gram for group in groups] == [None] * len(groups)
    assert [group.activations for group in groups] == [None] * len(groups)
    assert [group.originals for group in groups] == [None] * len(groups)
