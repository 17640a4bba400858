"""Load a checkpoint as the graph IR.

A source is a Hugging Face hub id, a local folder in safetensors form, or a single GGUF file, which
is converted once. mobius builds the graph (opset 24: MatMul, RMSNormalization, RotaryEmbedding,
Attention with past and present); its omissions in some families are repaired, so that the graph
equals the eager model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eoracc.compiler.frontend.files import (
    check_config_file,
    digest_files,
    find_checkpoint,
    find_tokenizer_json,
    first_line,
    weight_files,
)
from eoracc.compiler.frontend.quiet import quiet
from eoracc.compiler.frontend.repairs.repair import repair
from eoracc.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["LoadedModel", "load"]

_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A checkpoint and its graph.

    Attributes:
      model: opset 24, float32; inputs ``input_ids [B, S]``, ``attention_mask [B, P + S]``,
        ``position_ids [B, S]``, ``past_key_values.<i>.key|value [B, H, P, D]``; outputs
        ``logits [B, S, V]``, ``present.<i>.key|value``. Weights are read when they are used.
      folder: the checkpoint in safetensors form.
      config: its transformers configuration.
      digest: sha256 over config.json and the weight files, hexadecimal.
      tokenizer_json: the tokenizer.json to ship, see :mod:`eoracc.compiler.frontend.tokenizer`;
        None where the checkpoint has none.
      trust_remote_code: whether code that the checkpoint brings may run.
    """

    model: ir.Model
    folder: Path
    config: PretrainedConfig
    digest: str
    tokenizer_json: Path | None
    trust_remote_code: bool = False

    def tokenizer_files(self) -> list[Path]:
        """The files that an artifact needs to tokenize, chat and generate like the checkpoint."""
        others = (self.folder / name for name in _TOKENIZER_FILES)
        files = [path for path in others if path.is_file()]
        return files if self.tokenizer_json is None else [self.tokenizer_json, *files]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer.

        Raises:
          ModelError: the folder holds none.
        """
        from transformers import AutoTokenizer

        try:
            with quiet():
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    self.folder, trust_remote_code=self.trust_remote_code
                )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{self.folder} has no tokenizer that can be read ({first_line(error)}): "
                "add tokenizer.json and tokenizer_config.json"
            ) from error
        return tokenizer


def load(source: str, *, work: Path, trust_remote_code: bool = False) -> LoadedModel:
    """Read a checkpoint and build its graph.

    Args:
      source: hub id, local folder, or GGUF file.
      work: where a GGUF file is converted to, as ``work/source``; reused while it is the same.
      trust_remote_code: let transformers run code that the checkpoint brings.

    Raises:
      ModelError: the checkpoint is missing, damaged, or of an architecture that is not supported.
    """
    folder = find_checkpoint(source, work)
    check_config_file(folder)
    weights = weight_files(folder)
    config = _read_config(folder, trust_remote_code=trust_remote_code)
    model = _build(folder, config, trust_remote_code=trust_remote_code)
    repair(model, config, folder=folder, weight_files=weights)
    _check_finite(model)
    return LoadedModel(
        model=model,
        folder=folder,
        config=config,
        digest=digest_files([folder / "config.json", *weights]),
        tokenizer_json=find_tokenizer_json(folder, work),
        trust_remote_code=trust_remote_code,
    )


def _read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        raise ModelError(
            f"{folder / 'config.json'}: transformers cannot read a configuration of model_type "
            f"{model_type!r} ({first_line(error)})"
        ) from error
    return config


def _build(folder: Path, config: PretrainedConfig, *, trust_remote_code: bool) -> ir.Model:
    import mobius

    unsupported = (
        f"{folder}: architecture {_architecture(config)} is not supported; supported are decoders "
        "of text with a key/value cache, such as Llama, Qwen2, Qwen3, Gemma3 (text), Phi-3, "
        "Mistral and SmolLM"
    )
    if config.model_type not in mobius.registry or not _architecture(config).endswith(
        "ForCausalLM"
    ):
        raise ModelError(unsupported)
    try:
        with quiet():
            package = mobius.build(
                str(folder),
                execution_provider="onnx-standard",
                dtype="f32",
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:
        raise ModelError(
            f"{folder}: the graph of {_architecture(config)} cannot be built ({first_line(error)})"
        ) from error
    model: ir.Model | None = package.get("model") if len(package) == 1 else None
    if model is None or not {"input_ids", "logits", "present.0.key"} <= {
        str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)
    }:
        raise ModelError(unsupported)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise ModelError(
                f"{folder}: the checkpoint has no tensor {name}, which its config asks for"
            )
    model.graph.name = config.model_type  # mobius puts the local path there
    return model


def _architecture(config: PretrainedConfig) -> str:
    architectures = config.architectures or []
    return str(architectures[0]) if architectures else str(config.model_type)


def _check_finite(model: ir.Model) -> None:
    """Check that everything but the linears' weights is finite; those are checked when read."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        linear = all(use.node.op_type in ("MatMul", "Transpose") for use in value.uses())
        if linear or tensor is None or not tensor.dtype.is_floating_point():
            continue
        if not np.isfinite(tensor.numpy()).all():
            raise ModelError(f"{name} holds NaN or Inf: the checkpoint is damaged, fetch it again")
