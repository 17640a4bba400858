"""Loading engines: rejected files and error texts; partly with the real package."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.errors import ArtifactError, BackendError
from eoracc.runtime.artifact.manifest import Manifest, read_manifest
from eoracc.runtime.backends import backends_of
from eoracc.runtime.model import load
from eoracc.runtime.tensorrt.engine_set import read_engine_set
from eoracc.runtime.tensorrt.library import Library
from tests.optional import require
from tests.runtime.tensorrt.engine_artifact import write_engine_artifact
from tests.tiny_artifact import reseal

if TYPE_CHECKING:
    from pathlib import Path

    from tests.runtime.tensorrt.machine import Machine


@pytest.fixture
def artifact(libcuda: Path, machine: Machine, tmp_path: Path) -> Path:
    del machine
    return write_engine_artifact(tmp_path, libcuda, adapter_type="none")


def edit(folder: Path, **fields: object) -> None:
    """Change engines.json, and the manifest with it."""
    path = folder / "tensorrt_rtx" / "engines.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    reseal(folder)


def test_real_package_refuses_what_is_no_engine(tmp_path: Path) -> None:
    """Without a GPU nothing can be loaded; that TensorRT's own words arrive can be seen."""
    require("tensorrt_rtx")
    path = tmp_path / "sm86.engine"
    path.write_bytes(b"no engine")
    library = Library("tensorrt_rtx")
    with pytest.raises(BackendError, match=rf"^{path}: tensorrt_rtx refuses it: \S.*$") as raised:
        library.load_engine(path)
    assert "it gives no reason" not in str(raised.value)
    with pytest.raises(ArtifactError, match=r"missing\.engine: cannot be read: No such file"):
        library.load_engine(tmp_path / "missing.engine")


def test_engine_that_tensorrt_refuses(artifact: Path) -> None:
    (artifact / "tensorrt_rtx" / "sm86.engine").write_bytes(b"{}")
    reseal(artifact)
    with pytest.raises(
        BackendError, match=r"sm86\.engine: tensorrt_rtx refuses it: Magic tag does"
    ):
        load(artifact, backend="tensorrt_rtx", trust=True)


def test_engine_that_is_not_what_was_built(artifact: Path) -> None:
    engine = artifact / "tensorrt_rtx" / "sm86.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b" ")
    with pytest.raises(ArtifactError, match=r"sm86\.engine: its content is not what"):
        load(artifact, backend="tensorrt_rtx", trust=True)


def test_description_of_another_engine(artifact: Path) -> None:
    bindings = json.loads((artifact / "tensorrt_rtx" / "engines.json").read_text())["bindings"]
    edit(artifact, bindings=[one for one in bindings if one["name"] != "position_ids"])
    with pytest.raises(ArtifactError, match=r"does not describe the engine .*\(position_ids\)"):
        load(artifact, backend="tensorrt_rtx", trust=True)
    new = {"name": "image", "mode": "input", "dtype": "float16", "shape": ["batch"]}
    edit(artifact, bindings=[*bindings, new])
    with pytest.raises(ArtifactError, match="have an input 'image' that this eoracc does not know"):
        load(artifact, backend="tensorrt_rtx", trust=True)


def test_calls_beyond_what_an_engine_was_built_for(artifact: Path) -> None:
    model = load(artifact, backend="tensorrt_rtx", trust=True)
    network: Any = model._decoder
    contexts = network._network.contexts
    usual = {"batch": 1, "sequence": 4, "past": 0, "total": 4, "rank": 0, "logits": 1}
    with pytest.raises(BackendError) as raised:
        contexts.enqueue(usual | {"batch": 5}, {})
    assert str(raised.value) == (
        "the engine does not take a call of batch 5 (built for 1 to 4): build it for wider ranges"
    )


def test_engine_without_calls_of_few_tokens(
    libcuda: Path, machine: Machine, tmp_path: Path
) -> None:
    """A prefill profile from 4 tokens: the remaining tokens are decoded one by one."""
    from tests.runtime.tensorrt.engine_artifact import Oracle

    del machine
    folder = write_engine_artifact(
        tmp_path, libcuda, adapter_type="none", sequence=(4, 8, 16), logits=(1, 1, 2)
    )
    model = load(folder, backend="tensorrt_rtx", threads=1, trust=True)
    prompt = list(range(30, 30 + 22))  # 16, 4, and twice one
    assert list(model.generate(prompt, 4, ignore_end=True).tokens) == Oracle(folder).greedy(
        prompt, 4
    )
    with pytest.raises(BackendError, match=r"not take a call of past 0 \(built for 1 to 127\)"):
        model.generate([5, 6, 7], 1)


def test_backends_of_an_artifact(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert backends_of(manifest) == ("tensorrt_rtx", "onnxruntime")
    files = dict(manifest.files)
    del files["model.onnx"]
    bundle = {**files, "tensorrt/bundle.json": files["tensorrt_rtx/engines.json"]}
    sections: dict[str, Any] = {"source": {}, "config": {}, "packages": {}, "parity": {}}
    assert backends_of(Manifest.of(bundle, **sections)) == ("tensorrt_rtx",)
    built = {**bundle, "tensorrt/engines.json": files["tensorrt_rtx/engines.json"]}
    assert backends_of(Manifest.of(built, **sections)) == ("tensorrt_rtx", "tensorrt")


def test_bundle_without_an_engine_says_how_to_build_one(artifact: Path) -> None:
    (artifact / "tensorrt").mkdir()
    (artifact / "tensorrt" / "bundle.json").write_text("{}")
    reseal(artifact)
    with pytest.raises(ArtifactError, match="no engine yet: run 'eoracc engine "):
        load(artifact, backend="tensorrt", trust=True)
    assert read_engine_set(artifact / "tensorrt_rtx").package == "tensorrt_rtx"
