"""The files of a checkpoint: where they are, whether they are complete, their digest.

A source is a Hugging Face hub id, a local folder in safetensors form, or a single GGUF file, which
is converted once.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from eoracc.compiler.frontend.gguf import convert
from eoracc.compiler.frontend.quiet import quiet
from eoracc.compiler.frontend.tokenizer import portable_tokenizer
from eoracc.errors import ModelError

__all__ = [
    "check_config_file",
    "digest_files",
    "find_checkpoint",
    "find_tokenizer_json",
    "first_line",
    "weight_files",
]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
_HASH_BLOCK = 1 << 20


def find_checkpoint(source: str, work: Path) -> Path:
    """The folder of a checkpoint in safetensors form, downloaded or converted if need be.

    Args:
      source: hub id, local folder, or GGUF file.
      work: a GGUF file is converted to ``work/source``.

    Raises:
      ModelError: there is no such source, or it cannot be downloaded or converted.
    """
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
            f"({first_line(error)}): check the name, the network and access rights"
        ) from error


def check_config_file(folder: Path) -> None:
    """Check that ``folder`` has a model's config.json.

    Raises:
      ModelError: it is missing, damaged, or has no model_type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{path} is not valid JSON ({first_line(error)}): fetch it again"
        ) from error
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise ModelError(f"{path} has no field model_type: it is not a model's configuration")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder``, sorted and checked for completeness.

    Raises:
      ModelError: a file is missing or damaged, or the weights are in another format.
    """
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
    """Check that the header parses and that the file has all the data that it announces.

    The layout is ``u64 header size | JSON header | data``. A reader that maps a truncated file
    would notice only when it reads the missing tensor.
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


def digest_files(files: Sequence[Path]) -> str:
    """sha256 over the content of ``files``, hexadecimal."""
    sha256 = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK):
                sha256.update(block)
    return sha256.hexdigest()


def find_tokenizer_json(folder: Path, work: Path) -> Path | None:
    """The checkpoint's tokenizer.json in portable form; None if it has none.

    Args:
      folder: the checkpoint.
      work: a converted file is written there.

    Raises:
      ModelError: the file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return portable_tokenizer(path, work)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a tokenizer's JSON: fetch it again") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of one line; else the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
