from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.errors import ArtifactError, ConfigError
from eoracc.runtime.artifact.authenticity import Authenticity
from eoracc.runtime.artifact.folder_change import changing
from eoracc.runtime.artifact.manifest import MANIFEST_FILE, read_manifest, verify_manifest
from eoracc.runtime.artifact.signature import SIGNATURE_FILE, make_key
from eoracc.runtime.artifact.update import change_artifact, sign_artifact
from tests.slots_artifact import write_slots_artifact

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_slots_artifact(tmp_path / "artifact")
    return tmp_path / "artifact"


def test_signed_artifact_is_that_of_its_key(artifact: Path, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    expected = Authenticity(public_key=make_key(key))
    digest = sign_artifact(artifact, key)
    assert verify_manifest(artifact, expected) == verify_manifest(artifact, Authenticity(digest))
    first = (artifact / SIGNATURE_FILE).read_bytes()
    other = make_key(tmp_path / "other.pem")
    sign_artifact(artifact, tmp_path / "other.pem")
    assert (artifact / SIGNATURE_FILE).read_bytes() != first
    verify_manifest(artifact, Authenticity(public_key=other))


def test_change_removes_the_signature(artifact: Path, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    expected = Authenticity(public_key=make_key(key))
    digest = sign_artifact(artifact, key)
    with changing(artifact):
        manifest = read_manifest(artifact)
        changed = change_artifact(artifact, manifest, {"new": b"new"}, ["report.json"])
    assert changed == verify_manifest(artifact)
    assert changed.files.keys() == manifest.files.keys() - {"report.json"} | {"new"}
    assert not (artifact / SIGNATURE_FILE).exists()
    with pytest.raises(ArtifactError, match="is not signed"):
        read_manifest(artifact, expected)
    with pytest.raises(ArtifactError, match="not the digest asked for"):
        read_manifest(artifact, Authenticity(digest))


def test_damaged_artifact_is_not_signed(artifact: Path, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    make_key(key)
    with pytest.raises(ConfigError, match="is no ed25519 private key"):
        sign_artifact(artifact, tmp_path / "key.pem.pub")
    (artifact / "model.onnx.data").write_bytes(b"WEIGHTS")
    with pytest.raises(ArtifactError, match="its content is not what manifest"):
        sign_artifact(artifact, key)
    (artifact / MANIFEST_FILE).unlink()
    with pytest.raises(ArtifactError, match="is no eoracc artifact"):
        sign_artifact(artifact, key)
    with pytest.raises(ArtifactError, match="there is no such folder"):
        sign_artifact(tmp_path / "nowhere", key)
    assert not (artifact / SIGNATURE_FILE).exists()
