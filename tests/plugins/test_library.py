from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import eoracc
from eoracc.errors import PluginError
from eoracc.plugins import library
from eoracc.plugins.library import (
    ABI_VERSION,
    INSTRUCTION_SETS,
    LibraryInfo,
    library_info,
    library_path,
)


def test_installed_library_is_of_this_version() -> None:
    info = library_info(library_path())
    assert info == LibraryInfo(eoracc.__version__, ABI_VERSION, info.instruction_set)
    assert info.instruction_set in INSTRUCTION_SETS


def test_instruction_sets_are_those_of_the_c_interface() -> None:
    """The names in Python and in the C++ tests follow the enum, whose numbers are for good."""
    root = Path(__file__).parents[2]
    header = (root / "plugins/csrc/cpu/matmul_nbits_lowrank.h").read_text(encoding="utf-8")
    numbers = {
        name.lower(): int(number)
        for name, number in re.findall(r"EORACC_ISA_(\w+) = (\d+)", header)
        if name != "BEST"
    }
    assert numbers == INSTRUCTION_SETS
    source = (root / "tests/native/call.h").read_text(encoding="utf-8")
    entries = re.findall(r'{"(\w+)", EORACC_ISA_(\w+)}', source)
    assert [name for name, _ in entries] == list(INSTRUCTION_SETS)
    assert [isa.lower() for _, isa in entries] == list(INSTRUCTION_SETS)


def test_missing_library_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("eoracc.plugins.library.resources.files", lambda _: tmp_path)
    with pytest.raises(PluginError, match=r"libeoracc_ops\.so: .* is missing.*'make setup'"):
        library_path()


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libother.so"
    path.write_bytes(b"no library")
    with pytest.raises(PluginError, match="is not an eoracc op library"):
        library_info(path)


def test_other_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", ABI_VERSION + 1)
    with pytest.raises(PluginError, match="from the same build"):
        library_info(library_path())


def test_library_needs_nothing_but_libc() -> None:
    """An artifact carries a copy to machines where nothing else is installed."""
    listing = subprocess.run(
        ["ldd", str(library_path())], check=True, capture_output=True, text=True
    ).stdout
    needed = {Path(line.split()[0]).name for line in listing.splitlines()}
    assert {name.split(".")[0] for name in needed} <= {"linux-vdso", "libc", "ld-linux-x86-64"} | {
        "libm",
        "ld-linux-aarch64",
    }
