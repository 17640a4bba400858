"""Every chat is rendered as transformers renders it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eoracc.errors import ArtifactError, RequestError
from eoracc.runtime.decode.chat_template import ChatTemplate
from eoracc.runtime.request import ChatOptions
from tests.chats import (
    CALL,
    CHATS,
    OPTIONS,
    SPECIAL_TOKENS,
    TEMPLATES,
    assistant,
    of_transformers,
    user,
)


def render(source: str, chat: list[Any] | None = None, **options: Any) -> str:  # noqa: ANN401
    messages = [user("hi")] if chat is None else chat
    return ChatTemplate(source).render(messages, ChatOptions(**options), SPECIAL_TOKENS)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_of_models_render_as_in_transformers(
    name: str,
) -> None:
    source = TEMPLATES[name].read_text(encoding="utf-8")
    template = ChatTemplate(source)
    rendered = 0
    for kind, chat in CHATS.items():
        for case, options in OPTIONS.items():
            wanted = of_transformers(source, chat, options)
            if wanted is None:
                with pytest.raises(RequestError):
                    template.render(chat, options, SPECIAL_TOKENS)
                continue
            assert template.render(chat, options, SPECIAL_TOKENS) == wanted, f"{kind}, {case}"
            rendered += 1
    # Some templates refuse roles out of order, tools' answers and parts.
    assert rendered >= len(CHATS) * len(OPTIONS) // 2


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        ([user("a"), assistant("b c ")], True),
        ([user("a"), assistant(" b\n")], True),
        ([user("a"), assistant("b", reasoning="c ")], "reasoning"),
        ([user("a"), assistant("b", thinking="c")], "reasoning_content"),
        ([user([{"type": "text", "text": "x "}, {"type": "image"}])], True),
        ([user([{"type": "text", "text": "x"}, {"type": "text", "text": "y "}])], True),
        ([user([{"type": "image"}])], True),
        ([user("CONTINUE_FINAL_MESSAGE_TAG a"), assistant("b")], True),
        ([user("a"), assistant("", tool_calls=[CALL])], True),
        ([user("a"), assistant(None, tool_calls=[CALL])], True),
        ([user("a")], "name"),
    ],
)
@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}<{{ m.content }}>{% endfor %}",
        "{% for m in messages %}<{{ m.content | trim }}{{ m.reasoning_content }}>{% endfor %}",
        "{% for m in messages %}<{{ m.thinking }}{{ m.content[0].text }}>{% endfor %}",
        "{% for m in messages[:-1] %}<{{ m.content }}>{% endfor %}",
        "{{ messages[0].role }}",
        "{% for part in messages[-1].content %}{{ part.text }}|{% endfor %}",
        "{% for m in messages %}{{ m.values() | join }}{% endfor %}",
        "{% for m in messages %}<{{ m.content | replace('b', '') }}>{% endfor %}",
    ],
)
def test_a_continued_message_is_left_open(
    source: str,
    chat: list[dict[str, Any]],
    field: bool | str,
) -> None:
    options = ChatOptions(continue_final_message=field)
    wanted = of_transformers(source, chat, options)
    if wanted is None:
        with pytest.raises(RequestError):
            ChatTemplate(source).render(chat, options)
    else:
        assert ChatTemplate(source).render(chat, options) == wanted


def test_an_answer_cannot_both_begin_and_continue() -> None:
    with pytest.raises(
        RequestError, match="continue_final_message: excludes add_generation_prompt"
    ):
        ChatOptions(add_generation_prompt=True, continue_final_message=True)
    assert ChatOptions().begins_answer
    assert not ChatOptions(continue_final_message=True).begins_answer
    assert not ChatOptions(add_generation_prompt=False).begins_answer


def test_variables_of_the_template() -> None:
    source = "{{ bos_token }}{{ enable_thinking }}{{ add_generation_prompt }}"
    assert render(source, template_kwargs={"enable_thinking": False}) == "<s>FalseTrue"
    # As in transformers, a variable may replace a special token, and numbers of NumPy are numbers.
    kwargs = {"bos_token": "B", "enable_thinking": np.bool_(False)}
    assert render(source, template_kwargs=kwargs) == "BFalseTrue"
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        with pytest.raises(RequestError, match=f"chat_template_kwargs: '{name}' has an option"):
            render(source, template_kwargs={name: 1})
    with pytest.raises(RequestError, match="chat_template_kwargs: has a value of type object"):
        render(source, template_kwargs={"x": [object()]})
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(
        RequestError, match="chat_template_kwargs: is nested deeper than 100 levels"
    ):
        render(source, template_kwargs={"x": nested})
    with pytest.raises(RequestError, match="tools: must be a list of objects"):
        render(source, tools=["weather"])


def test_messages_stay_as_they_are() -> None:
    chat = [user("a"), assistant("b", thinking="c", name=None)]
    before = [dict(message) for message in chat]
    source = "{% for m in messages %}{{ m.items() | list }}{% endfor %}"
    assert "name" not in render(source, chat, continue_final_message=False)
    with pytest.raises(RequestError):
        render(source, chat, continue_final_message="nothing")
    assert chat == before


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ 'a' | nonsense }}",
        "{% for %}",
        "(" * 10 + "{{" + "(" * 5000,
        "{% include %}",
    ],
)
def test_an_invalid_source_is_refused(source: str) -> None:
    with pytest.raises(ArtifactError, match=r"^the folder: is not a Jinja template"):
        ChatTemplate(source, origin="the folder")


def test_a_long_source_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"has 1,048,577 characters, .* may have 1,048,576"):
        ChatTemplate("x" * (2**20 + 1))
