"""Calls into the driver, through ctypes, into a library with the driver's own prototypes."""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.errors import BackendError
from eoracc.runtime.tensorrt.cuda import ALIGNMENT, Device, Driver, open_device

if TYPE_CHECKING:
    from pathlib import Path

    from tests.runtime.tensorrt.machine import Machine


@pytest.fixture
def device(machine: Machine) -> Device:
    machine.set_up(capability=(12, 0))
    return open_device()


def test_device_says_what_it_is(device: Device) -> None:
    assert (device.name, device.compute_capability) == ("Stand-in GPU", "12.0")
    assert device.stream
    assert device.taken_bytes() == 0


def test_arrays_go_there_and_back(device: Device) -> None:
    array = np.arange(1000, dtype=np.int64)
    memory = device.allocate(array.nbytes)
    assert memory.address % ALIGNMENT == 0
    device.upload(array, memory.address)
    array[:] = 0  # what was uploaded stays
    back = np.zeros(990, np.int64)
    device.download(memory.address + 80, back)
    assert not back.any(), "it is there once the stream is done"
    device.synchronize()
    np.testing.assert_array_equal(back, np.arange(10, 1000))
    device.clear(memory.address + 80, 16)
    device.download(memory.address + 80, back)
    device.synchronize()
    assert back[:3].tolist() == [0, 0, 12]
    assert device.taken_bytes() == memory.nbytes
    for nothing in (np.zeros(0), np.zeros((3, 0), np.float16)):
        device.upload(nothing, memory.address)
        device.download(memory.address, nothing)


def test_pieces_of_any_steps(device: Device) -> None:
    source = np.arange(60, dtype=np.uint8).reshape(6, 10)
    old, new = device.allocate(60), device.allocate(6 * 17)
    device.upload(source, old.address)
    device.clear(new.address, new.nbytes)
    device.copy_pieces(old.address + 3, 10, new.address + 5, 17, nbytes=7, n=6)
    device.copy_pieces(old.address, 10, new.address, 17, nbytes=0, n=6)
    found = np.empty((6, 17), np.uint8)
    device.download(new.address, found)
    device.synchronize()
    expected = np.zeros_like(found)
    expected[:, 5:12] = source[:, 3:]
    np.testing.assert_array_equal(found, expected)


def test_memory_is_freed_with_its_last_reference(device: Device, machine: Machine) -> None:
    before = machine.used()
    memory = device.allocate(12345)
    assert machine.used() - before == 12345
    del memory
    assert machine.used() == before


def test_any_thread_may_call(device: Device) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            memory = device.allocate(24)
            device.upload(np.ones(3), memory.address)
            device.synchronize()
        except BackendError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_errors_are_one_sentence_of_the_driver(device: Device, machine: Machine) -> None:
    machine.set_up(memory=machine.used() + 100)
    with pytest.raises(
        BackendError, match=r"^there is no memory left on the GPU \(out of memory\)$"
    ):
        device.allocate(101)
    with pytest.raises(BackendError, match=r"^CUDA fails in cuMemcpyHtoDAsync: an illegal memory"):
        device.upload(np.ones(3), 4096)


def test_no_driver_no_gpu_and_a_driver_that_is_too_old(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.set_up(devices=0)
    with pytest.raises(
        BackendError, match=r"^there is no GPU 0: the NVIDIA driver shows 0 to this"
    ):
        open_device()
    with pytest.raises(
        BackendError, match=r"^the NVIDIA driver of this machine lacks cuInit: update"
    ):
        Driver(ctypes.CDLL(None))
    name = "libcuda-that-is-not.so"
    monkeypatch.setattr("eoracc.runtime.tensorrt.cuda._LIBRARIES", (name,))
    with pytest.raises(BackendError, match=f"^no NVIDIA driver is found on this machine: .*{name}"):
        open_device()


@pytest.mark.skipif(sys.platform != "linux", reason="names of libraries differ")
def test_every_function_is_in_the_real_interface(libcuda: Path) -> None:
    """The stand-in compiles against cuda.h, which declares all functions that it defines."""
    from eoracc.runtime.tensorrt.cuda import _FUNCTIONS

    library = ctypes.CDLL(str(libcuda))
    assert all(hasattr(library, name) for name in _FUNCTIONS)
