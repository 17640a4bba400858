"""Builds that resume from damaged work; `benchmarks/damage.py` tries every file and damage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.kept.interval import SaveInterval
from eoracc.compiler.progress import SilentProgress
from tests.damage import DAMAGES
from tests.kept_builds import KEPT_BUILDS

if TYPE_CHECKING:
    from pathlib import Path

DAMAGED = {
    "sweeps": [
        ("sweep/0/output_grams/model.layers.1.mlp.up_proj.safetensors", "other content"),
        ("sweep/1/operands-*", "cut in half"),  # a factorised weight, mapped from there
        ("sweep/2/activations-*", "a folder"),
    ],
    "gradients": [("sweep/0/output_grams/hidden-*", "emptied")],
    "findings": [
        ("sweep/0/allocate.1.json", "another file's content"),
        ("sweep/0/allocate.2.json", "emptied"),
    ],
    "adapters": [
        ("sweep/0/state.json", "unreadable"),
        ("adapters/math/operands-*", "bit in the middle"),
    ],
    "gguf": [("source/model.safetensors", "bit of the last byte")],
    "shared sweep": [("sweeps/*/shared/operands-*", "deleted")],
}
"""Kept files by build, each in a part of its own, with the damage."""


@pytest.mark.parametrize("name", DAMAGED)
def test_a_resumed_build_is_the_same_after_damage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)
    case = KEPT_BUILDS[name]
    workspace = case.prepare(tmp_path)
    files = case.interrupt(workspace)
    work = workspace / files[0].parts[0]
    damaged = []
    for pattern, damage in DAMAGED[name]:
        path = max(work.glob(pattern))
        DAMAGES[damage](path)
        damaged.append(path)
    resumed = case.run(workspace, SilentProgress())
    lines = [record.getMessage() for record in caplog.records if "discarded" in record.message]
    assert [line.split(" ")[0] for line in lines] == [str(path) for path in damaged]
    # Undisturbed, in another folder.
    fresh = case.prepare(tmp_path / "fresh")
    assert resumed == case.run(fresh, SilentProgress())
