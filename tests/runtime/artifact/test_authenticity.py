from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from eoracc.errors import ArtifactError, ConfigError
from eoracc.runtime.artifact.authenticity import UNCHECKED, Authenticity
from eoracc.runtime.artifact.signature import SIGNATURE_FILE, make_key, sign

CONTENT = b"{}\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_digest(tmp_path: Path) -> None:
    UNCHECKED.check(tmp_path, CONTENT)
    Authenticity(SHA256).check(tmp_path, CONTENT)
    Authenticity(SHA256.upper()).check(tmp_path, CONTENT)
    with pytest.raises(ArtifactError, match=r"has the sha256 .*, not the digest asked for"):
        Authenticity(SHA256).check(tmp_path, CONTENT + b" ")


@pytest.mark.parametrize("digest", ["", "abc", SHA256[:-1], SHA256 + "0", f" {SHA256}", "g" * 64])
def test_digest_of_another_form(digest: str) -> None:
    with pytest.raises(ConfigError, match="is no sha256 of a manifest"):
        Authenticity(digest)


def test_signature_is_checked_against_the_key(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    expected = Authenticity(public_key=make_key(key))
    with pytest.raises(ArtifactError, match="is not signed, it has no manifest"):
        expected.check(tmp_path, CONTENT)
    (tmp_path / SIGNATURE_FILE).write_bytes(sign(CONTENT, key))
    expected.check(tmp_path, CONTENT)
    with pytest.raises(ArtifactError, match="is no signature of its manifest"):
        expected.check(tmp_path, CONTENT + b" ")
    foreign = Authenticity(public_key=make_key(tmp_path / "other.pem"))
    with pytest.raises(ArtifactError, match="is no signature of its manifest"):
        foreign.check(tmp_path, CONTENT)
    (tmp_path / SIGNATURE_FILE).write_bytes(sign(CONTENT, key) + b"\0")
    with pytest.raises(ArtifactError, match="is no signature of its manifest"):
        expected.check(tmp_path, CONTENT)


def test_signature_elsewhere_is_not_followed(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    expected = Authenticity(public_key=make_key(key))
    folder = tmp_path / "artifact"
    folder.mkdir()
    (tmp_path / "elsewhere").write_bytes(sign(CONTENT, key))
    (folder / SIGNATURE_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="is a link: do not trust"):
        expected.check(folder, CONTENT)
