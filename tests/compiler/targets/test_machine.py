from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_limits

from eoracc.compiler.targets import machine
from eoracc.compiler.targets.machine import SETTINGS, build_machine


def test_names_what_decides_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with threadpool_limits(1, user_api="blas"):
        found = build_machine()
    assert json.loads(json.dumps(found)) == found
    assert found["settings"] == {"MKL_CBWR": "COMPATIBLE"}
    libraries = {library["name"]: library for library in found["libraries"]}
    assert libraries["torch"]["kernels"] == torch.backends.cpu.get_cpu_capability().lower()
    assert libraries["openblas"]["kernels"]
    assert libraries["openblas"]["threads"] == 1
    with threadpool_limits(2, user_api="blas"):
        assert build_machine() != found


@pytest.mark.parametrize(
    ("text", "extensions"),
    [
        ("processor : 0\nflags\t\t: fpu fma avx2 avx avx512f\n", ["avx", "fma", "avx2", "avx512f"]),
        ("processor : 0\nFeatures : fp asimd i8mm\n\nprocessor : 1\n", ["asimd", "i8mm"]),
        ("processor : 0\n", []),
    ],
)
def test_extensions_of_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, extensions: list[str]
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(machine, "_CPUINFO", path)
    assert build_machine()["extensions"] == extensions
    path.unlink()
    assert build_machine()["extensions"] == []
