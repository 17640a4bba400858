"""manifest.json: the list of an artifact's files, and the check that none has changed.

The manifest lists every file with its sha256 and size. Every byte is compared before anything is
loaded, and the folder is locked until everything is open. What is not listed is not opened: a file
beside the listed ones is refused, and so is a link, or a name that leads elsewhere.

On machines that compute alike (:attr:`Manifest.machine`) the same inputs give the same bytes in
every file, except for the records of the build (report.json, builder.log), TensorRT engines, whose
internal numbering varies, and manifest.json, which holds their hashes. :attr:`Manifest.digest`
covers none of these, nor adapters, which may be added and removed: it identifies the backbone,
which adapters are bound to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eoracc.documents import VOCABULARY_BYTES, Reader
from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.authenticity import UNCHECKED, Authenticity
from eoracc.runtime.artifact.folder_change import STAGED, reading
from eoracc.runtime.artifact.folder_exchange import finish_exchange
from eoracc.runtime.artifact.onnx_file import external_files, parse_onnx
from eoracc.runtime.artifact.signature import SIGNATURE_FILE
from eoracc.runtime.artifact.versioned_json import check_versioned, is_inside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "ADAPTERS_FOLDER",
    "BUILDER_LOG",
    "MANIFEST_FILE",
    "REPORT_FILE",
    "FileEntry",
    "Manifest",
    "backbone_digest",
    "check_files",
    "describe_bytes",
    "describe_file",
    "describe_folder",
    "leads_outside",
    "locked_artifact",
    "opening",
    "read_listed",
    "read_manifest",
    "verify_manifest",
]

ADAPTERS_FOLDER = "adapters"
BUILDER_LOG = "builder.log"
MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"
_SCHEMA = 1

_FORMAT = "eoracc artifact"
_BLOCK = 1 << 20
_READER = Reader(ArtifactError, "build the artifact again")
_LISTED = Reader(ArtifactError, "copy or build the artifact again")
_LARGEST = 1 << 40
"""Bytes of a file, far above any: its size is compared with the manifest."""

_UNLISTED = frozenset((MANIFEST_FILE, SIGNATURE_FILE))
"""Files that a manifest cannot list."""

_SECTIONS = ("source", "config", "packages", "parity")
_ADAPTER_FILE = re.compile(rf"{ADAPTERS_FOLDER}/[^/]+\.(onnx_adapter|json)")
_ENGINE_FILE = re.compile(r"tensorrt(_rtx)?/(engines\.json|[^/]+\.(engine|log))")
"""Files that TensorRT builds from a graph, during the build or later on the GPU's machine."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact.

    Attributes:
      sha256: of its content, hexadecimal.
      size: in bytes.
    """

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
      files: every other file of the artifact by its path in it, with forward slashes.
      source: the original checkpoint: ``model`` as configured, its ``model_type``, and ``digest``
        over its weights.
      config: the resolved model.yaml.
      packages: versions of the packages that the build used.
      parity: figures of the parity gate; empty if it was turned off.
      digest: of the backbone, see :func:`backbone_digest`.
      machine: that the build ran on: instruction set, the libraries' kernels, threads; empty if the
        build did not record it.
    """

    files: Mapping[str, FileEntry]
    source: Mapping[str, str]
    config: Mapping[str, Any]
    packages: Mapping[str, str]
    parity: Mapping[str, Any]
    digest: str
    machine: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        files: Mapping[str, FileEntry],
        *,
        source: Mapping[str, str],
        config: Mapping[str, Any],
        packages: Mapping[str, str],
        parity: Mapping[str, Any],
        machine: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """The manifest of ``files``, with the digest computed from them."""
        files = dict(sorted(files.items()))
        return cls(files, source, config, packages, parity, backbone_digest(files), machine or {})

    def with_files(self, files: Mapping[str, FileEntry | None]) -> Manifest:
        """The manifest with files added, replaced or (None) removed."""
        left = {name: entry for name, entry in self.files.items() if name not in files}
        left |= {name: entry for name, entry in files.items() if entry is not None}
        sections = {name: getattr(self, name) for name in _SECTIONS}
        return Manifest.of(left, machine=self.machine, **sections)

    def to_json(self) -> str:
        """The text of manifest.json: equal manifests give equal texts."""
        content = {"format": _FORMAT, "schema": _SCHEMA, **asdict(self)}
        return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def describe_bytes(content: bytes) -> FileEntry:
    """The entry of a file that holds ``content``."""
    return FileEntry(hashlib.sha256(content).hexdigest(), len(content))


def backbone_digest(files: Mapping[str, FileEntry]) -> str:
    """sha256 over paths and hashes of ``files``.

    Leaves out the report, adapters, and the files that TensorRT builds from a graph that the digest
    covers: engines, their description and the builder's logs.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(files.items()):
        left_out = name == REPORT_FILE or _ADAPTER_FILE.fullmatch(name)
        if not left_out and not _ENGINE_FILE.fullmatch(name):
            digest.update(f"{entry.sha256}  {name}\n".encode())
    return digest.hexdigest()


def describe_folder(folder: Path) -> dict[str, FileEntry]:
    """Hash every file under ``folder`` except the manifest and its signature, sorted by path.

    Raises:
      ArtifactError: an entry is neither a plain file nor a folder.
    """
    return {name: describe_file(folder / name) for name in _listing(folder)}


def read_manifest(folder: Path, authenticity: Authenticity = UNCHECKED) -> Manifest:
    """Read and check manifest.json, without looking at any other file but its signature.

    Args:
      folder: the artifact.
      authenticity: what the bytes of manifest.json have to match before they are read.

    Raises:
      ArtifactError: ``folder`` is no artifact, not the one asked for, or its manifest is damaged.
      ConfigError: the key of ``authenticity`` cannot be read.
    """
    path = folder / MANIFEST_FILE
    finish_exchange(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: there is no such folder: give an artifact's folder")
    if not path.exists():
        raise ArtifactError(
            f"{folder}: has no {MANIFEST_FILE}, so it is no eoracc artifact: build one"
        )
    raw = _READER.read_bytes(path, limit=VOCABULARY_BYTES)
    authenticity.check(folder, raw)
    content = check_versioned(
        _READER.parse(raw, path),
        path,
        file_format=_FORMAT,
        schema=_SCHEMA,
        foreign="is not the manifest of an eoracc artifact",
    )
    try:
        files = {
            str(name): FileEntry(str(entry["sha256"]), int(entry["size"]))
            for name, entry in content["files"].items()
        }
        sections = {key: dict(content[key]) for key in _SECTIONS}
        machine = dict(content.get("machine", {}))  # artifacts of older builds have none
        digest = str(content["digest"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ArtifactError(f"{path}: lacks a part: build the artifact again") from None
    for name in files:
        if not is_inside(name):
            raise ArtifactError(
                f"{path}: lists '{name}', which leaves the folder: do not trust this artifact"
            )
    if digest != backbone_digest(files):
        raise ArtifactError(f"{path}: its digest does not fit its files: build the artifact again")
    return Manifest(files=files, digest=digest, machine=machine, **sections)


def verify_manifest(folder: Path, authenticity: Authenticity = UNCHECKED) -> Manifest:
    """Compare every byte of the artifact in ``folder`` with its manifest.

    An interrupted change is finished first.

    Args:
      folder: the artifact.
      authenticity: what manifest.json has to match.

    Returns:
      The manifest.

    Raises:
      ArtifactError: a file is missing, changed, not listed, or not inside the folder; or this is
        not the artifact asked for.
    """
    with reading(folder):
        manifest = read_manifest(folder, authenticity)
        check_files(folder, manifest)
    return manifest


@contextmanager
def opening(folder: Path, authenticity: Authenticity = UNCHECKED) -> Iterator[Manifest]:
    """Verify an artifact and lock it against changes until all that is needed of it is open.

    Yields:
      The manifest. Every file that the ONNX files of the artifact name is listed in it.

    Raises:
      ArtifactError: see :func:`verify_manifest`; or an ONNX file keeps tensors in a file that is
        not listed.
    """
    with reading(folder):
        manifest = read_manifest(folder, authenticity)
        check_files(folder, manifest)
        for name in sorted(manifest.files):
            if name.endswith(".onnx"):
                _check_external(folder, manifest, name)
        yield manifest


@contextmanager
def locked_artifact(folder: Path, backbone: str) -> Iterator[None]:
    """Lock an artifact that was verified before against changes.

    Args:
      folder: the artifact.
      backbone: digest in the manifest that was verified.

    Raises:
      ArtifactError: the artifact was replaced by one with another backbone meanwhile.
    """
    with reading(folder):
        if read_manifest(folder).digest != backbone:
            raise ArtifactError(
                f"{folder}: was replaced by another artifact meanwhile: run the command again"
            )
        yield


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every byte of the files in a locked ``folder`` with its manifest.

    Raises:
      ArtifactError: see :func:`verify_manifest`.
    """
    present = set(_listing(folder))
    for name in sorted(manifest.files.keys() - present):
        raise ArtifactError(f"{folder / name}: is missing: copy or build the artifact again")
    for name in sorted(present - manifest.files.keys()):
        raise ArtifactError(
            f"{folder / name}: is not listed in {MANIFEST_FILE}: remove it, it is no part of "
            "the artifact"
        )
    for name, entry in manifest.files.items():
        path = folder / name
        if (size := path.stat().st_size) != entry.size:
            raise ArtifactError(
                f"{path}: has {size} bytes where {MANIFEST_FILE} says {entry.size}: "
                "copy or build the artifact again"
            )
        _compare(path, describe_file(path), entry)


def _check_external(folder: Path, manifest: Manifest, name: str) -> None:
    """Check that an ONNX file keeps tensors only in files that the manifest lists."""
    path = folder / name
    model = parse_onnx(read_listed(folder, manifest, name), path)
    start = name[: name.rfind("/") + 1]
    for location in sorted(external_files(model)):
        # Compared as text: another spelling of a listed path is refused, too.
        if f"{start}{location}" not in manifest.files:
            raise ArtifactError(
                f"{path}: keeps tensors in {location[:200]!r}, which {MANIFEST_FILE} does not "
                "list: do not trust this artifact"
            )


def read_listed(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The content of one file, compared with the manifest.

    Raises:
      ArtifactError: it is not listed, missing or changed.
    """
    path = folder / name
    if name not in manifest.files:
        raise ArtifactError(f"{path}: is not listed in {MANIFEST_FILE}: build the artifact again")
    if leads_outside(path, folder):
        raise ArtifactError(f"{path}: is a link that leaves the folder: do not trust this artifact")
    # A named pipe in the place of a file is refused, not waited for.
    content = _LISTED.read_bytes(path, limit=_LARGEST)
    _compare(path, describe_bytes(content), manifest.files[name])
    return content


def leads_outside(path: Path, folder: Path) -> bool:
    """Whether ``path`` leads out of ``folder``, or nowhere: a circle of links, or no name."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        return True


def _compare(path: Path, actual: FileEntry, listed: FileEntry) -> None:
    if actual.sha256 != listed.sha256:
        raise ArtifactError(
            f"{path}: its content is not what {MANIFEST_FILE} says: "
            "copy or build the artifact again"
        )


def _listing(folder: Path) -> list[str]:
    """Paths of all files that a manifest lists, sorted; a link is an error.

    A half-written change is not part of the artifact: no manifest lists it, so nothing opens it.
    """
    names: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=_refuse_unreadable):
        place = Path(parent)
        if place == folder and STAGED in folders and not (folder / STAGED).is_symlink():
            folders.remove(STAGED)
        for entry in sorted((*folders, *files)):
            path = place / entry
            if path.is_symlink():
                leaves = leads_outside(path, folder)
                raise ArtifactError(
                    f"{path}: is a link{' that leaves the folder' if leaves else ''}: "
                    "do not trust this artifact"
                )
            if entry not in folders and not path.is_file():
                raise ArtifactError(f"{path}: is neither a file nor a folder: remove it")
        names += [(place / entry).relative_to(folder).as_posix() for entry in files]
    return sorted(name for name in names if name not in _UNLISTED)


def _refuse_unreadable(error: OSError) -> None:
    raise ArtifactError(f"{error.filename}: cannot be read: {error.strerror}") from None


def describe_file(path: Path) -> FileEntry:
    """The entry of a file.

    Raises:
      ArtifactError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    return FileEntry(digest.hexdigest(), size)
