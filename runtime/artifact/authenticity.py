"""What identifies an artifact: a digest or the signer of its manifest.

manifest.json lists the digest of every other file, so its own digest stands for the whole artifact.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eoracc.errors import ArtifactError, ConfigError
from eoracc.runtime.artifact.signature import SIGNATURE_BYTES, SIGNATURE_FILE, is_signed_by

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["UNCHECKED", "Authenticity"]

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Authenticity:
    """What the manifest of an artifact has to match before any other file is opened.

    Attributes:
      digest: sha256 of manifest.json, 64 hexadecimal digits; None for any.
      public_key: PEM file of the ed25519 key that has to have signed it; None for none.
    """

    digest: str | None = None
    public_key: Path | None = None

    def __post_init__(self) -> None:
        """Check the form of the digest.

        Raises:
          ConfigError: it is no sha256.
        """
        if self.digest is not None and not _SHA256.fullmatch(self.digest):
            raise ConfigError(
                f"digest {self.digest[:80]!r}: is no sha256 of a manifest.json, 64 hexadecimal "
                "digits: 'eoracc inspect' prints it"
            )

    def check(self, folder: Path, content: bytes) -> None:
        """Compare a manifest.

        Args:
          folder: the artifact.
          content: of its manifest.json.

        Raises:
          ArtifactError: it has another digest, or is not signed by the key.
          ConfigError: the key cannot be read.
        """
        if self.digest is not None:
            actual = hashlib.sha256(content).hexdigest()
            if actual != self.digest.lower():
                raise ArtifactError(
                    f"{folder}: its manifest.json has the sha256 {actual}, not the digest asked "
                    "for: this is another artifact, or it was changed: fetch the right one"
                )
        if self.public_key is not None:
            self._check_signature(folder, content, self.public_key)

    def _check_signature(self, folder: Path, content: bytes, key: Path) -> None:
        path = folder / SIGNATURE_FILE
        if path.is_symlink():
            raise ArtifactError(f"{path}: is a link: do not trust this artifact")
        try:
            with path.open("rb") as file:
                signature = file.read(SIGNATURE_BYTES + 1)
        except FileNotFoundError:
            raise ArtifactError(
                f"{folder}: is not signed, it has no {SIGNATURE_FILE}: get a signed copy, or leave "
                "--public-key out"
            ) from None
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
        if not is_signed_by(content, signature, key):
            raise ArtifactError(
                f"{folder}: {SIGNATURE_FILE} is no signature of its manifest.json by {key}: "
                "do not trust this artifact"
            )


UNCHECKED = Authenticity()
"""Any artifact will do."""
