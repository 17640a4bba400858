from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.config.load import load_config
from eoracc.errors import ConfigError
from tests.compiler.config.files import MINIMAL, error, load

if TYPE_CHECKING:
    from pathlib import Path


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
            "model.yaml:8: passes.2.quantize_gptq.bits: must be 2, 3, 4, 6 or 8, not 5",
        ),
        (
            "  - quantize_gptq: {bits: 3, group_size: 64}",
            "  - quantize_gptq: {group_size: 20}",
            (
                "model.yaml:8: passes.2.quantize_gptq.group_size: 20 is no group size: "
                "give a multiple "
                "of 8 in 16..256, -1 for whole rows, or 'auto'"
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
            "model.yaml:12: output: occurs twice, first in line 11: keep one",
        ),
        (
            "      rank: 8",
            "      rank: 8\n      rank: 9",
            "model.yaml:11: passes.3.eora.rank: occurs twice, first in line 10: keep one",
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
        "--set passes.eora.rank=1: 'eora' occurs there twice: give passes.0.eora or passes.3.eora"
    )


@pytest.mark.parametrize("overrides", [(), ("trust_remote_code=true",)])
def test_a_file_cannot_allow_code_of_the_model(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    text = MINIMAL if overrides else f"trust_remote_code: true\n{MINIMAL}"
    message = error(tmp_path, text, *overrides)
    assert "trust_remote_code: the model needs Python code of its own repository" in message
    assert "add --trust-remote-code to the command if you trust 'data/tiny.gguf'" in message
    allowed = load_config(tmp_path / "model.yaml", overrides, trust_remote_code=True)
    assert allowed.trust_remote_code


def test_the_command_line_allows_code_of_the_model(tmp_path: Path) -> None:
    assert not load(tmp_path).trust_remote_code
    config = load_config(tmp_path / "model.yaml", trust_remote_code=True)
    assert config.resolved()["trust_remote_code"] is True
