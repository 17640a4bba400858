"""Whole builds of every family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler import driver
from eoracc.compiler.frontend.families import SUPPORTED
from eoracc.compiler.progress import SilentProgress
from eoracc.runtime.model import load
from eoracc.runtime.onnxruntime.session import open_session
from eoracc.runtime.request import Request
from tests.tiny_build import tiny_config, tiny_workspace
from tests.tiny_models import FAMILIES, OTHER_FAMILIES

if TYPE_CHECKING:
    from pathlib import Path


MEMBERS = {model_type: name for name, (model_type, _) in {**OTHER_FAMILIES, **FAMILIES}.items()}
"""A tiny checkpoint's name by its model_type."""


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_artifact_of_a_family_has_parity(model_type: str, tmp_path: Path) -> None:
    """Prompts, steps and chunks on the cache, and a batch, through the artifact."""
    workspace = tiny_workspace(tmp_path, MEMBERS[model_type])
    config = tiny_config(
        [{"quantize_rtn": {"bits": 8, "group_size": 16}}],
        verify={"windows": 1, "window_length": 32, "limits": {"kl": 0.02}},
    )
    result = driver.build(config, config_dir=workspace, progress=SilentProgress())
    assert result.report.parity["passed"]
    # 7 linears a block and the head, or 6 where there is no gate; packed ones count as one.
    assert len(result.report.linears) in (9, 13, 15)


@pytest.mark.parametrize(("family", "size"), [("gemma2", 100), ("phi3", None)])
def test_rows_of_odd_heads_are_decoded_together(
    family: str, size: int | None, tmp_path: Path
) -> None:
    """Padded heads, and rotary parts apart: through the cache, in a batch, past the window."""
    fields: dict[str, Any] = {} if size is None else {"head_dim": size}
    if size is None:  # 24 of 32 elements are rotated
        rotary = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
        fields = {"hidden_size": 192, "rope_parameters": rotary}
    workspace = tiny_workspace(tmp_path, family, **fields)
    verify = {"windows": 1, "window_length": 16, "parity": False}
    config = tiny_config([{"quantize_rtn": {"bits": 8, "group_size": 16}}], verify=verify)
    driver.build(config, config_dir=workspace, progress=SilentProgress())
    model = load(workspace / "out", threads=1)
    prompts = [list(range(5, 5 + length)) for length in (3, 17, 1)]
    requests = [Request(prompt=prompt, max_new_tokens=8) for prompt in prompts]
    session = open_session(workspace / "out")
    for prompt, completion in zip(prompts, model.generate_batch(requests), strict=True):
        tokens = list(prompt)
        for token in completion.tokens:
            logits, _ = session.run(np.array([tokens]), last_only=True)  # without a cache
            assert token == logits[0, -1].argmax()
            tokens.append(token)
        assert len(tokens) > len(prompt)
