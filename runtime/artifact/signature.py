r"""An ed25519 signature of manifest.json, which lists the digest of every other file.

``manifest.json.sig`` holds the 64 bytes of the signature over the bytes of manifest.json. Keys are
PEM files. OpenSSL makes and checks the same files::

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pem.pub
    openssl pkeyutl -verify -pubin -inkey key.pem.pub -rawin -in manifest.json \
        -sigfile manifest.json.sig
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from eoracc.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

# ruff: noqa: PLC0415 - most commands check no signature

__all__ = ["SIGNATURE_BYTES", "SIGNATURE_FILE", "is_signed_by", "make_key", "sign"]

SIGNATURE_FILE = "manifest.json.sig"
"""The file that manifest.json cannot list."""

SIGNATURE_BYTES = 64

_MAX_KEY_BYTES = 1 << 14
"""A PEM file of an ed25519 key has about 120 bytes."""


def make_key(path: Path) -> Path:
    """Write a new private key to ``path``, readable by its owner only, and its public key.

    Returns:
      The file of the public key: ``path`` with ``.pub`` appended.

    Raises:
      ConfigError: ``path`` is a folder, or one of the two exists or cannot be written; an existing
        key is never replaced.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    if not path.name:
        raise ConfigError(f"{path}: is a folder: name a file for the key")
    key = Ed25519PrivateKey.generate()
    public_path = path.with_name(f"{path.name}.pub")
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _create(path, private, mode=0o600)
    try:
        _create(public_path, public, mode=0o666)
    except ConfigError:
        path.unlink()
        raise
    return public_path


def sign(content: bytes, key: Path) -> bytes:
    """The signature of ``content``.

    Args:
      content: of manifest.json.
      key: PEM file (PKCS 8) of an ed25519 private key, without a password.

    Raises:
      ConfigError: the file holds no such key.
    """
    return _read_private_key(key).sign(content)


def is_signed_by(content: bytes, signature: bytes, key: Path) -> bool:
    """Whether ``signature`` is that of ``content`` by the owner of a key.

    Args:
      content: of manifest.json.
      signature: of manifest.json.sig.
      key: PEM file of an ed25519 public key.

    Raises:
      ConfigError: the file holds no such key.
    """
    from cryptography.exceptions import InvalidSignature

    public = _read_public_key(key)
    try:
        public.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read(path), password=None)
    except TypeError:
        raise ConfigError(
            f"{path}: is a key with a password: write it without one, "
            "with 'openssl pkey -in KEY -out PLAIN'"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"{path}: is no ed25519 private key in PEM form: make one with --new-key, or with "
            "'openssl genpkey -algorithm ed25519'"
        )
    return key


def _read_public_key(path: Path) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(
            f"{path}: is no ed25519 public key in PEM form: derive it from the private key with "
            "'openssl pkey -in KEY -pubout'"
        )
    return key


def _read(path: Path) -> bytes:
    try:
        # Opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path}: is no file: give the file of a key")
        with path.open("rb") as file:
            content = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be read: {error.strerror}") from None
    if len(content) > _MAX_KEY_BYTES:
        raise ConfigError(f"{path}: has more than {_MAX_KEY_BYTES:,} bytes: is no key")
    return content


def _create(path: Path, content: bytes, *, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise ConfigError(f"{path}: exists: choose another file for the new key") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError as error:
        path.unlink()
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
