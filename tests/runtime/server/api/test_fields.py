"""Fields that no model reads: which values are accepted, against OpenAI's client and the docs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from eoracc.errors import ApiError
from eoracc.runtime.server.api.fields import (
    MESSAGE_FIELDS,
    PART_FIELDS,
    REQUEST_FIELDS,
    STREAM_FIELDS,
    UnreadFields,
)
from eoracc.runtime.server.api.schemas import ChatCompletionRequest, CompletionRequest

FIELDS = UnreadFields(
    harmless=frozenset({"user"}),
    neutral={
        "best_of": (1,),
        "store": (False,),
        "tools": ([],),
        "audio": (),
        "response_format": ({"type": "text"},),
    },
    instead={"max_new_tokens": "use max_tokens"},
)
DOCS = Path(__file__).parents[4] / "docs/serving.md"


@pytest.mark.parametrize(
    "given",
    [
        {"user": {"any": "thing"}},
        {"best_of": 1, "store": False, "tools": []},
        {"best_of": 1.0},
        {"response_format": {"type": "text", "json_schema": None}},
        {"best_of": None, "audio": None, "max_new_tokens": None, "strange": None},
    ],
    ids=str,
)
def test_neutral_values_are_accepted(given: dict[str, Any]) -> None:
    FIELDS.check(given, known=())


@pytest.mark.parametrize(
    ("given", "text", "code"),
    [
        ({"best_of": 2}, "best_of: is not supported: leave it out or set it to 1", "unsupported"),
        (
            {"best_of": True},
            "best_of: is not supported: leave it out or set it to 1",
            "unsupported",
        ),
        ({"store": 0}, "store: is not supported: leave it out or set it to false", "unsupported"),
        ({"tools": [[]]}, "tools: is not supported: leave it out or set it to []", "unsupported"),
        ({"audio": {}}, "audio: is not supported: leave it out", "unsupported"),
        ({"max_new_tokens": 1}, "max_new_tokens: is not supported: use max_tokens", "unsupported"),
        (
            {"strange": False},
            "strange: is not a field of this request: leave it out",
            "unknown_parameter",
        ),
        (
            {"sede": 1},
            "sede: is not a field of this request: use 'seed', or leave it out",
            "unknown_parameter",
        ),
    ],
    ids=str,
)
def test_others_are_refused_by_name(given: dict[str, Any], text: str, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        FIELDS.check(given, known=("seed", "stop"))
    assert str(refused.value) == text
    assert (refused.value.status, refused.value.code) == (400, code)
    assert refused.value.param == next(iter(given))
    with pytest.raises(ApiError) as inside:
        FIELDS.check(given, known=("seed", "stop"), parent="messages.3")
    assert str(inside.value) == inside.value.param[: len("messages.3.")] + text  # type: ignore[index]


def test_long_and_unprintable_names_are_shortened_and_escaped() -> None:
    with pytest.raises(ApiError) as refused:
        FIELDS.check({"\ud800\n" + "x" * 1000: 1}, known=())
    assert refused.value.param == "\\ud800\\n" + "x" * 56 + "..."


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest])
def test_every_field_of_openai_is_known(
    model: type[CompletionRequest | ChatCompletionRequest],
) -> None:
    from openai.resources import Completions
    from openai.resources.chat import Completions as ChatCompletions

    client = Completions if model is CompletionRequest else ChatCompletions
    of_the_client = {"self", "extra_body", "extra_headers", "extra_query", "timeout"}
    fields = set(inspect.signature(client.create).parameters) - of_the_client
    assert len(fields) > 15
    known = set(model.model_fields) | model.unread.harmless | set(model.unread.neutral)
    assert fields <= known


def test_no_field_is_both_read_and_unread() -> None:
    read = set(CompletionRequest.model_fields) & set(ChatCompletionRequest.model_fields)
    assert not read & (REQUEST_FIELDS.harmless | set(REQUEST_FIELDS.neutral))
    assert not REQUEST_FIELDS.harmless & set(REQUEST_FIELDS.neutral)


def test_the_page_lists_every_field() -> None:
    page = DOCS.read_text(encoding="utf-8")
    for model in (CompletionRequest, ChatCompletionRequest):
        for name in model.model_fields:
            assert f"`{name}`" in page.partition("### Fields without support")[0], name
    section = page.partition("### Fields without support")[2].partition("\nErrors have")[0]
    requests, _, objects = section.partition("objects inside")
    assert _table(REQUEST_FIELDS) in requests
    for model in (CompletionRequest, ChatCompletionRequest):
        for name in set(model.unread.neutral) - set(REQUEST_FIELDS.neutral):
            assert f"`{name}`" in requests
    for name, fields in (
        ("messages", MESSAGE_FIELDS),
        ("parts of a message", PART_FIELDS),
        ("`stream_options`", STREAM_FIELDS),
    ):
        for row in filter(None, _table(fields).split("\n")):
            assert f"| {name} {row}\n" in objects, row


def _table(fields: UnreadFields) -> str:
    """The rows of the page: names by the values that are accepted."""
    names: dict[str, list[str]] = {"any": sorted(fields.harmless)} if fields.harmless else {}
    for name, values in sorted(fields.neutral.items()):
        cell = ", ".join(f"`{json.dumps(value)}`" for value in (None, *values))
        names.setdefault(cell, []).append(name)
    rows = [
        f"| {cell} | {', '.join(f'`{name}`' for name in group)} |" for cell, group in names.items()
    ]
    return "\n".join(sorted(rows, key=lambda row: (row[2] == "`", row.count("`"), row)))


def test_openapi_has_the_accepted_values() -> None:
    schema = CompletionRequest.model_json_schema()
    fields = schema["properties"]
    assert fields["best_of"]["enum"] == [None, 1]
    assert fields["user"] == {"description": "Accepted; has no effect."}
    assert fields["echo"]["anyOf"][0] == {"type": "boolean"}
    assert schema["additionalProperties"] == {"type": "null"}
    assert "unread" not in fields
