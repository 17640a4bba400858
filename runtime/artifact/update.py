"""Change a finished artifact: its files together with its manifest, or its signature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.runtime.artifact.folder_change import change_files, changing
from eoracc.runtime.artifact.manifest import (
    MANIFEST_FILE,
    check_files,
    describe_bytes,
    read_manifest,
)
from eoracc.runtime.artifact.signature import SIGNATURE_FILE, sign

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from eoracc.runtime.artifact.manifest import Manifest

__all__ = ["change_artifact", "sign_artifact"]


def change_artifact(
    folder: Path, manifest: Manifest, written: Mapping[str, bytes], removed: Collection[str] = ()
) -> Manifest:
    """Write and remove files of an artifact, all or nothing, and list them in its manifest.

    A signature is removed: it is that of the old manifest.

    Args:
      folder: the artifact, locked by :func:`eoracc.runtime.artifact.folder_change.changing`.
      manifest: of the artifact as it is.
      written: content by path in the artifact.
      removed: paths likewise.

    Returns:
      The new manifest.

    Raises:
      ArtifactError: the artifact cannot be written to.
    """
    changed = manifest.with_files(
        dict.fromkeys(removed) | {name: describe_bytes(data) for name, data in written.items()}
    )
    content = {**written, MANIFEST_FILE: changed.to_json().encode()}
    change_files(folder, content, [*removed, SIGNATURE_FILE])
    return changed


def sign_artifact(folder: Path, key: Path) -> str:
    """Sign the manifest of an artifact, after every byte was compared with it.

    Args:
      folder: the artifact; a signature that is there is replaced.
      key: PEM file of an ed25519 private key.

    Returns:
      sha256 of the manifest.

    Raises:
      ArtifactError: the artifact is damaged, or cannot be written to.
      ConfigError: the file holds no such key.
    """
    with changing(folder):
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        content = (folder / MANIFEST_FILE).read_bytes()
        digest = describe_bytes(content).sha256
        change_files(folder, {SIGNATURE_FILE: sign(content, key)})
    return digest
