"""Chat templates, rendered as transformers' ``apply_chat_template`` renders them, without it.

A template is a program that comes with a model, so it runs in a sandbox and sees only plain data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError

from eoracc.errors import ArtifactError, RequestError, reason
from eoracc.runtime.decode.chat_sandbox import compile_template, run_template

if TYPE_CHECKING:
    from eoracc.runtime.request import ChatOptions, Message

__all__ = ["ChatTemplate"]

_MAX_SOURCE = 1 << 20
"""Most characters of a template; those of models have a few thousand."""

_MAX_DEPTH = 100
"""Most levels of lists and dictionaries in messages, tools and variables."""

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of a message that is to be continued; transformers has the same."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message for its thoughts; templates read the first or the second."""

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


class ChatTemplate:
    """A compiled chat template. Threads may share it.

    >>> from eoracc.runtime.request import ChatOptions
    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "Hello"}], ChatOptions())
    '<user>Hello'

    Attributes:
      source: in Jinja.
    """

    def __init__(self, source: str, *, origin: str = "the chat template") -> None:
        """Compile ``source``.

        Args:
          source: in Jinja.
          origin: the file it comes from, for errors.

        Raises:
          ArtifactError: it is too long, nested too deeply, or not valid Jinja.
        """
        self.source = source
        if len(source) > _MAX_SOURCE:
            raise ArtifactError(
                f"{origin}: has {len(source):,} characters, a chat template may have "
                f"{_MAX_SOURCE:,}: replace it"
            )
        try:
            self._compiled = compile_template(source)
        # Jinja's parser recurses, and Python's compiler has limits of its own.
        except (TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise ArtifactError(
                f"{origin}: is not a Jinja template ({reason(error)}): replace it"
            ) from None

    def render(
        self,
        messages: Sequence[Message],
        options: ChatOptions,
        special_tokens: Mapping[str, str] | None = None,
    ) -> str:
        """The text of a chat, special tokens spelled out.

        Args:
          messages: at least one.
          options: see :class:`~eoracc.runtime.request.ChatOptions`; ``template`` has been applied.
          special_tokens: values of ``bos_token``, ``eos_token`` and so on.

        Raises:
          RequestError: a message is none, the template refuses the messages or does not end, or
            the last message cannot be continued.
        """
        chat = [_plain_message(message, index) for index, message in enumerate(messages)]
        if not chat:
            raise RequestError("messages: there are none: give at least one")
        for name in _RESERVED:
            if name in options.template_kwargs:
                raise RequestError(
                    f"chat_template_kwargs: '{name}' has an option of its own: use that"
                )
        if options.continue_final_message:
            field = _continued_field(options)
            final = _mark_end(chat[-1], field, self.source)
        variables = {
            **(special_tokens or {}),
            **_plain(options.template_kwargs, "chat_template_kwargs"),
            "messages": chat,
            "tools": _plain_list(options.tools, "tools"),
            "documents": _plain_list(options.documents, "documents"),
            "add_generation_prompt": options.begins_answer,
        }
        text = self._run(variables)
        return _cut_at_mark(text, final) if options.continue_final_message else text

    def _run(self, variables: Mapping[str, Any]) -> str:
        try:
            return run_template(self._compiled, variables)
        except RecursionError:
            problem = "calls itself too often"
        except Exception as error:  # noqa: BLE001 - a template may fail in any way
            problem = f"refuses them: {reason(error)}"
        raise RequestError(f"messages: the chat template {problem}")


# --- messages -------------------------------------------------------------------------------------


def _plain_message(message: object, index: int) -> dict[str, Any]:
    """A copy of a message in plain types, without fields that are None.

    Raises:
      RequestError: its role or its content is missing.
    """
    where = f"messages[{index}]"
    fields = message if isinstance(message, Mapping) else {}
    if not isinstance(fields.get("role"), str):
        raise RequestError(f"{where}: its 'role' is missing or no text")
    content = fields.get("content")
    # A call of a tool may come without words.
    wordless = content is None and fields.get("tool_calls") is not None
    if not (isinstance(content, str) or _is_parts(content) or wordless):
        raise RequestError(f"{where}: its 'content' is missing or no text")
    plain: dict[str, Any] = {
        name: value for name, value in _plain(fields, where).items() if value is not None
    }
    thoughts = next((plain[name] for name in _REASONING_FIELDS if name in plain), None)
    if thoughts is not None:
        plain = {"thinking": thoughts, **plain, "reasoning_content": thoughts}
    return plain


def _is_parts(content: object) -> bool:
    return isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content)


def _plain_list(items: Sequence[Mapping[str, Any]] | None, name: str) -> list[Any] | None:
    if items is None:
        return None
    if isinstance(items, str | Mapping) or not all(isinstance(item, Mapping) for item in items):
        raise RequestError(f"{name}: must be a list of objects")
    return [_plain(item, name) for item in items]


def _plain(value: Any, where: str, depth: int = 0) -> Any:  # noqa: ANN401 - as in JSON
    """A copy in the types of JSON: a template must not reach the methods of other objects.

    Raises:
      RequestError: it has a value of another type, or is nested too deeply.
    """
    if depth > _MAX_DEPTH:
        raise RequestError(f"{where}: is nested deeper than {_MAX_DEPTH} levels: flatten it")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item(), where)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value) if kind is not str else str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(name, where): _plain(item, where, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise RequestError(
        f"{where}: has a value of type {type(value).__name__}: use text, numbers, lists and "
        "dictionaries"
    )


# --- an unfinished last message -------------------------------------------------------------------


def _continued_field(options: ChatOptions) -> str:
    field = options.continue_final_message
    return field if isinstance(field, str) else "content"


def _mark_end(message: dict[str, Any], field: str, source: str) -> str:
    """Put the mark at the end of ``message[field]``; returns the text before it.

    Raises:
      RequestError: there is no such text, or the template does not read it.
    """
    text = message.get(field)
    copies = [field]
    if field in _REASONING_FIELDS:
        copies = [name for name in _REASONING_FIELDS if message.get(name) == text]
    if text is None or not any(name in source for name in copies):
        raise RequestError(
            f"continue_final_message: the last message has no '{field}', or the chat template does "
            "not read it"
        )
    if isinstance(text, str):
        for name in copies:
            message[name] = text + _CONTINUE_MARK
        return text
    for part in reversed(text):
        if isinstance(part.get("text"), str):
            before: str = part["text"]
            part["text"] = before + _CONTINUE_MARK
            return before
    raise RequestError("continue_final_message: the last message has no text")


def _cut_at_mark(text: str, final: str) -> str:
    """The text of a chat up to the mark.

    Raises:
      RequestError: the template has left out the last message or a part of it.
    """
    mark = _CONTINUE_MARK.strip()
    if final.strip() not in text or mark not in text:
        raise RequestError(
            "continue_final_message: the chat template leaves out the last message or a part of it"
        )
    place = text.rindex(mark)
    kept = text[:place]
    # A template that strips messages has stripped the mark's space and would have stripped theirs.
    return kept if text[place:].startswith(_CONTINUE_MARK) else kept.rstrip()
