"""Chats, chat templates of models, and what transformers makes of them.

``runtime/decode/chat_templates`` holds templates as their models have them, some shortened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from eoracc.runtime.request import ChatOptions

__all__ = [
    "CALL",
    "CHATS",
    "OPTIONS",
    "SPECIAL_TOKENS",
    "TEMPLATES",
    "WEATHER",
    "assistant",
    "of_transformers",
    "system",
    "user",
]

TEMPLATES = {
    path.stem: path for path in (Path(__file__).parent / "runtime/decode/chat_templates").iterdir()
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Le temps qu'il fait <là>",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "days": {"type": ["integer", "null"]},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln"}},
}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str | list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"role": "assistant", "content": text, **fields}


CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("Hello <there> & 日本 {{ messages }}")],
    "system": [system("Be brief. /no_think"), user("  Hi \n")],
    "several turns": [system(" S \n"), user("a"), assistant(" b \n"), user("c"), assistant("d\n")],
    "thoughts inside": [user("1+1"), assistant("<think>\nsum\n</think>\n\n2"), user("2+2")],
    "thoughts beside": [user("1+1"), assistant("2", reasoning_content="sum"), user("2+2")],
    "a tool's answer": [
        user("Wetter?"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "name": "weather", "content": '{"t": 3}', "tool_call_id": "abcdefghi"},
        assistant("3 degrees"),
        user("thanks"),
    ],
    "roles out of order": [assistant("a"), system("b"), user("c"), user("d")],
    "parts": [user([{"type": "text", "text": "Hi "}])],
}

OPTIONS: dict[str, ChatOptions] = {
    "plain": ChatOptions(),
    "whole": ChatOptions(add_generation_prompt=False),
    "tools": ChatOptions(tools=[WEATHER]),
    "thinking": ChatOptions(template_kwargs={"enable_thinking": False, "thinking": True}),
    "continued": ChatOptions(continue_final_message=True),
    "documents": ChatOptions(
        documents=[{"title": "t", "text": "doc"}], template_kwargs={"controls": {"length": "long"}}
    ),
}


@cache
def _tokenizer() -> Any:  # noqa: ANN401 - transformers' classes are untyped
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    factory: Any = PreTrainedTokenizerFast
    return factory(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL_TOKENS)


def of_transformers(
    source: str, chat: Sequence[Mapping[str, Any]], options: ChatOptions
) -> str | None:
    """What transformers renders; None if the template raises."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = source
    try:
        return str(
            tokenizer.apply_chat_template(
                chat,
                tokenize=False,
                tools=options.tools,
                documents=options.documents,
                add_generation_prompt=options.begins_answer,
                continue_final_message=options.continue_final_message,
                **options.template_kwargs,
            )
        )
    except Exception:  # noqa: BLE001 - a template may fail in any way
        return None
