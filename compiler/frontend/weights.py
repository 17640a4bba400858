"""The weights of a checkpoint: their safetensors files, and the tensors in them."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.documents import VOCABULARY_BYTES
from eoracc.errors import ModelError
from eoracc.printable import printable
from eoracc.tensor_files import read_tensor_header

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from eoracc.tensor_files import TensorEntry

__all__ = ["is_tied", "read_tensors", "weight_files"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""safetensors' names of the types that a weight in full precision may have."""

_QUANTIZED_PARTS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or fp8",
    "weight_scale_inv": "fp8",
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
    "W_q": "hqq",
}
"""Last part of the name of a tensor that only a quantized checkpoint has, and its method."""

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_ROWS = 1 << 12


def weight_files(folder: Path, config: Mapping[str, Any], *, quantized: bool = False) -> list[Path]:
    """The safetensors files of ``folder`` in the order of loading, checked for completeness.

    They are those that transformers loads: the file that ``transformers_weights`` of config.json
    names, else model.safetensors, else the files of the index. A file may be a link to anywhere, as
    in the cache of the hub; a *name* in the index may not lead out of the folder.

    Args:
      folder: the checkpoint.
      config: content of config.json.
      quantized: accept weights in codes.

    Raises:
      ModelError: a file is missing or damaged, or the weights are in another format.
    """
    named = config.get("transformers_weights")
    if named is not None:
        path = _inside(folder, named, where=f"{folder / 'config.json'}: transformers_weights")
        files = _indexed(path) if path.name.endswith(".index.json") else [path]
    elif (folder / _SINGLE).exists():
        files = [folder / _SINGLE]
    elif (folder / _INDEX).exists():
        files = _indexed(folder / _INDEX)
    else:
        raise ModelError(_without_weights(folder))
    for path in files:
        if not path.exists():
            raise ModelError(f"weight file {path} is missing: fetch the checkpoint again")
        entries = read_tensor_header(path, CHECKPOINT).tensors
        if not quantized:
            _check_types(path, entries)
    return files


def _indexed(index: Path) -> list[Path]:
    if not index.is_file():
        raise ModelError(f"weight index {index} is missing: fetch the checkpoint again")
    names = CHECKPOINT.read_object(index, limit=VOCABULARY_BYTES).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index} is not a valid safetensors index: fetch it again")
    files = {_inside(index.parent, name, where=f"{index}: weight_map") for name in names.values()}
    return sorted(files)


def _inside(folder: Path, name: object, *, where: str) -> Path:
    """``folder / name``, where ``name`` comes from the checkpoint and may be hostile."""
    if not isinstance(name, str) or not name.endswith((".safetensors", ".index.json")):
        raise ModelError(
            f"{where} names '{printable(name)}', which is no safetensors file: fetch it again"
        )
    # This class knows both separators, and drives.
    parsed = PureWindowsPath(name)
    if parsed.anchor or ".." in parsed.parts:
        raise ModelError(
            f"{where} names '{printable(name)}', which is outside of the folder and is not read: "
            "get the checkpoint from a source that you trust"
        )
    return folder.joinpath(*parsed.parts)


def _without_weights(folder: Path) -> str:
    def found(*patterns: str) -> str | None:
        return next((path.name for kind in patterns for path in sorted(folder.glob(kind))), None)

    if name := found("*.bin", "*.pt", "*.pth"):
        return (
            f"{folder} holds its weights as pickle ({name}), which is not read because "
            "unpickling runs code: convert it with save_pretrained(safe_serialization=True)"
        )
    missing = f"{folder} holds no weights: {_SINGLE} or {_INDEX} is missing"
    if name := found("*.gguf"):
        return f"{missing}: give the GGUF file itself, {folder / name}"
    if name := found("*.safetensors"):
        return f"{missing}, and {name} is not in transformers' format: convert it"
    return f"{missing}: fetch the checkpoint again"


def _check_types(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    for name in tensors:
        method = _QUANTIZED_PARTS.get(name.rpartition(".")[2])
        if method is not None:
            raise ModelError(
                f"{path}: tensor {printable(name)} belongs to a quantized checkpoint ({method}): "
                "give the model in full precision that it was made from as 'model', and this one "
                "as 'compressed'"
            )
    for name, entry in tensors.items():
        if entry.dtype not in _FLOATS:
            raise ModelError(
                f"{path}: tensor {printable(name)} is of type {printable(entry.dtype)}, and "
                "weights must be floating point: give the model in full precision"
            )


def read_tensors(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The tensors of ``files`` by name, mapped from the disk; a later file replaces a name.

    Raises:
      ModelError: a file cannot be read.
    """
    from safetensors.torch import load_file  # noqa: PLC0415 - slow to import

    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        with CHECKPOINT.refusing(path, "cannot be read"):
            tensors |= load_file(path)
    return tensors


def is_tied(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, tie_word_embeddings: bool
) -> bool:
    """Whether the output layer multiplies with the embedding.

    The tensors decide, as in transformers: a fine-tune may have a head of its own although its
    configuration still ties the two.

    Args:
      folder: the checkpoint, for messages.
      tensors: of the checkpoint.
      tie_word_embeddings: what its configuration says.

    Raises:
      ModelError: the head is not tied and the checkpoint has none.
    """
    import torch  # noqa: PLC0415 - slow to import

    embedding, head = tensors.get(_EMBEDDING), tensors.get(_HEAD)
    if head is None and embedding is not None and not tie_word_embeddings:
        raise ModelError(
            f"{folder}: the checkpoint has no tensor {_HEAD}, and its config.json does not tie the "
            "head to the embedding: set tie_word_embeddings to true there if the model is tied"
        )
    if not tie_word_embeddings or head is None or embedding is None:
        return tie_word_embeddings
    return embedding.shape == head.shape and all(
        torch.equal(embedding[start : start + _ROWS].float(), head[start : start + _ROWS].float())
        for start in range(0, len(head), _ROWS)
    )
