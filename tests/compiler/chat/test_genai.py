"""The comparison with onnxruntime-genai finds every difference and says where it begins."""

from __future__ import annotations

import pytest

from eoracc.compiler.chat.conversations import Conversation
from eoracc.compiler.chat.genai import GenaiTemplates, Rendering
from eoracc.runtime.request import ChatOptions
from tests.chats import WEATHER, user

CHAT = Conversation("a chat", [user("hi")], ChatOptions(add_generation_prompt=False))
TOOLS = Conversation("tools", [user("hi")], ChatOptions(tools=[WEATHER]))


@pytest.mark.parametrize(
    ("source", "wanted", "differences"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>hi", []),
        ("{{ messages[0].content }} ", "hi", ["a chat: ' ' instead of ''"]),
        ("{{ messages[0].content }}", "hi\n", ["a chat: '' instead of '\\n'"]),
        ("{{ add_generation_prompt }}", "True", ["a chat: 'False' instead of 'True'"]),
        ("{{ raise_exception('no') }}", "hi", ["a chat: fails: no"]),
    ],
)
def test_a_difference_is_named(source: str, wanted: str, differences: list[str]) -> None:
    engine = GenaiTemplates({"bos_token": "<s>"})
    assert engine.differences(source, [Rendering(CHAT, wanted)]) == differences


def test_tools_reach_the_template() -> None:
    engine = GenaiTemplates({})
    source = (
        "{% for tool in tools %}{{ tool.function.name | tojson }}{% endfor %}{# tools|tojson #}"
    )
    chats = [Rendering(CHAT, ""), Rendering(TOOLS, '"weather"')]
    assert engine.differences(source, chats) == []


def test_what_is_too_long_is_not_given_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GenaiTemplates({})
    monkeypatch.delattr(GenaiTemplates, "_render")
    for source in ("{{ " + "m" * 9000 + " }}", "{{ a }} " * 5000):
        (sentence,) = engine.differences(source, [Rendering(CHAT, "")])
        assert sentence == "a chat: is too long to be tried"
