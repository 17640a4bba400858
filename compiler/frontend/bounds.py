"""Bounds that a checkpoint's tensors set for the numbers in its JSON files.

transformers, tokenizers and mobius make lists and tables of these sizes before they look at a
tensor: a configuration of 10^9 layers, or a token whose id is 4 * 10^9, would take all memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.documents import VOCABULARY_BYTES
from eoracc.errors import ModelError
from eoracc.printable import printable, quoted

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TensorBounds"]

_WIDTHS = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
"""Fields that are a dimension of some tensor, or divide one."""

_LAYERS = "num_hidden_layers"

_SPARE_IDS = 1 << 20
"""Ids beyond the model's own: some tokenizers have more tokens than their model has rows. Libraries
keep a few bytes for every id up to the largest."""


@dataclass(frozen=True)
class TensorBounds:
    """What the tensors of a checkpoint allow.

    Attributes:
      largest: dimension of any tensor, usually the vocabulary.
      tensors: number of tensors.
    """

    largest: int
    tensors: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]]) -> TensorBounds:
        """The bounds of tensors of ``shapes``."""
        known = list(shapes)
        return cls(max((size for shape in known for size in shape), default=0), len(known))

    def check_config(self, path: Path, config: Mapping[str, Any]) -> None:
        """Check that the tensors can have the sizes of a configuration.

        Whether each tensor has just the right shape is found when the graph is built.

        Args:
          path: of config.json, for errors.
          config: its content.

        Raises:
          ModelError: a size is above every dimension, or there are more layers than tensors.
        """
        for name in _WIDTHS:
            size = config.get(name)
            if isinstance(size, int | float) and size > self.largest:
                raise ModelError(
                    f"{path}: field {name} is {printable(size)}, and no dimension of the weights "
                    f"is above {self.largest:,}: they are of another model, fetch both again"
                )
        layers = config.get(_LAYERS)
        if isinstance(layers, int | float) and layers > self.tensors:
            raise ModelError(
                f"{path}: field {_LAYERS} is {printable(layers)}, and the weights have "
                f"{self.tensors:,} tensors: they are of another model, fetch both again"
            )

    def check_token_files(self, folder: Path) -> None:
        """Check the ids of tokens in all files of a tokenizer.

        Args:
          folder: of the checkpoint.

        Raises:
          ModelError: a file is damaged, or an id is far above the rows of the embedding.
        """
        for name, find in _TOKEN_FILES.items():
            path = folder / name
            if not path.is_file():
                continue
            for token, index in find(CHECKPOINT.read_object(path, limit=VOCABULARY_BYTES)):
                self._check_id(path, token, index)

    def _check_id(self, path: Path, token: object, index: object) -> None:
        limit = self.largest + _SPARE_IDS
        if type(index) is not int or not 0 <= index < limit:
            raise ModelError(
                f"{path}: token '{printable(token)}' has the id {quoted(index)}, where "
                f"the model's tensors allow 0 to {limit - 1:,}: fetch it again"
            )


# --- the ids in a tokenizer's files ---------------------------------------------------------------

_Ids = Iterator[tuple[object, object]]


def _of_vocabulary(content: Mapping[str, Any]) -> _Ids:
    """vocab.json and added_tokens.json: ids by token."""
    yield from content.items()


def _of_tokenizer(content: Mapping[str, Any]) -> _Ids:
    """tokenizer.json. A vocabulary that is a list numbers its tokens itself."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        # What is no token at all is refused by the library that reads the file.
        if isinstance(token, dict) and "id" in token:
            yield token.get("content"), token["id"]


def _of_settings(content: Mapping[str, Any]) -> _Ids:
    """tokenizer_config.json: tokens by id, which is a text in JSON."""
    added = content.get("added_tokens_decoder")
    for index, token in added.items() if isinstance(added, dict) else ():
        text = token.get("content") if isinstance(token, dict) else token
        is_number = len(index) < _DIGITS and index.isascii() and index.isdigit()
        yield text, int(index) if is_number else index


_DIGITS = 20

_TOKEN_FILES: Mapping[str, Callable[[Mapping[str, Any]], _Ids]] = {
    "tokenizer.json": _of_tokenizer,
    "tokenizer_config.json": _of_settings,
    "added_tokens.json": _of_vocabulary,
    "vocab.json": _of_vocabulary,
}
