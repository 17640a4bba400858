from __future__ import annotations

from typing import Any

import pytest

from eoracc.compiler.frontend.context import context_notes
from eoracc.runtime.artifact.long_rope import LongRope


def notes(metadata: dict[str, str] | None = None, **fields: Any) -> list[str]:  # noqa: ANN401
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", max_position_embeddings=2048, **fields)
    return context_notes(config, metadata or {})


@pytest.mark.parametrize("rope_type", ["default", "linear"])
def test_nothing_where_the_context_is_the_positions(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    assert notes(rope_parameters=rope) == []


def test_dynamic_ntk_ends_with_the_positions() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (note,) = notes(rope_parameters=rope)
    assert note.startswith(
        "texts have up to 2048 tokens (max_position_embeddings): beyond, dynamic"
    )


def test_long_rope_is_shorter_elsewhere() -> None:
    (note,) = notes(LongRope(original=4096, longest=131072).to_metadata())
    assert "131072 tokens in eoracc on the CPU" in note
    assert "in TensorRT up to 4096" in note
