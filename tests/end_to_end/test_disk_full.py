from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from eoracc.errors import ArtifactError
from tests.kills import SCENARIOS, Scenario

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAGE = os.sysconf("SC_PAGE_SIZE")
_ROOMY = "64m"

QUICK = [
    "write",
    "replace",
    "replace-by-renames",
    "adapter-add",
    "adapter-remove",
    "adapter-import",
    "adapter-export",
]
"""Changes in milliseconds."""

_FULL = re.compile("the disk is full|are left on the disk|No space left on device")
_LARGE = re.compile("a file would be larger than|File too large")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, whose size can be changed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root may mount a small disk")
    options = f"size={_ROOMY}"
    done = subprocess.run([mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=False)
    if done.returncode:
        pytest.skip("a disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def used_bytes(disk: Path) -> int:
    return shutil.disk_usage(disk).used


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes; what anybody may do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fails(scenario: Scenario, folder: Path, problem: re.Pattern[str]) -> bool:
    """Whether the change fails; then in one sentence, and nothing has changed."""
    before, beside = scenario.content(folder), names(folder)
    try:
        scenario.change(folder)
    except ArtifactError as error:
        sentence = str(error)
    else:
        return False
    assert problem.search(sentence)
    assert "\n" not in sentence
    assert scenario.content(folder) == before
    # Finished work is kept: the same command goes on from there.
    assert {name for name in names(folder) if not name.endswith(".work")} <= {*beside}
    return True


@pytest.mark.parametrize("name", QUICK)
def test_each_page_that_is_missing(disk: Path, tmp_path: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    scenario.prepare(disk)
    expected = tmp_path / "expected"
    shutil.copytree(disk, expected)
    scenario.change(expected)
    room, failures = _PAGE, 0
    while True:
        resize(disk, str(used_bytes(disk) + room))
        if not fails(scenario, disk, _FULL):
            break
        failures += 1
        room += _PAGE
    assert failures >= 1
    assert scenario.content(disk) == scenario.content(expected)
    assert names(disk) == names(expected)


@pytest.mark.parametrize("name", QUICK)
def test_each_size_that_no_file_may_have(tmp_path: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    scenario.prepare(tmp_path)
    sizes = [0, 1, 100, 500, 1000, 1500, 2000]
    failures = 0
    for size in sizes:
        with largest_file(size):
            failed = fails(scenario, tmp_path, _LARGE)
        failures += failed
        if not failed:
            break
    assert failures >= 2


def test_build_on_a_small_disk(disk: Path) -> None:
    """The artifact's folder cannot be made, or kept work cannot be written."""
    scenario = SCENARIOS["build"]
    scenario.prepare(disk)
    before = used_bytes(disk)
    for room in (2 * _PAGE, 400 * 1024):
        resize(disk, str(before + room))
        assert fails(scenario, disk, _FULL), room
    resize(disk, _ROOMY)
    scenario.change(disk)
    assert scenario.content(disk) is not None
    assert names(disk) == ["model", "out", "text.txt"]


def test_adapter_on_a_small_disk(disk: Path) -> None:
    scenario = SCENARIOS["adapter-solve"]
    scenario.prepare(disk)
    before = used_bytes(disk)
    for room in (2 * _PAGE, 40 * 1024):
        resize(disk, str(before + room))
        assert fails(scenario, disk, _FULL), room
    resize(disk, _ROOMY)
    scenario.change(disk)
    assert names(disk) == ["model", "out", "text.txt"]


def test_artifact_on_a_read_only_disk(disk: Path) -> None:
    """A reader needs no lock file; a writer says in one sentence why it cannot."""
    SCENARIOS["replace"].prepare(disk)
    before = SCENARIOS["replace"].content(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert SCENARIOS["replace"].content(disk) == before
    for name, problem in (
        ("replace", "cannot be written to: choose another 'output'"),
        ("adapter-add", "cannot be changed: Read-only file system"),
        ("adapter-remove", "cannot be changed: Read-only file system"),
    ):
        assert fails(SCENARIOS[name], disk, re.compile(problem)), name
