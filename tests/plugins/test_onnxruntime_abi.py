"""The declared slice of ONNX Runtime's C interface against the runtime that is installed.

The slots are read from c_api.h, so that what is tested is what the library was compiled with.
Slots that only a running kernel can use (attributes, inputs, outputs, ParallelFor) are exercised
by test_onnxruntime_op.py; a wrong one could not give right products.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from eoracc.plugins.library import library_path

HEADER = Path(__file__).parents[2] / "plugins/csrc/onnxruntime/c_api.h"

# Not used by the library, but needed to make what its slots are tried on.
GET_ERROR_CODE, GET_ERROR_MESSAGE = 1, 2
CREATE_SESSION_OPTIONS = 10
CREATE_TENSOR_WITH_DATA = 49
CREATE_CPU_MEMORY_INFO = 69
RELEASE_MEMORY_INFO, RELEASE_VALUE = 94, 96
RELEASE_SESSION_OPTIONS, RELEASE_CUSTOM_OP_DOMAIN = 100, 101

INVALID_ARGUMENT = 2
FLOAT16 = 10

Pointer = ctypes.c_void_p


class ApiBase(ctypes.Structure):
    _fields_ = [
        ("get_api", ctypes.CFUNCTYPE(Pointer, ctypes.c_uint32)),
        ("get_version_string", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    ]


class Api:
    """OrtApi by slot."""

    def __init__(self, table: int) -> None:
        self._table = table

    def call(
        self, slot: int, *arguments: object, types: Sequence[type], result: type | None = Pointer
    ) -> object:
        address = Pointer.from_address(self._table + slot * ctypes.sizeof(Pointer)).value
        assert address
        return ctypes.CFUNCTYPE(result, *types)(address)(*arguments)


def constant(name: str) -> int:
    match = re.search(rf"\b{name} = (\d+)", HEADER.read_text())
    assert match, f"{HEADER} declares no {name}"
    return int(match[1])


@pytest.fixture(scope="module")
def base() -> ApiBase:
    (library,) = Path(ort.__file__).parent.glob("capi/libonnxruntime.so.*")
    get_base = ctypes.CDLL(str(library)).OrtGetApiBase
    get_base.restype = ctypes.POINTER(ApiBase)
    found: ApiBase = get_base().contents
    return found


@pytest.fixture(scope="module")
def api(base: ApiBase) -> Api:
    table = base.get_api(constant("kApiVersion"))
    assert table
    return Api(table)


@pytest.fixture
def tensor(api: Api) -> Iterator[tuple[Pointer, np.ndarray]]:
    data = np.arange(6, dtype=np.float16).reshape(2, 3)
    info, value = Pointer(), Pointer()
    arena, default = 1, 0
    assert not api.call(
        CREATE_CPU_MEMORY_INFO,
        arena,
        default,
        ctypes.byref(info),
        types=[ctypes.c_int, ctypes.c_int, Pointer],
    )
    shape = (ctypes.c_int64 * 2)(*data.shape)
    assert not api.call(
        CREATE_TENSOR_WITH_DATA,
        info,
        data.ctypes.data,
        data.nbytes,
        shape,
        2,
        FLOAT16,
        ctypes.byref(value),
        types=[
            Pointer,
            Pointer,
            ctypes.c_size_t,
            Pointer,
            ctypes.c_size_t,
            ctypes.c_int,
            Pointer,
        ],
    )
    yield value, data
    api.call(RELEASE_VALUE, value, types=[Pointer], result=None)
    api.call(RELEASE_MEMORY_INFO, info, types=[Pointer], result=None)


def test_base(base: ApiBase) -> None:
    assert base.get_version_string().decode() == ort.__version__


def test_status(api: Api) -> None:
    status = api.call(
        constant("kCreateStatus"), INVALID_ARGUMENT, b"why", types=[ctypes.c_int, ctypes.c_char_p]
    )
    assert constant("kInvalidArgument") == INVALID_ARGUMENT
    code = api.call(GET_ERROR_CODE, status, types=[Pointer], result=ctypes.c_int)
    assert code == INVALID_ARGUMENT
    message = api.call(GET_ERROR_MESSAGE, status, types=[Pointer], result=ctypes.c_char_p)
    assert message == b"why"
    api.call(constant("kReleaseStatus"), status, types=[Pointer], result=None)


def test_tensor(api: Api, tensor: tuple[Pointer, np.ndarray]) -> None:
    value, array = tensor
    info, data = Pointer(), Pointer()
    kind, rank, shape = ctypes.c_int(), ctypes.c_size_t(), (ctypes.c_int64 * 2)()
    two = [Pointer, Pointer]
    assert not api.call(constant("kGetTensorTypeAndShape"), value, ctypes.byref(info), types=two)
    assert not api.call(constant("kGetTensorElementType"), info, ctypes.byref(kind), types=two)
    assert not api.call(constant("kGetDimensionsCount"), info, ctypes.byref(rank), types=two)
    assert not api.call(
        constant("kGetDimensions"), info, shape, 2, types=[Pointer, Pointer, ctypes.c_size_t]
    )
    api.call(constant("kReleaseTensorTypeAndShapeInfo"), info, types=[Pointer], result=None)
    assert not api.call(constant("kGetTensorMutableData"), value, ctypes.byref(data), types=two)
    assert kind.value == FLOAT16 == constant("kFloat16")
    assert (rank.value, tuple(shape)) == (2, array.shape)
    assert data.value == array.ctypes.data


def test_registration(api: Api, base: ApiBase) -> None:
    """RegisterCustomOps goes through the four slots that make a domain known."""
    options, domain = Pointer(), Pointer()
    assert not api.call(
        constant("kCreateCustomOpDomain"),
        b"tried",
        ctypes.byref(domain),
        types=[ctypes.c_char_p, Pointer],
    )
    assert domain.value
    api.call(RELEASE_CUSTOM_OP_DOMAIN, domain, types=[Pointer], result=None)
    assert not api.call(CREATE_SESSION_OPTIONS, ctypes.byref(options), types=[Pointer])
    register = ctypes.CDLL(str(library_path())).RegisterCustomOps
    register.restype = Pointer
    assert register(options, ctypes.byref(base)) is None
    api.call(RELEASE_SESSION_OPTIONS, options, types=[Pointer], result=None)


def test_old_runtime_is_told_to_upgrade(api: Api, base: ApiBase) -> None:
    first = base.get_api(1)
    get_api = type(base.get_api)
    old = ApiBase(get_api(lambda version: first if version == 1 else None), base.get_version_string)
    register = ctypes.CDLL(str(library_path())).RegisterCustomOps
    register.restype = Pointer
    status = register(None, ctypes.byref(old))
    message = api.call(GET_ERROR_MESSAGE, status, types=[Pointer], result=ctypes.c_char_p)
    assert isinstance(message, bytes)
    assert b"needs ONNX Runtime 1.17 or newer: upgrade onnxruntime" in message
    api.call(constant("kReleaseStatus"), status, types=[Pointer], result=None)
