"""Whether a compressed checkpoint was made from a model: configuration, tokenizer, tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.compiler.frontend.files import check_tokenizer_json, complaint
from eoracc.compiler.frontend.quiet import quiet
from eoracc.compiler.frontend.rope_parameters import rope_sections
from eoracc.documents import VOCABULARY_BYTES
from eoracc.errors import ModelError
from eoracc.printable import printable, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PretrainedConfig

    from eoracc.compiler.frontend.load import LoadedModel

__all__ = ["check_config", "check_tokenizer", "is_rounded"]

_WAY_OUT = "give the model that it was made from as 'model'"

_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "layer_norm_eps",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_experts",
    "num_experts_per_tok",
)
"""Fields of config.json that a model of the same computation has alike."""

_SECTIONS = ("quantization_config", "compression_config")
"""Fields of config.json that only a compressed checkpoint has."""

_ROUNDING = 2.0**-8
"""Of a number rounded to bfloat16, relative, with as much for a rounding before."""
_SMALLEST = 2.0**-24
"""A step of float16 below its normal numbers."""
_ROWS = 1 << 12


def check_config(loaded: LoadedModel, path: Path, content: Mapping[str, Any]) -> None:
    """Check that the two compute alike but for their weights.

    Args:
      loaded: the original.
      path: the config.json of the compressed checkpoint, for messages.
      content: of that file.

    Raises:
      ModelError: a field differs.
    """
    own = _without_compression(loaded.config, path, content)
    mine, others = dict(_fields(loaded.config)), dict(_fields(own))
    for name, value in mine.items():
        if not _alike(others.get(name), value):
            raise ModelError(
                f"{path}: {name} is {quoted(others.get(name))}, and {quoted(value)} in the "
                f"original model: {_WAY_OUT}"
            )


def _without_compression(
    original: PretrainedConfig, path: Path, content: Mapping[str, Any]
) -> PretrainedConfig:
    kind = content["model_type"]
    if kind != original.model_type:
        raise ModelError(
            f"{path}: model_type is {quoted(kind)}, and {quoted(original.model_type)} in the "
            f"original model: {_WAY_OUT}"
        )
    plain = {name: value for name, value in content.items() if name not in _SECTIONS}
    try:
        with quiet():
            return type(original).from_dict(plain)
    except Exception as error:
        raise ModelError(
            f"{path}: transformers cannot read a configuration of model_type {quoted(kind)} "
            f"({complaint(error)})"
        ) from error


def _fields(config: PretrainedConfig) -> Iterator[tuple[str, object]]:
    content = config.to_dict()
    for name in _FIELDS:
        if name in content:
            yield name, content[name]
    for number, section in enumerate(rope_sections(config)):
        for name, value in sorted(section.items()):
            yield f"rope_parameters.{number}.{name}", value


def _alike(one: object, other: object) -> bool:
    """Whether two fields are equal; numbers may have been float32 in between, as in a GGUF file."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def check_tokenizer(loaded: LoadedModel, folder: Path) -> None:
    """Check that the two read the same tokens, where the compressed checkpoint has a tokenizer.

    Args:
      loaded: the original.
      folder: the compressed checkpoint.

    Raises:
      ModelError: a token has another number.
    """
    own = folder / "tokenizer.json"
    if not own.is_file():
        return
    check_tokenizer_json(folder)
    content = CHECKPOINT.read_text(own, limit=VOCABULARY_BYTES)
    vocabulary = Tokenizer.from_str(content).get_vocab()
    for token, number in sorted(loaded.tokenizer().get_vocab().items()):
        if vocabulary.get(token, number) != number:
            raise ModelError(
                f"{own}: the token {printable(token)} has the number {vocabulary[token]}, and "
                f"{number} in the original model: {_WAY_OUT}"
            )


def is_rounded(original: NDArray[np.float32], stored: NDArray[np.float32]) -> bool:
    """Whether ``stored`` is ``original`` but for rounding to 16 bits.

    >>> is_rounded(np.float32([1, -3]), np.float32([1.003, -3])), is_rounded(
    ...     np.float32([1]), np.float32([1.01])
    ... )
    (True, False)
    """
    if original.shape != stored.shape:
        return False
    for start in range(0, len(original), _ROWS):
        rows = slice(start, start + _ROWS)
        limit = np.abs(original[rows]) * np.float32(_ROUNDING) + np.float32(_SMALLEST)
        if not (np.abs(original[rows] - stored[rows]) <= limit).all():
            return False
    return True
