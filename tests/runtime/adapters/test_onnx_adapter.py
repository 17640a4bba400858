from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.adapters.onnx_adapter import OnnxAdapter, read_onnx_adapter, write_onnx_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

TYPES = (np.float32, np.float16, np.uint8, np.int8, np.int32, np.int64)
ORT: Any = onnxruntime


def arrays() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(3)
    shapes = [(), (1,), (7,), (1, 2, 3, 4), (0, 5), (1, 300, 64)]
    return {
        f"model.layers.{index}.{np.dtype(dtype)}": rng.integers(0, 100, shape).astype(dtype)
        for index, shape in enumerate(shapes)
        for dtype in TYPES
    }


def written(values: dict[str, NDArray[Any]]) -> bytes:
    return write_onnx_adapter(values, adapter_version=7, model_version=2**31 - 1)


def assert_same(adapter: OnnxAdapter, values: dict[str, NDArray[Any]]) -> None:
    assert set(adapter.arrays) == set(values)
    for name, array in values.items():
        assert adapter.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(adapter.arrays[name], array, strict=True)


def test_onnxruntime_reads_what_is_written(tmp_path: Path) -> None:
    values = {name: array for name, array in arrays().items() if array.size and array.ndim}
    (tmp_path / "a").write_bytes(written(values))
    read = ORT.AdapterFormat.read_adapter(str(tmp_path / "a"))
    versions = (read.get_format_version(), read.get_adapter_version(), read.get_model_version())
    assert versions == (1, 7, 2**31 - 1)
    found = {name: value.numpy() for name, value in read.get_parameters().items()}
    assert_same(OnnxAdapter(found, 7, 0), values)


def test_what_onnxruntime_writes_is_read(tmp_path: Path) -> None:
    values = {name: array for name, array in arrays().items() if array.size and array.ndim}
    adapter = ORT.AdapterFormat()
    adapter.set_adapter_version(3)
    adapter.set_model_version(5)
    value = ORT.OrtValue.ortvalue_from_numpy
    adapter.set_parameters({name: value(array) for name, array in values.items()})
    adapter.export_adapter(str(tmp_path / "a"))
    read = read_onnx_adapter((tmp_path / "a").read_bytes(), "a")
    assert (read.adapter_version, read.model_version) == (3, 5)
    assert_same(read, values)


def test_it_reads_back_what_it_writes() -> None:
    read = read_onnx_adapter(written(arrays()), "a")
    assert (read.adapter_version, read.model_version) == (7, 2**31 - 1)
    assert_same(read, arrays())
    assert_same(read_onnx_adapter(written({}), "a"), {})


def test_order_does_not_matter() -> None:
    values = arrays()
    assert written(values) == written(dict(reversed(values.items())))
    assert written(values) != written({**values, "model.layers.1.int8": np.zeros(1, np.int8)})


def test_arrays_begin_at_cache_lines() -> None:
    content = written(arrays())
    start = np.frombuffer(content, np.uint8).ctypes.data
    read = read_onnx_adapter(content, "a")
    assert {(array.ctypes.data - start) % 64 for array in read.arrays.values()} == {0}


def test_too_large_for_the_format() -> None:
    huge = np.broadcast_to(np.zeros(1, np.uint8), (2**31,))
    with pytest.raises(ArtifactError, match=r"of 2,147,48\d,\d+ bytes cannot be written: the form"):
        written({"huge": huge})


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 12 + b"TORT", b"\x0c\0\0\0TORT", b"a" * 99])
def test_something_else(content: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"a: is no \.onnx_adapter file, or is damaged"):
        read_onnx_adapter(content, "a")


def test_damage_never_does_more_than_raise_its_error() -> None:
    rng = np.random.default_rng(0)
    whole = written({"one": np.arange(9, dtype=np.uint8), "two": np.ones((2, 2), np.float16)})
    refused = 0
    for _ in range(2000):
        content = bytearray(whole)
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            content[position] = rng.integers(256)
        end = int(rng.integers(1, len(content) + 1)) if rng.random() < 0.3 else len(content)
        try:
            read_onnx_adapter(bytes(content[:end]), "a")
        except ArtifactError:
            refused += 1
    assert 500 < refused < 2000
