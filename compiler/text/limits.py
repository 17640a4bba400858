"""What a model takes: tokens that its embedding has rows for, windows within its positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eoracc.errors import ConfigError, DataError
from eoracc.printable import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenLimits"]


@dataclass(frozen=True)
class TokenLimits:
    """The tokens and the windows that a model takes.

    Attributes:
      rows: of the embedding; every token is below.
      positions: most tokens of a window; None where the model has no limit.
    """

    rows: int
    positions: int | None = None

    def check_length(self, setting: str, length: int) -> None:
        """Check that windows of ``length`` tokens, which ``setting`` asks for, are not too long.

        Raises:
          ConfigError: they have more tokens than the model has positions.
        """
        if self.positions is not None and length > self.positions:
            raise ConfigError(
                f"{setting}: windows of {length} tokens are longer than the model's "
                f"{self.positions} positions (max_position_embeddings in config.json): lower it"
            )

    def check_tokens(
        self, source: str, tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Check that the embedding has a row for each of ``tokens``, which come from ``source``.

        Raises:
          DataError: a token is beyond the embedding.
        """
        highest = max(tokens, default=0)
        if highest >= self.rows:
            token = tokenizer.convert_ids_to_tokens(highest)
            raise DataError(
                f"{source}: holds {quoted(token)}, token {highest} of the tokenizer, and the "
                "model's "
                f"embedding has {self.rows} rows: take it out of the text, or build from a model "
                "whose embedding was resized to its tokenizer"
            )
