from __future__ import annotations

import json
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.config.load import load_config
from eoracc.compiler.config.sections import BuildConfig
from eoracc.errors import ConfigError
from eoracc.passes.base import pass_names

if TYPE_CHECKING:
    from pathlib import Path

MINIMAL = """\
model: data/tiny.gguf
calibration:
  text: data/text.txt
  samples: 4
passes:
  - pack_projections
  - calibrate: {through: compressed}
  - quantize_gptq: {bits: 3, group_size: 64}
  - eora:
      rank: 8
output: build/tiny
"""


def load(folder: Path, text: str = MINIMAL, *overrides: str) -> BuildConfig:
    path = folder / "model.yaml"
    path.write_text(dedent(text), encoding="utf-8")
    return load_config(path, overrides)


def error(folder: Path, text: str = MINIMAL, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder}/", "")


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


@pytest.mark.parametrize(
    ("line", "changed", "expected"),
    [
        (
            "  samples: 4",
            "  smaples: 4",
            "model.yaml:4: calibration.smaples: unknown key: did you mean 'samples'?",
        ),
        (
            "output: build/tiny",
            "ouptut: build/tiny",
            (
                "model.yaml: output: is missing: add 'output: …'\n"
                "model.yaml:11: ouptut: unknown key: did you mean 'output'?"
            ),
        ),
        (
            "  samples: 4",
            "  zzz: 4",
            (
                "model.yaml:4: calibration.zzz: unknown key: known here: text, field, "
                "messages, split, mixture, "
                "samples, sequence_length, seed, layout"
            ),
        ),
        (
            "  samples: 4",
            "  samples: many",
            "model.yaml:4: calibration.samples: must be a whole number, not 'many'",
        ),
        (
            "  samples: 4",
            "  samples: 0",
            "model.yaml:4: calibration.samples: must be greater than or equal to 1, not 0",
        ),
        (
            "  samples: 4",
            "  samples: yes",
            "model.yaml:4: calibration.samples: must be a number, not true",
        ),
        (
            "  samples: 4",
            "  layout: paking",
            (
                "model.yaml:4: calibration.layout: must be 'packing' or 'padding', not 'paking': "
                "did you mean 'packing'?"
            ),
        ),
        (
            "model: data/tiny.gguf",
            "model: ''",
            "model.yaml:1: model: must not be empty",
        ),
        (
            "      rank: 8",
            "      rnak: 8",
            "model.yaml:10: passes.3.eora.rnak: unknown key: did you mean 'rank'?",
        ),
        (
            "  - pack_projections",
            "  - pack_projection",
            (
                "model.yaml:6: passes.0: there is no pass 'pack_projection': "
                "did you mean 'pack_projections'?"
            ),
        ),
        (
            "  - pack_projections",
            "  - 3",
            (
                "model.yaml:6: passes.0: must be a pass's name, or one name with its options: "
                "eora: {rank: 64}"
            ),
        ),
        (
            "  - quantize_gptq: {bits: 3, group_size: 64}",
            "  - quantize_gptq: {bits: 5}",
            "model.yaml:8: passes.2.quantize_gptq.bits: must be 2, 3, 4 or 8, not 5",
        ),
        (
            "  - quantize_gptq: {bits: 3, group_size: 64}",
            "  - quantize_gptq: {group_size: 20}",
            (
                "model.yaml:8: passes.2.quantize_gptq.group_size: 20 is no group size: "
                "give a multiple "
                "of 8 in 16..256, or -1 for whole rows"
            ),
        ),
        (
            "  - quantize_gptq: {bits: 3, group_size: 64}",
            "  - quantize_gptq: {overrides: {lm_head: {bit: 8}}}",
            (
                "model.yaml:8: passes.2.quantize_gptq.overrides.lm_head.bit: unknown key: "
                "did you mean 'bits'?"
            ),
        ),
        (
            "output: build/tiny",
            "output: build/tiny\ntargets: [onnxrt]",
            (
                "model.yaml:12: targets.0: must be 'onnxruntime', 'tensorrt_rtx' or 'tensorrt', "
                "not 'onnxrt': "
                "did you mean 'onnxruntime'?"
            ),
        ),
        (
            "output: build/tiny",
            "output: build/tiny\nverify: {limits: {top1_agreement: 2}}",
            "model.yaml:12: verify.limits.top1_agreement: must be less than or equal to 1, not 2",
        ),
        (
            "output: build/tiny",
            "output: a\noutput: b",
            "model.yaml:12: output: stands twice, first in line 11: keep one",
        ),
        (
            "      rank: 8",
            "      rank: 8\n      rank: 9",
            "model.yaml:11: passes.3.eora.rank: stands twice, first in line 10: keep one",
        ),
    ],
)
def test_mistakes_name_line_field_and_way_out(
    tmp_path: Path, line: str, changed: str, expected: str
) -> None:
    assert line in MINIMAL
    assert error(tmp_path, MINIMAL.replace(line, changed)) == expected


def test_every_mistake_is_told_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = MINIMAL.replace("samples: 4", "samples: -1").replace("rank: 8", "rank: x")
    assert error(tmp_path, text).splitlines() == [
        "model.yaml:4: calibration.samples: must be greater than or equal to 1, not -1",
        "model.yaml:10: passes.3.eora.rank: must be a whole number, not 'x'",
    ]


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (["eora"], "passes.0.eora: needs 'calibrate' before it: put it above"),
        (
            ["calibrate", "eora"],
            "passes.1.eora: needs 'quantize_gptq' or 'quantize_rtn' before it: put it above",
        ),
        (
            ["quantize_gptq", "calibrate"],
            "passes.0.quantize_gptq: needs 'calibrate' before it: put it above",
        ),
        (["svd"], "passes.0.svd: needs 'quantize_gptq' or 'quantize_rtn' before it: put it above"),
        (
            ["quantize_rtn", "pack_projections"],
            "passes.1.pack_projections: must stand before 'quantize_rtn': move it up",
        ),
        (
            ["calibrate", "quantize_gptq", "quantize_rtn"],
            (
                "passes.2.quantize_rtn: the weights are compressed already by 'quantize_gptq': "
                "keep one of the two"
            ),
        ),
        (
            [{"calibrate": {"through": "original", "match": "outputs"}}],
            "passes.0.calibrate.match: contradicts 'through: original': keep one of the two",
        ),
        (["calibrate", "calibrate"], "passes.1.calibrate: stands twice: keep one"),
        (
            ["quantize_rtn", "svd", "quantize_factors"],
            (
                "passes.2.quantize_factors: factors of 'svd' have 4 bits already: give it "
                "'factor_type: float16', or leave this pass out"
            ),
        ),
        (
            [{"select_last_k": {"ratio": 0.2}}] * 2,
            "passes.1.select_last_k: stands twice: keep one",
        ),
        (
            ["select_last_k"],
            "passes.0: 'select_last_k' needs one target: give either 'ratio' or 'average_bits'",
        ),
        ([], "passes: must not be empty"),
    ],
)
def test_order_of_passes(tmp_path: Path, passes: list[object], expected: str) -> None:
    text = f"model: m\ncalibration: {{text: t}}\npasses: {json.dumps(passes)}\noutput: o\n"
    assert error(tmp_path, text) == f"model.yaml:3: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "passes: [calibrate]\nverify: {text: t}",
            "passes.0.calibrate: needs a text: give 'calibration: {text: …}'",
        ),
        ("passes: [quantize_rtn]", "verify: needs held-out text: give 'verify: {text: …}'"),
        (
            "passes: [quantize_rtn]\ncalibration: {text: t}\nverify: {field: f}",
            "verify.field: belongs to a 'text': give verify.text too",
        ),
        (
            "passes: [quantize_rtn]\nverify: {text: t, field: f, messages: m}",
            "verify.messages: stands next to 'field': keep one of the two",
        ),
        (
            "passes: [quantize_rtn]\ncalibration: {text: t, seed: 1}",
            "calibration.seed: random windows come from anywhere in the text",
        ),
    ],
)
def test_texts_that_contradict_each_other(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in error(tmp_path, f"model: m\noutput: o\n{text}\n")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty: give at least model, passes and output"),
        (b"- a\n", ":1: must be a mapping of keys to values"),
        (b"model: [\n", ":2: is not valid YAML"),
        (b"model: \xff\n", "is not UTF-8 text"),
        (b"a: &x {b: *x}\n", ":1: an alias that contains itself"),
        (b"? [a, b]\n: 1\n", ":1: a key must be a single word"),
        (b"model: !!python/object:os.system {}\n", ":1: is not valid YAML"),
    ],
)
def test_files_that_are_no_model_yaml(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "passes.quantize_gptq.bits=4",
        "passes.3.eora.rank=0",
        "passes.0.pack_projections.mlp=false",
        "calibration.samples=16",
        "verify.limits.kl=0.5",
        "verify.compare=[svd]",
        'passes.quantize_gptq.overrides={"*.down_proj": {bits: 8}}',
    )
    resolved = config.resolved()
    assert resolved["passes"][2]["quantize_gptq"]["bits"] == 4
    assert resolved["passes"][2]["quantize_gptq"]["group_size"] == 64
    assert resolved["passes"][2]["quantize_gptq"]["overrides"]["*.down_proj"]["bits"] == 8
    assert resolved["passes"][3]["eora"]["rank"] == 0
    assert resolved["passes"][0]["pack_projections"]["mlp"] is False
    assert resolved["calibration"]["samples"] == 16
    assert resolved["verify"]["limits"]["kl"] == 0.5
    assert resolved["verify"]["compare"] == ["svd"]


def test_the_last_override_wins(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "passes.eora.rank=1", "passes.eora.rank=2")
    assert config.resolved()["passes"][3]["eora"]["rank"] == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("calibration.samples", "give it as path=value"),
        ("=4", "give it as path=value"),
        ("calibration..samples=4", "give it as path=value"),
        ("calibration.samples=[", "the value is not valid YAML"),
        ("calibration.smaples=4", "calibration.smaples: unknown key: did you mean 'samples'?"),
        ("calibration.samples=x", "calibration.samples: must be a whole number, not 'x'"),
        ("passes.eroa.rank=4", "'passes' has no 'eroa': did you mean 'eora'?"),
        ("passes.9.eora.rank=4", "'passes' has 4 items, counted from 0"),
        ("passes.eora.rnk=4", "passes.3.eora.rnk: unknown key: did you mean 'rank'?"),
        ("model.x=4", "'model' is a single value and has no 'x'"),
    ],
)
def test_override_mistakes_name_the_override(tmp_path: Path, override: str, expected: str) -> None:
    assert error(tmp_path, MINIMAL, override).startswith(f"--set {override}: {expected}")


def test_override_of_a_pass_that_stands_twice(tmp_path: Path) -> None:
    text = MINIMAL.replace("  - pack_projections\n", "  - eora\n")
    assert error(tmp_path, text, "passes.eora.rank=1") == (
        "--set passes.eora.rank=1: 'eora' stands there twice: say passes.0.eora or passes.3.eora"
    )


def test_known_passes() -> None:
    BuildConfig.model_validate(
        {"model": "m", "passes": ["quantize_rtn"], "output": "o", "verify": {"text": "t"}}
    )
    assert {"calibrate", "eora", "quantize_gptq", "quantize_rtn", "svd"} <= set(pass_names())


ADAPTED = """\
model: m
calibration: {mixture: [{text: a, weight: 2}, {text: b, field: body, samples: 3}], samples: 5}
passes: [calibrate, quantize_gptq]
onnxruntime: {adapter_type: int8}
adapters:
  math: {text: t, rank: 4, factor_type: int4, overrides: {"*.q_proj": {rank: 2}}}
  code: {text: u, seed: 1, verify: {text: h, windows: 2}}
verify: {text: v, compare_adapters: true}
output: o
"""


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


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("  math: {", "  Math: {", "adapter 'Math': is no valid name"),
        ("  math: {", "  none: {", "adapter 'none': is no valid name"),
        ("rank: 4", "rank: -4", "adapters.math.rank: must be greater than or equal to 0"),
        ("rank: 4", "rnak: 4", "adapters.math.rnak: unknown key: did you mean 'rank'?"),
        ("text: t, ", "", "adapters.math: needs a text: give 'text: …' or 'mixture:"),
        (
            "factor_type: int4",
            "factor_type: float16",
            "adapters.math.factor_type: is float16, while onnxruntime.adapter_type is int8",
        ),
        ("{rank: 2}", "{factor_type: float16}", ".factor_type: is float16, while"),
        ("adapter_type: int8", "adapter_type: none", "the model takes no adapters: set"),
        ("verify: {text: h, windows: 2}", "verify: {windows: 2}", "give adapters.code.verify.text"),
        (
            "verify: {text: h, windows: 2}",
            "verify: {field: f, offset_tokens: 9}",
            "adapters.code.verify.field: belongs to a 'text'",
        ),
        (
            "text: u, seed: 1",
            "text: u, field: f, messages: g",
            "adapters.code.messages: stands next to 'field'",
        ),
        (
            "samples: 5}",
            "samples: 5, text: c}",
            "calibration.text: stands next to 'mixture'",
        ),
        ("field: body", "field: x, messages: y", "calibration.mixture.1.messages: stands next to"),
        ("weight: 2", "weight: 0", "calibration.mixture.0.weight: must be greater than 0"),
        ("verify: {text: v, ", "verify: {", "calibration has several: give verify.text"),
        ("[calibrate, quantize_gptq]", "[calibrate]", "adapters: needs a quantize pass"),
    ],
)
def test_mistakes_in_adapters_and_mixtures(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    assert old in ADAPTED
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, ADAPTED.replace(old, new))
    assert problem in str(caught.value)


def test_comparing_adapters_needs_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"verify.compare_adapters: compares adapters: give"):
        load(tmp_path, MINIMAL + "verify: {compare_adapters: true}\n")
