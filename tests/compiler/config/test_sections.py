from __future__ import annotations

import json
from typing import TYPE_CHECKING

from eoracc.compiler.config.sections import BuildConfig
from tests.compiler.config.files import ADAPTED, MINIMAL, load

if TYPE_CHECKING:
    from pathlib import Path


def test_fills_defaults_in(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.calibration is not None
    assert config.calibration.samples == 4
    assert config.calibration.sequence_length == 512
    assert config.targets == ("onnxruntime",)
    assert config.verify.parity
    assert [type(item).__name__ for item in config.passes] == [
        "PackProjections",
        "Calibrate",
        "QuantizeGptq",
        "Eora",
    ]
    assert config.passes[3].rank == 8


def test_resolved_is_json_and_validates_to_the_same(tmp_path: Path) -> None:
    config = load(tmp_path)
    resolved = json.loads(json.dumps(config.resolved()))
    assert resolved["passes"][2]["quantize_gptq"]["bits"] == 3
    assert "damping" in resolved["passes"][2]["quantize_gptq"]
    assert BuildConfig.model_validate(resolved) == config


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.output_path(tmp_path) == tmp_path / "build" / "tiny"
    assert config.model_source(tmp_path) == "data/tiny.gguf", "not there: a hub id, perhaps"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny.gguf").touch()
    assert config.model_source(tmp_path) == str(tmp_path / "data" / "tiny.gguf")


def test_held_out_text(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.verify.held_out_text(config.calibration).text == "data/text.txt"
    other = load(tmp_path, MINIMAL + "verify: {text: other.jsonl, field: body}\n")
    text = other.verify.held_out_text(other.calibration)
    assert (text.text, text.field) == ("other.jsonl", "body")


def test_adapters_and_mixtures(tmp_path: Path) -> None:
    config = load(tmp_path, ADAPTED)
    assert config.calibration is not None
    assert [(one.text, one.weight, one.samples) for one in config.calibration.texts()] == [
        ("a", 2.0, None),
        ("b", 1.0, 3),
    ]
    assert list(config.adapters) == ["math", "code"]
    math = config.adapters["math"]
    assert (math.rank, math.factor_type, math.samples) == (4, "int4", 64)
    assert math.overrides["*.q_proj"].rank == 2
    assert math.verify.held_out_text(math).text == "t"
    assert [one.text for one in math.texts()] == ["t"]
    resolved = json.loads(json.dumps(config.resolved()))
    assert BuildConfig.model_validate(resolved) == config
