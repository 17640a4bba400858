"""Model files for the tests of this folder."""

from __future__ import annotations

from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.config.load import load_config
from eoracc.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.compiler.config.sections import BuildConfig

__all__ = ["ADAPTED", "MINIMAL", "error", "load"]

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


def load(folder: Path, text: str = MINIMAL, *overrides: str) -> BuildConfig:
    """``text`` as ``folder/model.yaml``, loaded."""
    path = folder / "model.yaml"
    path.write_text(dedent(text), encoding="utf-8")
    return load_config(path, overrides)


def error(folder: Path, text: str = MINIMAL, *overrides: str) -> str:
    """The message of the error that loading ``text`` raises, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder}/", "")
