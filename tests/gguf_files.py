"""Writes random checkpoints as GGUF, laid out as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["BYTES", "VOCABULARY", "write_gguf"]

BYTES = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = [*SPECIAL, *BYTES, "ĊĊ", "12"]
_MERGES = ["Ċ Ċ", "1 2"]

_MODEL_TYPES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "ministral": "llama",
    "nemotron": "nemotron",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "stablelm": "stablelm",
}
_WITH_OFFSET = ("gemma2", "gemma3", "nemotron")
"""Norms are stored as ``1 + w``."""


def write_gguf(
    path: Path,
    checkpoint: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    tokens: Sequence[str] = VOCABULARY,
    types: Sequence[int] | None = None,
    merges: Sequence[str] = _MERGES,
) -> Path:
    """Write a checkpoint as float32 GGUF.

    Args:
      path: the file.
      checkpoint: a folder with config.json and model.safetensors.
      keys: more keys, or other values; ``{arch}`` stands for the architecture. None leaves a key
        out, a pair ``(value, type)`` gives the type of its value.
      tensors: more tensors, or other values; None leaves a tensor out.
      tokens: the vocabulary.
      types: of its tokens; the first three are control tokens by default.
      merges: of the byte-level tokenizer.

    Returns:
      ``path``.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    architecture = _MODEL_TYPES[config["model_type"]]
    content: dict[str, Any] = {
        **_shape(config, architecture),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": list(types or [3] * 3 + [1] * (len(tokens) - 3)),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    for key, value in (keys or {}).items():
        content[key.format(arch=architecture)] = value
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in content.items():
        if value is not None:
            _add(writer, key, value)
    stored = _tensors(checkpoint, config, architecture)
    for name, tensor in {**stored, **(tensors or {})}.items():
        if tensor is not None:
            writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shape(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    parameters = config["rope_parameters"]
    parameters = parameters.get("full_attention", parameters)
    rotated = round(head_dim * parameters.get("partial_rotary_factor", 1.0))
    epsilon = next(
        config[name] for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps") if name in config
    )
    norm = "layer_norm" if architecture in ("nemotron", "stablelm") else "layer_norm_rms"
    shape = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        f"attention.{norm}_epsilon": float(epsilon),
        "rope.dimension_count": rotated,
        "rope.freq_base": float(parameters["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    return {f"{architecture}.{key}": value for key, value in shape.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:  # noqa: ANN401
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
        list: gguf.GGUFValueType.ARRAY,
    }
    if isinstance(value, tuple):
        value, kind = value
    else:
        kind = kinds[type(value)]
    writer.add_key_value(key, value, kind)


def _tensors(checkpoint: Path, config: dict[str, Any], architecture: str) -> dict[str, Any]:
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    stored: dict[str, Any] = {}
    experts: dict[str, dict[int, Any]] = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        value = tensor
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            # GGUF pairs neighbours for the rotary embedding, transformers pairs halves.
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            halves = value.reshape(heads, 2, -1, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(tensor.shape)
        if architecture in _WITH_OFFSET and name.endswith("norm.weight"):
            value = value + 1
        if name.endswith("shared_expert_gate.weight"):
            value = value[0]
        stem, _, suffix = name.rpartition(".")
        if ".experts." in stem:  # stacked, in the order of the experts
            layer, kind = stem.split(".")[2], stem.split(".")[-1].removesuffix("_proj")
            stacked = experts.setdefault(f"blk.{layer}.ffn_{kind}_exps.weight", {})
            stacked[int(stem.split(".")[-2])] = value
        else:
            stored[f"{names.get_name(stem)}.{suffix}"] = value
    for name, stacked in experts.items():
        stored[name] = np.stack([stacked[index] for index in sorted(stacked)])
    return stored
