"""ONNX Runtime, imported when it is first needed: its CPU and GPU builds exclude each other."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eoracc.errors import ArtifactError, BackendError

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

__all__ = ["CONFIG_FILE", "Decoder", "import_backend", "read_decoder"]

CONFIG_FILE = "genai_config.json"


def import_backend(name: str) -> ModuleType:
    """Import ``onnxruntime`` or ``onnxruntime_genai``.

    Raises:
      BackendError: it is not installed; the text says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        problem = "is not installed" if error.name == name else f"cannot be loaded ({error})"
        raise BackendError(
            f"{package} {problem}: pip install 'eoracc[cpu]' (or 'eoracc[gpu]')"
        ) from None


@dataclass(frozen=True)
class Decoder:
    """Where an artifact keeps its model.

    Attributes:
      model: the ONNX file.
      library: the native library with the fused op's kernel; None where there is none.
      context_length: tokens that it takes at most.
      shares_cache: whether its attention writes new keys and values into the buffers of the old.
    """

    model: Path
    library: Path | None
    context_length: int
    shares_cache: bool


def read_decoder(folder: Path) -> Decoder:
    """Read from genai_config.json what ONNX Runtime must load.

    Raises:
      ArtifactError: the file is missing or damaged.
    """
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        section = content["model"]
        decoder = section["decoder"]
        model = str(decoder["filename"])
        context_length = int(section["context_length"])
        library = decoder.get("session_options", {}).get("custom_ops_library")
        shares_cache = bool(content.get("search", {}).get("past_present_share_buffer"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: is missing: build the artifact again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(
            f"{path}: does not describe a decoder: build the artifact again"
        ) from None
    for name in filter(None, (model, library)):
        if not (folder / str(name)).resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(
                f"{path}: names '{name}', which is not in the folder: do not trust this artifact"
            )
    return Decoder(
        model=folder / model,
        library=None if library is None else folder / str(library),
        context_length=context_length,
        shares_cache=shares_cache,
    )
