"""Which native library runs an artifact: the installed one, unless only the artifact's own can."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest

from eoracc.errors import ArtifactError, PluginError
from eoracc.plugins.library import library_path
from eoracc.plugins.op import DOMAIN, FUSED_OP, GATHER_OP
from eoracc.runtime.artifact.manifest import read_manifest
from eoracc.runtime.model import load
from eoracc.runtime.onnxruntime import native_library
from eoracc.runtime.onnxruntime.native_library import choose_library, native_path
from tests.tiny_artifact import reseal

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = "libeoracc_ops.so"


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """An artifact whose library does the same and has other bytes."""
    folder = Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
    with (folder / LIBRARY).open("ab") as file:
        file.write(b"another build")
    reseal(folder)
    return folder


def edit(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)


def fused(model: onnx.ModelProto) -> onnx.NodeProto:
    found: onnx.NodeProto = next(node for node in model.graph.node if node.op_type == FUSED_OP)
    return found


def test_equal_library_is_the_installed_one(tiny_artifact: Path) -> None:
    for trust in (False, True):
        chosen = choose_library(tiny_artifact, read_manifest(tiny_artifact), trust=trust)
        assert chosen is not None
        assert (chosen.path, chosen.note) == (library_path(), None)
    assert load(tiny_artifact, threads=1).library_note is None


def test_another_build_is_not_loaded(artifact: Path, tiny_artifact: Path) -> None:
    chosen = choose_library(artifact, read_manifest(artifact), trust=False)
    assert chosen is not None
    assert chosen.path == library_path()
    assert chosen.note is not None
    assert "libeoracc_ops.so of the artifact is not the installed library" in chosen.note
    model = load(artifact, threads=1)
    assert model.library_note == chosen.note
    expected = load(tiny_artifact, threads=1).generate("abc", 8).tokens
    assert model.generate("abc", 8).tokens == expected
    own = choose_library(artifact, read_manifest(artifact), trust=True)
    assert own is not None
    assert (own.path, own.note) == (artifact / LIBRARY, None)
    assert load(artifact, threads=1, trust=True).generate("abc", 8).tokens == expected


def add_attribute(model: onnx.ModelProto) -> None:
    fused(model).attribute.append(onnx.helper.make_attribute("rounding", 1))


def change_value(name: str, value: int | str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = fused(model)
        kept = [item for item in node.attribute if item.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


def add_input(model: onnx.ModelProto) -> None:
    node = fused(model)
    node.input.extend([""] * (16 - len(node.input)) + ["input_ids"])


def raise_version(model: onnx.ModelProto) -> None:
    for entry in model.opset_import:
        if entry.domain == DOMAIN:
            entry.version = 2


def add_op(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Own", ["input_ids"], ["own"], domain="own"))


def hide_op(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_node("Own", [], ["own"], domain="own")
    body = onnx.helper.make_graph([inner], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=body))


def rename_op(model: onnx.ModelProto) -> None:
    node = fused(model)
    node.op_type, node.overload = "MatMulNBitsLowRank2", ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_attribute, f"does not know 'rounding' of eoracc::{FUSED_OP}"),
        (change_value("bits", 5), f"does not know bits = 5 of eoracc::{FUSED_OP}"),
        (change_value("bits", "3"), f"does not know bits = '3' of eoracc::{FUSED_OP}"),
        (change_value("layout", 2), f"does not know layout = 2 of eoracc::{FUSED_OP}"),
        (change_value("activation", "relu"), "does not know activation = 'relu' of eoracc::"),
        (add_input, f"does not know all inputs of eoracc::{FUSED_OP}"),
        (raise_version, "its ops are of version 2, and the installed library has 1"),
        (add_op, "does not have the op own::Own"),
        (hide_op, "does not have the op own::Own"),
        (rename_op, "does not have the op eoracc::MatMulNBitsLowRank2"),
    ],
)
def test_graph_beyond_the_installed_library_needs_trust(
    artifact: Path, change: Callable[[onnx.ModelProto], object], reason: str
) -> None:
    """The installed library would ignore an attribute that it does not know: a wrong result."""
    edit(artifact, change)
    manifest = read_manifest(artifact)
    with pytest.raises(ArtifactError) as caught:
        choose_library(artifact, manifest, trust=False)
    assert f"{artifact / LIBRARY}: is native code of the artifact's builder" in str(caught.value)
    assert reason in str(caught.value)
    assert "add --trust (trust=True) if you trust the builder" in str(caught.value)
    with pytest.raises(ArtifactError, match="is native code of the artifact's builder"):
        load(artifact, threads=1)
    trusted = choose_library(artifact, manifest, trust=True)
    assert trusted is not None
    assert trusted.path == artifact / LIBRARY


def test_op_with_a_body_needs_no_library(artifact: Path) -> None:
    def call_function(model: onnx.ModelProto) -> None:
        body = [onnx.helper.make_node("Identity", ["x"], ["y"])]
        opset = [onnx.helper.make_opsetid("", 24)]
        model.functions.append(onnx.helper.make_function("own", "F", ["x"], ["y"], body, opset))
        model.graph.node.append(onnx.helper.make_node("F", ["input_ids"], ["own"], domain="own"))

    edit(artifact, call_function)
    chosen = choose_library(artifact, read_manifest(artifact), trust=False)
    assert chosen is not None
    assert chosen.path == library_path()


def test_installation_without_a_library(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise PluginError("the native op library is missing")

    monkeypatch.setattr(native_library, "library_path", missing)
    with pytest.raises(ArtifactError, match="since eoracc is installed without a native library"):
        choose_library(artifact, read_manifest(artifact), trust=False)
    assert choose_library(artifact, read_manifest(artifact), trust=True) is not None


def test_library_that_is_not_listed(artifact: Path) -> None:
    manifest = read_manifest(artifact).with_files({LIBRARY: None})
    for trust in (False, True):
        with pytest.raises(ArtifactError, match="does not list"):
            choose_library(artifact, manifest, trust=trust)


def test_native_path(tmp_path: Path) -> None:
    assert native_path(library=True) == library_path()
    assert native_path(library=False) is None
    assert native_path(tmp_path) == tmp_path


def test_ops_are_those_of_the_graph(tiny_artifact: Path) -> None:
    """The tests above change what is there."""
    model = onnx.load(tiny_artifact / "model.onnx", load_external_data=False)
    assert {node.op_type for node in model.graph.node if node.domain == DOMAIN} <= {
        FUSED_OP,
        GATHER_OP,
    }
