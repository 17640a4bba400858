from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest

from benchmarks.machine import describe_machine, machine_line
from eoracc.compiler.targets import machine
from eoracc.compiler.targets.machine import build_machine


@pytest.mark.parametrize(
    ("text", "processor"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 9354\nflags\t: avx2\n", "AMD EPYC 9354"),
        ("processor\t: 0\nFeatures\t: asimd\n", platform.processor() or platform.machine()),
    ],
)
def test_the_processor_has_the_name_that_linux_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, processor: str
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(machine, "_CPUINFO", path)
    assert describe_machine()["processor"] == processor
    path.unlink()
    assert describe_machine()["processor"] == (platform.processor() or platform.machine())


def test_the_machine_is_the_one_that_a_manifest_names() -> None:
    found = describe_machine()
    assert json.loads(json.dumps(found)) == found
    assert found["instruction_sets"] == build_machine()["extensions"]
    assert found["cores"] == len(os.sched_getaffinity(0))
    line = machine_line()
    assert found["processor"] in line
    assert all(name in line for name in found["instruction_sets"])
