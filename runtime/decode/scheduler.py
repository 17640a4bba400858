"""Continuous batching: requests come and go while others are decoded.

A step processes some of a prompt and then decodes one token of every text that is being made, all
in one run. A prompt is processed by itself and in chunks whose ends it alone decides, and its
tokens are drawn with numbers of its own: what comes out does not depend on what else is served.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from eoracc.errors import BackendError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.runtime.decode.continuation import Continuation
    from eoracc.runtime.decode.decoder import Decoder
    from eoracc.runtime.request import Piece

__all__ = ["PREFILL_CHUNK", "Scheduler"]

PREFILL_CHUNK = 256
"""Tokens of a prompt that are processed at once, while others wait for their next token."""


class Scheduler:
    """Serves any number of requests, so many at a time. For one thread at a time."""

    def __init__(self, decoder: Decoder, *, max_rows: int, chunk: int = PREFILL_CHUNK) -> None:
        """``max_rows`` texts are made at a time, prompts processed ``chunk`` tokens at a time.

        Raises:
          RequestError: one of them is below 1.
        """
        for name, value in (("max_rows", max_rows), ("prefill_chunk", chunk)):
            if value < 1:
                raise RequestError(f"{name}: must be 1 or more, not {value}")
        self._batch = decoder.new_rows()
        self._bank = decoder.bank
        self._max_rows = max_rows
        self._chunk = chunk
        self._waiting: deque[Continuation] = deque()
        # The first rows of the batch are decoded; behind them is the prompt that is processed.
        self._rows: list[Continuation] = []
        self._filling: Continuation | None = None

    @property
    def waiting(self) -> int:
        """Requests whose prompt nobody has looked at yet."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that have a row."""
        return len(self._rows) + (self._filling is not None)

    def add(self, continuation: Continuation) -> None:
        """Take a request in; its adapter is acquired, and released when it ends."""
        self._waiting.append(continuation)

    def step(self) -> bool:
        """Do the least that brings every active request forward.

        Whatever goes wrong with a request ends that request: its listener gets the error.

        Returns:
          Whether there is anything left to do.
        """
        self._drop_cancelled()
        self._process_prompts()
        if self._rows:
            self._decode()
        return bool(self._rows or self._filling or self._waiting)

    def close(self, error: Exception | None = None) -> None:
        """End whatever is left: as cancelled, or with ``error``."""
        left = [*self._waiting, *self._rows]
        if self._filling is not None:
            left.append(self._filling)
        self._waiting.clear()
        self._rows.clear()
        self._filling = None
        for one in left:
            self._end(one, error or one.end("cancelled"))

    # --- prompts ----------------------------------------------------------------------------------

    def _process_prompts(self) -> None:
        """Process about a chunk: one of a long prompt, or several short prompts."""
        budget = self._chunk
        while budget > 0:
            if self._filling is None and not self._admit():
                return
            budget -= self._fill()

    def _admit(self) -> bool:
        while self._waiting and len(self._rows) < self._max_rows:
            one = self._waiting.popleft()
            if one.finish_reason is not None:  # it asks for no tokens at all
                self._end(one, one.end(one.finish_reason))
                continue
            self._filling = one
            self._batch.clear(len(self._rows))
            return True
        return False

    def _fill(self) -> int:
        """Process a chunk of the prompt; how many tokens that were."""
        one = self._filling
        assert one is not None  # noqa: S101 - the caller has admitted it
        row = len(self._rows)
        done = self._batch.length(row)
        chunk = one.prompt[done : done + self._chunk]
        try:
            logits = self._batch.prefill(row, chunk, adapter=one.place)
        except BackendError as error:
            self._filling = None
            self._end(one, error)
            return len(chunk)
        if done + len(chunk) == len(one.prompt):
            self._filling = None
            self._rows.append(one)
            if self._advance(one, logits[0]):
                self._remove(row)
        return len(chunk)

    # --- decoding ---------------------------------------------------------------------------------

    def _decode(self) -> None:
        tokens = [one.tokens[-1] for one in self._rows]
        places = [one.place for one in self._rows]
        try:
            logits = self._batch.decode(tokens, places)
        except BackendError:
            ended = self._decode_singly(tokens, places)
        else:
            ended = [row for row, one in enumerate(self._rows) if self._advance(one, logits[row])]
        for row in reversed(ended):
            self._remove(row)

    def _decode_singly(self, tokens: list[int], places: list[int]) -> list[int]:
        """After a run has failed: whoever fails by itself is to blame, nobody else."""
        ended = []
        for row, one in enumerate(self._rows):
            try:
                logits = self._batch.decode([tokens[row]], [places[row]], first=row)
            except BackendError as error:
                self._end(one, error)
                ended.append(row)
                continue
            if self._advance(one, logits[0]):
                ended.append(row)
        return ended

    def _advance(self, one: Continuation, logits: NDArray[np.float32]) -> bool:
        """Make a token; whether the text has ended."""
        try:
            piece = one.push(logits)
        except Exception as error:  # noqa: BLE001 - it must not reach the other requests
            self._end(one, error)
            return True
        if one.finish_reason is not None:
            assert piece is not None  # noqa: S101 - an end is a piece
            self._end(one, piece)
            return True
        if piece is not None:
            self._tell(one, piece)
        return False

    # --- ends -------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for one in [one for one in self._waiting if one.cancelled]:
            self._waiting.remove(one)
            self._end(one, one.end("cancelled"))
        for row in reversed(range(len(self._rows))):
            if self._rows[row].cancelled:
                self._end(self._rows[row], self._rows[row].end("cancelled"))
                self._remove(row)
        if self._filling is not None and self._filling.cancelled:
            one, self._filling = self._filling, None
            self._end(one, one.end("cancelled"))

    def _remove(self, row: int) -> None:
        """Close the gap in the rows that are decoded."""
        last = len(self._rows) - 1
        if row < last:
            self._batch.move(last, row)
            self._rows[row] = self._rows[last]
        self._rows.pop()
        if self._filling is not None:
            self._batch.move(last + 1, last)

    def _end(self, one: Continuation, last: Piece | Exception) -> None:
        self._bank.release(one.request.adapter)
        self._tell(one, last)

    def _tell(self, one: Continuation, event: Piece | Exception) -> None:
        try:
            one.listener(event)
        except Exception:  # noqa: BLE001 - a listener that fails has nobody to tell
            one.cancelled = True
