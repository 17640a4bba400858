"""The checkpoint's generation_config.json: special tokens and search defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eoracc.compiler.frontend.config import TOKEN_FIELDS, check_token_field
from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.compiler.frontend.files import complaint
from eoracc.compiler.frontend.quiet import quiet
from eoracc.errors import ModelError
from eoracc.printable import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import GenerationConfig

__all__ = ["read_generation_config"]

_NUMBERS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 1e6),
    "top_k": (-1, 1e9),
    "top_p": (0, 1e6),
    "repetition_penalty": (0, 1e6),
}
"""Search defaults that an artifact takes over, with the range of each. -1 and 0 turn top_k off."""


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The content of generation_config.json, None where the checkpoint has none.

    Raises:
      ModelError: it is damaged, or a field that an artifact takes over has a value of another type
        or range.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    _check_fields(path, CHECKPOINT.read_object(path))
    from transformers import GenerationConfig

    try:
        with quiet():
            return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # what its fields raise
        raise ModelError(f"{path}: transformers cannot read it ({complaint(error)})") from error


def _check_fields(path: Path, content: dict[str, Any]) -> None:
    """Check the fields that an artifact takes over."""
    for name, value in content.items():
        if value is None:
            continue
        if name in TOKEN_FIELDS:
            check_token_field(path, name, value)
        elif name in _NUMBERS:
            low, high = _NUMBERS[name]
            # Compared as it is: whole numbers of JSON have no limit, and NaN is in no range.
            if type(value) not in (int, float) or not low <= value <= high:
                raise ModelError(
                    f"{path}: field {name} is {quoted(value)}: it must be a number from "
                    f"{low:g} to {high:g}"
                )
        elif name == "do_sample" and type(value) is not bool:
            raise ModelError(f"{path}: field {name} is {quoted(value)}: it must be true or false")
