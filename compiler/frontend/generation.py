"""The checkpoint's generation_config.json: special tokens and search defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.compiler.frontend.files import complaint
from eoracc.compiler.frontend.quiet import quiet
from eoracc.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import GenerationConfig

__all__ = ["read_generation_config"]

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NUMBERS = ("temperature", "top_k", "top_p", "repetition_penalty")


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The content of generation_config.json, None where the checkpoint has none.

    Raises:
      ModelError: it is damaged, or a field that an artifact takes over has another type.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    _check_types(path, CHECKPOINT.read_object(path))
    from transformers import GenerationConfig

    try:
        with quiet():
            return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # what its fields raise
        raise ModelError(f"{path}: transformers cannot read it ({complaint(error)})") from error


def _check_types(path: Path, content: dict[str, Any]) -> None:
    for name, value in content.items():
        if name in _TOKENS:
            tokens = value if isinstance(value, list) and value else [value]
            fits = all(type(token) is int for token in tokens)
            wanted = "a token's number, or a list of them"
        elif name in _NUMBERS:
            fits, wanted = type(value) in (int, float), "a number"
        elif name == "do_sample":
            fits, wanted = type(value) is bool, "true or false"
        else:
            continue
        if value is not None and not fits:
            raise ModelError(f"{path}: field {name} is {value!r}: it must be {wanted}")
