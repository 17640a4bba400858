from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.config.load import load_config
from eoracc.compiler.config.sections import BuildConfig
from eoracc.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

ENGINES = """\
model: model
passes: [quantize_rtn]
targets: [tensorrt_rtx]
tensorrt_rtx:
  compute_capabilities: [8.0, "8.6"]
  batch: [1, 1, 4]
  sequence: [1, 64, 128]
  context_length: 512
  adapter_type: float16
  rank: [0, 8, 16]
adapters:
  math: {text: t, factor_type: float16, verify: {text: h}}
verify: {text: h}
output: out
"""


def load(folder: Path, text: str = ENGINES) -> BuildConfig:
    path = folder / "model.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def test_ranges_and_capabilities(tmp_path: Path) -> None:
    config = load(tmp_path)
    engines = config.tensorrt_rtx
    assert engines.compute_capabilities == ("8.0", "8.6")  # numbers to YAML, or texts
    assert (engines.batch, engines.sequence) == ((1, 1, 4), (1, 64, 128))
    assert (engines.rank, engines.cache) == ((0, 8, 16), "concat")
    assert BuildConfig.model_validate(config.resolved()) == config


def test_options_of_a_target_that_is_not_asked_for_contradict_nothing(tmp_path: Path) -> None:
    text = ENGINES.replace("targets: [tensorrt_rtx]", "targets: [onnxruntime]")
    text = text.replace("factor_type: float16", "factor_type: int8")
    config = load(tmp_path, text.replace("context_length: 512", "context_length: 64"))
    assert config.tensorrt_rtx.sequence[2] > config.tensorrt_rtx.context_length


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[8.0, ", "[9.9, ", "tensorrt_rtx.compute_capabilities.0: must be '7.5', '8.0'"),
        ("[8.0, ", "[8.6, ", "compute_capabilities: names '8.6' twice: keep one"),
        ('[8.0, "8.6"]', "[]", "compute_capabilities: must not be empty"),
        (
            "batch: [1, 1, 4]",
            "batch: [1, 8, 4]",
            "tensorrt_rtx.batch: must be [smallest, usual, largest], in this order, not [1, 8, 4]",
        ),
        ("batch: [1, 1, 4]", "batch: [0, 1, 4]", "batch.0: must be greater than or equal to 1"),
        ("batch: [1, 1, 4]", "batch: [1, yes, 4]", "batch.1: must be a number, not true"),
        (
            "context_length: 512",
            "context_length: 100",
            "tensorrt_rtx.sequence: goes to 128 tokens, beyond context_length, 100",
        ),
        ("context_length: 512", "context_length: 63", "must be greater than or equal to 64"),
        (
            "[1, 64, 128]",
            "[1, 8, 16]",
            "tensorrt_rtx.logits: goes to 32 tokens, and a call has 16 at most: lower it",
        ),
        (
            "rank: [0, 8, 16]",
            "rank: [0, 8, 8]",
            "adapters.math.rank: is 16, and tensorrt_rtx.rank ends at 8: change one of the two",
        ),
        (
            "adapter_type: float16",
            "adapter_type: none",
            "the model takes no adapters: set tensorrt_rtx.adapter_type to float16",
        ),
        (
            "factor_type: float16",
            "factor_type: int8",
            "is int8, while tensorrt_rtx.adapter_type is float16, which takes float16",
        ),
        (
            "targets: [tensorrt_rtx]",
            "targets: [tensorrt_rtx, tensorrt_rtx]",
            "targets.1: 'tensorrt_rtx' occurs twice: keep one",
        ),
    ],
)
def test_mistakes_name_the_field_and_the_way_out(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    assert old in ENGINES
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, ENGINES.replace(old, new))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
