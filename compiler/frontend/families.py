"""The families of models that are let in, and why others are not.

A family is on the list if the tests hold it: tests/tiny_models.py has a small random checkpoint of
it, whose graph is compared with the eager model. docs/families.md says the same to readers, and a
test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from eoracc.errors import ModelError
from eoracc.printable import quoted

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["REFUSED", "SUPPORTED", "check_family"]

SUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "apertus": "Apertus",
        "arcee": "Arcee AFM",
        "cohere": "Command R",
        "cohere2": "Command R7B, Command A",
        "ernie4_5": "ERNIE 4.5, dense",
        "exaone4": "EXAONE 4",
        "gemma": "Gemma 1",
        "gemma2": "Gemma 2",
        "gemma3_text": "Gemma 3, text",
        "glm": "GLM-4 9B, GLM-Edge",
        "glm4": "GLM-4-0414",
        "granite": "Granite 3, dense",
        "helium": "Helium",
        "hunyuan_v1_dense": "HunYuan, dense",
        "llama": "Llama, SmolLM, Yi, TinyLlama, and others that are saved as Llama",
        "ministral": "Ministral 8B",
        "ministral3": "Ministral 3, text",
        "mistral": "Mistral",
        "nemotron": "Nemotron, Minitron",
        "olmo": "OLMo 1",
        "olmo2": "OLMo 2",
        "olmo3": "OLMo 3",
        "phi": "Phi-1.5, Phi-2",
        "phi3": "Phi-3, Phi-3.5, Phi-4",
        "qwen2": "Qwen2, Qwen2.5",
        "qwen3": "Qwen3",
        "seed_oss": "Seed-OSS",
        "smollm3": "SmolLM3",
        "stablelm": "StableLM 2",
        "starcoder2": "StarCoder2",
    }
)
"""The ``model_type`` of each family that is let in, with the models that have it."""

_EXPERTS = "it is a mixture of experts, whose weights are no linears of the graph"
_LEARNED = "its position embeddings are learned"
_ALIBI = "its positions are biases of the scores (ALiBi)"
_FUSED = "its projections are stored in an order of their own"
_STATE = "some of its layers keep a state in place of keys and values"
_LATENT = "it compresses keys and values (multi-head latent attention)"
_SHARED = "its layers share caches or read embeddings of their own"
_TENSORS = "the graph builder has no place for all of its tensors"

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "dots1",
                "ernie4_5_moe",
                "flex_olmo",
                "glm4_moe",
                "gpt_oss",
                "granitemoe",
                "hunyuan_v1_moe",
                "jetmoe",
                "llama4_text",
                "mixtral",
                "olmoe",
                "phimoe",
                "qwen2_moe",
                "qwen3_moe",
                "solar_open",
            ),
            _EXPERTS,
        ),
        **dict.fromkeys(
            ("biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt"), _LEARNED
        ),
        **dict.fromkeys(("bloom", "mpt"), _ALIBI),
        **dict.fromkeys(("codegen", "falcon", "gpt_neox", "gptj", "persimmon"), _FUSED),
        **dict.fromkeys(
            (
                "bamba",
                "falcon_h1",
                "granitemoehybrid",
                "jamba",
                "lfm2",
                "mamba",
                "mamba2",
                "minimax",
                "nemotron_h",
                "qwen3_5_text",
                "qwen3_next",
                "zamba2",
            ),
            _STATE,
        ),
        **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "youtu"), _LATENT),
        **dict.fromkeys(("gemma3n_text", "gemma4_text"), _SHARED),
        **dict.fromkeys(("modernbert-decoder", "nanochat", "xglm"), _TENSORS),
        "diffllama": "its attention is the difference of two",
        "doge": "its attention masks depend on the values",
    }
)
"""The ``model_type`` of families that were tried and are refused, with the reason."""

_VARIANTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gemma3_text": ("use_bidirectional_attention",),
        "phi": ("qk_layernorm",),
        "stablelm": ("qk_layernorm", "use_parallel_residual"),
    }
)
"""Switches of supported families with which the graph builder makes another model."""

_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_family(folder: Path, content: Mapping[str, Any]) -> None:
    """Check that a checkpoint is a language model of a supported family.

    Args:
      folder: the checkpoint, for messages.
      content: of its config.json.

    Raises:
      ModelError: it is not; says why where that is known.
    """
    kind = content["model_type"]
    if kind not in SUPPORTED:
        why = _reason(content)
        raise ModelError(
            f"{folder}: model_type {quoted(kind)} is not supported{f': {why}' if why else ''}; "
            "supported "
            f"are {len(SUPPORTED)} families of dense decoders, such as Llama, Qwen3, Gemma 3 and "
            "Phi-3, which docs/families.md lists"
        )
    architectures = content.get("architectures") or f"{kind}ForCausalLM"
    name = str(architectures[0] if isinstance(architectures, list) else architectures)
    # Heads of classifiers, and drafters of speculative decoding without embedding or head.
    if not name.endswith("ForCausalLM") or name.startswith("Eagle"):
        raise ModelError(
            f"{folder}: architecture {name} of model_type {quoted(kind)} is not supported: "
            "give a model for text generation (…ForCausalLM)"
        )
    for field in _VARIANTS.get(kind, ()):
        if content.get(field):
            raise ModelError(
                f"{folder / 'config.json'}: {field} is true, and this variant of model_type "
                f"{quoted(kind)} is not supported: give a model without it"
            )


def _reason(content: Mapping[str, Any]) -> str | None:
    if content["model_type"] in REFUSED:
        return REFUSED[content["model_type"]]
    if any(content.get(name) for name in _EXPERT_FIELDS):
        return _EXPERTS
    if "text_config" in content:
        return "it holds more than a text model"
    return None
