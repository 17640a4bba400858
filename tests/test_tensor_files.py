from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from eoracc.documents import Reader
from eoracc.errors import ModelError
from eoracc.tensor_files import TensorEntry, load_arrays, open_arrays, read_tensor_header

if TYPE_CHECKING:
    from pathlib import Path

READER = Reader(ModelError, "fetch it again")
GOOD: dict[str, Any] = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}


def write(path: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_a_header_is_read(path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.ones((), np.int64),
    }
    save_file(arrays, path, metadata={"format": "np"})
    header = read_tensor_header(path, READER)
    assert header.metadata == {"format": "np"}
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == {
        "a": ("F16", (2, 3)),
        "b": ("I64", ()),
    }
    content = path.read_bytes()
    for name, entry in header.tensors.items():
        assert content[entry.begin : entry.end] == arrays[name].tobytes()
    assert {name: array.tolist() for name, array in load_arrays(path, READER).items()} == {
        name: array.tolist() for name, array in arrays.items()
    }


def test_an_empty_file_of_tensors_is_read(path: Path) -> None:
    assert read_tensor_header(write(path, {}, b""), READER).tensors == {}


@pytest.mark.parametrize(
    "member",
    [
        None,
        [],
        {},
        {**GOOD, "dtype": 3},
        {**GOOD, "shape": [2, -1]},
        {**GOOD, "shape": [2, True]},
        {**GOOD, "shape": [1 << 70]},
        {**GOOD, "shape": 2},
        {**GOOD, "shape": [2, 2]},
        {**GOOD, "data_offsets": [8, 0]},
        {**GOOD, "data_offsets": [0]},
        {**GOOD, "data_offsets": [0, 8.0]},
    ],
    ids=str,
)
def test_a_damaged_entry_names_its_tensor(path: Path, member: object) -> None:
    with pytest.raises(ModelError, match=r"tensor w: is not described as safetensors: fetch"):
        read_tensor_header(write(path, {"w": member}), READER)


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        ({"w": GOOD}, bytes(7), "is truncated: its header announces"),
        ({"w": GOOD}, bytes(9), "has 1 bytes that its header does not know"),
        ({"w": GOOD, "v": GOOD}, bytes(8), "has tensors that overlap, or a hole"),
        ({"w": {**GOOD, "data_offsets": [1, 9]}}, bytes(9), "overlap, or a hole"),
        ({"__metadata__": {"a": 1}}, b"", "has metadata that are no texts"),
        ({"__metadata__": "a"}, b"", "has metadata that are no texts"),
        ([], b"", "is a list where a JSON object is expected"),
        (b"{", b"", "header: is not valid JSON"),
        (b"\xff", b"", "header: is not UTF-8 text"),
        (b"[" * 100_000, b"", "header: is nested more than"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_damaged_file_is_refused(path: Path, header: object, data: bytes, problem: str) -> None:
    for read in (read_tensor_header, load_arrays):
        with pytest.raises(ModelError, match=problem):
            read(write(path, header, data), READER)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 60) + b"{}"])
def test_a_cut_header_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is truncated inside its header"):
        read_tensor_header(path, READER)


def test_what_is_missing_in_an_open_file_names_it(path: Path) -> None:
    save_file({"a": np.zeros(1)}, path)
    with (
        pytest.raises(ModelError, match=r"model\.safetensors: does not hold what it should \("),
        open_arrays(path, READER) as file,
    ):
        file.get_tensor("b")


def test_a_type_of_later_versions_is_named_and_not_measured(path: Path) -> None:
    write(path, {"w": {**GOOD, "dtype": "F3"}})
    entry = read_tensor_header(path, READER).tensors["w"]
    assert (entry.dtype, entry.end - entry.begin) == ("F3", 8)
    assert isinstance(entry, TensorEntry)
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load_arrays(path, READER)
