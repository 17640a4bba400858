"""Import and export adapters: PEFT folders and single ``.onnx_adapter`` files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.passes.solvers.factor_types import store_factors
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.files import decode_adapter, encode_adapter, read_adapter
from eoracc.runtime.adapters.peft_format import PEFT_WEIGHTS, encode_peft, read_peft
from eoracc.runtime.adapters.peft_modules import (
    ModuleLayout,
    linears_to_modules,
    modules_to_linears,
    read_layout,
)
from eoracc.runtime.adapters.slots import read_slots
from eoracc.runtime.artifact.genai_files import CONFIG_FILE
from eoracc.runtime.artifact.manifest import leads_outside, read_listed, read_manifest
from eoracc.runtime.artifact.staged_folder import staged_folder
from eoracc.runtime.artifact.sync import sync_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from eoracc.passes.solvers.factor_types import FactorType
    from eoracc.plugins.operands.low_rank import LowRank

__all__ = [
    "ORIGIN_FILE",
    "export_onnx",
    "export_peft",
    "import_adapter",
    "import_onnx",
    "import_peft",
    "relative_error",
    "round_factors",
]

ORIGIN_FILE = "eoracc_adapter.json"
"""A file beside PEFT's own with the origin of the adapter."""

_FORMAT = "eoracc adapter origin"
_ORIGIN = Reader(ArtifactError, "remove it")
_READER = Reader(ArtifactError, "copy or make the adapter again")
_MAX_FACTORS = 1 << 31
"""Bytes; offsets in an .onnx_adapter have 32 bits."""


def export_peft(artifact: Path, name: str, folder: Path) -> list[Path]:
    """Write an adapter as a folder that PEFT loads, on the model with the backbone's weights.

    Args:
      artifact: its folder.
      name: of the adapter.
      folder: to be made; an empty one may be there.

    Returns:
      The files.

    Raises:
      ArtifactError: there is no such adapter, it is damaged, or the folder cannot be made or is in
        the artifact.
    """
    adapter = read_adapter(artifact, name)
    files = encode_peft(linears_to_modules(adapter.factors, _layout(artifact)))
    origin = {
        "format": _FORMAT,
        "name": adapter.name,
        "backbone": adapter.backbone,
        "details": dict(adapter.details),
    }
    text = json.dumps(origin, indent=2, ensure_ascii=False) + "\n"
    return _write_folder(artifact, folder, {**files, ORIGIN_FILE: text.encode()})


def export_onnx(artifact: Path, name: str, folder: Path) -> list[Path]:
    """Write an adapter as its ``.onnx_adapter`` and the ``.json`` that describes it.

    Args:
      artifact: its folder.
      name: of the adapter.
      folder: to be made; an empty one may be there.

    Returns:
      The files.

    Raises:
      ArtifactError: there is no such adapter, it is damaged, or the folder cannot be made or is in
        the artifact.
    """
    content = encode_adapter(read_adapter(artifact, name), read_slots(artifact))
    return _write_folder(
        artifact, folder, {Path(path).name: data for path, data in content.items()}
    )


def import_adapter(
    artifact: Path, source: Path, name: str | None, factor_type: FactorType | None = None
) -> Adapter:
    """Read a file or folder as an adapter of the artifact, which does not change.

    Args:
      artifact: its folder.
      source: a folder that PEFT has saved, the safetensors file in it, or an ``.onnx_adapter``.
      name: of the new adapter; None takes that of an exported one.
      factor_type: what to round the factors of PEFT to; None for the type of the artifact's slots.

    Raises:
      ArtifactError: it cannot be read, or is none that this artifact takes.
    """
    if source.is_dir():
        return import_peft(artifact, source, name, factor_type)
    if not source.is_file():
        raise ArtifactError(f"{source}: there is no such file or folder")
    if source.name == PEFT_WEIGHTS:
        return import_peft(artifact, source.parent, name, factor_type)
    if source.suffix != ".onnx_adapter":
        raise ArtifactError(
            f"{source}: is neither a folder of PEFT with {PEFT_WEIGHTS} nor an .onnx_adapter"
        )
    if factor_type is not None:
        raise ArtifactError(f"{source}: holds factors of its type: leave --factor-type out")
    return import_onnx(artifact, source, name)


def import_peft(
    artifact: Path, folder: Path, name: str | None, factor_type: FactorType | None = None
) -> Adapter:
    """Read a LoRA adapter of PEFT as an adapter of the artifact, which does not change.

    Args:
      artifact: its folder.
      folder: what PEFT has saved.
      name: of the new adapter; None takes that of an exported one.
      factor_type: what to round factors to; None for the type of the artifact's slots.

    Raises:
      ArtifactError: it is no plain LoRA, is for another model or backbone, or has no name.
    """
    slots, digest = read_slots(artifact), read_manifest(artifact).digest
    origin = _read_origin(folder / ORIGIN_FILE)
    if origin and origin.get("backbone") != digest:
        raise ArtifactError(
            f"{folder}: was made for the backbone {str(origin.get('backbone'))[:12]}, {artifact} "
            f"is {digest[:12]}: make the adapter anew for this artifact"
        )
    stored_as = factor_type or slots.type
    if stored_as not in slots.factor_types:
        raise ArtifactError(
            f"{artifact}: takes factors of type {' or '.join(slots.factor_types)}, not {stored_as}"
        )
    modules = read_peft(folder)
    floats = modules_to_linears(
        modules, slots.linears, _layout(artifact), place=str(folder / PEFT_WEIGHTS)
    )
    factors = {linear: round_factors(low_rank, stored_as) for linear, low_rank in floats.items()}  # type: ignore[arg-type]
    errors = {
        linear: relative_error(low_rank, factors[linear]) for linear, low_rank in floats.items()
    }
    worst = max(errors, key=errors.__getitem__, default=None)
    details: dict[str, Any] = {
        "from": f"PEFT, {folder.name}",
        **({"origin": origin} if origin else {}),
        "rounding": {
            "largest": 0.0 if worst is None else errors[worst],
            "linear": worst,
            "mean": float(np.mean(list(errors.values()))) if errors else 0.0,
        },
    }
    chosen = name or origin.get("name")
    if not chosen:
        raise ArtifactError(f"{folder}: does not say the adapter's name: give one with --name")
    return Adapter(str(chosen), factors, digest, details)


def import_onnx(artifact: Path, path: Path, name: str | None) -> Adapter:
    """Read a single ``.onnx_adapter`` as an adapter of the artifact, which does not change.

    Args:
      artifact: its folder.
      path: the file; a ``.json`` beside it that describes it is read too.
      name: of the new adapter; None takes that which the ``.json`` says.

    Raises:
      ArtifactError: it is damaged, for another backbone, or has no name.
    """
    description = path.with_suffix(".json")
    factors = _READER.read_bytes(path, limit=_MAX_FACTORS)
    described = _READER.read_bytes(description) if description.is_file() else None
    adapter = decode_adapter(
        described,
        factors,
        read_slots(artifact),
        backbone=read_manifest(artifact).digest,
        place=str(path),
    )
    if not (name or adapter.name):
        raise ArtifactError(f"{path}: does not say the adapter's name: give one with --name")
    return replace(adapter, name=name or adapter.name)


# --- rounding -------------------------------------------------------------------------------------


def round_factors(factors: LowRank, factor_type: FactorType) -> LowRank:
    """Convert factors to the type that they are stored in.

    Trained factors may grow against each other along directions that cancel in their product, and
    codes would be spent on what cancels. So integer ones are rounded as the product's singular
    vectors, which are orthogonal.

    Args:
      factors: float ones.
      factor_type: of the result. Integer ones are of the rank of the product.
    """
    b, a = factors.up().astype(np.float64), factors.down().astype(np.float64)
    if factor_type == "float16" or factors.rank == 0:
        return store_factors(b, a, factor_type)
    b, a = _orthogonal(b, a)
    return store_factors(b, a, factor_type)


def _orthogonal(
    b: NDArray[np.float64], a: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``b'`` and ``a'`` of the same product ``U S V.T``: ``U sqrt(S)`` and ``sqrt(S) V.T``."""
    left, upper = np.linalg.qr(b)
    right, lower = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(upper @ lower.T)
    # Directions that nothing is left of but the rounding of this very product.
    rank = int((s > len(s) * np.finfo(np.float64).eps * s.max(initial=0)).sum())
    root = np.sqrt(s[:rank])
    return left @ u[:, :rank] * root, (root[:, None] * vt[:rank]) @ right.T


def relative_error(exact: LowRank, stored: LowRank) -> float:
    """``||B A - B' A'|| / ||B A||`` in Frobenius norm, 0 if the latter norm is 0.

    Neither product is computed.
    """
    b, a = exact.up().astype(np.float64), exact.down().astype(np.float64)
    # Orthogonal factors on either side leave small matrices of the same norm.
    _, left = np.linalg.qr(np.hstack([b, stored.up()]))
    _, right = np.linalg.qr(np.hstack([a.T, stored.down().T]))
    rank = exact.rank
    whole = left[:, :rank] @ right[:, :rank].T
    size = float(np.linalg.norm(whole))
    if size == 0:
        return 0.0
    return float(np.linalg.norm(whole - left[:, rank:] @ right[:, rank:].T)) / size


# --- files ----------------------------------------------------------------------------------------


def _read_origin(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    origin = _ORIGIN.read_object(path)
    if origin.get("format") != _FORMAT or not isinstance(origin.get("details"), dict):
        _ORIGIN.refuse(path, "does not say where the adapter comes from")
    return origin


def _write_folder(artifact: Path, folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Create ``folder``, which is outside ``artifact``, with ``files`` in it, atomically."""
    target = folder.absolute()
    if not leads_outside(target, artifact):
        raise ArtifactError(
            f"{folder}: lies in the artifact, which may hold nothing else: choose another --to"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(target) as staged:
            for name, content in files.items():
                (staged / name).write_bytes(content)
                sync_path(staged / name)
            sync_path(staged)
            # Not by an exchange: an empty folder may be there, and nothing else.
            staged.rename(target)
    except OSError as error:
        raise ArtifactError(
            f"{folder}: cannot be made: {error.strerror}: choose another --to"
        ) from error
    return [folder / name for name in files]


def _layout(artifact: Path) -> ModuleLayout:
    manifest = read_manifest(artifact)
    read_listed(artifact, manifest, CONFIG_FILE)  # which it reads once more
    model_type = manifest.source.get("model_type", "")
    return read_layout(artifact, model_type)
