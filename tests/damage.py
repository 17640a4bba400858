"""Ways in which a kept file is damaged by a power loss, a failing disk, or a hand."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["DAMAGES"]


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip_at(fraction: float) -> Callable[[Path], None]:
    """Flip one bit of the byte at a fraction of the file's length."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(fraction * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)

    return flip


def _replace(path: Path) -> None:
    """Other content of the same size; a header of safetensors stays valid."""
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 0
    random = np.random.default_rng(0).integers(32, 127, len(content) - header, np.uint8)
    path.write_bytes(content[:header] + random.tobytes())


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


def _make_unreadable(path: Path) -> None:
    """A link to itself, which not even root can open."""
    path.unlink()
    path.symlink_to(path)


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _replace_by_sibling(path: Path) -> None:
    """The sound content of another file of that kind, or of an earlier version of eoracc."""
    others = sorted(path.parent.glob(f"*{path.suffix}"))
    other = next((file for file in others if file != path), None)
    if other is None:
        path.write_text('{"key": "key", "operands": [], "found": {}}')
    else:
        shutil.copyfile(other, path)


DAMAGES: Mapping[str, Callable[[Path], None]] = {
    "emptied": lambda path: os.truncate(path, 0),
    "cut in half": _halve,
    "bit 4 of the first byte": _flip_at(0),
    "bit in the header": _flip_at(0.03),
    "bit in the middle": _flip_at(0.5),
    "bit of the last byte": _flip_at(1),
    "other content": _replace,
    "another file's content": _replace_by_sibling,
    "deleted": lambda path: path.unlink(),
    "a folder": _replace_by_folder,
    "unreadable": _make_unreadable,
    "a pipe": _replace_by_pipe,
}
