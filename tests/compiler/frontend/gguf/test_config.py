"""Each member: a checkpoint, what its GGUF says of it, and that both compute the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.gguf.convert import convert
from eoracc.compiler.frontend.gguf.llama3 import llama3_divisors
from eoracc.compiler.frontend.quiet import quiet
from eoracc.errors import ModelError
from tests.gguf_files import VOCABULARY, write_gguf
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

IDS = np.random.default_rng(7).integers(3, len(VOCABULARY), (2, 40))
LONG = [1.0 + 0.6 * index for index in range(8)]
SHORT = [1.0 + 0.02 * index for index in range(8)]


def rope(kind: str, **fields: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


def scaling(kind: str | None, factor: float | None = None, **keys: object) -> dict[str, Any]:
    given = {"type": kind, "factor": factor, **keys}
    return {f"{{arch}}.rope.scaling.{key}": value for key, value in given.items()}


def divisors(**options: float) -> dict[str, Any]:
    return {"rope_freqs.weight": llama3_divisors(theta=10000.0, dims=16, **options)}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"long_factor": LONG, "short_factor": SHORT, "original_max_position_embeddings": 24}
FACTORS = {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}
WINDOW = {"{arch}.attention.sliding_window": 5}
CAPS = {"{arch}.attn_logit_softcapping": 0.4, "{arch}.final_logit_softcapping": 2.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}

MEMBERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: family, its configuration, keys, tensors
    "plain": ("llama", {}, {}, {}),
    "biases": ("llama_bias", {}, {}, {}),
    "linear": ("llama", rope("linear", factor=4.0), scaling("linear", 4.0), {}),
    "linear without a type": ("llama", rope("linear", factor=4.0), scaling(None, 4.0), {}),
    "scale_linear": (
        "llama",
        rope("linear", factor=4.0),
        {"{arch}.rope.scale_linear": 4.0},
        {},
    ),
    "none": ("llama", {}, scaling("none", 4.0), {}),
    "yarn": ("llama", rope("yarn", **YARN), scaling("yarn", 4.0, original_context_length=32), {}),
    "yarn with all keys": (
        "qwen2",
        rope("yarn", **YARN, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0),
        scaling(
            "yarn",
            4.0,
            original_context_length=32,
            yarn_attn_factor=1.3,
            yarn_beta_fast=16.0,
            yarn_beta_slow=2.0,
            yarn_ext_factor=1.0,
            finetuned=True,
        ),
        {},
    ),
    "yarn with a logarithm": (
        "qwen3",
        rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.5),
        scaling("yarn", 4.0, original_context_length=32, yarn_log_multiplier=0.5),
        {},
    ),
    "llama3": (
        "llama3_rope",
        {},
        {},
        divisors(factor=8.0, low=1.0, high=4.0, original=16),
    ),
    "longrope": (
        "phi3",
        {**rope("longrope", **LONGROPE), "original_max_position_embeddings": 24},
        {"{arch}.rope.scaling.original_context_length": 24},
        FACTORS,
    ),
    "longrope with an attention factor": (
        "phi3",
        {
            **rope("longrope", **LONGROPE, attention_factor=1.7),
            "original_max_position_embeddings": 24,
        },
        scaling("longrope", original_context_length=24, attn_factor=1.7),
        FACTORS,
    ),
    "longrope of a llama": (
        "llama",
        rope("longrope", **LONGROPE, factor=2.0),
        scaling(None, 2.0, original_context_length=24),
        FACTORS,
    ),
    "other divisors": (
        "llama",
        rope(
            "longrope",
            factor=1.0,
            long_factor=LONG[::-1],
            short_factor=LONG[::-1],
            original_max_position_embeddings=128,
        ),
        {},
        {"rope_freqs.weight": LONG[::-1]},
    ),
    "phi3 window": ("phi3", {"sliding_window": 5}, WINDOW, {}),
    "phi3 rotates a part": ("phi3", rope("default", partial_rotary_factor=0.5), {}, {}),
    "mistral": ("mistral", {}, WINDOW, {}),
    "name that transformers takes for a family": (
        "mistral",
        {},
        {**WINDOW, "general.name": "mistral"},
        {},
    ),
    "no length of a head": (
        "llama",
        {},
        {"{arch}.attention.key_length": None, "{arch}.attention.value_length": None},
        {},
    ),
    "as many keys as queries": (
        "qwen2",
        {"num_key_value_heads": 6},
        {"{arch}.attention.head_count_kv": None},
        {},
    ),
    "qwen2 window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        WINDOW,
        {},
    ),
    "qwen3 window of one layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {**WINDOW, "{arch}.attention.sliding_window_pattern": [False, True]},
        {},
    ),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}, {**WINDOW, **CAPS}, {}),
    "gemma3": (
        "gemma3",
        {"query_pre_attn_scalar": 16, "rope_parameters": GEMMA3_ROPE},
        {
            **WINDOW,
            "{arch}.attention.sliding_window_pattern": [True, False],
            "{arch}.rope.freq_base": 1e6,
            "{arch}.rope.freq_base_swa": 5000.0,
            **scaling("linear", 8.0),
        },
        {},
    ),
    "gemma3 with a scale": (
        "gemma3",
        {"query_pre_attn_scalar": 24, "layer_types": ["sliding_attention"] * 2},
        {
            **WINDOW,
            "{arch}.attention.scale": 24**-0.5,
            "{arch}.rope.freq_base": 1e6,
        },
        {},
    ),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_member_computes_what_the_checkpoint_computes(name: str, tmp_path: Path) -> None:
    family, fields, keys, tensors = MEMBERS[name]
    checkpoint = tiny_model(family, tmp_path / "model", **{"vocab_size": len(VOCABULARY), **fields})
    path = write_gguf(tmp_path / "model.gguf", checkpoint, keys=keys, tensors=tensors)
    folder = convert(path, tmp_path / "source")
    expected = reference_logits(load_eager(checkpoint, {}), IDS)
    given = reference_logits(load_eager(folder, {}), IDS)
    # The weights are equal; scalars were rounded to float32.
    np.testing.assert_allclose(given, expected, atol=1e-4 * np.abs(expected).max())


COMMON = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERT_KEYS = {
    "{arch}.expert_count": 4,
    "{arch}.expert_used_count": 2,
    "{arch}.expert_feed_forward_length": 24,
}
PERIOD = {"{arch}.attention.sliding_window_pattern": 2}

OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ministral": (
        {
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {**WINDOW, **PERIOD},
    ),
    "nemotron": ({"norm_eps": 1e-3}, {}),
    "qwen2_moe": (
        {**EXPERTS, "shared_expert_intermediate_size": 40},
        {
            **EXPERT_KEYS,
            "{arch}.expert_shared_feed_forward_length": 40,
            "{arch}.expert_weights_norm": False,
        },
    ),
    "qwen3_moe": (
        {**EXPERTS, "head_dim": 8, "norm_topk_prob": True},
        {**EXPERT_KEYS, "{arch}.expert_gating_func": 1},
    ),
    "stablelm": ({"use_qkv_bias": True, **rope("default", partial_rotary_factor=0.5)}, {}),
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_family_computes_what_the_checkpoint_computes(
    model_type: str, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields, keys = OTHERS[model_type]
    config = AutoConfig.for_model(model_type, **COMMON, **fields)
    generator = torch.Generator().manual_seed(0)
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    with quiet():
        model.save_pretrained(tmp_path / "model")
    path = write_gguf(tmp_path / "model.gguf", tmp_path / "model", keys=keys)
    folder = convert(path, tmp_path / "source")
    expected = reference_logits(load_eager(tmp_path / "model", {}), IDS)
    given = reference_logits(load_eager(folder, {}), IDS)
    np.testing.assert_allclose(given, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("family", "keys", "match"),
    [
        ("phi3", scaling("linear", 4.0), "rope scaling of type linear has no place"),
        ("phi3", scaling("yarn", 4.0), "rope scaling of type yarn has no place"),
        ("phi3", {**WINDOW, **PERIOD}, "sliding_window_pattern has no place"),
        (
            "gemma3",
            {"{arch}.attention.sliding_window": None},
            "attention.sliding_window is missing",
        ),
        ("gemma3", {**WINDOW, "{arch}.attention.scale": 0.3}, "attention.scale is not the root"),
        ("llama_bias", WINDOW, "attention.sliding_window has no place .* Llama with biases"),
        (
            "qwen3",
            {**WINDOW, "{arch}.attention.sliding_window_pattern": [True]},
            "does not have one value for each of 2 blocks",
        ),
    ],
)
def test_family_that_cannot_hold_a_key(
    family: str, keys: dict[str, Any], match: str, tmp_path: Path
) -> None:
    checkpoint = tiny_model(family, tmp_path / "model", vocab_size=len(VOCABULARY))
    path = write_gguf(tmp_path / "model.gguf", checkpoint, keys=keys)
    with pytest.raises(ModelError, match=match):
        convert(path, tmp_path / "source")
