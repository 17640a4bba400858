"""Builds with a budget of bytes of the folder, against the folders that they write."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler import driver
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.targets.planned_folder import PlannedFolder
from eoracc.errors import ArtifactError, ConfigError, PassError
from eoracc.runtime.artifact.manifest import verify_manifest
from tests.tiny_build import tiny_config, tiny_workspace

if TYPE_CHECKING:
    import onnx_ir as ir

    from eoracc.compiler.driver import BuildResult

OUTPUTS: dict[str, Any] = {"calibrate_outputs": {}}
SWEEP: tuple[Any, ...] = (
    "calibrate",
    {"quantize_gptq": {"group_size": 16}},
    {"eora": {"factor_type": "int4"}},
)
QUICK: dict[str, Any] = {"windows": 1, "window_length": 16}


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return {
        tied: tiny_workspace(tmp_path_factory.mktemp("tied"), tie_word_embeddings=tied)
        for tied in (True, False)
    }


def files_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build(workspace: Path, passes: tuple[Any, ...], *, lean: bool = False) -> BuildResult:
    config = tiny_config(passes, verify=QUICK)
    progress = SilentProgress()
    return driver.build(config, config_dir=workspace, progress=progress, force=True, lean=lean)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_takes_what_was_planned_and_no_more_than_its_budget(
    tied: bool, lean: bool, workspaces: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    nbytes = PlannedFolder.nbytes

    def record(self: PlannedFolder, model: ir.Model) -> int:
        planned.append(nbytes(self, model))
        return planned[-1]

    monkeypatch.setattr(PlannedFolder, "nbytes", record)
    allocate = {"size": 10**9, "ranks": [0, 4, 8], "widths": [2, 3, 4]}
    large = build(workspaces[tied], (OUTPUTS, {"allocate": allocate}, *SWEEP), lean=lean)
    most = planned[-1]
    actual = files_bytes(large.output)
    print(
        "PLANNED",
        most,
        "ACTUAL",
        actual,
        large.report.folder_kinds,
        [(p.name, p.stat().st_size) for p in large.output.iterdir()],
    )
