"""Adapters of an artifact: low-rank factors of one task, on top of its frozen backbone.

An adapter named ``math`` is two files of the artifact. ``adapters/math.onnx_adapter`` holds its
factors as the graph takes them, in ONNX Runtime's own format, so that any runtime built on it can
set them. ``adapters/math.json`` says what they are and which backbone they are for:

.. code-block:: json

    {"format": "eoracc adapter", "schema": 1, "name": "math", "backbone": "<digest>",
     "sha256": "<of the .onnx_adapter>", "details": {}}

Nothing is taken from either before it has been compared with the manifest and with one another.
:mod:`eoracc.runtime.adapters.store` writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eoracc.errors import ArtifactError, PluginError
from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlots, pack_adapter, unpack_adapter
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.adapters.onnx_adapter import read_onnx_adapter, write_onnx_adapter
from eoracc.runtime.adapters.weighted_sum import weighted_sum
from eoracc.runtime.artifact.folder_change import reading
from eoracc.runtime.artifact.genai_files import read_decoder
from eoracc.runtime.artifact.manifest import ADAPTERS_FOLDER, Manifest, read_listed, read_manifest
from eoracc.runtime.artifact.model_metadata import read_metadata

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Adapter",
    "adapter_files",
    "adapter_names",
    "adapters_in",
    "check_adapter_name",
    "check_known",
    "combine",
    "decode_adapter",
    "encode_adapter",
    "find_slots",
    "model_version",
    "parse_slots",
    "read_adapter",
    "read_slots",
]

_FORMAT = "eoracc adapter"
_SCHEMA = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = "none"
_FACTORS = ".onnx_adapter"
_DESCRIPTION = ".json"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank factors of one task.

    Attributes:
      name: in the artifact, see :func:`check_adapter_name`.
      factors: by linear, named as in the checkpoint; a linear that is left out has none.
      backbone: digest of the backbone that it is for, :attr:`Manifest.digest`.
      details: what JSON can hold: where it comes from, the text, figures.
    """

    name: str
    factors: Mapping[str, LowRank]
    backbone: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest of a linear."""
        return max((factors.rank for factors in self.factors.values()), default=0)

    @property
    def factor_types(self) -> tuple[str, ...]:
        """What factors are stored in, mostly one type."""
        return tuple(sorted({factors.factor_type for factors in self.factors.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, without what fills up tiles."""
        return sum(factors.nbytes for factors in self.factors.values())


def check_adapter_name(name: str) -> None:
    """See that ``name`` may be an adapter's: it is part of paths, model names and graph feeds.

    Raises:
      ArtifactError: it may not.
    """
    if name == _RESERVED or not _NAME.fullmatch(name):
        raise ArtifactError(
            f"adapter {name!r}: cannot be its name: take up to 64 of a-z, 0-9, '.', '_' and '-', "
            f"the first a letter or digit; '{_RESERVED}' is taken"
        )


def combine(terms: Sequence[tuple[Adapter, float]], name: str) -> Adapter:
    """Several adapters as one, whose factors are their weighted sum.

    Args:
      terms: adapters of one backbone with finite weights. Those of weight 0 add nothing.
      name: of the new one; a name that is no :func:`check_adapter_name` cannot be stored.

    Returns:
      An adapter of the ranks of all terms together, exact but for what
      :func:`eoracc.runtime.adapters.weighted_sum.weighted_sum` says of integer factors.

    Raises:
      ArtifactError: there are no terms, a weight is not finite, or they are of several backbones.
    """
    if not terms:
        raise ArtifactError(f"adapter {name!r}: is a sum of no adapters: give at least one")
    for one, weight in terms:
        if not math.isfinite(weight):
            raise ArtifactError(f"adapter {name!r}: the weight of '{one.name}' is {weight}")
    backbones = {one.backbone for one, _ in terms}
    if len(backbones) > 1:
        raise ArtifactError(
            f"adapter {name!r}: is a sum of adapters of several backbones: "
            f"{', '.join(sorted(digest[:12] for digest in backbones))}"
        )
    by_linear: dict[str, list[tuple[LowRank, float]]] = {}
    for one, weight in terms:
        for linear, own in one.factors.items():
            by_linear.setdefault(linear, []).append((own, weight))
    try:
        factors = {linear: weighted_sum(parts) for linear, parts in by_linear.items()}
    except PluginError as error:
        raise ArtifactError(f"adapter {name!r}: {error}") from error
    details = {"sum_of": [{"adapter": one.name, "weight": weight} for one, weight in terms]}
    return Adapter(name, factors, backbones.pop(), details)


def model_version(backbone: str) -> int:
    """What an ``.onnx_adapter`` carries of the backbone's digest: its first 31 bits."""
    return int(backbone[:8], 16) >> 1


# --- reading an artifact --------------------------------------------------------------------------


def read_slots(folder: Path, manifest: Manifest | None = None) -> AdapterSlots:
    """Where the artifact's model takes adapters.

    Args:
      folder: the artifact.
      manifest: its manifest, where that is at hand.

    Raises:
      ArtifactError: it is damaged, or takes none.
    """
    slots = find_slots(folder, manifest)
    if slots is None:
        raise ArtifactError(
            f"{folder}: takes no adapters: build it again, with onnxruntime.adapter_type int8 or "
            "float16"
        )
    return slots


def find_slots(folder: Path, manifest: Manifest | None = None) -> AdapterSlots | None:
    """Like :func:`read_slots`; None where the artifact takes no adapters."""
    path = read_decoder(folder).model
    name = path.relative_to(folder).as_posix()
    return parse_slots(read_listed(folder, manifest or read_manifest(folder), name), path)


def parse_slots(model: bytes, path: Path) -> AdapterSlots | None:
    """The slots that an ONNX file lists; None where it lists none.

    Args:
      model: content of the file.
      path: what an error names.

    Raises:
      ArtifactError: it is damaged.
    """
    try:
        metadata = read_metadata(model)
        return AdapterSlots.from_json(metadata[SLOTS_KEY]) if SLOTS_KEY in metadata else None
    except (ValueError, PluginError) as error:
        raise ArtifactError(f"{path}: {error}: build the artifact again") from None


def adapter_names(folder: Path) -> list[str]:
    """Names of the artifact's adapters, sorted.

    Raises:
      ArtifactError: ``folder`` is no artifact.
    """
    return adapters_in(read_manifest(folder))


def adapters_in(manifest: Manifest) -> list[str]:
    """Names of the adapters that ``manifest`` lists both files of, sorted."""
    start = f"{ADAPTERS_FOLDER}/"
    names = {
        path.removeprefix(start).removesuffix(_FACTORS)
        for path in manifest.files
        if path.startswith(start) and path.endswith(_FACTORS)
    }
    return sorted(name for name in names if _path(name, _DESCRIPTION) in manifest.files)


def check_known(folder: Path, manifest: Manifest, name: str) -> None:
    """See that the artifact has an adapter ``name``.

    Raises:
      ArtifactError: it has not; the text says which ones it has.
    """
    known = adapters_in(manifest)
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ArtifactError(f"{folder}: has no adapter {name!r}: {has}")


def read_adapter(folder: Path, name: str) -> Adapter:
    """One adapter of an artifact, every byte compared with the manifest.

    Raises:
      ArtifactError: there is no such adapter, it is for another backbone, a byte has changed, or it
        does not fit the model.
    """
    with reading(folder):
        manifest = read_manifest(folder)
        check_known(folder, manifest, name)
        place = folder / _path(name, _FACTORS)
        adapter = decode_adapter(
            read_listed(folder, manifest, _path(name, _DESCRIPTION)),
            read_listed(folder, manifest, _path(name, _FACTORS)),
            read_slots(folder, manifest),
            backbone=manifest.digest,
            place=str(place),
        )
    if adapter.name != name:
        raise ArtifactError(f"{place}: is adapter {adapter.name!r} under another name: remove it")
    return adapter


# --- the two files --------------------------------------------------------------------------------


def adapter_files(name: str) -> tuple[str, str]:
    """Paths of an adapter's files in the artifact: the description and the factors."""
    return _path(name, _DESCRIPTION), _path(name, _FACTORS)


def _path(name: str, suffix: str) -> str:
    return f"{ADAPTERS_FOLDER}/{name}{suffix}"


def encode_adapter(adapter: Adapter, slots: AdapterSlots) -> dict[str, bytes]:
    """The content of an adapter's files by path in the artifact; equal adapters give equal bytes.

    Raises:
      ArtifactError: its name is none, its details are no JSON, or the model does not take it.
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
      description: content of the ``.json``; None where there is only the other file, which is then
        bound to its backbone by the 31 bits that it carries, and has neither name nor details.
      factors: content of the ``.onnx_adapter``.
      slots: of the model that shall take it.
      backbone: digest of that model.
      place: what an error names: the ``.onnx_adapter``.

    Raises:
      ArtifactError: the files are damaged, not for this backbone or do not fit each other.
    """
    name, details = "", {}
    if description is not None:
        content = _description(description, place)
        name, details = content["name"], content["details"]
        if content["backbone"] != backbone:
            raise _foreign(place, content["backbone"], backbone)
        if content["sha256"] != hashlib.sha256(factors).hexdigest():
            raise ArtifactError(
                f"{place}: is not the file that its .json describes: copy or make the adapter again"
            )
    stored = read_onnx_adapter(factors, place)
    if stored.model_version != model_version(backbone):
        raise _foreign(place, f"{2 * stored.model_version:08x}"[:7], backbone)
    try:
        return Adapter(name, unpack_adapter(slots, stored.arrays), backbone, details)
    except PluginError as error:
        raise ArtifactError(f"{place}: {error}") from error


def _description(content: bytes, place: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
        schema = found["schema"] if found["format"] == _FORMAT else None
        strings = [found[key] for key in ("name", "backbone", "sha256")]
        complete = all(isinstance(value, str) for value in strings)
        complete = complete and isinstance(found["details"], dict)
    except (ValueError, KeyError, TypeError):
        schema, complete, found = None, False, {}
    if schema not in (None, _SCHEMA):
        raise ArtifactError(
            f"{place}: its .json has schema {schema}, this eoracc reads {_SCHEMA}: use the eoracc "
            "that made it, or make it again"
        )
    if schema is None or not complete:
        raise ArtifactError(f"{place}: its .json does not describe an eoracc adapter")
    return dict(found)


def _foreign(place: str, own: str, backbone: str) -> ArtifactError:
    return ArtifactError(
        f"{place}: is for the backbone {own[:12]}, this one is {backbone[:12]}: make the adapter "
        "anew for this artifact"
    )
