"""Continuous batching: requests start and end while others are decoded.

A step processes part of a prompt and then decodes one token of every active text in one run. Each
prompt is processed alone, in chunks whose ends depend on nothing else, and its tokens are drawn
with random numbers of its own: the result of a request does not depend on other requests.

A text that outgrows the original length of a LongRoPE model is processed anew like a prompt, since
the keys in its cache have the rotary embedding of short texts.
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
"""Tokens of a prompt in one step; other texts wait for their next token meanwhile."""


class Scheduler:
    """Serves any number of requests, ``max_rows`` at a time. For one thread at a time."""

    def __init__(self, decoder: Decoder, *, max_rows: int, chunk: int = PREFILL_CHUNK) -> None:
        """Generate ``max_rows`` texts at a time and process prompts in chunks of ``chunk`` tokens.

        Raises:
          RequestError: one of the numbers is below 1.
        """
        for name, value in (("max_rows", max_rows), ("prefill_chunk", chunk)):
            if value < 1:
                raise RequestError(f"{name}: must be 1 or more, not {value}")
        self._batch = decoder.new_rows()
        self._bank = decoder.bank
        self._long_rope = decoder.long_rope
        self._max_rows = max_rows
        self._chunk = chunk
        self._waiting: deque[Continuation] = deque()
        # The first rows of the batch are in decoding; the next one is the prompt in prefill.
        self._rows: list[Continuation] = []
        self._filling: Continuation | None = None

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a row."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Number of requests that have a row."""
        return len(self._rows) + (self._filling is not None)

    def add(self, continuation: Continuation) -> None:
        """Add a request whose adapter is acquired; it is released when the request ends."""
        self._waiting.append(continuation)

    def step(self) -> bool:
        """Process some of a prompt and decode a token of every active text.

        An error in one request ends that request, and its listener gets the error.

        Returns:
          Whether requests are left.
        """
        self._drop_cancelled()
        self._process_prompts()
        self._send_back_outgrown()
        if self._rows:
            self._decode()
        return bool(self._rows or self._filling or self._waiting)

    def close(self, error: Exception | None = None) -> None:
        """End all requests that are left: as cancelled, or with ``error``."""
        left = [*self._waiting, *self._rows]
        if self._filling is not None:
            left.append(self._filling)
        self._waiting.clear()
        self._rows.clear()
        self._filling = None
        for continuation in left:
            self._end(continuation, error or continuation.end("cancelled"))

    # --- prompts ----------------------------------------------------------------------------------

    def _process_prompts(self) -> None:
        """Process about one chunk: part of a long prompt, or several short prompts."""
        budget = self._chunk
        while budget > 0:
            if self._filling is None and not self._admit():
                return
            budget -= self._fill()

    def _admit(self) -> bool:
        while self._waiting and len(self._rows) < self._max_rows:
            continuation = self._waiting.popleft()
            if continuation.finish_reason is not None:  # a limit of 0 tokens
                self._end(continuation, continuation.end(continuation.finish_reason))
                continue
            self._filling = continuation
            self._batch.clear(len(self._rows))
            return True
        return False

    def _fill(self) -> int:
        """Process a chunk of the prompt; returns its number of tokens."""
        continuation = self._filling
        assert continuation is not None  # noqa: S101 - the caller has admitted it
        row = len(self._rows)
        done = self._batch.length(row)
        text = continuation.text
        chunk = text[done : done + self._chunk]
        try:
            logits = self._batch.prefill(
                row, chunk, adapter=continuation.place, text_length=len(text)
            )
        except BackendError as error:
            self._filling = None
            self._end(continuation, error)
            return len(chunk)
        if done + len(chunk) == len(text):
            self._filling = None
            self._rows.append(continuation)
            if self._advance(continuation, logits[0]):
                self._remove(row)
        return len(chunk)

    def _send_back_outgrown(self) -> None:
        """Send rows whose next token changes their rotary embedding back to prefill."""
        if self._long_rope is None:
            return
        for row in reversed(range(len(self._rows))):
            if self._batch.length(row) == self._long_rope.original:
                self._waiting.appendleft(self._rows[row])
                self._remove(row)

    # --- decoding ---------------------------------------------------------------------------------

    def _decode(self) -> None:
        tokens = [continuation.tokens[-1] for continuation in self._rows]
        places = [continuation.place for continuation in self._rows]
        try:
            logits = self._batch.decode(tokens, places)
        except BackendError:
            ended = self._decode_singly(tokens, places)
        else:
            ended = [
                row
                for row, continuation in enumerate(self._rows)
                if self._advance(continuation, logits[row])
            ]
        for row in reversed(ended):
            self._remove(row)

    def _decode_singly(self, tokens: list[int], places: list[int]) -> list[int]:
        """Decode row by row after a failed run; only rows that fail alone end."""
        ended = []
        for row, continuation in enumerate(self._rows):
            try:
                logits = self._batch.decode([tokens[row]], [places[row]], first=row)
            except BackendError as error:
                self._end(continuation, error)
                ended.append(row)
                continue
            if self._advance(continuation, logits[0]):
                ended.append(row)
        return ended

    def _advance(self, continuation: Continuation, logits: NDArray[np.float32]) -> bool:
        """Choose a token; returns whether the text has ended."""
        try:
            piece = continuation.push(logits)
        except Exception as error:  # noqa: BLE001 - it must not reach the other requests
            self._end(continuation, error)
            return True
        if continuation.finish_reason is not None:
            assert piece is not None  # noqa: S101 - the end of a text has a piece
            self._end(continuation, piece)
            return True
        if piece is not None:
            self._notify(continuation, piece)
        return False

    # --- ends -------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for continuation in [waiting for waiting in self._waiting if waiting.cancelled]:
            self._waiting.remove(continuation)
            self._end(continuation, continuation.end("cancelled"))
        for row in reversed(range(len(self._rows))):
            if self._rows[row].cancelled:
                self._end(self._rows[row], self._rows[row].end("cancelled"))
                self._remove(row)
        if self._filling is not None and self._filling.cancelled:
            continuation, self._filling = self._filling, None
            self._end(continuation, continuation.end("cancelled"))

    def _remove(self, row: int) -> None:
        """Remove a row from decoding and close the gap."""
        last = len(self._rows) - 1
        if row < last:
            self._batch.move(last, row)
            self._rows[row] = self._rows[last]
        self._rows.pop()
        if self._filling is not None:
            self._batch.move(last + 1, last)

    def _end(self, continuation: Continuation, last: Piece | Exception) -> None:
        self._bank.release(continuation.request.adapter)
        self._notify(continuation, last)

    def _notify(self, continuation: Continuation, event: Piece | Exception) -> None:
        try:
            continuation.listener(event)
        except Exception:  # noqa: BLE001 - no caller could handle it
            continuation.cancelled = True
