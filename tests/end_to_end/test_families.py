"""Whole builds of families that differ from Llama in every part of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler import driver
from eoracc.compiler.progress import SilentProgress
from tests.tiny_build import tiny_config, tiny_workspace

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "family",
    [
        "gemma2",  # caps of scores and logits, four norms a block
        "cohere",  # LayerNorm, one for attention and MLP, rotation of neighbours
        "phi",  # parallel branches, biases everywhere, names of its own
        "apertus",  # an activation with parameters
    ],
)
def test_the_artifact_of_a_family_has_parity(family: str, tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path, family)
    passes = ["calibrate", {"quantize_gptq": {"bits": 8, "group_size": 16}}, {"eora": {"rank": 2}}]
    verify = {"windows": 1, "window_length": 32, "limits": {"kl": 0.02}}
    config = tiny_config(passes, verify=verify)
    result = driver.build(config, config_dir=workspace, progress=SilentProgress())
    assert result.report.parity["passed"]
    # 7 linears a block and the head; Phi and Apertus have no gate.
    assert len(result.report.linears) == (13 if family in ("phi", "apertus") else 15)
