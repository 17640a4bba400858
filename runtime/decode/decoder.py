"""The interface of a backend to generation and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.runtime.artifact.long_rope import LongRope
    from eoracc.runtime.decode.bank import AdapterPlaces

__all__ = ["Decoder", "Rows"]


class Decoder(Protocol):
    """A model that is ready to run. Threads may share it."""

    @property
    def context_length(self) -> int:
        """Tokens of a row at most."""

    @property
    def long_rope(self) -> LongRope | None:
        """At which length the rotary embedding of a text changes; None where it never does.

        A row that grows beyond it, token by token, has keys of the other embedding in its cache:
        the caller clears it and processes its text anew.
        """

    @property
    def vocabulary(self) -> int:
        """Number of logits of a token."""

    @property
    def bank(self) -> AdapterPlaces[Any]:
        """The loaded adapters."""

    def new_rows(self) -> Rows:
        """A new cache without rows."""


class Rows(Protocol):
    """Texts of any lengths with their keys and values in a cache. For one thread at a time.

    Rows are numbered from 0 and assigned to texts by the caller. The adapter of a row is a place in
    the decoder's bank, negative for none.
    """

    def length(self, row: int) -> int:
        """Tokens in the cache of ``row``."""

    def clear(self, row: int) -> None:
        """Start a new text in ``row``."""

    def move(self, source: int, target: int) -> None:
        """Move the text of row ``source`` to row ``target``; ``source`` is empty afterwards."""

    def prefill(
        self,
        row: int,
        tokens: Sequence[int],
        *,
        adapter: int,
        keep: int = 1,
        text_length: int = 0,
    ) -> NDArray[np.float32]:
        """Append ``tokens`` to the text of ``row``.

        Args:
          row: cleared before its first tokens.
          tokens: at least one; the whole text must fit the model's context.
          adapter: place in the bank.
          keep: number of last tokens to return logits of.
          text_length: tokens of the whole text, where further calls process the rest of it.

        Returns:
          Logits, ``float32 [keep, V]``.

        Raises:
          BackendError: the run fails; the row has not changed.
        """

    def process(
        self, texts: Sequence[Sequence[int]], *, adapters: Sequence[int], keep: int
    ) -> NDArray[np.float32]:
        """Start new texts in the first rows.

        Args:
          texts: tokens of each row, at least one each.
          adapters: a place in the bank for each.
          keep: number of last tokens of each row to return logits of.

        Returns:
          Logits, ``float32 [len(texts), keep, V]``; undefined before the first token of a text.

        Raises:
          BackendError: the run fails.
        """

    def decode(
        self, tokens: Sequence[int], adapters: Sequence[int], *, first: int = 0
    ) -> NDArray[np.float32]:
        """Append one token to each of ``len(tokens)`` rows.

        Args:
          tokens: of the rows ``first``, ``first + 1``, …, none of which is empty.
          adapters: a place in the bank for each.
          first: the first row.

        Returns:
          Logits, ``float32 [len(tokens), V]``, valid until the next call.

        Raises:
          BackendError: the run fails, or memory is exhausted; the rows have not changed.
        """
