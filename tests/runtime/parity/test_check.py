from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from eoracc.errors import ArtifactError
from eoracc.runtime.onnxruntime.single_linears import open_linears
from eoracc.runtime.parity.check import check_parity
from eoracc.runtime.parity.record import PARITY_FILE, ParityRecord
from tests.tiny_build import tiny_config, tiny_workspace

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LINEAR = "model.layers.1.self_attn.k_proj"
NODE, TILE, FACTOR_TILE = "model.layers.1.self_attn.qkv_proj", 6, 1
"""Its node and tiles, after the 96 rows of q_proj, whose rank takes one tile."""


@pytest.fixture(scope="module", params=[0, 4])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized and compensated, at each accuracy level, with its record; no test may change it."""
    from eoracc.compiler import driver
    from eoracc.compiler.progress import SilentProgress

    folder = tiny_workspace(tmp_path_factory.mktemp("parity"))
    config = tiny_config(
        verify={"windows": 1, "window_length": 32}, onnxruntime={"accuracy_level": request.param}
    )
    return driver.build(config, config_dir=folder, progress=SilentProgress()).output


def change(
    artifact: Path, copy: Path, part: str, edit: Callable[[NDArray[np.generic]], None]
) -> None:
    """Copy the artifact and edit the first tile of one operand of :data:`LINEAR`."""
    shutil.copytree(artifact, copy)
    model = ir.load(copy / "model.onnx")
    (value,) = (v for n, v in model.graph.initializers.items() if n == f"{NODE}.{part}_tiles")
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    edit(array[FACTOR_TILE if part == "lora_a" else TILE])
    value.const_value = ir.tensor(array, name=value.name)
    ir.external_data.load_to_model(model)
    ir.save(model, copy / "model.onnx", external_data="model.onnx.data")


def test_correct_artifact_passes_with_room_to_spare(artifact: Path) -> None:
    report = check_parity(artifact)
    assert report.passed
    assert [one.through for one in report.linears] == ["library", "function"]
    assert [one.linears for one in report.linears] == [15, 15]
    assert all(0 < one.tolerance_share < 0.5 for one in report.linears)
    assert len(report.logits) == 6
    rounds = any(case.rounding for case in ParityRecord.load(artifact / PARITY_FILE).cases)
    near = False
    for case in report.logits:
        assert case.passed
        assert case.max_error <= case.tolerance
        if rounds and case.through == "library":
            near |= case.tolerance / 20 < case.max_error
            assert case.tolerance < report.compression_effect
        else:
            assert case.tolerance < 1e-3 * report.compression_effect, "far below the signal"
    # With AVX2 alone products of many rows are in floats, and their error is far below the bound.
    assert near == rounds


def rounds_between_factors(artifact: Path) -> bool:
    record = ParityRecord.load(artifact / PARITY_FILE)
    return any(one.rounding is not None for one in record.linears)


def one_code(array: NDArray[np.generic]) -> None:
    array.reshape(-1)[11] ^= np.uint8(1)


def one_scale(array: NDArray[np.generic]) -> None:
    flat = array.reshape(-1)
    flat[5] = np.nextafter(flat[5], flat.dtype.type(np.inf))


def one_factor(array: NDArray[np.generic]) -> None:
    flat = array.reshape(-1)
    flat[np.abs(flat).argmax()] *= 1.01


def not_a_number(array: NDArray[np.generic]) -> None:
    array.reshape(-1)[3] = np.nan


@pytest.mark.parametrize(
    ("part", "edit"),
    [
        ("B", one_code),
        ("scales", one_scale),
        ("scales", not_a_number),
        ("lora_a", one_factor),
        ("lora_b", one_factor),
    ],
)
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_smallest_change_of_an_operand_fails(
    artifact: Path, tmp_path: Path, part: str, edit: Callable[[NDArray[np.generic]], None]
) -> None:
    change(artifact, tmp_path / "changed", part, edit)
    report = check_parity(tmp_path / "changed")
    assert not report.passed
    for one in report.linears:
        if one.through == "library" and rounds_between_factors(artifact):
            continue  # the change may be less than the rounding, which functions do not do
        assert not one.passed
        assert one.worst == LINEAR


def test_saving_again_changes_nothing(artifact: Path, tmp_path: Path) -> None:
    change(artifact, tmp_path / "same", "scales", lambda _: None)
    assert check_parity(tmp_path / "same") == check_parity(artifact)


def test_record_and_back(artifact: Path, tmp_path: Path) -> None:
    record = ParityRecord.load(artifact / PARITY_FILE)
    record.save(tmp_path / "again")
    again = ParityRecord.load(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (artifact / PARITY_FILE).read_bytes()
    assert again.compression_effect == record.compression_effect
    assert list(again.inputs) == list(record.inputs)
    for one, other in zip(record.linears, again.linears, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.outputs, other.outputs)
        np.testing.assert_array_equal(one.tolerance, other.tolerance)
        assert (one.rounding is None) == (other.rounding is None)
        if one.rounding is not None:
            np.testing.assert_array_equal(one.rounding, other.rounding)
    for case, same in zip(record.cases, again.cases, strict=True):
        assert (case.name, case.chunks) == (same.name, same.chunks)
        assert (case.tolerance, case.rounding) == (same.tolerance, same.rounding)
        np.testing.assert_array_equal(case.logits, same.logits)
        np.testing.assert_array_equal(case.input_ids, same.input_ids)


def test_record_of_an_older_build_is_read(artifact: Path, tmp_path: Path) -> None:
    """Without a version, and with all values in float32."""
    folder = shutil.copytree(artifact, tmp_path / "old")
    record = ParityRecord.load(artifact / PARITY_FILE)
    arrays: dict[str, NDArray[np.generic]] = {f"inputs/{k}": v for k, v in record.inputs.items()}
    names = [linear.name for linear in record.linears]
    for name, run in zip(names, open_linears(artifact, names, library=False), strict=True):
        outputs = arrays[f"linear/{name}/outputs"] = np.ascontiguousarray(run(record.inputs))
        arrays[f"linear/{name}/tolerance"] = np.full_like(outputs, 1e-4)
        if name == LINEAR:
            arrays[f"linear/{name}/rounding"] = np.full_like(outputs, 0.25)
    for position, case in enumerate(record.cases):
        for part in ("input_ids", "attention_mask", "rows", "columns", "logits"):
            arrays[f"case/{position}/{part}"] = getattr(case, part)
    fields = ("name", "chunks", "tolerance", "rounding")
    cases = [{field: getattr(case, field) for field in fields} for case in record.cases]
    index = {"linears": names, "cases": cases, "compression_effect": record.compression_effect}
    save_file(arrays, folder / PARITY_FILE, {"parity": json.dumps(index)})

    old = ParityRecord.load(folder / PARITY_FILE)
    for linear in old.linears:
        np.testing.assert_array_equal(linear.outputs, arrays[f"linear/{linear.name}/outputs"])
        assert (linear.kept.step, linear.codes) == (1, None)
        assert (linear.rounding is None) == (linear.name != LINEAR)
        shifted = linear.outputs + np.float32(2e-4)
        assert np.isinf(linear.shares(shifted, rounded=False)).all()
        assert np.isinf(linear.shares(shifted, rounded=True)).all() == (linear.name != LINEAR)
    report = check_parity(folder)
    (function,) = (one for one in report.linears if one.through == "function")
    assert function.tolerance_share == 0
    assert report.logits == check_parity(artifact).logits


def test_record_of_a_newer_version_is_refused(artifact: Path, tmp_path: Path) -> None:
    record = ParityRecord.load(artifact / PARITY_FILE)
    content = record.encode()
    assert content.count(b'\\"version\\":2') == 1
    (tmp_path / PARITY_FILE).write_bytes(content.replace(b'\\"version\\":2', b'\\"version\\":3'))
    with pytest.raises(ArtifactError, match=r"has version 3, this eoracc reads 1 and 2: use the"):
        check_parity(tmp_path)


def test_missing_record(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is missing: build the artifact with 'verify.parity"):
        check_parity(tmp_path)
