"""The files of a checkpoint: where they are, whether they can be parsed, their digest.

A source is a Hugging Face hub id, a local folder in safetensors form, or a single GGUF file, which
is converted once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tokenizers import Tokenizer

from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.compiler.frontend.gguf.convert import convert
from eoracc.compiler.frontend.quiet import quiet
from eoracc.documents import VOCABULARY_BYTES, Reader
from eoracc.errors import ModelError
from eoracc.printable import printable, quoted

__all__ = [
    "check_json_files",
    "check_tokenizer_json",
    "complaint",
    "digest_files",
    "find_checkpoint",
    "first_line",
]

_TOKENIZERS = Reader(ModelError, "fetch it again, or update tokenizers")

_JSON_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
"""Files that are copied to an artifact or read late in a build."""

_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt")
# Other forms of the same weights (Mistral's own, Meta's own, exported graphs), and JSON of others.
_HUB_IGNORED = ("consolidated*", "original/*", "onnx/*", "*/*.json")
_HASH_BLOCK = 1 << 20


def find_checkpoint(source: str, work: Path, *, trust_remote_code: bool = False) -> Path:
    """The folder of a checkpoint in safetensors form, downloaded or converted if need be.

    Args:
      source: hub id, optionally with ``@revision``; local folder; or GGUF file.
      work: a GGUF file is converted to ``work/source``.
      trust_remote_code: download the code that a repository of the hub brings.

    Raises:
      ModelError: there is no such source, or it cannot be downloaded or converted.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        return convert(path, work / "source")
    if path.exists():
        raise ModelError(f"{path} is neither a model folder nor a .gguf file")
    repository, _, revision = source.partition("@")
    if path.is_absolute() or source.startswith((".", "~")) or repository.count("/") != 1:
        raise ModelError(
            f"model folder {path} does not exist: give a hub id, an existing folder or a GGUF file"
        )
    patterns = [*_HUB_PATTERNS, "*.py"] if trust_remote_code else [*_HUB_PATTERNS]
    try:
        with quiet():
            folder = snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=patterns,
                ignore_patterns=[*_HUB_IGNORED],
            )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{quoted(source)} is no local folder and cannot be fetched from the hub "
            f"({first_line(error)}): check the name, the network and access rights"
        ) from error
    return Path(folder)


def check_json_files(folder: Path) -> None:
    """Check that the files beside the weights can be parsed.

    Raises:
      ModelError: a file is damaged.
    """
    for name in _JSON_FILES:
        path = folder / name
        if not path.exists():
            continue
        template = CHECKPOINT.read_object(path, limit=VOCABULARY_BYTES).get("chat_template")
        if template is not None and not _is_chat_template(template):
            raise ModelError(
                f"{path}: field chat_template is neither a template nor a list of named ones"
            )


def _is_chat_template(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(part, str) for part in value.values())
    if isinstance(value, list):
        return all(
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
            for entry in value
        )
    return isinstance(value, str)


def digest_files(files: Sequence[Path]) -> str:
    """sha256 over the content of ``files``, hexadecimal."""
    sha256 = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK):
                sha256.update(block)
    return sha256.hexdigest()


def check_tokenizer_json(folder: Path) -> None:
    """Check that the checkpoint's tokenizer.json, if it has one, is a tokenizer.

    Raises:
      ModelError: the file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    content = CHECKPOINT.read_text(path, limit=VOCABULARY_BYTES)
    with _TOKENIZERS.refusing(path, "is no tokenizer that the package tokenizers can read"):
        Tokenizer.from_str(content)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of one line; else the error's type."""
    lines = str(error).strip().splitlines()
    return printable(lines[0].rstrip(".:")) if lines else type(error).__name__


def complaint(error: BaseException) -> str:
    r"""What an error of another package complains about, on one line.

    The first line of a message of several lines is a heading where it ends with a colon.

    >>> complaint(ValueError("Validation of 'size':\n    TypeError: expected int, got str"))
    'TypeError: expected int, got str'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines = lines[1:]
    return printable(lines[0].split(" Errors: ")[0].rstrip(".:")) if lines else type(error).__name__
