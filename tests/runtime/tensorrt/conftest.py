"""A machine with a GPU, as far as the runtime can tell: both stand-ins in place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from eoracc.runtime.tensorrt import cuda
from tests.optional import require
from tests.runtime.tensorrt.engine_artifact import Oracle, write_engine_artifact
from tests.runtime.tensorrt.machine import GIB, Machine
from tests.runtime.tensorrt.stand_in import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in of the driver, compiled against the cuda.h that Triton carries."""
    require("triton")
    include = Path(str(import_module("triton").__file__)).parent / "backends" / "nvidia" / "include"
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("libcuda") / "libcuda.so.1"
    source = Path(__file__).with_name("libcuda_stand_in.c")
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, f"-I{include}", source, "-o", library], check=True)
    return library


@pytest.fixture
def machine(libcuda: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A GPU of compute capability 8.6 with a GiB, its driver, and TensorRT for RTX."""
    monkeypatch.setattr(cuda, "_LIBRARIES", (str(libcuda),))
    machine = Machine(ctypes.CDLL(str(libcuda)), monkeypatch)
    machine.install_tensorrt(VERSION)
    machine.set_up(devices=1, capability=(8, 6), memory=GIB)
    yield machine
    machine.set_up(devices=1, capability=(8, 6), memory=GIB)


@pytest.fixture(scope="module", params=["concat", "in_place"])
def artifact(
    request: pytest.FixtureRequest, libcuda: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Engines that take adapters, with either cache."""
    return write_engine_artifact(tmp_path_factory.mktemp("engines"), libcuda, cache=request.param)


@pytest.fixture(scope="module")
def oracle(artifact: Path) -> Oracle:
    """What they must compute."""
    return Oracle(artifact)
