"""What generating and scoring ask of a model, whichever backend runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.runtime.decode.bank import AdapterPlaces

__all__ = ["Decoder", "Rows"]


class Decoder(Protocol):
    """A model that is ready to run. Threads may share it."""

    @property
    def context_length(self) -> int:
        """Tokens of a row at most."""

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""

    @property
    def bank(self) -> AdapterPlaces[Any]:
        """Its adapters."""

    def new_rows(self) -> Rows:
        """A cache of its own, without a row yet."""


class Rows(Protocol):
    """Texts of any lengths, their keys and values in a cache. For one thread at a time.

    Rows are numbered from 0; whose text is in which is the caller's business. The adapter of a row
    is its place in the decoder's bank, negative for none.
    """

    def length(self, row: int) -> int:
        """Tokens in the cache of ``row``."""

    def clear(self, row: int) -> None:
        """Begin a new text in ``row``."""

    def move(self, source: int, target: int) -> None:
        """Put the text of row ``source`` into row ``target``; ``source`` has none afterwards."""

    def prefill(
        self, row: int, tokens: Sequence[int], *, adapter: int, keep: int = 1
    ) -> NDArray[np.float32]:
        """Append ``tokens`` to the text of ``row``.

        Args:
          row: one that has been cleared.
          tokens: at least one; with those that are there already at most the model's context.
          adapter: its place in the bank.
          keep: of how many last tokens to give the logits.

        Returns:
          Logits, ``float32 [keep, V]``.

        Raises:
          BackendError: the run fails; the row is as it was.
        """

    def process(
        self, texts: Sequence[Sequence[int]], *, adapters: Sequence[int], keep: int
    ) -> NDArray[np.float32]:
        """Begin the first rows anew with ``texts``.

        Args:
          texts: tokens of each row, at least one each.
          adapters: a place in the bank for each.
          keep: of how many last tokens of each row to give the logits.

        Returns:
          Logits, ``float32 [len(texts), keep, V]``; those before a text's beginning are undefined.

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
          BackendError: the run fails, or memory is out; the rows are as they were.
        """
