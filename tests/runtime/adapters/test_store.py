from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.files import adapter_names, read_adapter
from eoracc.runtime.adapters.store import add_adapter, remove_adapter
from eoracc.runtime.artifact.manifest import read_manifest, verify_manifest
from tests.slots_artifact import random_factors, write_slots_artifact

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_slots_artifact(tmp_path / "artifact")
    return tmp_path / "artifact"


def make(artifact: Path, name: str = "math", **details: object) -> Adapter:
    return Adapter(name, random_factors("int8"), read_manifest(artifact).digest, details)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_backbone_stays_what_it_was(artifact: Path) -> None:
    before = read_manifest(artifact)
    kept = snapshot(artifact)
    returned = add_adapter(artifact, make(artifact))
    after = verify_manifest(artifact)
    assert after == returned
    assert after.digest == before.digest
    assert (after.source, after.config) == (before.source, before.config)
    new = {"adapters/math.json", "adapters/math.onnx_adapter"}
    assert set(after.files) - set(before.files) == new
    del kept["manifest.json"]
    assert {name: snapshot(artifact)[name] for name in kept} == kept


def test_removing_leaves_no_trace(artifact: Path) -> None:
    before = snapshot(artifact)
    add_adapter(artifact, make(artifact))
    add_adapter(artifact, make(artifact, "code"))
    assert adapter_names(artifact) == ["code", "math"]
    remove_adapter(artifact, "code")
    assert adapter_names(artifact) == ["math"]
    verify_manifest(artifact)
    remove_adapter(artifact, "math")
    assert snapshot(artifact) == before
    assert not (artifact / "adapters").exists()


def test_duplicate_is_refused_or_replaced(artifact: Path) -> None:
    add_adapter(artifact, make(artifact, version=1))
    before = snapshot(artifact)
    with pytest.raises(ArtifactError, match="has an adapter 'math': choose another name, or repl"):
        add_adapter(artifact, make(artifact, version=2))
    assert snapshot(artifact) == before
    add_adapter(artifact, make(artifact, version=2), force=True)
    verify_manifest(artifact)
    assert read_adapter(artifact, "math").details == {"version": 2}


def test_adapter_of_another_backbone_is_refused(artifact: Path, tmp_path: Path) -> None:
    write_slots_artifact(tmp_path / "other", weights=b"others")
    before = snapshot(artifact)
    with pytest.raises(ArtifactError, match=r"adapter 'math': is for the backbone .* artifact"):
        add_adapter(artifact, make(tmp_path / "other"))
    assert snapshot(artifact) == before


def test_removing_what_is_not_there(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="has no adapter 'math': it has none"):
        remove_adapter(artifact, "math")


def report(artifact: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((artifact / "report.json").read_text())
    return content


def score(*names: str) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        table = content["adapters"]["perplexity"]
        for text in names:
            table[text] = dict.fromkeys(("none", *names), 1.0)

    return edit


def test_report_changes_with_the_adapter(artifact: Path) -> None:
    add_adapter(artifact, make(artifact, "math"), edit_report=score("math"))
    add_adapter(artifact, make(artifact, "code"), edit_report=score("math", "code"))
    verify_manifest(artifact)
    assert set(report(artifact)["adapters"]["perplexity"]) == {"math", "code"}
    remove_adapter(artifact, "math")
    verify_manifest(artifact)
    table = {"code": {"none": 1.0, "code": 1.0}}
    assert report(artifact) == {"build": {}, "adapters": {"perplexity": table}}


def test_figures_of_a_replaced_adapter_are_dropped(artifact: Path) -> None:
    add_adapter(artifact, make(artifact), edit_report=score("math"))
    add_adapter(artifact, make(artifact), force=True)
    assert report(artifact)["adapters"]["perplexity"] == {}


def test_error_while_the_report_is_edited_changes_nothing(artifact: Path) -> None:
    before = snapshot(artifact)

    def fail(_: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_adapter(artifact, make(artifact), edit_report=fail)
    assert snapshot(artifact) == before


def test_changed_report_is_not_taken_for_the_artifacts_own(artifact: Path) -> None:
    (artifact / "report.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"report\.json: its content is not what manifest"):
        add_adapter(artifact, make(artifact))


def test_nan_does_not_reach_the_report(artifact: Path) -> None:
    before = snapshot(artifact)
    with pytest.raises(ArtifactError, match=r"report\.json: cannot be written as JSON"):
        add_adapter(
            artifact, make(artifact), edit_report=lambda content: content.update(x=float("nan"))
        )
    assert snapshot(artifact) == before


ADD = """
import sys
from pathlib import Path
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.artifact.manifest import read_manifest, verify_manifest
from tests.slots_artifact import random_factors

folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    adapter = Adapter(name, random_factors("int8", rank=1), read_manifest(folder).digest)
    add_adapter(folder, adapter, edit_report=lambda content: content["build"].update({name: 1}))
    verify_manifest(folder)
"""


def test_processes_at_once_lose_nothing(artifact: Path) -> None:
    names = [[f"{who}.{index}" for index in range(12)] for who in ("a", "b")]
    running = [
        subprocess.Popen([sys.executable, "-c", ADD, str(artifact), *own], cwd=ROOT)
        for own in names
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    verify_manifest(artifact)
    expected = sorted(name for own in names for name in own)
    assert adapter_names(artifact) == expected
    assert sorted(report(artifact)["build"]) == expected


KILLED = """
import os, sys
from pathlib import Path
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.artifact.manifest import read_manifest
from tests.slots_artifact import random_factors

folder, step, count = Path(sys.argv[1]), int(sys.argv[2]), 0

def watch(event, arguments):
    global count
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        if str(arguments[0]).startswith(str(folder)):
            count += 1
            if count == step:
                os._exit(9)

adapter = Adapter("math", random_factors("int8"), read_manifest(folder).digest, {"version": 2})
sys.addaudithook(watch)
add_adapter(folder, adapter, force=True, edit_report=lambda content: content.update(version=2))
"""


@pytest.mark.parametrize("step", [3, 12, 25, 40])
def test_killed_process_leaves_an_artifact_that_verifies(artifact: Path, step: int) -> None:
    add_adapter(
        artifact,
        make(artifact, version=1),
        edit_report=lambda content: content.update(version=1),
    )
    subprocess.run(
        [sys.executable, "-c", KILLED, str(artifact), str(step)], cwd=ROOT, check=False, timeout=60
    )
    verify_manifest(artifact)
    version = read_adapter(artifact, "math").details["version"]
    assert report(artifact)["version"] == version
    add_adapter(artifact, make(artifact, version=3), force=True)
    assert read_adapter(artifact, "math").details == {"version": 3}
    assert not [name for name in artifact.iterdir() if name.name.startswith(".")]
