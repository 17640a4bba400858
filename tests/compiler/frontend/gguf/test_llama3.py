from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from eoracc.compiler.frontend.gguf.llama3 import llama3_divisors, recover_llama3

PUBLISHED = {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 8192}
ROUNDING = 8 * 2.0**-24
"""Of a frequency that transformers computes with a few operations in float32."""


def frequencies(theta: float, dims: int, parameters: dict[str, Any]) -> np.ndarray:
    """The inverse frequencies that transformers computes, float32."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=dims,
        num_attention_heads=1,
        head_dim=dims,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    found, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention == 1
    return found.numpy()


@pytest.mark.parametrize(
    ("theta", "dims", "options"),
    [
        (500000.0, 128, PUBLISHED),
        (500000.0, 64, PUBLISHED | {"factor": 32.0}),
        (10000.0, 16, PUBLISHED | {"original": 32}),
        (10000.0, 32, {"factor": 5.0, "low": 2.0, "high": 3.0, "original": 100}),
        (1e6, 128, {"factor": 16.0, "low": 1.0, "high": 32.0, "original": 1024}),
        (100.0, 6, {"factor": 4.0, "low": 1.0, "high": 4.0, "original": 20}),
    ],
)
def test_recovered_parameters_give_the_same_frequencies(
    theta: float, dims: int, options: dict[str, Any]
) -> None:
    stored = llama3_divisors(theta=theta, dims=dims, **options).astype(np.float32)
    found = recover_llama3(stored, theta=theta, dims=dims)
    assert found is not None
    original = {
        "rope_type": "llama3",
        "factor": options["factor"],
        "low_freq_factor": options["low"],
        "high_freq_factor": options["high"],
        "original_max_position_embeddings": options["original"],
    }
    given, expected = (frequencies(theta, dims, each) for each in (found, original))
    # The stored divisors are float32: so is what is recovered from them.
    np.testing.assert_allclose(given, expected, rtol=options["factor"] * ROUNDING)
    # Another factor or length is far away from that.
    for field, value in (("factor", 1.01), ("original_max_position_embeddings", 1.01)):
        other = frequencies(theta, dims, original | {field: original[field] * value})
        if stored.min() < stored.max():
            assert np.abs(other / expected - 1).max() > 100 * options["factor"] * ROUNDING


def test_published_values_are_found_as_they_are() -> None:
    for factor, dims in itertools.product((8.0, 32.0), (64, 128)):
        options = PUBLISHED | {"factor": factor}
        stored = llama3_divisors(theta=500000.0, dims=dims, **options).astype(np.float32)
        assert recover_llama3(stored, theta=500000.0, dims=dims) == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }


@pytest.mark.parametrize("divisors", [[1.0, 8.0, 1.0, 8.0], [0.5, 1.0, 2.0, 2.0], [1.0] * 4])
def test_divisors_that_no_scaling_gives(divisors: list[float]) -> None:
    assert recover_llama3(np.array(divisors, np.float32), theta=10000.0, dims=8) is None
