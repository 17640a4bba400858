"""bundle.json: the content of a ``tensorrt`` folder and the description of its engines.

An engine of TensorRT is built where it runs. The folder has all that this takes: the graph and its
weights, the plugin and its kernels, and here the ranges that engines are built for. Whoever has
copied the folder alone can still compare its files with what was written::

    {"format": "eoracc tensorrt bundle", "schema": 1,
     "compute_capabilities": ["8.0", "8.6"],
     "engines": {...},
     "files": {"model.onnx": {"sha256": "...", "size": 1}, ...}}

``engines`` is engines.json (:mod:`eoracc.runtime.tensorrt.engine_set`) as it is without an engine.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eoracc.errors import ArtifactError
from eoracc.printable import printable
from eoracc.runtime.artifact.authenticity import UNCHECKED, Authenticity
from eoracc.runtime.artifact.manifest import MANIFEST_FILE, describe_file, opening
from eoracc.runtime.artifact.onnx_file import external_files, parse_onnx
from eoracc.runtime.artifact.versioned_json import is_file_name, read_versioned
from eoracc.runtime.tensorrt.engine_set import EngineSet, parse_engine_set

__all__ = ["BUNDLE_FILE", "BUNDLE_FOLDER", "Bundle", "bundle_json", "open_bundle"]

BUNDLE_FILE = "bundle.json"
BUNDLE_FOLDER = "tensorrt"

_FORMAT = "eoracc tensorrt bundle"
_SCHEMA = 1


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked.

    Attributes:
      folder: of the bundle.
      artifact: that it is part of; None for a folder on its own.
      backbone: digest of the artifact's backbone; None likewise.
      compute_capabilities: that its kernels were compiled for.
      engines: of this graph, as described without an engine.
    """

    folder: Path
    artifact: Path | None
    backbone: str | None
    compute_capabilities: tuple[str, ...]
    engines: EngineSet


def bundle_json(
    folder: Path, engines: EngineSet, compute_capabilities: Sequence[str], files: Sequence[str]
) -> str:
    """The text of bundle.json.

    Args:
      folder: of the bundle.
      engines: as described without an engine.
      compute_capabilities: that kernels were compiled for.
      files: names in the folder, of what engines are built from.
    """
    content = {
        "format": _FORMAT,
        "schema": _SCHEMA,
        "compute_capabilities": list(compute_capabilities),
        "engines": json.loads(engines.to_json()),
        "files": {name: asdict(describe_file(folder / name)) for name in sorted(files)},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def open_bundle(path: Path, authenticity: Authenticity = UNCHECKED) -> Bundle:
    """Check a bundle against its manifest, and read the description of its engines.

    Args:
      path: an artifact with the target ``tensorrt``, or that target's folder, alone or in its
        artifact.
      authenticity: what the artifact has to be.

    Raises:
      ArtifactError: it is no bundle, not part of the artifact asked for, or a file is not what was
        written.
    """
    path = path.absolute()
    if not path.is_dir():
        raise ArtifactError(f"{path}: there is no such folder: give an artifact or its bundle")
    in_artifact = path.name == BUNDLE_FOLDER and (path.parent / MANIFEST_FILE).is_file()
    artifact = path.parent if in_artifact else path if (path / MANIFEST_FILE).is_file() else None
    folder = path if artifact is None else artifact / BUNDLE_FOLDER
    if artifact is None:
        if authenticity != UNCHECKED:
            raise ArtifactError(
                f"{path}: is a bundle without its artifact, whose manifest has the digest and the "
                "signature: give the artifact"
            )
        return _read_bundle(path, folder, None, None)
    with opening(artifact, authenticity) as manifest:
        return _read_bundle(path, folder, artifact, manifest.digest)


def _read_bundle(path: Path, folder: Path, artifact: Path | None, backbone: str | None) -> Bundle:
    file = folder / BUNDLE_FILE
    content = read_versioned(
        file,
        file_format=_FORMAT,
        schema=_SCHEMA,
        missing=(
            f"{path}: has no bundle for TensorRT: add 'tensorrt' to 'targets' of its model.yaml "
            "and build it again"
        ),
        foreign="does not describe a bundle for TensorRT",
    )
    try:
        capabilities = tuple(str(capability) for capability in content["compute_capabilities"])
        files = {
            str(name): (str(entry["sha256"]), int(entry["size"]))
            for name, entry in content["files"].items()
        }
        engines = parse_engine_set(content["engines"], file)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ArtifactError(f"{file}: lacks a part: build the artifact again") from None
    for name, described in files.items():
        if not is_file_name(name):
            raise ArtifactError(f"{file}: names '{name}', which is not beside it: do not trust it")
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise ArtifactError(f"{folder / name}: is missing: copy or build the bundle again")
        entry = describe_file(folder / name)
        if (entry.sha256, entry.size) != described:
            raise ArtifactError(
                f"{folder / name}: its content is not what {BUNDLE_FILE} says: copy or build the "
                "bundle again"
            )
    _check_listed(folder, engines.graph, files.keys())
    return Bundle(folder, artifact, backbone, capabilities, engines)


def _check_listed(folder: Path, graph: str, listed: Collection[str]) -> None:
    """Check that the graph and the files of its weights are among those that were compared."""
    path = folder / graph
    named = {graph}
    if graph in listed:
        named |= external_files(parse_onnx(path.read_bytes(), path))
    for name in sorted(named.difference(listed)):
        raise ArtifactError(
            f"{path}: is made of '{printable(name)}', which {BUNDLE_FILE} does not list: do not "
            "trust this bundle"
        )
