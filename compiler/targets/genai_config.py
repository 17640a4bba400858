"""genai_config.json: how onnxruntime-genai feeds a lowered decoder and searches with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eoracc.runtime.artifact.long_rope import LongRope

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import GenerationConfig, PretrainedConfig

__all__ = ["genai_config"]

_ERRORS_ONLY = 3

_GENAI_TYPES = frozenset(
    {
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
"""Model types that onnxruntime-genai 0.18 knows by name; it refuses to load any other name."""

_GENERIC_TYPE = "decoder"
"""Its name for a decoder with the inputs and outputs that the file lists."""


def genai_config(
    config: PretrainedConfig,
    model: ir.Model,
    *,
    generation: GenerationConfig | None = None,
    filename: str = "model.onnx",
    custom_ops_library: str | None = None,
) -> dict[str, Any]:
    """The content of genai_config.json.

    Args:
      config: the checkpoint's transformers configuration.
      model: the lowered graph; which inputs it has and whether it shares its cache buffer decides.
      generation: the checkpoint's search defaults and special tokens; None where it has none.
      filename: the model, relative to the artifact.
      custom_ops_library: the native library, relative to the artifact; None runs without one.

    Returns:
      A dictionary that JSON can hold.
    """
    session_options: dict[str, Any] = {
        "log_id": "onnxruntime-genai",
        # ONNX Runtime warns of each default of an input, at every load: only errors are worth it.
        "log_severity_level": _ERRORS_ONLY,
        "provider_options": [],
    }
    if custom_ops_library is not None:
        session_options["custom_ops_library"] = custom_ops_library
    # genai feeds what it knows; what has a default (logits to keep, adapters) is left at it.
    inputs = [str(value.name) for value in model.graph.inputs if value.const_value is None]
    names = {name: name for name in inputs if not name.startswith("past_key_values.")}
    head_size = next(
        value.shape[3]
        for value in model.graph.inputs
        if value.name == "past_key_values.0.key" and value.shape is not None
    )
    long_rope = LongRope.of(model.metadata_props)
    # genai would go on with keys of short texts where a text outgrows the original length.
    context_length = config.max_position_embeddings if long_rope is None else long_rope.original
    section: dict[str, Any] = {
        "type": config.model_type if config.model_type in _GENAI_TYPES else _GENERIC_TYPE,
        "vocab_size": config.vocab_size,
        "context_length": context_length,
        **_special_tokens(config, generation),
        "decoder": {
            "session_options": session_options,
            "filename": filename,
            "head_size": head_size,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "inputs": {
                **names,
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    return {"model": section, "search": _search(model, generation, context_length)}


def _special_tokens(
    config: PretrainedConfig, generation: GenerationConfig | None
) -> dict[str, Any]:
    tokens = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(generation, name, None)
        tokens[name] = getattr(config, name, None) if token is None else token
    if tokens["pad_token_id"] is None:
        # genai wants one; a batch is padded with the end token where the checkpoint names none.
        ends = tokens["eos_token_id"]
        tokens["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return {name: token for name, token in tokens.items() if token is not None}


def _search(
    model: ir.Model, generation: GenerationConfig | None, context_length: int
) -> dict[str, Any]:
    attentions = {node.op_type for node in model.graph} & {"Attention", "GroupQueryAttention"}
    defaults = {
        "do_sample": False,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
    }
    search: dict[str, Any] = {}
    for name, default in defaults.items():
        value = getattr(generation, name, None)
        search[name] = default if value is None else value
    return {
        **search,
        "num_beams": 1,
        "num_return_sequences": 1,
        "min_length": 0,
        "max_length": context_length,
        "early_stopping": True,
        # Only the fused op writes into the buffer that it reads its past from.
        "past_present_share_buffer": attentions == {"GroupQueryAttention"},
    }
