from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx
import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.authenticity import Authenticity
from eoracc.runtime.artifact.folder_change import PENDING, STAGED
from eoracc.runtime.artifact.manifest import (
    MANIFEST_FILE,
    Manifest,
    describe_bytes,
    describe_folder,
    locked_artifact,
    opening,
    read_listed,
    read_manifest,
    verify_manifest,
)
from eoracc.runtime.artifact.signature import SIGNATURE_FILE

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "adapters").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"model" * 1000)
    (folder / "libops.so").write_bytes(b"\x7fELF")
    (folder / "adapters" / "a.onnx_adapter").write_bytes(b"adapter")
    (folder / "report.json").write_text("{}")
    write(folder)
    return folder


def write(folder: Path) -> Manifest:
    manifest = Manifest.of(
        describe_folder(folder),
        source={"model": "m", "digest": "d"},
        config={"passes": []},
        packages={"numpy": "2"},
        parity={"passed": True},
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    return manifest


def test_the_machine_is_kept_and_may_be_missing(artifact: Path) -> None:
    manifest = replace(read_manifest(artifact), machine={"extensions": ["avx2"]})
    (artifact / MANIFEST_FILE).write_text(manifest.to_json())
    read = read_manifest(artifact)
    assert read.machine == {"extensions": ["avx2"]}
    assert read.with_files({"libops.so": None}).machine == read.machine
    content = json.loads(manifest.to_json())
    del content["machine"]
    (artifact / MANIFEST_FILE).write_text(json.dumps(content))
    assert read_manifest(artifact).machine == {}
    (artifact / MANIFEST_FILE).write_text(json.dumps({**content, "machine": [1]}))
    with pytest.raises(ArtifactError, match="lacks a part"):
        read_manifest(artifact)


def test_lists_every_file_with_hash_and_size(artifact: Path) -> None:
    manifest = verify_manifest(artifact)
    assert sorted(manifest.files) == [
        "adapters/a.onnx_adapter",
        "libops.so",
        "model.onnx",
        "report.json",
    ]
    entry = manifest.files["model.onnx"]
    assert entry.size == 5000
    assert entry.sha256 == hashlib.sha256(b"model" * 1000).hexdigest()
    assert manifest.source == {"model": "m", "digest": "d"}


@pytest.mark.parametrize("name", ["model.onnx", "libops.so", "adapters/a.onnx_adapter"])
def test_one_changed_bit_is_found(artifact: Path, name: str) -> None:
    content = bytearray((artifact / name).read_bytes())
    content[-1] ^= 1
    (artifact / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: its content is not what manifest.json says"):
        verify_manifest(artifact)


def test_truncated_file_is_named_with_both_sizes(artifact: Path) -> None:
    os.truncate(artifact / "model.onnx", 4999)
    with pytest.raises(ArtifactError, match=r"model\.onnx: has 4999 bytes .* says 5000"):
        verify_manifest(artifact)


def test_missing_file_is_named(artifact: Path) -> None:
    (artifact / "libops.so").unlink()
    with pytest.raises(ArtifactError, match=r"libops\.so: is missing"):
        verify_manifest(artifact)


def test_additional_file_is_refused(artifact: Path) -> None:
    (artifact / "chat_template.jinja").write_text("{{ evil }}")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja: is not listed"):
        verify_manifest(artifact)


def test_link_out_of_the_folder_is_refused(artifact: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.so"
    shutil.copyfile(artifact / "libops.so", outside)
    (artifact / "libops.so").unlink()
    (artifact / "libops.so").symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"libops\.so: is a link that leaves the folder"):
        verify_manifest(artifact)


@pytest.mark.parametrize("target", ["model.onnx", "adapters", STAGED, "."])
def test_link_inside_the_folder_is_refused(artifact: Path, target: str) -> None:
    (artifact / STAGED).mkdir()
    (artifact / "link").symlink_to(target)
    with pytest.raises(ArtifactError, match="link: is a link: do not trust this artifact"):
        describe_folder(artifact)
    with pytest.raises(ArtifactError, match="link: is a link: do not trust this artifact"):
        verify_manifest(artifact)


def test_unlisted_files_are_refused_anywhere(artifact: Path) -> None:
    for name in ("tokenizer.json", "adapters/b.json", ".hidden", "a/b/c", ".change.partial2/x"):
        (artifact / name).parent.mkdir(parents=True, exist_ok=True)
        (artifact / name).write_bytes(b"x")
        with pytest.raises(ArtifactError, match=f"{name}: is not listed in manifest.json"):
            verify_manifest(artifact)
        (artifact / name).unlink()


def test_folder_that_cannot_be_read_is_named(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ArtifactError, match="artifact: cannot be read: Permission denied"):
        describe_folder(artifact)


def write_model(folder: Path, location: str, name: str = "model.onnx") -> None:
    """An artifact whose ``name`` keeps a tensor in ``location``."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    graph = onnx.helper.make_graph([], "g", [], [], initializer=[tensor])
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(onnx.helper.make_model(graph).SerializeToString())
    write(folder)


@pytest.mark.parametrize(
    ("name", "location"), [("model.onnx", "w.data"), ("tensorrt/model.onnx", "w.data")]
)
def test_listed_weights_are_fine(artifact: Path, name: str, location: str) -> None:
    (artifact / name).parent.mkdir(exist_ok=True)
    (artifact / name).with_name(location).write_bytes(b"1234")
    (artifact / "model.onnx").unlink()
    write_model(artifact, location, name)
    with opening(artifact) as manifest:
        assert name in manifest.files


@pytest.mark.parametrize("name", ["model.onnx", "tensorrt/model.onnx"])
@pytest.mark.parametrize(
    "location",
    [
        "nowhere",
        f"{STAGED}/w.data",
        f"../artifact/{STAGED}/w.data",
        "../outside",
        "/etc/hostname",
        "./libops.so",
        "adapters/../libops.so",
        "*/_ORT_MEM_ADDR_/*",
        "",
    ],
)
def test_weights_elsewhere_are_refused(artifact: Path, name: str, location: str) -> None:
    """Whatever the spelling: ONNX Runtime would open a listed file, or nothing is opened."""
    (artifact / "model.onnx").unlink()
    write_model(artifact, location, name)
    (artifact / STAGED).mkdir()
    (artifact / STAGED / "w.data").write_bytes(b"1234")
    with (
        pytest.raises(ArtifactError, match=r"keeps tensors in .* does not list"),
        opening(artifact),
    ):
        pass


def test_artifact_stays_locked_until_all_is_open(artifact: Path) -> None:
    write_model(artifact, "libops.so")
    change = (
        "import fcntl, os, sys\n"
        "descriptor = os.open(sys.argv[1], os.O_RDONLY)\n"
        "try:\n"
        "    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError:\n"
        "    print('locked')\n"
    )

    def outside() -> str:
        command = [sys.executable, "-c", change, str(artifact)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with opening(artifact) as manifest:
        assert outside() == "locked\n"
    assert outside() == ""
    with locked_artifact(artifact, manifest.digest):
        assert outside() == "locked\n"
    with (
        pytest.raises(ArtifactError, match="was replaced by another artifact meanwhile"),
        locked_artifact(artifact, "0" * 64),
    ):
        pass


def test_another_artifact_is_refused_before_anything_is_opened(artifact: Path) -> None:
    (artifact / "libops.so").write_bytes(b"changed")
    with (
        pytest.raises(ArtifactError, match="not the digest asked for"),
        opening(artifact, Authenticity("0" * 64)),
    ):
        pass
    (artifact / MANIFEST_FILE).write_text("no JSON")
    with pytest.raises(ArtifactError, match="not the digest asked for"):
        read_manifest(artifact, Authenticity("0" * 64))


def test_signature_is_no_listed_file(artifact: Path) -> None:
    (artifact / SIGNATURE_FILE).write_bytes(b"64 bytes")
    assert SIGNATURE_FILE not in verify_manifest(artifact).files
    assert SIGNATURE_FILE not in describe_folder(artifact)


def test_linked_artifact_folder_is_fine(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact)
    verify_manifest(tmp_path / "link")


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/../../b", "a\\b", ""])
def test_path_that_leaves_the_folder_is_refused(artifact: Path, name: str) -> None:
    content = json.loads((artifact / MANIFEST_FILE).read_text())
    content["files"][name] = {"sha256": "0" * 64, "size": 1}
    (artifact / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="which leaves the folder"):
        verify_manifest(artifact)


def test_edited_hash_does_not_fit_the_digest(artifact: Path) -> None:
    content = json.loads((artifact / MANIFEST_FILE).read_text())
    content["files"]["libops.so"]["sha256"] = "0" * 64
    (artifact / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="its digest does not fit"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not the manifest of an eoracc artifact"),
        ('{"format": "other"}', "is not the manifest of an eoracc artifact"),
        ('{"format": "eoracc artifact", "schema": 99}', "has schema 99, this eoracc reads 1"),
        ('{"format": "eoracc artifact", "schema": 1}', "lacks a part"),
        ('{"format": "eoracc artifact", "schema": 1, "files": []}', "lacks a part"),
    ],
)
def test_damaged_manifest(artifact: Path, text: str, problem: str) -> None:
    (artifact / MANIFEST_FILE).write_text(text)
    with pytest.raises(ArtifactError, match=problem):
        read_manifest(artifact)


def test_folder_that_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json, so it is no eoracc artifact"):
        read_manifest(tmp_path)


def test_adapters_are_no_part_of_the_backbones_digest(artifact: Path) -> None:
    before = read_manifest(artifact)
    for name in ("adapters/a.onnx_adapter", "adapters/b.onnx_adapter", "adapters/b.json"):
        (artifact / name).write_bytes(b"another")
        assert write(artifact).digest == before.digest
        verify_manifest(artifact)
    for name in ("adapters/lib.so", "adapters/a/b.json", "other.json"):
        (artifact / name).parent.mkdir(exist_ok=True)
        (artifact / name).touch()
        assert write(artifact).digest != before.digest, name
        (artifact / name).unlink()


def test_files_of_a_manifest_are_replaced(artifact: Path) -> None:
    before = read_manifest(artifact)
    entry = describe_bytes(b"new")
    after = before.with_files({"adapters/b.json": entry, "adapters/a.onnx_adapter": None})
    assert set(before.files) ^ set(after.files) == {"adapters/b.json", "adapters/a.onnx_adapter"}
    assert list(after.files) == sorted(after.files)
    assert (after.digest, after.source) == (before.digest, before.source)
    assert before.with_files({"model.onnx": entry}).digest != before.digest


def test_one_file_is_read_and_compared(artifact: Path, tmp_path: Path) -> None:
    manifest = read_manifest(artifact)
    assert read_listed(artifact, manifest, "libops.so") == b"\x7fELF"
    with pytest.raises(ArtifactError, match="nowhere: is not listed in manifest"):
        read_listed(artifact, manifest, "nowhere")
    (artifact / "libops.so").write_bytes(b"\x7fELG")
    with pytest.raises(ArtifactError, match=r"libops\.so: its content is not what manifest"):
        read_listed(artifact, manifest, "libops.so")
    (artifact / "libops.so").unlink()
    with pytest.raises(ArtifactError, match=r"libops\.so: is missing"):
        read_listed(artifact, manifest, "libops.so")
    (tmp_path / "outside").write_bytes(b"\x7fELF")
    (artifact / "libops.so").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match=r"libops\.so: is a link that leaves the folder"):
        read_listed(artifact, manifest, "libops.so")


def test_a_pipe_or_a_circle_of_links_is_refused_at_once(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    path = artifact / "libops.so"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match=r"libops\.so: is no regular file"):
        read_listed(artifact, manifest, path.name)
    path.unlink()
    path.symlink_to(path.name)
    for read in (verify_manifest, lambda folder: read_listed(folder, manifest, path.name)):
        with pytest.raises(ArtifactError, match=r"libops\.so: is a link that leaves the folder"):
            read(artifact)


def test_what_was_half_written_is_no_part_of_the_artifact(artifact: Path) -> None:
    (artifact / STAGED / "files").mkdir(parents=True)
    (artifact / STAGED / "files" / "model.onnx").write_bytes(b"half")
    verify_manifest(artifact)
    assert not any(name.startswith(STAGED) for name in describe_folder(artifact))


def test_interrupted_change_is_finished_before_anything_is_compared(artifact: Path) -> None:
    shutil.copytree(artifact, artifact.parent / "changed")
    (artifact.parent / "changed" / "adapters" / "a.onnx_adapter").write_bytes(b"changed")
    manifest = write(artifact.parent / "changed")
    files = artifact / PENDING / "files"
    (files / "adapters").mkdir(parents=True)
    (files / "adapters" / "a.onnx_adapter").write_bytes(b"changed")
    (files / MANIFEST_FILE).write_text(manifest.to_json())
    (artifact / PENDING / "removed.json").write_text("[]")
    assert verify_manifest(artifact) == manifest
    assert not (artifact / PENDING).exists()


def test_digest_names_what_was_built_and_not_how_long_it_took(artifact: Path) -> None:
    before = read_manifest(artifact)
    (artifact / "report.json").write_text('{"build": {"wall_s": 2}}')
    slower = write(artifact)
    assert slower.digest == before.digest
    assert slower.files["report.json"] != before.files["report.json"]
    (artifact / "model.onnx").write_bytes(b"other")
    assert write(artifact).digest != before.digest
