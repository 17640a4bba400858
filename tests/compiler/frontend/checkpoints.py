"""Checkpoints on disk that tests of the frontend change."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import load_file, save_file

from eoracc.compiler.frontend.load import load
from eoracc.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["edit_config", "edit_tensors", "lay_out_hub_cache", "refused"]


def edit_config(folder: Path, *, without: tuple[str, ...] = (), **fields: object) -> None:
    """Set ``fields`` in config.json, and remove those called ``without``."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: content[name] for name in content if name not in without}))


def edit_tensors(
    folder: Path, change: Callable[[dict[str, NDArray[Any]]], object], file: str = "model"
) -> None:
    """Let ``change`` work on the tensors of ``file``.safetensors."""
    path = folder / f"{file}.safetensors"
    tensors = load_file(path) if path.exists() else {}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def lay_out_hub_cache(
    checkpoint: Path,
    cache: Path,
    repository: str,
    *,
    revision: str = "main",
    commit: str = "0" * 40,
) -> Path:
    """Move ``checkpoint`` into a cache of the hub, as huggingface_hub lays it out.

    Content is stored once, under its digest; a snapshot is a folder of links to it.

    Returns:
      The snapshot's folder.
    """
    storage = cache / f"models--{repository.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit
    for folder in (snapshot, storage / "blobs", storage / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (storage / "refs" / revision).write_text(commit)
    for path in checkpoint.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(storage / "blobs" / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def refused(source: Path | str, work: Path, match: str) -> None:
    """Check that loading ``source`` is refused in one line that ``match`` is found in."""
    with pytest.raises(ModelError, match=match) as caught:
        load(str(source), work=work)
    assert "\n" not in str(caught.value)
