from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import pytest

from eoracc.plugins.library import library_path
from eoracc.runtime.onnxruntime.own_memory import library_in_memory, own_mapped_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/maps")

CONTENT = bytes(range(256)) * 64


def mapped(path: Path) -> mmap.mmap:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(CONTENT)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_what_was_mapped_outlives_its_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a b" / "weights", tmp_path / "a b.old" / "weights"
    with mapped(path) as ours, mapped(other) as theirs:
        own_mapped_files(path.parent)
        assert not is_mapped(path)
        path.write_bytes(b"")
        assert ours[:] == CONTENT
        assert is_mapped(other)
        assert theirs[:] == CONTENT


def test_libraries_in_memory(tmp_path: Path) -> None:
    path, same, other = (tmp_path / f"lib{name}.so" for name in "abc")
    content = library_path().read_bytes()
    path.write_bytes(content)
    same.write_bytes(content)
    other.write_bytes(content + b"\0")
    copy = library_in_memory(path)
    assert library_in_memory(same) == copy
    assert library_in_memory(other) != copy  # by one path, the loader would find the first again
    path.write_bytes(b"")
    assert Path(copy).read_bytes() == content
    assert ctypes.CDLL(copy).eoracc_abi_version() > 0


def test_a_system_without_files_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise OSError(name)

    monkeypatch.setattr("os.memfd_create", refuse)
    path = tmp_path / "lib.so"
    path.write_bytes(b"a library that no other test has")
    assert library_in_memory(path) == str(path)
