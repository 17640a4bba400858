"""From a checkpoint to the graph IR.

A source is a Hugging Face hub id, a local folder in safetensors form, or a single GGUF file, which
is converted once. mobius builds the graph (opset 24: MatMul, RMSNormalization, RotaryEmbedding,
Attention with past and present); what it leaves out of a family is put right here, so that every
later stage sees a graph that equals the eager model.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mobius
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoTokenizer

from eoracc.compiler.frontend.gguf import convert
from eoracc.compiler.frontend.quiet import quiet
from eoracc.compiler.frontend.repairs import repair
from eoracc.compiler.frontend.tokenizer import portable_tokenizer
from eoracc.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["LoadedModel", "load"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
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
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
_HASH_BLOCK = 1 << 20


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
      None where
        the checkpoint has none.
      trust_remote_code: whether code that the checkpoint brings may run.
    """

    model: ir.Model
    folder: Path
    config: PretrainedConfig
    digest: str
    tokenizer_json: Path | None
    trust_remote_code: bool = False

    def tokenizer_files(self) -> list[Path]:
        """What an artifact must carry to tokenize, chat and generate as the checkpoint does."""
        others = (self.folder / name for name in _TOKENIZER_FILES)
        files = [path for path in others if path.is_file()]
        return files if self.tokenizer_json is None else [self.tokenizer_json, *files]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer.

        Raises:
          ModelError: the folder holds none.
        """
        try:
            with quiet():
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    self.folder, trust_remote_code=self.trust_remote_code
                )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{self.folder} has no tokenizer that can be read ({_first_line(error)}): "
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
    folder = _resolve(source, work)
    _check_config_file(folder)
    weight_files = _weight_files(folder)
    config = _read_config(folder, trust_remote_code=trust_remote_code)
    model = _build(folder, config, trust_remote_code=trust_remote_code)
    repair(model, config, folder=folder, weight_files=weight_files)
    _check_finite(model)
    return LoadedModel(
        model=model,
        folder=folder,
        config=config,
        digest=_digest([folder / "config.json", *weight_files]),
        tokenizer_json=_tokenizer_json(folder, work),
        trust_remote_code=trust_remote_code,
    )


# --- where the checkpoint lies --------------------------------------------------------------------


def _resolve(source: str, work: Path) -> Path:
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        return convert(path, work / "source")
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is neither a model folder nor a .gguf file")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise ModelError(
            f"model folder {path} does not exist: give a hub id, an existing folder or a GGUF file"
        )
    return _download(source)


def _download(repository: str) -> Path:
    try:
        with quiet():
            return Path(snapshot_download(repository, allow_patterns=list(_HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{repository!r} is no local folder and cannot be fetched from the hub "
            f"({_first_line(error)}): check the name, the network and access rights"
        ) from error


def _check_config_file(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{path} is not valid JSON ({_first_line(error)}): fetch it again"
        ) from error
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise ModelError(f"{path} has no field model_type: it is not a model's configuration")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder``, sorted, each one seen to be complete."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a valid safetensors index: fetch it again") from error
        files = sorted(folder / Path(name).name for name in names)
    elif (folder / _SINGLE).is_file():
        files = [folder / _SINGLE]
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt")
        )
        if pickled:
            raise ModelError(
                f"{folder} holds its weights as pickle ({pickled[0]}), which is not read because "
                "unpickling runs code: convert it with save_pretrained(safe_serialization=True)"
            )
        raise ModelError(f"{folder} holds no weights: {_SINGLE} or {_INDEX} is missing")
    for path in files:
        _check_safetensors(path)
    return files


def _check_safetensors(path: Path) -> None:
    """See that the header parses and that the data it announces is all there.

    The layout is ``u64 header size | JSON header | data``; a reader that maps the file would
    otherwise find a short one only when the missing tensor is read.
    """
    if not path.is_file():
        raise ModelError(f"weight file {path} is missing: fetch the checkpoint again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ModelError(f"{path} is truncated inside its header: fetch it again")
        try:
            header = json.loads(stream.read(length))
            data = max(
                (
                    entry["data_offsets"][1]
                    for key, entry in header.items()
                    if key != "__metadata__"
                ),
                default=0,
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(
                f"{path} has a header that is not safetensors: fetch it again"
            ) from error
    if 8 + length + data != size:
        raise ModelError(
            f"{path} is truncated: its header announces {8 + length + data} bytes, it has {size}"
            if 8 + length + data > size
            else f"{path} has {size - 8 - length - data} bytes that its header does not know"
        )


def _digest(files: Sequence[Path]) -> str:
    sha256 = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK):
                sha256.update(block)
    return sha256.hexdigest()


def _tokenizer_json(folder: Path, work: Path) -> Path | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return portable_tokenizer(path, work)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a tokenizer's JSON: fetch it again") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


# --- the graph ------------------------------------------------------------------------------------


def _read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        raise ModelError(
            f"{folder / 'config.json'}: transformers cannot read a configuration of model_type "
            f"{model_type!r} ({_first_line(error)})"
        ) from error
    return config


def _build(folder: Path, config: PretrainedConfig, *, trust_remote_code: bool) -> ir.Model:
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
            f"{folder}: the graph of {_architecture(config)} cannot be built ({_first_line(error)})"
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
    """See that everything but the linears' weights is finite; those are seen to when read."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        linear = all(use.node.op_type in ("MatMul", "Transpose") for use in value.uses())
        if linear or tensor is None or not tensor.dtype.is_floating_point():
            continue
        if not np.isfinite(tensor.numpy()).all():
            raise ModelError(f"{name} holds NaN or Inf: the checkpoint is damaged, fetch it again")
