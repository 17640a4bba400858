"""Conversion of a GGUF file to a Hugging Face folder in safetensors form, in full precision."""

from __future__ import annotations

import gc
import shutil
from typing import TYPE_CHECKING, Any

from eoracc import __version__
from eoracc.compiler.frontend.gguf.accounting import (
    check_kind,
    refuse_unread_keys,
    refuse_unread_tensors,
)
from eoracc.compiler.frontend.gguf.config import loading_config, written_config
from eoracc.compiler.frontend.gguf.generation import end_tokens, sampling
from eoracc.compiler.frontend.gguf.reading import GgufFile
from eoracc.compiler.frontend.gguf.tensors import match_tensors
from eoracc.compiler.frontend.gguf.tokenizer import read_tokenizer, read_vocabulary
from eoracc.compiler.frontend.quiet import quiet
from eoracc.compiler.kept.files import describe_file, keeping, remove
from eoracc.compiler.kept.folder import KeptFolder
from eoracc.errors import ModelError, reason
from eoracc.runtime.artifact.sync import sync_path

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

__all__ = ["convert"]

_STAMP = "source.json"
_CONVERSION = 2
"""Of the way from a file to a folder: raise it whenever a file may give another folder."""


def convert(path: Path, folder: Path) -> Path:
    """Convert the model in ``path`` to ``folder``, unless a sound conversion of it is there.

    Args:
      path: a GGUF file of any quantization that transformers can dequantize.
      folder: config.json, model.safetensors (float32), generation_config.json and the tokenizer
        are written here, under a temporary name until they are complete.

    Raises:
      ModelError: the file is missing, truncated, no GGUF, not supported by transformers, or holds
        something that changes the model and has no place in such a folder.
      ArtifactError: the disk is full or fails.
    """
    if not path.is_file():
        raise ModelError(f"GGUF file {path} does not exist")
    key = f"{path.name} {describe_file(path)['sha256']} {__version__} {_CONVERSION}"
    files = KeptFolder(folder, key).read(_STAMP)
    if files is not None and KeptFolder(folder, key).holds(files):
        return folder
    temporary = folder.with_name(f"{folder.name}.partial")
    remove(temporary)
    with keeping(temporary):
        temporary.mkdir(parents=True)
    try:
        _write(path, temporary)
        written = KeptFolder(temporary, key)
        written.write(_STAMP, written.seal(sorted(file.name for file in temporary.iterdir())))
        remove(folder)
        with keeping(folder):
            temporary.rename(folder)
            sync_path(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(path: Path, folder: Path) -> None:
    """Read everything that decides whether the file is refused before any weight is touched."""
    file = GgufFile(path)
    check_kind(file)
    vocabulary = read_vocabulary(file)
    config = loading_config(file)
    ends = end_tokens(vocabulary)
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    generation = sampling(file)
    refuse_unread_keys(file)
    match_tensors(file, config)
    refuse_unread_tensors(file)
    tokenizer = read_tokenizer(file, vocabulary)
    _write_model(path, folder, config, generation)
    with quiet():
        tokenizer.save_pretrained(folder)


def _write_model(
    path: Path, folder: Path, config: PretrainedConfig, generation: dict[str, Any]
) -> None:
    import torch  # noqa: PLC0415 - slow to import
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
            )
    except Exception as error:
        raise ModelError(
            f"{path}: transformers cannot read this GGUF file ({reason(error)})"
        ) from error
    # save_pretrained would otherwise write a checkpoint that says it is quantized.
    vars(model).update(hf_quantizer=None, is_quantized=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for field, value in generation.items():
        setattr(model.generation_config, field, value)
    written = written_config(model.config)
    with quiet():
        model.save_pretrained(folder)
        if written is not model.config:
            written.save_pretrained(folder)
    # The graph is built from the files: the torch copy must be gone before that begins.
    del model
    gc.collect()
