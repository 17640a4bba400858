from __future__ import annotations

import errno
import json
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from safetensors import SafetensorError

from eoracc.compiler.targets import artifact, weights_file
from eoracc.compiler.targets.artifact import ArtifactWriter, package_versions
from eoracc.compiler.targets.weights_file import graph_bytes
from eoracc.errors import ArtifactError
from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlots
from eoracc.plugins.op import DOMAIN, FUSED_OP
from eoracc.runtime.adapters.files import adapter_names, read_adapter
from eoracc.runtime.artifact.folder_change import changing
from eoracc.runtime.artifact.manifest import read_manifest, verify_manifest
from tests.slots_artifact import SLOTS, random_factors

if TYPE_CHECKING:
    from collections.abc import Callable


def tiny_graph(size: int = 3000) -> ir.Model:
    """``y = x @ big + small``: one weight that is mapped, one that stays inside."""
    x = ir.Value(name="x", shape=ir.Shape([1, size]), type=ir.TensorType(ir.DataType.FLOAT))
    arrays = {
        "big": np.arange(size * 4, dtype=np.float32).reshape(size, 4),
        "small": np.ones(4, np.float32),
        "other": np.full((size, 4), 2, np.float32),
    }
    values = {
        name: ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for name, array in arrays.items()
    }
    product = ir.node("MatMul", [x, values["big"]])
    again = ir.node("MatMul", [x, values["other"]])
    total = ir.node("Add", [product.outputs[0], again.outputs[0]])
    shifted = ir.node("Add", [total.outputs[0], values["small"]])
    shifted.outputs[0].name = "y"
    graph = ir.Graph(
        [x],
        shifted.outputs,
        nodes=[product, again, total, shifted],
        initializers=list(values.values()),
        opset_imports={"": 20},
    )
    return ir.Model(graph, ir_version=10)


def test_the_size_of_a_model_is_known_before_it_is_written(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        path = writer.write_model(tiny_graph())
        written = path.stat().st_size + path.with_name("model.onnx.data").stat().st_size
    graph = tiny_graph()
    big = graph.graph.initializers["big"]
    # What no one reads is not computed.
    big.const_value = ir.LazyTensor(
        pytest.fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([3000, 4]), name="big"
    )
    assert graph_bytes(graph) == written


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("spare", [0, -1])
def test_a_folder_beyond_its_limit_is_not_written(
    spare: int, *, lean: bool, tmp_path: Path
) -> None:
    write(tmp_path / "first")
    total = sum(path.stat().st_size for path in (tmp_path / "first").iterdir())
    limit = total + spare

    def commit() -> None:
        with ArtifactWriter(tmp_path / "out") as writer:
            writer.write_model(tiny_graph())
            writer.write_json("genai_config.json", {"extra": "same"})
            if lean:
                writer.leave_out_records()
            writer.commit(
                source={"model": "m"}, config={}, parity={}, packages={}, limit_bytes=limit
            )

    if spare < 0:
        with pytest.raises(
            ArtifactError, match=rf"take {total:,} bytes, more than.*{limit:,}.*of {total - 2:,},"
        ) as caught:
            commit()
        assert ("--lean" in str(caught.value)) != lean
        assert "its records take more than was planned" in str(caught.value)
    else:
        commit()
    assert (tmp_path / "out").exists() == (spare == 0)


def test_a_folder_with_wide_scales_says_what_they_take(tmp_path: Path) -> None:
    x = ir.Value(name="x", shape=ir.Shape([1, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    scales = ir.Value(name="s", const_value=ir.tensor(np.full(300, 1e6, np.float32), name="s"))
    codes = ir.Value(name="B", const_value=ir.tensor(np.zeros(300, np.uint8), name="B"))
    node = ir.node(FUSED_OP, [x, codes, scales], domain=DOMAIN)
    node.outputs[0].name = "y"
    imports = {"": 20, DOMAIN: 1}
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[codes, scales], opset_imports=imports
    )
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.write_model(ir.Model(graph, ir_version=10))
        writer.write_json("genai_config.json", {})
        with pytest.raises(ArtifactError, match=r"float16 cannot hold take 600 more than was"):
            writer.commit(source={"model": "m"}, config={}, parity={}, packages={}, limit_bytes=9)


def write(output: Path, *, force: bool = False, extra: str = "same") -> None:
    with ArtifactWriter(output, force=force) as writer:
        writer.write_model(tiny_graph())
        writer.write_json("genai_config.json", {"extra": extra})
        writer.commit(source={"model": "m"}, config={}, parity={}, packages={})


def test_writes_a_folder_that_verifies(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "artifact"
    write(output)
    manifest = verify_manifest(output)
    assert sorted(manifest.files) == ["genai_config.json", "model.onnx", "model.onnx.data"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["artifact"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(output.stat().st_mode) == 0o777 & ~umask


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two


def test_existing_output_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    output.mkdir()
    with pytest.raises(ArtifactError, match=r"artifact: exists: choose another 'output', or"):
        ArtifactWriter(output)
    (output / "precious.txt").touch()
    with pytest.raises(ArtifactError, match="is no eoracc artifact, so --force does not replace"):
        ArtifactWriter(output, force=True)
    assert (output / "precious.txt").exists()


def test_force_replaces_an_artifact(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    write(output, extra="old")
    with pytest.raises(ArtifactError, match="exists"):
        write(output)
    write(output, force=True, extra="new")
    assert json.loads((output / "genai_config.json").read_text()) == {"extra": "new"}
    verify_manifest(output)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("step", ["write_model", "write_json", "commit"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug")], ids=repr)
def test_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    monkeypatch.setattr(ArtifactWriter, step, fail_with(error))
    with pytest.raises(type(error)):
        write(tmp_path / "new" / "artifact")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["sync_path", "describe_folder"])
def test_failure_while_finishing_keeps_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    output = tmp_path / "artifact"
    write(output, extra="old")
    monkeypatch.setattr(artifact, step, fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write(output, force=True, extra="new")
    verify_manifest(output)
    assert json.loads((output / "genai_config.json").read_text()) == {"extra": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_failed_exchange_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "artifact"
    write(output, extra="old")
    busy = OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    monkeypatch.setattr(artifact, "put_in_place", fail_with(busy))
    with pytest.raises(ArtifactError, match="cannot be put in its place: Device or resource busy"):
        write(output, force=True, extra="new")
    assert json.loads((output / "genai_config.json").read_text()) == {"extra": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    with ArtifactWriter(output) as writer:
        write(output, extra="first")
        with pytest.raises(ArtifactError, match="artifact: exists: choose another"):
            writer.commit(source={"model": "m"}, config={}, parity={}, packages={})
    assert json.loads((output / "genai_config.json").read_text()) == {"extra": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def save(*_: object, **__: object) -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise ValueError("cannot serialize") from error

    monkeypatch.setattr(ir, "to_proto", save)
    with pytest.raises(ArtifactError, match=r"artifact: the disk is full: free some space or"):
        write(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_full_disk_is_seen_while_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_file, "DATA_FILE", "/dev/full")
    with pytest.raises(ArtifactError, match=r"artifact: the disk is full: free some space or"):
        write(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shutil import disk_usage

    usage = type(disk_usage(tmp_path))(total=10, used=0, free=10)
    monkeypatch.setattr("eoracc.compiler.targets.artifact.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ArtifactError, match="96,016 bytes are needed and 10 are left on the disk"):
        write(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_nan_does_not_reach_a_json_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="not JSON compliant"),
        ArtifactWriter(tmp_path / "artifact") as writer,
    ):
        writer.write_json("report.json", {"perplexity": float("nan")})


def test_versions_name_what_the_bytes_depend_on() -> None:
    versions = package_versions()
    assert {"eoracc", "numpy", "onnx-ir", "torch"} <= set(versions)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I/O error: No space left on device (os error 28)", ArtifactError),
        ("Error while deserializing header: InvalidHeader", SafetensorError),
    ],
)
def test_full_disk_is_seen_through_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: type[Exception]
) -> None:
    def save(*_: object, **__: object) -> None:
        raise SafetensorError(text)

    monkeypatch.setattr(ir, "to_proto", save)
    with pytest.raises(expected):
        write(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "artifact") as writer:
        writer.write_json("private.json", {})
        (writer.folder / "private.json").chmod(0o600)
        writer.commit(source={"model": "m"}, config={}, parity={}, packages={})
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "artifact").iterdir()}
    assert modes == {(tmp_path / "other").stat().st_mode}


def slotted_graph() -> ir.Model:
    model = tiny_graph()
    model.metadata_props[SLOTS_KEY] = AdapterSlots("int8", SLOTS).to_json()
    return model


def write_with_adapters(output: Path, model: ir.Model, *names: str, force: bool = False) -> None:
    with ArtifactWriter(output, force=force) as writer:
        writer.write_model(model)
        config = {"model": {"context_length": 1, "decoder": {"filename": "model.onnx"}}}
        writer.write_genai_config(config)
        for seed, name in enumerate(names):
            writer.write_adapter(name, random_factors("int8", seed=seed), {"seed": seed})
        writer.commit(source={"model": "m"}, config={}, parity={}, packages={})


def test_adapters_are_bound_to_what_was_built(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    write_with_adapters(output, slotted_graph(), "math", "code")
    manifest = verify_manifest(output)
    assert adapter_names(output) == ["code", "math"]
    for seed, name in enumerate(("math", "code")):
        found = read_adapter(output, name)
        assert (found.backbone, found.details) == (manifest.digest, {"seed": seed})
        expected = random_factors("int8", seed=seed)
        for linear, one in expected.items():
            np.testing.assert_array_equal(found.factors[linear].product(), one.product())
    write_with_adapters(tmp_path / "bare", slotted_graph())
    assert read_manifest(tmp_path / "bare").digest == manifest.digest
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((output / "adapters").stat().st_mode) == 0o777 & ~umask


def test_adapters_that_cannot_be_written(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    with pytest.raises(ArtifactError, match="artifact: the model takes no adapters"):
        write_with_adapters(output, tiny_graph(), "math")
    with pytest.raises(ArtifactError, match="artifact: has an adapter 'math' already"):
        write_with_adapters(output, slotted_graph(), "math", "math")
    with pytest.raises(ArtifactError, match=r"'\.\./math': is no valid name"):
        write_with_adapters(output, slotted_graph(), "../math")
    assert list(tmp_path.iterdir()) == []


def test_replacing_waits_for_a_change_of_the_old_artifact(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    write_with_adapters(output, slotted_graph())
    rebuild = threading.Thread(
        target=write_with_adapters, args=(output, slotted_graph(), "new"), kwargs={"force": True}
    )
    with changing(output):
        rebuild.start()
        rebuild.join(0.2)
        assert rebuild.is_alive()
        assert adapter_names(output) == []
    rebuild.join(30)
    assert adapter_names(output) == ["new"]
    verify_manifest(output)


def test_records_of_every_target_are_left_out(tmp_path: Path) -> None:
    records = ("parity.safetensors", "tokens.json", "tensorrt/parity.safetensors")
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.write_model(tiny_graph(), "tensorrt")
        for name in (*records, "tokenizer.json"):
            (writer.folder / name).write_bytes(b"{}")
        writer.leave_out_records()
        writer.commit(source={"model": "m"}, config={}, parity={}, packages={})
    files = verify_manifest(tmp_path / "out").files.keys()
    assert files == {"tokenizer.json", "tensorrt/model.onnx", "tensorrt/model.onnx.data"}
