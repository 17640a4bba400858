"""The parity gate of a TensorRT target: what is recorded, and that a wrong graph fails it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler.frontend import load as frontend
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.targets.parity_record import PARITY_STEPS
from eoracc.compiler.targets.tensorrt.half_precision import HALF
from eoracc.compiler.targets.tensorrt.lower_rtx import lower
from eoracc.compiler.targets.tensorrt.parity_record import (
    record_graph_parity,
    rounding_tolerance,
)
from eoracc.compiler.text.windows import Windows
from eoracc.errors import ArtifactError
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import LinearGroup
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.runtime.onnxruntime.graph_session import GraphSession
from eoracc.runtime.parity.check import check_parity
from eoracc.runtime.parity.record import PARITY_FILE, ParityRecord
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


class Phase:
    def __init__(self) -> None:
        self.steps = 0

    def advance(self, note: str = "") -> None:
        assert note
        self.steps += 1

    def skip(self) -> None:
        raise AssertionError("nothing was done before")


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def artifact(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ANN401
    """A folder as a build leaves it: the graph of a target, and its record."""
    folder: Path = tmp_path_factory.mktemp("graph")
    loaded = frontend.load(str(tiny_model("qwen2", folder / "model")), work=folder)
    original, embeddings = Executor(loaded.model.clone()), find_embeddings(loaded.model)
    linears = Executor(loaded.model).linears
    # The head stays as it is: what is not compressed is rounded, too.
    for linear in linears[:-1]:
        QuantizeRtn(bits=4, group_size=16).call(LinearGroup((linear,)))
        if linear.role != "o_proj":
            Svd(rank=3, factor_type="float16").call(LinearGroup((linear,)))
    target = folder / "artifact" / "tensorrt_rtx"
    target.mkdir(parents=True)
    save(lower(loaded.model, dtype=request.param), target)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 40))
    phase = Phase()
    record = record_graph_parity(
        linears,
        embeddings,
        original,
        Windows(ids, np.ones_like(ids)),
        graph=target / "model.onnx",
        dtype=HALF[request.param],
        folder=loaded.folder,
        phase=phase,
    )
    assert phase.steps == PARITY_STEPS
    record.save(target / PARITY_FILE)
    return target.parent


def save(model: ir.Model, folder: Path) -> None:
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")


def test_the_graph_passes_far_below_the_signal(artifact: Path) -> None:
    report = check_parity(artifact)
    assert report.passed
    assert {case.through for case in report.logits} == {"tensorrt_rtx"}
    assert len(report.logits) == PARITY_STEPS
    for case in report.logits:
        assert 0 < case.max_error < case.tolerance < 1e-3 * report.compression_effect


def test_a_gpu_has_room_for_its_rounding_and_not_for_more(artifact: Path) -> None:
    record = ParityRecord.load(artifact / "tensorrt_rtx" / PARITY_FILE)
    session = GraphSession.open(artifact / "tensorrt_rtx" / "model.onnx", rounded=True)
    for case in record.cases:
        logits = session.run_chunks(case.input_ids, case.attention_mask, case.chunks)
        error = np.abs(logits[case.rows, case.columns] - case.logits).max()
        assert case.tolerance < error < case.rounding
        assert case.rounding < np.abs(case.logits).max()


def one_code(array: NDArray[Any]) -> NDArray[Any]:
    changed = array.copy()
    changed.reshape(-1)[11] = (int(changed.reshape(-1)[11]) + 9) % 16 - 8
    return changed


def half_again(array: NDArray[Any]) -> NDArray[Any]:
    changed = array.copy()
    changed.reshape(-1)[5] *= changed.dtype.type(1.5)
    return changed


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("layers.0.mlp.up_proj.weight.int4", one_code),
        ("layers.1.self_attn.q_proj.scales", half_again),
        ("layers.0.self_attn.k_proj.offsets.int4", one_code),
        ("layers.1.mlp.down_proj.compensation_b", half_again),
        ("layers.0.self_attn.v_proj.bias", half_again),
    ],
)
def test_a_changed_number_fails(
    artifact: Path,
    tmp_path: Path,
    name: str,
    edit: Callable[[NDArray[Any]], NDArray[Any]],
) -> None:
    model = ir.load(artifact / "tensorrt_rtx" / "model.onnx")
    (value,) = [v for v in model.graph.initializers.values() if name in str(v.name)]
    tensor = value.const_value
    assert tensor is not None
    value.const_value = ir.Tensor(edit(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)
    assert not check_changed(artifact, tmp_path, model)


def test_a_wrong_window_fails(artifact: Path, tmp_path: Path) -> None:
    """Causality off by one: only a mask can tell."""
    model = ir.load(artifact / "tensorrt_rtx" / "model.onnx")
    value = model.graph.initializers["mask.one"]
    value.const_value = ir.tensor(np.array(2, np.int64), name="mask.one")
    assert not check_changed(artifact, tmp_path, model)


def check_changed(artifact: Path, folder: Path, model: ir.Model) -> bool:
    target = folder / "tensorrt_rtx"
    target.mkdir()
    save(model, target)
    shutil.copy(artifact / "tensorrt_rtx" / PARITY_FILE, target)
    return check_parity(folder).passed


def test_an_artifact_without_any_record_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing: build the artifact with"):
        check_parity(tmp_path)


def test_a_graph_that_cannot_be_read_is_named(artifact: Path, tmp_path: Path) -> None:
    target = tmp_path / "tensorrt_rtx"
    target.mkdir()
    shutil.copy(artifact / "tensorrt_rtx" / PARITY_FILE, target)
    (target / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"model\.onnx: is no ONNX graph"):
        check_parity(tmp_path)


def test_a_record_of_old_knows_of_no_rounding(artifact: Path, tmp_path: Path) -> None:
    record = ParityRecord.load(artifact / "tensorrt_rtx" / PARITY_FILE)
    plain = replace(record, cases=[replace(case, rounding=0.0) for case in record.cases])
    plain.save(tmp_path / PARITY_FILE)
    loaded = ParityRecord.load(tmp_path / PARITY_FILE)
    assert [case.rounding for case in loaded.cases] == [0.0] * PARITY_STEPS


def test_tolerance_of_rounded_logits_by_hand() -> None:
    exact = np.zeros((2, 50), np.float32)
    moved = exact.copy()
    moved[0], moved[1] = 1e-3, 3e-3
    deviations = np.sqrt(2 * np.log(2 * 100 / 1e-9))
    assert rounding_tolerance(exact, moved) == pytest.approx(2 * deviations * 3e-3, rel=1e-6)
