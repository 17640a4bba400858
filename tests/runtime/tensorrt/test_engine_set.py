from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.tensorrt.engine_set import (
    ENGINES_FILE,
    Binding,
    EngineFile,
    EngineSet,
    Profile,
    read_engine_set,
)

if TYPE_CHECKING:
    from pathlib import Path

ENGINES = EngineSet(
    package="tensorrt_rtx",
    version="1.7.1.116",
    graph="model.onnx",
    dtype="bfloat16",
    context_length=64,
    cache_layout="in_place",
    cache_layers=2,
    adapter_type="bfloat16",
    max_rank=8,
    profiles=(Profile("decode", {"batch": (1, 2, 4), "rank": (0, 4, 8)}),),
    bindings=(
        Binding("input_ids", "input", "int64", ("batch", "sequence")),
        Binding("logits", "output", "float32", ("batch", 1, 260)),
    ),
    engines=(EngineFile("8.6", "sm86.engine", "ab" * 32, 7),),
)


def write(folder: Path, **changes: Any) -> Path:  # noqa: ANN401 - of any part
    content = json.loads(ENGINES.to_json()) | changes
    (folder / ENGINES_FILE).write_text(json.dumps(content))
    return folder


def test_reads_what_it_writes(tmp_path: Path) -> None:
    (tmp_path / ENGINES_FILE).write_text(ENGINES.to_json())
    assert read_engine_set(tmp_path) == ENGINES
    empty = replace(ENGINES, engines=())
    (tmp_path / ENGINES_FILE).write_text(empty.to_json())
    assert read_engine_set(tmp_path) == empty


def test_a_line_for_each_binding() -> None:
    lines = ENGINES.to_json().splitlines()
    assert sum('"name": "logits"' in line for line in lines) == 1
    assert max(map(len, lines)) < 160


def test_shapes_and_profiles_by_name() -> None:
    binding = ENGINES.binding("input_ids")
    assert binding.resolve({"batch": 3, "sequence": 5, "past": 1}) == (3, 5)
    with pytest.raises(KeyError):
        ENGINES.binding("absent")
    (profile,) = ENGINES.profiles
    assert profile.takes({"batch": 4, "rank": 0})
    assert not profile.takes({"batch": 5, "rank": 0})
    assert not profile.takes({"batch": 1, "rank": 9})
    assert ENGINES.compute_capabilities == ("8.6",)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "other"}, "does not describe the engines"),
        ({"schema": 2}, "has schema 2, this eoracc reads 1"),
        ({"profiles": None}, "lacks a part"),
        ({"dtype": "float8"}, "lacks a part"),
        ({"cache": {"layout": "paged", "layers": 2}}, "lacks a part"),
        ({"profiles": [{"name": "p", "dims": {"batch": [2, 1, 4]}}]}, "lacks a part"),
        ({"graph": "../model.onnx"}, "names '../model.onnx', which is not beside it"),
        (
            {"engines": [{"compute_capability": "8.6", "file": "a/b", "sha256": "", "size": 1}]},
            "names 'a/b', which is not beside it",
        ),
        ({"graph": ""}, "names '', which is not beside it"),
        ({"graph": ".."}, "names '..', which is not beside it"),
    ],
)
def test_refuses_what_is_damaged(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ArtifactError, match=problem.replace(".", r"\.")):
        read_engine_set(write(tmp_path, **changes))


def test_refuses_what_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing: build the artifact again"):
        read_engine_set(tmp_path)
    (tmp_path / ENGINES_FILE).write_text("{")
    with pytest.raises(ArtifactError, match="is not valid JSON"):
        read_engine_set(tmp_path)
