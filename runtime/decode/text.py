"""Between text and tokens: the tokenizer of an artifact, its chats, stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING

from eoracc.errors import ArtifactError, PromptTooLongError, RequestError
from eoracc.printable import printable
from eoracc.runtime.artifact.genai_files import read_special_tokens
from eoracc.runtime.decode.chat_files import Chat
from eoracc.runtime.decode.codec import Codec
from eoracc.runtime.request import ChatOptions

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.runtime.request import Message, Prompt

__all__ = ["StopStrings", "Tokenizer"]


class Tokenizer(Codec):
    """The tokenizer of an artifact, with its chats. Threads may share it.

    Attributes:
      folder: the artifact.
      begin: BOS; None if there is none.
      ends: tokens that end a text.
    """

    def __init__(self, folder: Path) -> None:
        """Open the tokenizer.

        Raises:
          ArtifactError: a file is missing or damaged.
        """
        super().__init__(folder)
        self.folder = folder
        self.begin, self.ends = read_special_tokens(folder)
        self._chat = _read_chat(folder)
        # The answers to one request have the same words.
        self._encode_words = lru_cache(maxsize=1)(self._encode_each_word)

    @property
    def beginning(self) -> int:
        """The token of an empty context: BOS, or EOS if there is no BOS."""
        return min(self.ends, default=0) if self.begin is None else self.begin

    @property
    def has_chat_template(self) -> bool:
        """Whether the artifact has a chat template."""
        return bool(self.chat.sources)

    @property
    def chat(self) -> Chat:
        """The chat templates of the artifact.

        Raises:
          ArtifactError: a file is damaged.
        """
        if isinstance(self._chat, ArtifactError):
            raise ArtifactError(str(self._chat))
        return self._chat

    def encode_prompt(
        self,
        prompt: Prompt,
        *,
        chat: bool = False,
        options: ChatOptions | None = None,
        limit: int | None = None,
    ) -> list[int]:
        """Tokens of a text or of messages; tokens are returned as they are.

        Args:
          prompt: messages go through the chat template.
          chat: treat a text as the user's turn.
          options: how messages become text; None for the defaults.
          limit: tokens that there is room for: a text that surely has more is not tokenized. The
            result may be longer all the same.

        Raises:
          PromptTooLongError: the text has more bytes than ``limit`` tokens can hold.
          RequestError: a message lacks its role or content, or the template rejects it.
          ArtifactError: a chat, and there is no chat template.
        """
        if isinstance(prompt, str):
            if not chat:
                self._check_length(prompt, limit)
                return self.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        tokens = [int(item) for item in prompt if isinstance(item, Integral)]  # NumPy's too
        if len(tokens) == len(prompt):
            return tokens
        messages = [item for item in prompt if not isinstance(item, int)]
        return self.encode_chat(messages, options, limit=limit)

    def encode_words(self, words: Iterable[str]) -> Sequence[Sequence[int]]:
        """Tokens of words, each as it is and after a blank.

        Raises:
          RequestError: a word has no tokens.
        """
        return self._encode_words(tuple(words))

    def _encode_each_word(self, words: tuple[str, ...]) -> list[list[int]]:
        encoded = []
        for word in words:
            forms = [self.encode(word, special=False)]
            if not word[:1].isspace():
                forms.append(self.encode(" " + word, special=False))
            if not all(forms):
                raise RequestError(
                    f"bad_words: '{printable(word, 64)}' has no tokens: leave it out"
                )
            encoded += forms
        return encoded

    def encode_chat(
        self,
        messages: Sequence[Message],
        options: ChatOptions | None = None,
        *,
        limit: int | None = None,
    ) -> list[int]:
        """Tokens of a chat, see :meth:`Chat.render` and :meth:`encode_prompt`."""
        text = self.chat.render(messages, options or ChatOptions())
        self._check_length(text, limit)
        # The template itself adds BOS.
        return self.encode(text, special=False)

    def _check_length(self, text: str, limit: int | None) -> None:
        if limit is None or len(text) <= limit or self.bound is None:
            return
        if self.bound.excludes(text, limit):
            raise PromptTooLongError(
                f"the prompt has {len(text)} characters, more than {limit} tokens can hold: "
                "shorten it"
            )


def _read_chat(folder: Path) -> Chat | ArtifactError:
    """Read the chat files now, since the folder may change; their error waits for a chat."""
    try:
        return Chat(folder)
    except ArtifactError as error:
        return error


class StopStrings:
    r"""Ends a text before its first stop string, and holds back what may become one.

    The result does not depend on the pieces that the text comes in: the first stop string to be
    complete counts, and the longest of those that end together.

    >>> stops = StopStrings(["\n\n"])
    >>> stops.push("one\n"), stops.push("two\n"), stops.push("\nthree"), stops.found
    ('one', '\ntwo', '', True)
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Look for ``stops``, which stay in the text if ``include`` is set."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found = False

    def push(self, text: str, *, search: bool = True) -> str:
        """Add ``text``; returns the text that is certainly before any stop string.

        Args:
          text: what follows the text of the call before.
          search: a stop string that ends in ``text`` ends the whole.
        """
        if not self._stops:
            return text
        buffer = self._held + text
        # A stop string that is held back whole ended where none was searched for.
        matches = [
            (start + len(stop), start)
            for stop in self._stops
            if search and (start := buffer.find(stop, max(0, len(self._held) - len(stop) + 1))) >= 0
        ]
        if matches:
            self._held = ""
            self.found = True
            end, start = min(matches)
            return buffer[: end if self._include else start]
        keep = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """The text held back, at the end of the whole."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
