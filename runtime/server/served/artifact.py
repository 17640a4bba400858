"""Open an artifact for serving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from eoracc.runtime.decode.codec import TOKENIZER_FILE
from eoracc.runtime.engine import Engine
from eoracc.runtime.model import LoadOptions, Model, load
from eoracc.runtime.server.api.token_bytes import token_bytes
from eoracc.runtime.server.service import ServedModel

__all__ = ["open_artifact"]

_FINGERPRINT_LENGTH = 12


def open_artifact(
    folder: Path,
    *,
    rows: int,
    context_length: int | None = None,
    on_load: Callable[[Model], None] = lambda _: None,
    **options: Unpack[LoadOptions],
) -> ServedModel:
    """Verify the artifact in ``folder``, load it and start its engine.

    Args:
      folder: the artifact.
      rows: texts that are generated at a time.
      context_length: most tokens of a prompt and its answer; None for the model's context. Bounds
        the memory of the key/value cache.
      on_load: called with the model once it is loaded.
      **options: of :func:`eoracc.runtime.load`.

    Raises:
      ArtifactError: the folder is damaged, no artifact, not the one asked for, or not trusted.
      BackendError: a package, a driver or a GPU is missing, or the backend rejects the model.
    """
    options.setdefault("own_memory", True)
    model = load(folder, **options)
    on_load(model)
    engine = Engine(model, max_rows=rows, max_tokens=context_length)
    _ = model.tokenizer.bound  # found out now rather than during a request
    return ServedModel(
        engine=engine,
        rows=rows,
        is_alive=lambda: engine.alive,
        codec=model.tokenizer,
        token_bytes=token_bytes(model.tokenizer.to_json(), folder / TOKENIZER_FILE),
        context_length=min(context_length or model.context_length, model.context_length),
        adapters=model.adapters,
        fingerprint=f"fp_{model.manifest.digest[:_FINGERPRINT_LENGTH]}",
        folder=model.folder_watch,
        close=lambda: engine.close(drain=False),
    )
