"""What a GGUF file may hold that nobody reads. Everything else that is unread is refused."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gguf.constants import MODEL_ARCH_NAMES, Keys

from eoracc.printable import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from eoracc.compiler.frontend.gguf.reading import GgufFile

__all__ = ["check_kind", "refuse_unread_keys", "refuse_unread_tensors"]

_DESCRIPTIONS = (
    # Where the model comes from, what it is called, and how it is stored: the tensors say the same.
    r"general\.(?!architecture$|sampling\.).+",
    r"quantize\.imatrix\.\w+",
    r"split\.\w+(\.count)?",
    # Defaults of samplers that generation_config.json has no field for.
    r"general\.sampling\.(sequence|xtc_\w+|penalty_last_n|mirostat\w*)",
    # Tokens of tasks other than generation, which the vocabulary holds anyway.
    r"tokenizer\.ggml\.(seperator|cls|mask|fim_\w+|prefix|suffix|middle)_token_id",
    # The same tokenizer in another form.
    r"tokenizer\.huggingface\.json",
)
_DESCRIPTION = re.compile("|".join(_DESCRIPTIONS))

_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "attention.causal": (True,),
        "attention.clamp_kqv": (0.0,),
        "attention.max_alibi_bias": (0.0,),
        "attention.output_scale": (0.0, 1.0),
        "attention.shared_kv_layers": (0,),
        "attention.temperature_length": (0,),
        "attention.temperature_scale": (0.0,),
        "embedding_scale": (0.0, 1.0),
        "expert_gating_func": (1,),  # softmax
        "expert_group_count": (0, 1),
        "expert_group_used_count": (0, 1),
        "expert_shared_count": (0, 1),
        "expert_weights_scale": (0.0, 1.0),
        "full_attention_interval": (0, 1),
        "interleave_moe_layer_step": (0, 1),
        "leading_dense_block_count": (0,),
        "logit_scale": (0.0, 1.0),
        "moe_every_n_layers": (0, 1),
        "nextn_predict_layers": (0,),
        "pooling_type": (0,),
        "residual_scale": (0.0, 1.0),
        "rope.dimension_sections": ([0, 0, 0, 0], []),
        "rope.scaling.alpha": (0.0,),
        "rope.scaling.attn_factor": (0.0, 1.0),
        "rope.scaling.yarn_attn_factor": (0.0, 1.0),
        "rope.scaling.yarn_beta_fast": (32.0,),
        "rope.scaling.yarn_beta_slow": (1.0,),
        "rope.scaling.yarn_ext_factor": (-1.0, 0.0),
        "rope.scaling.yarn_log_multiplier": (0.0,),
        "router_logit_softcapping": (0.0,),
        "tensor_data_layout": ("Meta AI original pth",),
        "use_parallel_residual": (False,),
    }
)
"""Values of the architecture's keys under which a model computes the same as without them."""

_NEUTRAL_TOKENIZER: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "tokenizer.ggml.add_sep_token": (False,),
        "tokenizer.ggml.precompiled_charsmap": ([],),
        "tokenizer.ggml.remove_extra_whitespaces": (False,),
        "tokenizer.ggml.token_type_count": (0, 1),
    }
)


def _format_namespaces() -> Iterator[str]:
    """First words of keys that the format itself defines."""
    for group in vars(Keys).values():
        if isinstance(group, type):
            for key in vars(group).values():
                if isinstance(key, str) and "." in key and not key.startswith("{arch}"):
                    yield key.split(".")[0]
    yield from MODEL_ARCH_NAMES.values()


_NAMESPACES = frozenset(_format_namespaces()) | {"quantize"}


def check_kind(file: GgufFile) -> None:
    """Check that the file is a whole language model.

    Raises:
      ModelError: it is an adapter, a projector, or a part of a split model.
    """
    kind = file.text("general.type")
    if kind not in (None, "model"):
        raise file.refusal(f"it holds no model but what GGUF calls {quoted(kind)}")
    parts = file.integer("split.count") or 1
    if parts > 1:
        number = (file.integer("split.no") or 0) + 1
        raise file.refusal(
            f"it is part {number} of {parts}",
            "merge the parts with llama-gguf-split --merge, or use the model's safetensors folder",
        )


def refuse_unread_keys(file: GgufFile) -> None:
    """Check that every key was read, describes the model only, or changes nothing.

    Keys outside the namespaces of the format belong to the tool that wrote them.

    Raises:
      ModelError: a key is none of these.
    """
    prefix = f"{file.architecture}."
    for key, value in file.unread_keys().items():
        if _DESCRIPTION.fullmatch(key) or _is_neutral(key, prefix, value):
            continue
        own = key.startswith(prefix)
        if not own and key.split(".")[0] not in _NAMESPACES:
            continue
        given = f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:40]
        raise file.refusal(f"key {key} ({given}) may change the model and cannot be carried over")


def _is_neutral(key: str, prefix: str, value: object) -> bool:
    if key.startswith(prefix):
        neutral = _NEUTRAL.get(key.removeprefix(prefix), ())
    else:
        neutral = _NEUTRAL_TOKENIZER.get(key, ())
    return any(value == choice for choice in neutral)


def refuse_unread_tensors(file: GgufFile) -> None:
    """Check that every tensor was read.

    Raises:
      ModelError: one was not.
    """
    unread = file.unread_tensors()
    if unread:
        others = f" (and {len(unread) - 1} others)" if len(unread) > 1 else ""
        raise file.refusal(
            f"tensor {unread[0]}{others} has no place in the model that transformers builds"
        )
