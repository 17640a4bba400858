"""Small random-weight checkpoints of every supported family, for unit parity.

Two layers with odd widths: a head dimension that is not ``hidden_size / heads``, grouped query
attention and an MLP width that no group size divides. Every parameter is random, norms and biases
included, so that an operand that is dropped or swapped shows in the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eoracc.compiler.frontend.quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["FAMILIES", "OTHER_FAMILIES", "VOCABULARY", "tiny_model"]

VOCABULARY = 131

_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_bias": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3_rope": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "smollm": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 24,
        },
    ),
    # Phi-3 has no head_dim of its own: it is hidden_size / num_attention_heads.
    "phi3": (
        "phi3",
        {"tie_word_embeddings": False, "head_dim": None, "hidden_size": 96, "sliding_window": None},
    ),
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": 5}),
}
"""Family name to transformers model type and what its configuration says beyond the common part."""

_HIDDEN_IS_HEADS: dict[str, Any] = {"head_dim": None, "hidden_size": 96}
_ALTERNATING: dict[str, Any] = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}

OTHER_FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 0.4,
            "final_logit_softcapping": 2.0,
            **_ALTERNATING,
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.3, "attention_bias": True, **_HIDDEN_IS_HEADS}),
    "cohere_norms": ("cohere", {"use_qk_norm": True, **_HIDDEN_IS_HEADS}),
    "cohere2": ("cohere2", {"tie_word_embeddings": True, **_ALTERNATING}),
    "ernie4_5": ("ernie4_5", {"tie_word_embeddings": True, "use_bias": True}),
    "helium": ("helium", {"tie_word_embeddings": False, "hidden_size": 96}),
    "granite": (
        "granite",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.3,
            "logits_scaling": 4.0,
            **_HIDDEN_IS_HEADS,
        },
    ),
    "olmo": ("olmo", {"tie_word_embeddings": False, "clip_qkv": 0.5, **_HIDDEN_IS_HEADS}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False, **_HIDDEN_IS_HEADS}),
    "olmo3": ("olmo3", {"tie_word_embeddings": False, **_HIDDEN_IS_HEADS, **_ALTERNATING}),
    "ministral": ("ministral", {"tie_word_embeddings": False, **_ALTERNATING}),
    "ministral3": (
        "ministral3",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "smollm3": ("smollm3", {"tie_word_embeddings": True, "no_rope_layers": [1, 0]}),
    "exaone4": ("exaone4", {"tie_word_embeddings": False, **_ALTERNATING}),
    "exaone4_full": (
        "exaone4",
        {"tie_word_embeddings": True, "layer_types": ["full_attention"] * 2},
    ),
    "arcee": ("arcee", {"tie_word_embeddings": False}),
    "apertus": ("apertus", {"tie_word_embeddings": False, **_HIDDEN_IS_HEADS}),
    "seed_oss": ("seed_oss", {"tie_word_embeddings": False}),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "factor": 1.0,
                "alpha": 1000.0,
            },
        },
    ),
    "stablelm": (
        "stablelm",
        {"tie_word_embeddings": False, "use_qkv_bias": True, **_HIDDEN_IS_HEADS},
    ),
    "starcoder2": ("starcoder2", {"tie_word_embeddings": True, "sliding_window": 5}),
    "phi": ("phi", {"tie_word_embeddings": False, **_HIDDEN_IS_HEADS}),
    "nemotron": ("nemotron", {"tie_word_embeddings": False}),
    "glm": ("glm", {"tie_word_embeddings": False}),
    "glm4": ("glm4", {"tie_word_embeddings": False}),
}
"""Further families, which the tests of the frontend and of the lowerings run; as above."""


def tiny_model(family: str, folder: Path, *, seed: int = 0, **overrides: object) -> Path:
    """Write a checkpoint of ``family`` with random float32 weights.

    Args:
      family: a key of :data:`FAMILIES` or :data:`OTHER_FAMILIES`.
      folder: where to write; created.
      seed: of the weights.
      **overrides: configuration fields that replace the family's own.

    Returns:
      ``folder``, with config.json, generation_config.json and model.safetensors.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = {**FAMILIES, **OTHER_FAMILIES}[family]
    settings = {**_COMMON, **fields, **overrides}
    settings = {name: value for name, value in settings.items() if value is not None}
    if model_type == "phi3":
        settings.setdefault("sliding_window", None)
    config = AutoConfig.for_model(model_type, **settings)
    generator = torch.Generator().manual_seed(seed)
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            # Matrices keep the variance of their input; vectors stay near what training gives.
            parameter.mul_(parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2)
            if name.endswith("norm.weight") and "gemma" not in model_type:
                parameter.add_(1.0)
    with quiet():
        model.save_pretrained(folder)
    return folder
