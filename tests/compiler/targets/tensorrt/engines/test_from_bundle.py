"""The target ``tensorrt`` up to where TensorRT and a GPU take over: neither is here."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from eoracc.compiler.cli import main
from eoracc.compiler.driver import build
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.targets.tensorrt.engines import from_bundle
from eoracc.compiler.targets.tensorrt.engines.bundle import Bundle, open_bundle
from eoracc.compiler.targets.tensorrt.engines.from_bundle import build_from_bundle, store_engine
from eoracc.errors import ArtifactError, BackendError, TargetError
from eoracc.runtime.artifact.authenticity import Authenticity
from eoracc.runtime.artifact.folder_change import changing
from eoracc.runtime.artifact.folder_lock import waiting_at_most
from eoracc.runtime.artifact.manifest import verify_manifest
from eoracc.runtime.tensorrt.engine_set import read_engine_set
from tests.optional import require
from tests.tiny_build import EORA, tiny_config, tiny_workspace

require("triton")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for TensorRT alone, its kernels for capability 8.0."""
    folder = tiny_workspace(tmp_path_factory.mktemp("bundle"))
    options = {"compute_capabilities": ["8.0"], "batch": [1, 1, 2], "context_length": 64}
    config = tiny_config(EORA, targets=["tensorrt"], tensorrt={**options, "sequence": [1, 16, 32]})
    return build(config, config_dir=folder, progress=SilentProgress()).output


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "artifact"))


def test_bundle_has_all_that_an_engine_is_built_from(built: Path) -> None:
    bundle = open_bundle(built)
    names = {path.name for path in bundle.folder.iterdir()}
    kernels = json.loads((bundle.folder / "kernels.json").read_text())["kernels"]
    assert names == {
        "model.onnx",
        "model.onnx.data",
        "plugin.py",
        "kernels.json",
        "bundle.json",
        "parity.safetensors",
        *(kernel["file"] for kernel in kernels),
    }
    assert bundle.compute_capabilities == ("8.0",)
    assert bundle.engines.engines == ()
    assert [profile.name for profile in bundle.engines.profiles] == ["decode", "prefill"]
    assert {binding.name for binding in bundle.engines.bindings} > {"input_ids", "logits"}


def test_plugin_of_the_bundle_needs_nothing_of_eoracc(built: Path) -> None:
    source = (built / "tensorrt" / "plugin.py").read_text()
    assert "import tensorrt" in source
    assert "eoracc." not in "\n".join(
        line for line in source.splitlines() if line.lstrip().startswith(("import", "from"))
    )


def test_graph_passed_the_parity_gate(built: Path) -> None:
    parity = json.loads((built / "report.json").read_text())["parity"]
    cases = [case for case in parity["logits"] if case["through"] == "tensorrt"]
    assert parity["passed"]
    assert len(cases) == 3
    for case in cases:
        assert case["max_error"] <= case["tolerance"] < 0.1 * parity["compression_effect"]


def test_folder_of_the_target_is_a_bundle_in_its_artifact_and_alone(
    artifact: Path, tmp_path: Path
) -> None:
    folder = artifact / "tensorrt"
    assert open_bundle(folder) == open_bundle(artifact)
    alone = Path(shutil.copytree(folder, tmp_path / "alone"))
    assert open_bundle(alone).artifact is None
    kernel = next(alone.glob("*.ptx"))
    kernel.write_text(kernel.read_text() + "\n")
    with pytest.raises(ArtifactError, match=rf"{kernel.name}: its content is not what bundle.json"):
        open_bundle(alone)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content.update(format="other"), "does not describe a bundle"),
        (lambda content: content.update(schema=2), "has schema 2, this eoracc reads 1"),
        (lambda content: content.pop("engines"), "lacks a part"),
        (
            lambda content: content["files"].update({"../x": {"sha256": "", "size": 0}}),
            r"names '\.\./x', which is not beside it",
        ),
        (
            lambda content: content["files"].update({"x": {"sha256": "", "size": 0}}),
            "x: is missing",
        ),
        (
            lambda content: content["files"].pop("model.onnx"),
            r"is made of 'model\.onnx', which bundle\.json does not list",
        ),
        (
            lambda content: content["files"].pop("model.onnx.data"),
            r"is made of 'model\.onnx\.data', which bundle\.json does not list",
        ),
    ],
)
def test_a_damaged_description_is_refused(
    change: Any,  # noqa: ANN401 - a function
    problem: str,
    artifact: Path,
    tmp_path: Path,
) -> None:
    alone = Path(shutil.move(artifact / "tensorrt", tmp_path / "alone"))
    content = json.loads((alone / "bundle.json").read_text())
    change(content)
    (alone / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=problem):
        open_bundle(alone)


def test_manifest_is_checked_first(artifact: Path) -> None:
    (artifact / "tensorrt" / "plugin.py").write_text("")
    with pytest.raises(ArtifactError, match=r"plugin\.py: has 0 bytes where manifest\.json says"):
        build_from_bundle(artifact, progress=SilentProgress())


def test_another_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no bundle for TensorRT: add 'tensorrt'"):
        open_bundle(tmp_path)
    with pytest.raises(ArtifactError, match="there is no such folder"):
        open_bundle(tmp_path / "nowhere")


@pytest.mark.skipif(util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_missing_package_is_one_sentence(built: Path) -> None:
    done = CliRunner().invoke(main, ["engine", str(built)])
    assert done.exit_code == 2
    assert done.stderr == "error: tensorrt is not installed: pip install 'eoracc[tensorrt]'\n"


def with_tensorrt(
    monkeypatch: pytest.MonkeyPatch, version: str = "11.4.0", capability: str = "8.6"
) -> None:
    """A machine that has TensorRT and a GPU, as far as it is asked before the build."""
    monkeypatch.setattr(from_bundle, "require_package", lambda _: None)
    monkeypatch.setattr(metadata, "version", lambda _: version)
    gpu = SimpleNamespace(name="a GPU", compute_capability=capability)
    monkeypatch.setattr(from_bundle, "open_device", lambda: gpu)


def test_an_old_package_is_one_sentence(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_tensorrt(monkeypatch, version="10.8.0.43")
    with pytest.raises(TargetError, match=r"tensorrt 10\.8\.0\.43 .* 'tensorrt>=10\.9'"):
        build_from_bundle(built, progress=SilentProgress())


def test_a_missing_driver_is_one_sentence(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver")
    from eoracc.runtime.tensorrt.cuda import open_device

    with_tensorrt(monkeypatch)
    monkeypatch.setattr(from_bundle, "open_device", open_device)
    with pytest.raises(BackendError, match="no NVIDIA driver is found on this machine"):
        build_from_bundle(built, progress=SilentProgress())


def test_another_gpu_is_one_sentence(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_tensorrt(monkeypatch)
    with pytest.raises(TargetError, match=r"a GPU, has compute capability 8\.6, not 8\.9"):
        build_from_bundle(built, progress=SilentProgress(), compute_capability="8.9")


def test_kernels_are_executed_only_where_trusted(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):  # noqa: N818 - no error
        pass

    def build_engine(*_: object) -> None:
        # What is built from cannot be exchanged meanwhile.
        with (
            waiting_at_most(0),
            pytest.raises(ArtifactError, match="is locked by"),
            changing(artifact),
        ):
            pass
        raise Reached

    with_tensorrt(monkeypatch)
    monkeypatch.setattr(from_bundle, "build_engine", build_engine)
    with pytest.raises(ArtifactError, match="brings kernels of the bundle's builder"):
        build_from_bundle(artifact, progress=SilentProgress())
    with pytest.raises(Reached):
        build_from_bundle(artifact, progress=SilentProgress(), trust=True)


def test_engine_of_a_replaced_artifact_is_not_stored(artifact: Path) -> None:
    bundle = replace(open_bundle(artifact), backbone="0" * 64)
    with pytest.raises(ArtifactError, match="was replaced by another artifact meanwhile"):
        stored(bundle, "8.6")
    verify_manifest(artifact)


def test_bundle_alone_has_neither_digest_nor_signature(artifact: Path, tmp_path: Path) -> None:
    alone = Path(shutil.move(artifact / "tensorrt", tmp_path / "alone"))
    with pytest.raises(ArtifactError, match="is a bundle without its artifact"):
        open_bundle(alone, Authenticity("0" * 64))


def stored(bundle: Bundle, capability: str, *, output: Path | None = None, **known: Any) -> Path:  # noqa: ANN401
    return store_engine(
        bundle,
        output,
        known.get("known"),
        capability=capability,
        engine=f"engine {capability}".encode(),
        log=b"log",
        version=known.get("version", "11.4.0"),
    )


def test_engines_become_part_of_the_artifact(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = verify_manifest(artifact)
    bundle = open_bundle(artifact)
    path = stored(bundle, "12.0")
    stored(bundle, "8.6", known=read_engine_set(bundle.folder))
    after = verify_manifest(artifact)
    assert after.digest == before.digest  # of what adapters are bound to
    engines = read_engine_set(bundle.folder)
    assert [(one.compute_capability, one.file) for one in engines.engines] == [
        ("8.6", "sm86.engine"),
        ("12.0", "sm120.engine"),
    ]
    assert engines.version == "11.4.0"
    assert path.read_bytes() == b"engine 12.0"
    with_tensorrt(monkeypatch)
    with pytest.raises(ArtifactError, match=r"has an engine for .* 8\.6: replace it with --force"):
        build_from_bundle(artifact, progress=SilentProgress())


def test_engines_of_another_version_make_room(artifact: Path) -> None:
    bundle = open_bundle(artifact)
    stored(bundle, "12.0")
    known = read_engine_set(bundle.folder)
    stored(bundle, "8.6", known=known, version="11.5.0")
    assert read_engine_set(bundle.folder).compute_capabilities == ("8.6",)
    assert not (bundle.folder / "sm120.engine").exists()
    verify_manifest(artifact)


def test_engines_go_elsewhere_when_told_to(artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "engines"
    path = stored(open_bundle(artifact), "8.6", output=output)
    assert path == output / "sm86.engine"
    assert read_engine_set(output).compute_capabilities == ("8.6",)
    assert not (artifact / "tensorrt" / "engines.json").exists()
