from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from eoracc.compiler.cli import main
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.files import adapter_names
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import verify_manifest
from tests.slots_artifact import random_factors, write_slots_artifact

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


DETAILS = {"from": "eora", "perplexity": {"none": 9.5, "math": 7.25}}


def eoracc(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["adapter", *map(str, arguments)])


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """With an adapter ``math``."""
    digest = write_slots_artifact(tmp_path / "artifact").digest
    factors = random_factors("int8", rank=5)
    add_adapter(tmp_path / "artifact", Adapter("math", factors, digest, DETAILS))
    return tmp_path / "artifact"


def test_list(artifact: Path) -> None:
    done = eoracc("list", artifact)
    assert done.exit_code == 0
    (row,) = [line for line in done.stdout.splitlines() if line.strip().startswith("math")]
    kilobytes = sum(one.nbytes for one in random_factors("int8", rank=5).values()) / 1e3
    described = ["math", "5", "int8", "6", f"{kilobytes:.1f}", "kB", "9.50", "to", "7.25", "eora"]
    assert row.split() == described
    (content,) = json.loads(eoracc("list", artifact, "--json").stdout)
    assert (content["name"], content["rank"], content["linears"]) == ("math", 5, 6)
    assert content["details"] == DETAILS


@pytest.mark.parametrize("perplexity", [None, 3, [9.5], {"none": "9.5", "math": 7.25}, {"none": 1}])
def test_details_of_another_form_are_listed(tmp_path: Path, perplexity: object) -> None:
    digest = write_slots_artifact(tmp_path / "artifact").digest
    details = {"perplexity": perplexity}
    factors = random_factors("int8", rank=5)
    add_adapter(tmp_path / "artifact", Adapter("math", factors, digest, details))
    done = eoracc("list", tmp_path / "artifact")
    assert (done.exit_code, done.stderr) == (0, "")
    assert " to " not in done.stdout


def test_list_of_none(tmp_path: Path) -> None:
    write_slots_artifact(tmp_path / "bare")
    assert eoracc("list", tmp_path / "bare").stdout == f"{tmp_path / 'bare'} has no adapters\n"
    assert json.loads(eoracc("list", tmp_path / "bare", "--json").stdout) == []


def test_export_remove_and_import(artifact: Path, tmp_path: Path) -> None:
    done = eoracc("export", artifact, "math", "--to", tmp_path / "onnx", "--format", "onnx")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        f"wrote {tmp_path / 'onnx' / name}" for name in ("math.json", "math.onnx_adapter")
    ]
    done = eoracc("export", artifact, "math", "--to", tmp_path / "peft", "--json")
    assert len(json.loads(done.stdout)["files"]) == 3
    assert eoracc("remove", artifact, "math").stdout == "removed math; none is left\n"
    assert adapter_names(artifact) == []
    done = eoracc("import", artifact, tmp_path / "onnx" / "math.onnx_adapter")
    assert done.stdout == "imported math: rank 5, 6 linears, int8 factors\n"
    done = eoracc("import", artifact, tmp_path / "peft", "--name", "other", "--factor-type", "int4")
    assert done.stdout.splitlines()[0] == "imported other: rank 5, 6 linears, int4 factors"
    assert done.stdout.splitlines()[1].startswith("rounding changed the product of a linear's ")
    assert adapter_names(artifact) == ["math", "other"]
    verify_manifest(artifact)
    done = eoracc("remove", artifact, "other", "--json")
    assert json.loads(done.stdout) == {"removed": "other", "adapters": ["math"]}


def test_mistakes_are_one_sentence(artifact: Path, tmp_path: Path) -> None:
    exported = tmp_path / "math.onnx_adapter"
    exported.write_bytes((artifact / "adapters" / "math.onnx_adapter").read_bytes())
    for arguments, problem in (
        (("remove", artifact, "code"), "has no adapter 'code': it has math"),
        (("export", artifact, "code", "--to", tmp_path / "x"), "has no adapter 'code'"),
        (("import", artifact, exported), "does not say the adapter's name"),
        (("import", artifact, exported, "--name", "math"), "has an adapter 'math'"),
        (("import", artifact, exported, "--name", "../x"), "is no valid name"),
        (("import", artifact, exported, "--factor-type", "int4"), "leave --factor-type out"),
        (("list", tmp_path), "has no manifest.json"),
    ):
        done = eoracc(*arguments)
        assert done.exit_code == 2
        assert problem in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = eoracc("import", artifact, exported, "--name", "math", "--force")
    assert done.exit_code == 0
