"""Read a checkpoint's config.json, and refuse what no graph can be built from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.compiler.frontend.files import complaint
from eoracc.compiler.frontend.quiet import quiet
from eoracc.compiler.frontend.rope_parameters import rope_sections
from eoracc.errors import ModelError
from eoracc.printable import printable, quoted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PretrainedConfig

__all__ = ["TOKEN_FIELDS", "check_token_field", "read_config", "read_config_file"]

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)

_MOST_POSITIONS = 1 << 22
"""The graph has a table of all positions: 2 GB for heads of 128 columns."""

TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json and generation_config.json that name tokens."""

_MOST_TOKENS = 1 << 10
"""Of a list: a model has a handful of end tokens."""

_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "attention_factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
)


def read_config_file(folder: Path, *, quantized: bool = False) -> dict[str, Any]:
    """The content of ``folder``'s config.json.

    Args:
      folder: the checkpoint.
      quantized: accept that of a quantized model.

    Raises:
      ModelError: it is missing, damaged, or not the configuration of a model in full precision.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        # transformers would load the model that the adapter was trained on, not this folder's.
        raise ModelError(
            f"{folder} holds an adapter of PEFT (adapter_config.json): merge it into its model "
            "with merge_and_unload and save that, or remove the file where that has been done"
        )
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    content = CHECKPOINT.read_object(path)
    if not isinstance(content.get("model_type"), str):
        raise ModelError(f"{path} has no field model_type: it is not a model's configuration")
    if not quantized:
        _refuse_quantized(path, content)
    for name in _SIZES:
        size = content.get(name)
        if isinstance(size, int | float) and not 1 <= size < math.inf:
            raise ModelError(
                f"{path}: field {name} is {printable(size)}: it must be a positive number"
            )
    positions = content.get("max_position_embeddings")
    if isinstance(positions, int | float) and positions > _MOST_POSITIONS:
        raise ModelError(
            f"{path}: field max_position_embeddings is {printable(positions)}: lower it to the "
            f"length that is needed, {_MOST_POSITIONS} at most"
        )
    for name in TOKEN_FIELDS:
        if content.get(name) is not None:
            check_token_field(path, name, content[name])
    return content


def check_token_field(path: Path, name: str, value: object) -> None:
    """Check a field that names a token, or several.

    Args:
      path: of the file, for errors.
      name: of the field.
      value: of the field; -1 stands for no token.

    Raises:
      ModelError: it is neither a token's number nor a list of them.
    """
    if value == []:
        raise ModelError(f"{path}: field {name} is an empty list: name a token, or null")
    tokens = value if isinstance(value, list) else [value]
    if len(tokens) > _MOST_TOKENS or not all(
        type(token) is int and -1 <= token < 1 << 31 for token in tokens
    ):
        raise ModelError(
            f"{path}: field {name} is {quoted(value)}: it must be a token's number, or a "
            "list of them"
        )


def _refuse_quantized(path: Path, content: Mapping[str, Any]) -> None:
    # compression_config is the older name in compressed-tensors.
    for name in ("quantization_config", "compression_config"):
        section = content.get(name)
        if section is None:
            continue
        fields = section if isinstance(section, dict) else {}
        method = fields.get("quant_method")
        if method is None and any(key.startswith("load_in_") for key in fields):
            method = "bitsandbytes"
        said = f"quant_method {quoted(method)}" if method is not None else "no quant_method"
        raise ModelError(
            f"{path}: the checkpoint is quantized already ({name} with {said}): give the model in "
            "full precision that it was made from as 'model', and this one as 'compressed'"
        )


def read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The transformers configuration of a checkpoint, see :func:`read_config_file`.

    Args:
      folder: the checkpoint.
      trust_remote_code: let transformers run code that the checkpoint brings.

    Raises:
      ModelError: transformers cannot read it, or its sizes contradict each other.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    content = read_config_file(folder)
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise ModelError(
            f"{path}: transformers cannot read a configuration of model_type "
            f"{quoted(content['model_type'])} ({complaint(error)})"
        ) from error
    _check_numbers(path, config)
    heads = getattr(config, "num_attention_heads", None)
    keys = getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(keys, int) and heads % keys:
        raise ModelError(
            f"{path}: num_attention_heads, {heads}, is no multiple of num_key_value_heads, {keys}"
        )
    return config


def _check_numbers(path: Path, config: PretrainedConfig) -> None:
    """Check numbers that transformers takes as they are and that would make tables of NaN."""
    fields = config.to_dict()
    for name, value in fields.items():
        is_epsilon = name.endswith(("norm_eps", "norm_epsilon"))
        if is_epsilon and value is not None and not (_is_number(value) and 0 <= value < math.inf):
            raise ModelError(
                f"{path}: field {name} is {quoted(value)}: it must be a number, and not negative"
            )
    for section in (fields.get("rope_parameters") or {}, *rope_sections(config)):
        if not isinstance(section, dict):
            raise ModelError(
                f"{path}: field rope_parameters is {quoted(section)}: it must be an object"
            )
        for name in _ROPE_NUMBERS:
            value = section.get(name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ModelError(
                    f"{path}: {name} of the rotary embedding is {quoted(value)}: it must "
                    "be a positive number"
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
