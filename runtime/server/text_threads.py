"""Threads that convert between text and tokens, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["TextThreads"]

_LONG = 1 << 14
"""Characters, or tokens, from which on a text has to wait for other long ones."""

Value = TypeVar("Value")


class TextThreads:
    """One thread for short texts and one for long ones, which may take seconds.

    Whoever sends long prompts delays others who do so, and uses one processor at most.
    """

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, thread_name_prefix="eoracc-text")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="eoracc-long-text")

    async def run(self, convert: Callable[[Any], Value], text: Any) -> Value:  # noqa: ANN401
        """``convert(text)``, in the thread for the size of ``text``.

        Args:
          convert: may take long.
          text: a text, tokens, or messages.
        """
        thread = self._long if _size(text) > _LONG else self._short
        return await asyncio.get_running_loop().run_in_executor(thread, convert, text)

    def close(self) -> None:
        """End the threads, without the work that has not begun."""
        for thread in (self._short, self._long):
            thread.shutdown(cancel_futures=True)


def _size(text: str | Sequence[Any]) -> int:
    """Characters of a text or of messages, or the number of tokens."""
    if isinstance(text, str):
        return len(text)
    return len(text) + sum(
        len(str(value))
        for message in text
        if isinstance(message, Mapping)
        for value in message.values()
    )
