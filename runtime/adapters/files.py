"""The two files of an adapter, and the adapters that an artifact lists.

An adapter named ``math`` is two files of the artifact. ``adapters/math.onnx_adapter`` holds the
factors as the graph takes them, in ONNX Runtime's own format, so that any runtime built on it can
set them. ``adapters/math.json`` describes them and names the backbone that they belong to:

.. code-block:: json

    {"format": "eoracc adapter", "schema": 1, "name": "math", "backbone": "<digest>",
     "sha256": "<of the .onnx_adapter>", "details": {}}

Both files are compared with the manifest and with each other before anything is read from them.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from eoracc.documents import Reader
from eoracc.errors import ArtifactError, PluginError
from eoracc.plugins.adapters import AdapterSlots, pack_adapter, unpack_adapter
from eoracc.printable import printable, quoted
from eoracc.runtime.adapters.adapter import Adapter, check_adapter_name
from eoracc.runtime.adapters.onnx_adapter import read_onnx_adapter, write_onnx_adapter
from eoracc.runtime.adapters.slots import read_slots
from eoracc.runtime.artifact.folder_change import reading
from eoracc.runtime.artifact.manifest import ADAPTERS_FOLDER, Manifest, read_listed, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "adapter_files",
    "adapter_names",
    "check_adapter_exists",
    "decode_adapter",
    "encode_adapter",
    "listed_adapters",
    "model_version",
    "read_adapter",
    "read_listed_adapter",
]

_READER = Reader(ArtifactError, "copy or make the adapter again")
_FORMAT = "eoracc adapter"
_SCHEMA = 1
_FACTORS = ".onnx_adapter"
_DESCRIPTION = ".json"


def adapter_names(folder: Path) -> list[str]:
    """Names of the artifact's adapters, sorted.

    Raises:
      ArtifactError: ``folder`` is no artifact.
    """
    return listed_adapters(read_manifest(folder))


def listed_adapters(manifest: Manifest) -> list[str]:
    """Names of the adapters that ``manifest`` lists both files of, sorted."""
    start = f"{ADAPTERS_FOLDER}/"
    names = {
        path.removeprefix(start).removesuffix(_FACTORS)
        for path in manifest.files
        if path.startswith(start) and path.endswith(_FACTORS)
    }
    return sorted(name for name in names if _path(name, _DESCRIPTION) in manifest.files)


def check_adapter_exists(folder: Path, manifest: Manifest, name: str) -> None:
    """Check that the artifact has an adapter ``name``.

    Raises:
      ArtifactError: it does not; the text lists its adapters.
    """
    known = listed_adapters(manifest)
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ArtifactError(f"{folder}: has no adapter {quoted(name)}: {has}")


def read_adapter(folder: Path, name: str) -> Adapter:
    """One adapter of an artifact, every byte compared with the manifest.

    Raises:
      ArtifactError: the adapter is unknown, belongs to another backbone, has changed, or does not
        fit the model.
    """
    with reading(folder):
        manifest = read_manifest(folder)
        return read_listed_adapter(folder, manifest, name)


def read_listed_adapter(folder: Path, manifest: Manifest, name: str) -> Adapter:
    """One adapter of an artifact whose manifest has been read, every byte compared with it.

    Raises:
      ArtifactError: see :func:`read_adapter`.
    """
    check_adapter_exists(folder, manifest, name)
    place = folder / _path(name, _FACTORS)
    adapter = decode_adapter(
        read_listed(folder, manifest, _path(name, _DESCRIPTION)),
        read_listed(folder, manifest, _path(name, _FACTORS)),
        read_slots(folder, manifest),
        backbone=manifest.digest,
        place=str(place),
    )
    if adapter.name != name:
        raise ArtifactError(
            f"{place}: is adapter {quoted(adapter.name)} under another name: remove it"
        )
    return adapter


def adapter_files(name: str) -> tuple[str, str]:
    """Paths of an adapter's files in the artifact: the description and the factors."""
    return _path(name, _DESCRIPTION), _path(name, _FACTORS)


def _path(name: str, suffix: str) -> str:
    return f"{ADAPTERS_FOLDER}/{name}{suffix}"


def encode_adapter(adapter: Adapter, slots: AdapterSlots) -> dict[str, bytes]:
    """The content of an adapter's files by path in the artifact; equal adapters give equal bytes.

    Raises:
      ArtifactError: the name is not allowed, the details are no JSON, or the factors do not fit the
        model.
    """
    check_adapter_name(adapter.name)
    try:
        arrays = pack_adapter(slots, adapter.factors)
        factors = write_onnx_adapter(
            arrays, adapter_version=_SCHEMA, model_version=model_version(adapter.backbone)
        )
        content = {
            "format": _FORMAT,
            "schema": _SCHEMA,
            "name": adapter.name,
            "backbone": adapter.backbone,
            "sha256": hashlib.sha256(factors).hexdigest(),
            "details": dict(adapter.details),
        }
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (PluginError, ArtifactError) as error:
        raise ArtifactError(f"adapter '{adapter.name}': {error}") from error
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"adapter '{adapter.name}': its details are no JSON: {error}") from None
    return {
        _path(adapter.name, _DESCRIPTION): text.encode(),
        _path(adapter.name, _FACTORS): factors,
    }


def decode_adapter(
    description: bytes | None, factors: bytes, slots: AdapterSlots, *, backbone: str, place: str
) -> Adapter:
    """Inverse of :func:`encode_adapter`.

    Args:
      description: content of the ``.json``. None if there is only the other file: then the 31 bits
        in it are compared with the backbone's digest, and there is no name and no details.
      factors: content of the ``.onnx_adapter``.
      slots: of the model.
      backbone: digest of the model.
      place: path of the ``.onnx_adapter``, for errors.

    Raises:
      ArtifactError: the files are damaged, belong to another backbone or do not fit each other.
    """
    name, details = "", {}
    if description is not None:
        content = _description(description, place)
        name, details = content["name"], content["details"]
        if content["backbone"] != backbone:
            raise _wrong_backbone(place, content["backbone"], backbone)
        if content["sha256"] != hashlib.sha256(factors).hexdigest():
            raise ArtifactError(
                f"{place}: is not the file that its .json describes: copy or make the adapter again"
            )
    stored = read_onnx_adapter(factors, place)
    if stored.model_version != model_version(backbone):
        raise _wrong_backbone(place, f"{2 * stored.model_version:08x}"[:7], backbone)
    try:
        return Adapter(name, unpack_adapter(slots, stored.arrays), backbone, details)
    except PluginError as error:
        raise ArtifactError(f"{place}: {error}") from error


def _description(content: bytes, place: str) -> dict[str, Any]:
    values = _READER.parse(content, f"{place}: its .json")
    try:
        schema = values["schema"] if values["format"] == _FORMAT else None
        strings = [values[key] for key in ("name", "backbone", "sha256")]
        complete = all(isinstance(value, str) for value in strings)
        complete = complete and isinstance(values["details"], dict)
    except (ValueError, KeyError, TypeError):
        schema, complete, values = None, False, {}
    if schema not in (None, _SCHEMA):
        raise ArtifactError(
            f"{place}: its .json has schema {printable(schema)}, this eoracc reads {_SCHEMA}: use "
            "the eoracc that made it, or make it again"
        )
    if schema is None or not complete:
        raise ArtifactError(f"{place}: its .json does not describe an eoracc adapter")
    return dict(values)


def _wrong_backbone(place: str, own: str, backbone: str) -> ArtifactError:
    return ArtifactError(
        f"{place}: is for the backbone {printable(own[:12])}, this one is {backbone[:12]}: make "
        "the adapter anew for this artifact"
    )


def model_version(backbone: str) -> int:
    """The first 31 bits of the backbone's digest, which an ``.onnx_adapter`` holds."""
    return int(backbone[:8], 16) >> 1
