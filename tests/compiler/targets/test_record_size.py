"""The bytes of records, for the shapes of real models, and what a record that fits still finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.compiler.eager.int8_activations import representable_inputs
from eoracc.compiler.targets.record_size import fit_record, record_budget, save_record
from eoracc.runtime.parity.record import ParityCase, ParityLinear, ParityRecord
from eoracc.runtime.parity.record_checks import check_record, read_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Shapes:
    """Linears ``(N, K)`` of a block; the head is a quantized linear too."""

    blocks: int
    hidden: int
    heads: int
    keys: int
    inner: int
    vocabulary: int

    def linears(self) -> list[tuple[str, int, int]]:
        sizes = {
            "self_attn.q_proj": (self.heads, self.hidden),
            "self_attn.k_proj": (self.keys, self.hidden),
            "self_attn.v_proj": (self.keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.heads),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }
        found = [
            (f"model.layers.{block}.{name}", *size)
            for block in range(self.blocks)
            for name, size in sizes.items()
        ]
        return [*found, ("lm_head", self.vocabulary, self.hidden)]


SMOLLM2 = Shapes(30, 576, 576, 192, 1536, 49152)
GEMMA_3_270M = Shapes(18, 640, 1024, 256, 2048, 262144)
QWEN_1_5B = Shapes(28, 1536, 1536, 256, 8960, 151936)
TINY = Shapes(2, 48, 96, 32, 88, 260)

PATH = Path("parity.safetensors")

CALLS = (("prefill", 1, 64, 3), ("decode and chunk on cache", 1, 50, 5), ("batch", 3, 48, 3))


def record_of(shapes: Shapes, rounding: float | None = 3.0) -> ParityRecord:
    """A record as a build makes it; ``rounding`` of int8 factors, in tolerances."""
    rng = np.random.default_rng(0)
    linears = []
    for name, size, _ in shapes.linears():
        outputs = rng.standard_normal((2, size)).astype(np.float32)
        tolerance = (1e-3 * rng.uniform(1, 2, (2, size))).astype(np.float32)
        beyond = None if rounding is None or name == "lm_head" else rounding * tolerance
        linears.append(ParityLinear(name, outputs, tolerance, beyond))
    cases = [
        ParityCase(
            name=name,
            input_ids=rng.integers(0, shapes.vocabulary, (rows, length)),
            attention_mask=np.ones((rows, length), np.int64),
            chunks=(length,),
            rows=np.arange(kept) % rows,
            columns=np.arange(kept),
            logits=rng.standard_normal((kept, shapes.vocabulary)).astype(np.float32),
            tolerance=1e-4,
        )
        for name, rows, length, kept in CALLS
    ]
    widths = {width for _, _, width in shapes.linears()}
    return ParityRecord(
        inputs={width: representable_inputs(rng, 2, width) for width in widths},
        linears=linears,
        cases=cases,
        compression_effect=1.0,
    )


@pytest.mark.parametrize(
    ("shapes", "folder_bytes"),
    [
        (SMOLLM2, 80_000_000),
        (SMOLLM2, 88_200_000),
        (SMOLLM2, 105_500_000),
        (SMOLLM2, 181_000_000),
        (GEMMA_3_270M, 180_000_000),
        (GEMMA_3_270M, 250_000_000),
        (QWEN_1_5B, 800_000_000),
    ],
)
def test_models_keep_every_output_and_part_of_the_logits(shapes: Shapes, folder_bytes: int) -> None:
    budget = record_budget(folder_bytes)
    assert budget == folder_bytes // 100
    record = fit_record(record_of(shapes), budget)
    assert 0.3 * budget < len(record.encode()) <= budget
    assert [one.kept.count for one in record.linears] == [size for _, size, _ in shapes.linears()]
    for case in record.cases:
        assert case.logits.shape[1] > shapes.vocabulary / 25
    check_record(record, PATH)


@pytest.mark.parametrize("shapes", [SMOLLM2, GEMMA_3_270M, TINY])
@pytest.mark.parametrize("rounding", [None, 3.0, 200.0])
def test_256_kilobytes_hold_some_of_every_linear(shapes: Shapes, rounding: float | None) -> None:
    assert record_budget(0) == record_budget(25_000_000) == 256_000
    whole = record_of(shapes, rounding)
    record = fit_record(whole, 256_000)
    assert len(record.encode()) <= 256_000
    for linear, (_, size, _) in zip(record.linears, shapes.linears(), strict=True):
        assert linear.kept.size == size
        assert linear.outputs.shape[1] >= size / 30
    if shapes is TINY:
        for case, same in zip(record.cases, whole.cases, strict=True):
            np.testing.assert_array_equal(case.logits, same.logits)
        for linear, _ in zip(record.linears, whole.linears, strict=True):
            assert linear.kept.step == 1
            assert linear.codes is not None
            assert len(linear.codes.outputs) == 2, "errors are found up to 16384 tolerances"


def test_tokens_together_hold_every_logit() -> None:
    whole = record_of(SMOLLM2)
    record = fit_record(whole, record_budget(105_500_000))
    seen = np.zeros(SMOLLM2.vocabulary, bool)
    for case, same in zip(record.cases, whole.cases, strict=True):
        for token, logits in enumerate(case.logits):
            places = case.kept.places(token)
            seen[places] = True
            np.testing.assert_array_equal(logits, same.logits[token, places])
    assert seen.all()


def test_samples_of_linears_begin_at_different_places() -> None:
    record = fit_record(record_of(SMOLLM2), 256_000)
    step = record.linears[0].kept.step
    assert step > 1
    assert [one.kept.first for one in record.linears[:5]] == [place % step for place in range(5)]


def test_budget_is_that_of_the_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_bytes(bytes(60_000_000))
    (tmp_path / "model.onnx").write_bytes(bytes(1_000_000))
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "model.onnx.data").write_bytes(bytes(60_000_000))
    path = tmp_path / "parity.safetensors"
    save_record(record_of(SMOLLM2), path)
    assert 500_000 < path.stat().st_size <= 610_000
    again = tmp_path / "again"
    read_record(path).save(again)
    assert again.read_bytes() == path.read_bytes()


def test_record_of_a_graph_for_tensorrt_has_logits_alone() -> None:
    whole = record_of(QWEN_1_5B)
    graph = ParityRecord({}, [], whole.cases, 1.0)
    for budget in (256_000, 9_000_000):
        record = fit_record(graph, budget)
        assert 0.06 * budget < len(record.encode()) <= budget
        check_record(record, PATH)


def test_what_cannot_fit_is_an_error() -> None:
    with pytest.raises(AssertionError, match="bytes where 8000 are allowed"):
        fit_record(record_of(TINY), 8_000)


# --- what a record in single bytes finds ----------------------------------------------------------

OUT, IN, GROUP, RANK = 192, 576, 64, 16


@dataclass
class Weights:
    """A linear of SmolLM2: codes of 3 bits with float16 scales, and factors."""

    codes: NDArray[np.float64]
    scales: NDArray[np.float64]
    up: NDArray[np.float64]
    down: NDArray[np.float64]

    @classmethod
    def random(cls) -> Weights:
        rng = np.random.default_rng(3)
        return cls(
            codes=rng.integers(-4, 4, (OUT, IN)).astype(np.float64),
            scales=rng.uniform(0.01, 0.02, (OUT, IN // GROUP)).astype(np.float16).astype(float),
            up=0.01 * rng.standard_normal((OUT, RANK)),
            down=0.05 * rng.standard_normal((RANK, IN)),
        )

    def backbone(self) -> NDArray[np.float64]:
        return self.codes * self.scales.repeat(GROUP, axis=1)

    def outputs(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        inputs = x.astype(np.float64)
        return (inputs @ (self.backbone() + self.up @ self.down).T).astype(np.float32)

    def tolerance(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        weight = np.abs(self.backbone()) + np.abs(self.up) @ np.abs(self.down)
        magnitude = np.abs(x).astype(np.float64) @ weight.T
        tolerance: NDArray[np.float32] = ((IN + RANK + 5) * 2.0**-24 * magnitude).astype(np.float32)
        return tolerance


def one_code(weights: Weights) -> None:
    weights.codes[17, 300] += 1


def one_scale(weights: Weights) -> None:
    weights.scales[100, 4] *= 1.03


def swapped_rows(weights: Weights) -> None:
    weights.codes[[5, 6]] = weights.codes[[6, 5]]


def swapped_groups(weights: Weights) -> None:
    weights.scales[9, [1, 2]] = weights.scales[9, [2, 1]]


def no_factors(weights: Weights) -> None:
    weights.up[:] = 0


def one_row_without_factors(weights: Weights) -> None:
    weights.up[33] = 0


def other_factors(weights: Weights) -> None:
    weights.down[:] = weights.down[::-1].copy()


@pytest.mark.parametrize(
    "change",
    [
        one_code,
        one_scale,
        swapped_rows,
        swapped_groups,
        no_factors,
        one_row_without_factors,
        other_factors,
    ],
)
def test_changes_of_a_linear_are_found(change: Callable[[Weights], None]) -> None:
    weights = Weights.random()
    x = representable_inputs(np.random.default_rng(0), 2, IN)
    whole = record_of(SMOLLM2, rounding=None)
    linear = ParityLinear("own", weights.outputs(x), weights.tolerance(x))
    linears = [linear, *whole.linears]
    record = fit_record(
        ParityRecord(whole.inputs, linears, whole.cases, 1.0), record_budget(85_000_000)
    )
    kept = record.linears[0]
    assert kept.codes is not None
    assert len(kept.codes.outputs) == 1
    assert kept.shares(weights.outputs(x), rounded=False).max() < 0.15
    change(weights)
    assert kept.shares(weights.outputs(x), rounded=False).max() > 1


def test_wrong_steps_of_rounded_inputs_are_found() -> None:
    weights = Weights.random()
    x = representable_inputs(np.random.default_rng(0), 2, IN)
    tolerance = weights.tolerance(x)
    whole = record_of(SMOLLM2, rounding=None)
    linear = ParityLinear("own", weights.outputs(x), tolerance, tolerance)
    record = fit_record(
        ParityRecord(whole.inputs, [linear, *whole.linears], whole.cases, 1.0),
        record_budget(85_000_000),
    )
    blocks = x.reshape(2, -1, 32)
    for levels in (127, 126, 128):
        step = np.abs(blocks).max(axis=-1, keepdims=True) / levels
        rounded = (np.rint(blocks / step) * step).astype(np.float32).reshape(x.shape)
        largest = record.linears[0].shares(weights.outputs(rounded), rounded=True).max()
        assert (largest <= 1) == (levels == 127)
