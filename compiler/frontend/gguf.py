"""Conversion of a GGUF file to a Hugging Face folder in safetensors form, in full precision."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from types import MappingProxyType
from typing import TYPE_CHECKING

from gguf import GGUFReader
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from eoracc.compiler.frontend.quiet import quiet
from eoracc.compiler.frontend.tokenizer import DIGIT_PATTERN, GPT2_PATTERN
from eoracc.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["convert"]

_STAMP = "source.json"

# Patterns as their tokenizers publish them.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_PRE_TOKENIZERS = MappingProxyType(
    {
        "gpt-2": (GPT2_PATTERN,),
        "llama-bpe": (_LLAMA3_SPLIT,),
        "qwen2": (_QWEN2_SPLIT,),
        "smollm": (DIGIT_PATTERN, GPT2_PATTERN),
    }
)
"""The patterns that split text, applied one after the other, by ``tokenizer.ggml.pre``."""


def convert(path: Path, folder: Path) -> Path:
    """Convert the model in ``path`` to ``folder``, unless the same file has been converted already.

    Args:
      path: a GGUF file of any quantization that transformers can dequantize.
      folder: config.json, model.safetensors (float32) and the tokenizer are written here, under a
        temporary name until they are complete.

    Raises:
      ModelError: the file is missing, truncated, no GGUF, or not supported by transformers.
    """
    if not path.is_file():
        raise ModelError(f"GGUF file {path} does not exist")
    stamp = {"file": path.name, "sha256": _sha256(path)}
    if _read_stamp(folder) == stamp:
        return folder
    pre_tokenizer = _pre_tokenizer(path)
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(path, temporary, pre_tokenizer)
        (temporary / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_stamp(folder: Path) -> object:
    try:
        return json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _pre_tokenizer(path: Path) -> PreTokenizer | None:
    """The pre-tokenizer that the file names; None where its tokenizer has none (SentencePiece).

    transformers reads the merges but not ``tokenizer.ggml.pre``, so that digits and contractions
    would be split as GPT-2 splits them whatever the model was trained with.
    """
    try:
        reader = GGUFReader(path)
        kind = reader.get_field("tokenizer.ggml.model")
        name = reader.get_field("tokenizer.ggml.pre")
    except Exception as error:
        raise ModelError(
            f"{path} is not a complete GGUF file: it is truncated or damaged, fetch it again"
        ) from error
    if kind is None:
        raise ModelError(f"{path} carries no tokenizer: use the model's safetensors folder instead")
    if kind.contents() != "gpt2":
        return None
    pre = "default" if name is None else str(name.contents())
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"{path}: its pre-tokenizer {pre!r} is not known (known: "
            f"{', '.join(_PRE_TOKENIZERS)}): use the model's safetensors folder instead"
        )
    splits = [Split(Regex(pattern), "isolated") for pattern in _PRE_TOKENIZERS[pre]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _write(path: Path, folder: Path, pre_tokenizer: PreTokenizer | None) -> None:
    import torch  # noqa: PLC0415 - slow to import
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise ModelError(f"{path}: transformers cannot read this GGUF file ({error})") from error
    # save_pretrained would otherwise write a checkpoint that says it is quantized.
    vars(model).update(hf_quantizer=None, is_quantized=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # The graph is built from the files: the torch copy must be gone before that begins.
    del model
    gc.collect()
