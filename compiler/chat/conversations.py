"""Chats that the template engines are compared on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import nodes

from eoracc.runtime.decode.chat_sandbox import parse_template
from eoracc.runtime.request import ChatOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from eoracc.runtime.request import Message

__all__ = ["Conversation", "conversations_for"]


def _tool(days: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool whose second parameter is ``days``."""
    return {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of the next days, in °C",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "its <name>"},
                    "days": days,
                },
                "required": ["city"],
            },
        },
    }


_TOOL = _tool({"type": "integer", "description": "how many"})

_NO_PARAMETERS: Mapping[str, Any] = {
    "name": "time",
    "description": "Time of day",
    "parameters": {"type": "object", "properties": {}, "required": []},
}

_CALL: Mapping[str, Any] = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln"}},
}


_SEARCHES = ("count", "find", "partition", "replace", "rsplit", "split", "startswith", "endswith")
"""Methods of a text that look for their first argument."""

_MOST_MARKS = 16


@dataclass(frozen=True)
class Conversation:
    """A chat and how it is rendered.

    Attributes:
      name: what is special about it.
      messages: plain data.
      options: of the rendering.
    """

    name: str
    messages: Sequence[Message]
    options: ChatOptions = field(default_factory=ChatOptions)


def _chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """The user and the assistant by turns, after a system message if there is one."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [
        {"role": roles[index % 2], "content": content} for index, content in enumerate(contents)
    ]


_CONVERSATIONS = (
    Conversation("one turn", _chat("Why is the sky blue?\n\n  <b>日本</b> {{ 1 }}")),
    Conversation("a system message", _chat(" Hi there \n", system="You are brief.\n")),
    Conversation("several turns", _chat("Hi", " Hello! \n", "1 + 1?", "2", "Thanks", system="S")),
    Conversation("a whole chat", _chat("Hi", "Hello!"), ChatOptions(add_generation_prompt=False)),
    Conversation(
        "thoughts inside",
        _chat("1+1?", "<think>\nadd them\n</think>\n\n2", "2+2?", "<think>4", "?"),
    ),
    Conversation(
        "thoughts beside",
        [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2", "reasoning_content": "add them"},
            {"role": "user", "content": "2+2?"},
        ],
    ),
    Conversation("switches in the system message", _chat("Hi", system="Be kind. /no_think")),
)

_WITH_TOOLS = (
    Conversation("tools", _chat("Weather?", system="You are brief."), ChatOptions(tools=[_TOOL])),
    Conversation(
        "two tools, one with several types",
        _chat("Weather?"),
        ChatOptions(tools=[_TOOL, _tool({"type": ["integer", "null"]})]),
    ),
    Conversation(
        "a tool without parameters",
        _chat("Weather?"),
        ChatOptions(tools=[{"type": "function", "function": _NO_PARAMETERS}]),
    ),
    Conversation(
        "a call of a tool",
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [_CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": '{"t": 3}'},
            {"role": "assistant", "content": "3 °C"},
            {"role": "user", "content": "Thanks"},
        ],
        ChatOptions(tools=[_TOOL]),
    ),
)


def conversations_for(sources: Sequence[str]) -> list[Conversation]:
    """The chats to compare on.

    Args:
      sources: valid templates. Chats with tools are among the chats where one of them reads tools,
        and a chat for each text that one of them looks for.
    """
    marks = dict.fromkeys(mark for source in sources for mark in _marks(source))
    conversations = [*_CONVERSATIONS]
    conversations += [
        Conversation(f"{mark!r} inside", _chat(text, text, text, system=text))
        for mark in list(marks)[:_MOST_MARKS]
        for text in (f"before{mark}after",)
    ]
    if any("tools" in source for source in sources):
        conversations += _WITH_TOOLS
    return conversations


def _marks(source: str) -> Iterator[str]:
    """Texts that a template looks for in others."""
    tree = parse_template(source)
    for comparison in tree.find_all(nodes.Compare):
        if comparison.ops[0].op in ("in", "notin"):
            yield from _texts([comparison.expr])
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEARCHES:
            yield from _texts(call.args[:1])
    for replacement in tree.find_all(nodes.Filter):
        if replacement.name == "replace":
            yield from _texts(replacement.args[:1])


def _texts(expressions: Sequence[nodes.Expr]) -> Iterator[str]:
    for expression in expressions:
        if isinstance(expression, nodes.Const) and isinstance(expression.value, str):
            yield expression.value
