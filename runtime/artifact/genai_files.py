"""genai_config.json: the files that ONNX Runtime loads, the model's limits and special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.printable import printable
from eoracc.runtime.artifact.manifest import Manifest, leads_outside, read_listed

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CONFIG_FILE", "ModelFiles", "read_model_files", "read_special_tokens"]

CONFIG_FILE = "genai_config.json"

_READER = Reader(ArtifactError, "build the artifact again")


@dataclass(frozen=True)
class ModelFiles:
    """The model of an artifact for ONNX Runtime.

    Attributes:
      model: the ONNX file.
      library: the native library with the kernel of the fused op; None if there is none.
      context_length: most tokens of a text.
      shares_cache: whether attention writes new keys and values into the buffers of the past.
    """

    model: Path
    library: Path | None
    context_length: int
    shares_cache: bool


def read_model_files(folder: Path, manifest: Manifest | None = None) -> ModelFiles:
    """Read the files that ONNX Runtime must load from genai_config.json.

    Args:
      folder: the artifact, or what a build has written of it.
      manifest: of the artifact, which must list the files; None before there is one.

    Raises:
      ArtifactError: the file is missing or damaged.
    """
    path = folder / CONFIG_FILE
    if manifest is None:
        content = _READER.read_object(path)
    else:
        listed = read_listed(folder, manifest, CONFIG_FILE)
        content = _READER.as_object(_READER.parse(listed, path), path)
    with _READER.refusing_form(path, "does not describe a decoder"):
        section = content["model"]
        decoder = section["decoder"]
        model = decoder["filename"]
        context_length = int(section["context_length"])
        library = decoder.get("session_options", {}).get("custom_ops_library")
        shares_cache = bool(content.get("search", {}).get("past_present_share_buffer"))
        names = [model] if library is None else [model, library]
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError(names)
    for name in names:
        if leads_outside(folder / name, folder):
            raise ArtifactError(
                f"{path}: names '{printable(name)}', which is not in the folder: do not trust this "
                "artifact"
            )
        if manifest is not None and name not in manifest.files:
            raise ArtifactError(
                f"{path}: names '{printable(name)}', which manifest.json does not list: do not "
                "trust this artifact"
            )
    return ModelFiles(
        model=folder / model,
        library=None if library is None else folder / library,
        context_length=context_length,
        shares_cache=shares_cache,
    )


def read_special_tokens(folder: Path) -> tuple[int | None, frozenset[int]]:
    """BOS, None if there is none, and the tokens that end a text.

    Raises:
      ArtifactError: the file is missing or damaged.
    """
    path = folder / CONFIG_FILE
    content = _READER.read_object(path)
    with _READER.refusing_form(path, "names no special tokens"):
        section = content["model"]
        begin, ends = section.get("bos_token_id"), section.get("eos_token_id", [])
        tokens = [int(token) for token in (ends if isinstance(ends, list) else [ends])]
        return (None if begin is None or int(begin) < 0 else int(begin)), frozenset(tokens)
