"""The configuration of a GGUF file: transformers' own reading of it, completed and corrected."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from eoracc.compiler.frontend.gguf.rope import rope_scaling
from eoracc.compiler.frontend.quiet import quiet
from eoracc.errors import reason
from eoracc.printable import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

    from eoracc.compiler.frontend.gguf.reading import GgufFile

__all__ = ["EPSILONS", "loading_config", "written_config"]

_RMS = ("attention.layer_norm_rms_epsilon",)
_LAYER = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")

EPSILONS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "gemma2": ("rms_norm_eps", _RMS),
        "gemma3": ("rms_norm_eps", _RMS),
        "llama": ("rms_norm_eps", _RMS),
        "nemotron": ("norm_eps", _LAYER),
        "phi3": ("rms_norm_eps", _RMS),
        "qwen2": ("rms_norm_eps", _RMS),
        "qwen2moe": ("rms_norm_eps", _RMS),
        "qwen3": ("rms_norm_eps", _RMS),
        "qwen3moe": ("rms_norm_eps", _RMS),
        "stablelm": ("layer_norm_eps", _LAYER),
    }
)
"""The architectures that are read; where each keeps the epsilon of its norms."""

_COUNTS = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
)
_EXPERTS = (
    ("expert_count", "num_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
)
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_PARTIAL_ROTARY = frozenset({"phi3", "stablelm", "nemotron"})
_WITHOUT_SCALING = frozenset({"phi3"})
"""Their configuration takes LongRoPE and no other scaling."""

_BLOCK = re.compile(r"blk\.(\d{1,9})\.")

_GEMMA_27B_BLOCKS = MappingProxyType({"gemma2": 46, "gemma3": 62})
"""The one size of each whose queries are scaled by the width of the model per head."""


def loading_config(file: GgufFile) -> PretrainedConfig:
    """The configuration under which transformers loads the tensors of ``file``.

    Raises:
      ModelError: the architecture is not supported, a key is missing or of another type, or it
        asks for something that the configuration cannot hold.
    """
    if file.architecture not in EPSILONS:
        raise file.refusal(
            f"its architecture {quoted(file.architecture)} is not read from GGUF (read are "
            f"{', '.join(EPSILONS)})"
        )
    sizes = {field: _size(file, key) for key, field in _COUNTS}
    _check_blocks(file, sizes["num_hidden_layers"])
    sizes["num_key_value_heads"] = (
        file.integer(file.own("attention.head_count_kv")) or sizes["num_attention_heads"]
    )
    embedding = file.shape("token_embd.weight")
    # A key is no use where it contradicts the tensor, and old files have none.
    vocabulary = embedding[0] if embedding else file.integer(file.own("vocab_size"))
    file.consume([file.own("vocab_size")])
    epsilon = _epsilon(file)
    config = _read_by_transformers(file)
    for field, value in {**sizes, **epsilon}.items():
        setattr(config, field, value)
    if vocabulary is not None:
        config.vocab_size = vocabulary
    _set_head(file, config)
    _set_rope(file, config)
    _set_window(file, config)
    _set_scales(file, config)
    _set_experts(file, config)
    _set_biases(file, config)
    _set_tokens(file, config)
    return config


def written_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration to write: a Llama with a sliding window is what transformers calls Mistral.

    Args:
      config: from :func:`loading_config`.
    """
    if config.model_type != "llama" or getattr(config, "sliding_window", None) is None:
        return config
    from transformers import AutoConfig

    fields = config.to_dict()
    layer_types = fields.get("layer_types")
    mixed = layer_types is not None and "full_attention" in layer_types
    for name in ("model_type", "attention_bias", "mlp_bias", "pretraining_tp"):
        fields.pop(name, None)
    if not mixed:
        fields.pop("layer_types", None)
    fields["architectures"] = ["MinistralForCausalLM" if mixed else "MistralForCausalLM"]
    return AutoConfig.for_model("ministral" if mixed else "mistral", **fields)


def _size(file: GgufFile, key: str) -> int:
    value = file.integer(file.own(key))
    if value is None or value < 1:
        raise file.refusal(f"key {file.own(key)} is {'missing' if value is None else value}")
    return value


def _check_blocks(file: GgufFile, count: int) -> None:
    """Compare the number of blocks with the tensors, before anything is built for them."""
    blocks = {int(number[1]) for number in map(_BLOCK.match, file.tensors) if number}
    if len(blocks) != count or max(blocks, default=-1) != count - 1:
        raise file.refusal(
            f"key {file.own('block_count')} is {count}, and the file has tensors of "
            f"{len(blocks)} blocks"
        )


def _epsilon(file: GgufFile) -> dict[str, float]:
    field, keys = EPSILONS[file.architecture]
    values = [file.real(file.own(key)) for key in keys]
    known = [value for value in values if value is not None]
    if not known or known[0] <= 0:
        raise file.refusal(f"key {file.own(keys[0])} is {known[0] if known else 'missing'}")
    return {field: known[0]}


def _read_by_transformers(file: GgufFile) -> PretrainedConfig:
    from transformers import AutoConfig, LlamaConfig

    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                file.path.parent, gguf_file=file.path.name, trust_remote_code=False
            )
            if file.architecture == "llama" and config.model_type != "llama":
                # The reader takes a file of the name "mistral" for one, and then fails to load it.
                fields = config.to_dict()
                for name in ("model_type", "sliding_window"):
                    fields.pop(name, None)
                config = LlamaConfig(**fields)
    except Exception as error:
        raise file.refusal(
            f"transformers cannot read its configuration ({reason(error)})"
        ) from error
    return config


def _set_head(file: GgufFile, config: PretrainedConfig) -> None:
    """``head_dim`` from the file or from the shape of the queries, and the rotated part of it."""
    heads = config.num_attention_heads
    key, value = file.own("attention.key_length"), file.own("attention.value_length")
    length = file.integer(key)
    queries = file.shape("blk.0.attn_q.weight")
    usual = config.hidden_size // heads
    head_dim = length or (queries[0] // heads if queries else usual)
    for other in (value, key + "_swa", value + "_swa"):
        if (file.integer(other) or head_dim) != head_dim:
            raise file.refusal(f"key {other} differs from the length of a key, {head_dim}")
    if head_dim != usual or hasattr(config, "head_dim"):
        config.head_dim = head_dim
    count = file.own("rope.dimension_count")
    rotated = file.integer(count) or head_dim
    if (file.integer(count + "_swa") or rotated) != rotated:
        raise file.refusal(f"key {count}_swa differs from {count}")
    if rotated != head_dim and config.model_type not in _PARTIAL_ROTARY:
        raise file.refusal(
            f"key {count} is {rotated} of a head of {head_dim}, and {config.model_type} in "
            "transformers rotates whole heads"
        )
    if config.model_type in _PARTIAL_ROTARY:
        config.rope_parameters["partial_rotary_factor"] = rotated / head_dim


def _set_rope(file: GgufFile, config: PretrainedConfig) -> None:
    parameters = config.rope_parameters
    local = file.own("rope.freq_base_swa")
    local_theta = file.real(local)
    if "full_attention" in parameters:
        if local_theta is not None:
            parameters["sliding_attention"]["rope_theta"] = local_theta
        parameters = parameters["full_attention"]
    elif local_theta is not None and local_theta != file.real(file.own("rope.freq_base")):
        raise file.refusal(f"key {local} has no place in the configuration of {config.model_type}")
    theta = file.real(file.own("rope.freq_base"))
    if theta is not None and theta <= 0:
        raise file.refusal(f"key {file.own('rope.freq_base')} is {theta}")
    if theta is not None:
        parameters["rope_theta"] = theta
    elif file.architecture != "gemma3":
        parameters["rope_theta"] = 10000.0  # of llama.cpp where a file says nothing
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scaling = rope_scaling(
        file,
        theta=parameters["rope_theta"],
        dims=round(head_dim * parameters.get("partial_rotary_factor", 1.0)),
        context=config.max_position_embeddings,
    )
    if scaling and scaling["rope_type"] != "longrope" and config.model_type in _WITHOUT_SCALING:
        raise file.refusal(
            f"rope scaling of type {scaling['rope_type']} has no place in the configuration of "
            f"{config.model_type}"
        )
    parameters.update(scaling)
    if "original_max_position_embeddings" in scaling and hasattr(
        config, "original_max_position_embeddings"
    ):
        config.original_max_position_embeddings = scaling["original_max_position_embeddings"]


def _set_window(file: GgufFile, config: PretrainedConfig) -> None:
    key = file.own("attention.sliding_window")
    pattern_key = key + "_pattern"
    window = file.integer(key) or None
    if window is not None and window < 0:
        raise file.refusal(f"key {key} is {window}")
    layer_types = _layer_types(file, pattern_key, config.num_hidden_layers)
    if window is None or (layer_types is not None and "sliding_attention" not in layer_types):
        if file.architecture == "gemma3" and window is None:
            raise file.refusal(f"key {key} is missing")
        # Gemma 2 files from before the key have the window that the class has, too.
        if hasattr(config, "sliding_window") and file.architecture not in _GEMMA_27B_BLOCKS:
            config.sliding_window = None
        return
    if config.model_type == "llama" and (
        file.shape("blk.0.attn_q.bias") or file.shape("blk.0.ffn_up.bias")
    ):
        raise file.refusal(f"key {key} has no place in the configuration of a Llama with biases")
    if config.model_type != "llama" and not hasattr(config, "sliding_window"):
        raise file.refusal(f"key {key} has no place in the configuration of {config.model_type}")
    config.sliding_window = window
    if hasattr(config, "use_sliding_window"):
        config.use_sliding_window = True
        config.max_window_layers = 0
        layer_types = layer_types or ["sliding_attention"] * config.num_hidden_layers
    if layer_types is not None:
        if config.model_type == "phi3" and "full_attention" in layer_types:
            raise file.refusal(f"key {pattern_key} has no place in the configuration of phi3")
        if config.model_type != "phi3":
            config.layer_types = layer_types


def _layer_types(file: GgufFile, key: str, layers: int) -> list[str] | None:
    """From a list of flags, or from a period whose last layer sees everything."""
    if file.is_list(key):
        flags = file.items(key, bool)
        if flags is None or len(flags) != layers:
            raise file.refusal(f"key {key} does not have one value for each of {layers} blocks")
    else:
        period = file.integer(key)
        if not period:
            return None
        flags = [bool((layer + 1) % period) for layer in range(layers)]
    return ["sliding_attention" if flag else "full_attention" for flag in flags]


def _set_scales(file: GgufFile, config: PretrainedConfig) -> None:
    for name in _SOFTCAPS:
        value = file.real(file.own(name))
        if value is None:
            continue
        if hasattr(config, name):
            setattr(config, name, value or None)
        elif value:
            raise file.refusal(
                f"key {file.own(name)} has no place in the configuration of {config.model_type}"
            )
    key = file.own("attention.scale")
    scale = file.real(key) or None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hasattr(config, "query_pre_attn_scalar"):
        width = head_dim
        if config.num_hidden_layers == _GEMMA_27B_BLOCKS[file.architecture]:
            width = config.hidden_size // config.num_attention_heads
        if scale is not None:
            width = round(scale**-2)
            if abs(width**-0.5 - scale) > 1e-6 * scale:
                raise file.refusal(f"key {key} is not the root of one over a whole number")
        config.query_pre_attn_scalar = width
    elif scale is not None and abs(scale - head_dim**-0.5) > 1e-6 * scale:
        raise file.refusal(f"key {key} has no place in the configuration of {config.model_type}")


def _set_experts(file: GgufFile, config: PretrainedConfig) -> None:
    for key, field in _EXPERTS:
        value = file.integer(file.own(key))
        if not value:
            continue
        if not hasattr(config, field):
            raise file.refusal(
                f"key {file.own(key)} is {value}: a mixture of experts has no place in the "
                f"configuration of {config.model_type}"
            )
        setattr(config, field, value)
    norm = file.own("expert_weights_norm")
    value = file.flag(norm)
    if value is not None:
        if hasattr(config, "norm_topk_prob"):
            config.norm_topk_prob = value
        elif value:
            raise file.refusal(f"key {norm} has no place in the configuration")


def _set_biases(file: GgufFile, config: PretrainedConfig) -> None:
    """Flags of tensors that only some models of a family have."""
    for field, tensor in (
        ("attention_bias", "blk.0.attn_q.bias"),
        ("mlp_bias", "blk.0.ffn_up.bias"),
    ):
        if hasattr(config, field):
            setattr(config, field, file.shape(tensor) is not None)
    if file.architecture == "stablelm":
        parallel = file.flag(file.own("use_parallel_residual"))
        if parallel is not None:
            config.use_parallel_residual = parallel


def _set_tokens(file: GgufFile, config: PretrainedConfig) -> None:
    """Special tokens that the file does not name are none, whatever the class would put there."""
    for field, key in (
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("pad_token_id", "padding_token_id"),
    ):
        setattr(config, field, file.integer(f"tokenizer.ggml.{key}"))
