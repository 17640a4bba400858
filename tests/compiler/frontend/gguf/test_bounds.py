from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.frontend.gguf.bounds import check_bounds
from eoracc.documents import Reader
from eoracc.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

READER = Reader(ModelError, "fetch it again")
UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9
HUGE = 1 << 40


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def key(kind: int, value: bytes) -> bytes:
    return text(b"k") + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return key(ARRAY, struct.pack("<IQ", kind, count) + items)


def tensor(dimensions: int, sizes: bytes) -> bytes:
    return text(b"t") + struct.pack("<I", dimensions) + sizes + struct.pack("<IQ", 0, 0)


def check(path: Path, *, keys: int, tensors: int = 0, content: bytes = b"") -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + content)
    check_bounds(path, READER)


def test_a_whole_header_passes(tmp_path: Path) -> None:
    content = (
        key(UINT32, bytes(4))
        + key(STRING, text(b"llama"))
        + array(UINT8, 3, bytes(3))
        + array(STRING, 2, text(b"a") + text(b""))
        + tensor(2, bytes(16))
    )
    check(tmp_path / "m.gguf", keys=4, tensors=1, content=content)


@pytest.mark.parametrize(
    ("keys", "tensors", "content"),
    [
        (HUGE, 0, b""),
        (0, HUGE, b""),
        (1, 0, array(UINT8, HUGE)),
        (1, 0, array(UINT32, 2, bytes(7))),
        (1, 0, array(STRING, HUGE, bytes(100))),
        (1, 0, key(STRING, struct.pack("<Q", HUGE))),
        (1, 0, struct.pack("<Q", HUGE) + bytes(20)),
        (1, 0, key(UINT32, bytes(3))),
        (0, 1, tensor(4, bytes(16))[:-12]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, keys: int, tensors: int, content: bytes
) -> None:
    with pytest.raises(ModelError, match="it announces more than it holds"):
        check(tmp_path / "m.gguf", keys=keys, tensors=tensors, content=content)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (key(99, bytes(8)), "has a value of the unknown type 99"),
        (array(ARRAY, 1, bytes(40)), "has an array of something that is no value"),
    ],
)
def test_unknown_types_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        check(tmp_path / "m.gguf", keys=1, content=content)


def test_a_tensor_of_many_dimensions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has a tensor of 9 dimensions"):
        check(tmp_path / "m.gguf", keys=0, tensors=1, content=tensor(9, bytes(72)))
