from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from eoracc.errors import ConfigError
from eoracc.runtime.artifact.signature import SIGNATURE_BYTES, is_signed_by, make_key, sign

CONTENT = b'{"format": "eoracc artifact"}\n'


def test_only_these_bytes_are_signed_and_only_by_this_key(tmp_path: Path) -> None:
    own, other = tmp_path / "own.pem", tmp_path / "other.pem"
    public, foreign = make_key(own), make_key(other)
    signature = sign(CONTENT, own)
    assert len(signature) == SIGNATURE_BYTES
    assert is_signed_by(CONTENT, signature, public)
    assert not is_signed_by(CONTENT, signature, foreign)
    assert not is_signed_by(CONTENT + b" ", signature, public)
    for changed in (b"", signature[:-1], signature + b"\0", bytes(SIGNATURE_BYTES)):
        assert not is_signed_by(CONTENT, changed, public)
    for bit in range(8):
        assert not is_signed_by(CONTENT, bytes([signature[0] ^ 1 << bit, *signature[1:]]), public)


def test_private_key_is_for_its_owner_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    public = make_key(path)
    assert public == tmp_path / "key.pem.pub"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"key\.pem: exists: choose another file"):
        make_key(path)
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(ConfigError, match=r"key\.pem\.pub: exists"):
        make_key(path)
    assert not path.exists()  # a private key alone would be no use
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        make_key(tmp_path / "nowhere" / "key.pem")


def test_openssl_makes_and_checks_the_same_files(tmp_path: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    try:
        openssl("genpkey", "-algorithm", "ed25519", "-out", "key.pem")
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    openssl("pkey", "-in", "key.pem", "-pubout", "-out", "key.pem.pub")
    (tmp_path / "manifest.json").write_bytes(CONTENT)
    signature = sign(CONTENT, tmp_path / "key.pem")
    (tmp_path / "manifest.json.sig").write_bytes(signature)
    assert is_signed_by(CONTENT, signature, tmp_path / "key.pem.pub")
    files = ("-in", "manifest.json", "-sigfile", "manifest.json.sig")
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", "key.pem.pub", "-rawin", *files)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    private = tmp_path / "key.pem"
    public = make_key(private)
    key = Ed25519PrivateKey.generate()
    locked = written(
        tmp_path / "locked.pem",
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")),
    )
    with pytest.raises(ConfigError, match=r"locked\.pem: is a key with a password"):
        sign(CONTENT, locked)
    curve = generate_private_key(SECP256R1())
    others = {
        "text": b"no key",
        "empty": b"",
        "curve": curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "public": public.read_bytes(),
    }
    for name, content in others.items():
        with pytest.raises(ConfigError, match=f"{name}: is no ed25519 private key in PEM form"):
            sign(CONTENT, written(tmp_path / name, content))
    others["public"] = private.read_bytes()
    others["curve"] = curve.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    for name, content in others.items():
        with pytest.raises(ConfigError, match=f"{name}: is no ed25519 public key in PEM form"):
            is_signed_by(CONTENT, bytes(64), written(tmp_path / name, content))
    with pytest.raises(ConfigError, match="has more than 16,384 bytes"):
        sign(CONTENT, written(tmp_path / "long", b"-" * 20_000))
    with pytest.raises(ConfigError, match="nowhere: the key cannot be read: No such file"):
        sign(CONTENT, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is no file: give the file of a key"):
        is_signed_by(CONTENT, bytes(64), tmp_path)
