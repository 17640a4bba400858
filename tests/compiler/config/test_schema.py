from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from eoracc.compiler.config.load import load_config
from eoracc.compiler.config.schema import describe_passes, json_schema, model_yaml_page, write_docs
from eoracc.passes.base import pass_names

ROOT = Path(__file__).parents[3]


def test_published_files_are_current(tmp_path: Path) -> None:
    write_docs(tmp_path)
    for name in ("schema/model.schema.json", "model_yaml.md"):
        assert (tmp_path / name).read_text("utf-8") == (ROOT / "docs" / name).read_text("utf-8"), (
            "run: python -m eoracc.compiler.config.schema docs"
        )


def test_every_reference_is_defined() -> None:
    schema = json_schema()
    text = json.dumps(schema)
    references = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert references <= set(schema["$defs"])
    assert "CalibrationConfig" in references


def test_every_pass_and_option_is_described() -> None:
    described = {one["name"]: one for one in describe_passes()}
    assert set(described) == set(pass_names())
    for one in described.values():
        assert one["doc"], one["name"]
        for option in one["options"]:
            assert option["doc"], f"{one['name']}.{option['name']}"
    bits = next(o for o in described["quantize_rtn"]["options"] if o["name"] == "bits")
    assert bits["type"] == "2 | 3 | 4 | 6 | 8"


def test_descriptions_are_whole_lines_in_markdown() -> None:
    for paragraph in json_schema()["$defs"]["quantize_gptq"]["description"].split("\n\n"):
        assert "\n" not in paragraph
    table = [line for line in model_yaml_page().splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 5 for line in table)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*/model.yaml")), ids=str)
def test_examples_are_valid(example: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    config = load_config(example)
    assert config.model_validate(config.resolved()) == config
    jsonschema.validate(yaml.safe_load(example.read_text("utf-8")), json_schema())
    jsonschema.validate(config.resolved(), json_schema())


def test_schema_refuses_what_the_loader_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    good = {"model": "m", "passes": ["svd", {"eora": None}, {"eora": {"rank": 1}}], "output": "o"}
    jsonschema.validate(good, json_schema())
    for bad in (
        {**good, "modle": "m"},
        {**good, "passes": ["eroa"]},
        {**good, "passes": [{"eora": {"rnk": 1}}]},
        {**good, "passes": [{"eora": {"rank": "x"}}]},
        {**good, "targets": ["other"]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, json_schema())
