"""Load a checkpoint as the graph IR.

A source is a Hugging Face hub id, a local folder in safetensors form, or a single GGUF file, which
is converted once. mobius builds the graph (opset 24: MatMul, RMSNormalization, RotaryEmbedding,
Attention with past and present); its omissions in some families are repaired, so that the graph
equals the eager model.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eoracc.compiler.frontend.bounds import TensorBounds
from eoracc.compiler.frontend.config import read_config, read_config_file
from eoracc.compiler.frontend.families import check_family
from eoracc.compiler.frontend.files import (
    check_json_files,
    check_tokenizer_json,
    digest_files,
    find_checkpoint,
)
from eoracc.compiler.frontend.generation import read_generation_config
from eoracc.compiler.frontend.graph import build_graph
from eoracc.compiler.frontend.quiet import quiet
from eoracc.compiler.frontend.repairs.repair import repair
from eoracc.compiler.frontend.tokenizer import tokenizer_advice, write_tokenizer
from eoracc.compiler.frontend.weights import is_tied, read_tensors, weight_files
from eoracc.compiler.text.limits import TokenLimits
from eoracc.documents import Reader
from eoracc.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["LoadedModel", "load"]

_TOKENIZER_FILES = (
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
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
      generation: its generation_config.json; None where it has none.
      digest: sha256 over config.json and the weight files, hexadecimal.
      trust_remote_code: whether code that the checkpoint brings may run.
    """

    model: ir.Model
    folder: Path
    config: PretrainedConfig
    generation: GenerationConfig | None
    digest: str
    trust_remote_code: bool = False

    def write_tokenizer(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[Path]:
        """Write the files that an artifact needs to tokenize, chat and generate.

        Args:
          tokenizer: of :meth:`tokenizer`.
          folder: where to write; created.

        Returns:
          The files, tokenizer.json first.

        Raises:
          ModelError: the tokenizer cannot be written, see
            :mod:`eoracc.compiler.frontend.tokenizer`.
        """
        files = write_tokenizer(tokenizer, self.folder, folder)
        for name in sorted(_TOKENIZER_FILES):
            source = self.folder / name
            if source.is_file():
                files.append(shutil.copyfile(source, folder / name))
        return files

    def limits(self) -> TokenLimits:
        """The tokens and the windows that the model takes."""
        positions = getattr(self.config, "max_position_embeddings", None)
        return TokenLimits(rows=int(self.config.vocab_size), positions=positions)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer.

        Raises:
          ModelError: the folder holds none.
        """
        from transformers import AutoTokenizer

        reader = Reader(ModelError, tokenizer_advice(self.folder))
        with reader.refusing(self.folder, "has no tokenizer that can be read"), quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code
            )
            tokenizer("a")  # some bad fields are noticed only here
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
    folder = find_checkpoint(source, work, trust_remote_code=trust_remote_code)
    content = read_config_file(folder)
    check_family(folder, content)
    check_json_files(folder)
    weights = weight_files(folder, content)
    tensors = read_tensors(weights)
    # Before other packages read these files: they trust every number in them.
    bounds = TensorBounds.of(tuple(tensor.shape) for tensor in tensors.values())
    bounds.check_config(folder / "config.json", content)
    bounds.check_token_files(folder)
    check_tokenizer_json(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    generation = read_generation_config(folder)
    config.tie_word_embeddings = is_tied(
        folder, tensors, tie_word_embeddings=bool(config.tie_word_embeddings)
    )
    model = build_graph(folder, config, tensors)
    repair(model, config, folder=folder, tensors=tensors)
    _check_finite(model)
    return LoadedModel(
        model=model,
        folder=folder,
        config=config,
        generation=generation,
        digest=digest_files([folder / "config.json", *weights]),
        trust_remote_code=trust_remote_code,
    )


def _check_finite(model: ir.Model) -> None:
    """Check that everything but the linears' weights is finite; those are checked when read."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        linear = all(use.node.op_type in ("MatMul", "Transpose") for use in value.uses())
        if linear or tensor is None or not tensor.dtype.is_floating_point():
            continue
        if not np.isfinite(tensor.numpy()).all():
            raise ModelError(f"{name} holds NaN or Inf: the checkpoint is damaged, fetch it again")
