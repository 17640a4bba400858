"""Bodies that are accepted or refused, by the server and by its OpenAPI schema."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from eoracc.runtime.server.api.schemas import ChatCompletionRequest, CompletionRequest, Fields
from tests.runtime.server.fake import CHAT, COMPLETIONS, HI, JSON, Server, run

REFUSED: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (COMPLETIONS, {}, 400, "prompt", "prompt: field required"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "the prompt is empty: give some text"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "prompt: must be a string, a list of strings"),
    (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt", "prompt: must be a string"),
    (COMPLETIONS, {"prompt": [[1], []]}, 400, "prompt", "prompt: must be a string"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "prompt: must be a string"),
    (COMPLETIONS, {"prompt": [True]}, 400, "prompt", "prompt: must be a string"),
    (COMPLETIONS, {"prompt": [300]}, 400, "prompt", "prompt: there is no token 300"),
    (COMPLETIONS, {"prompt": "\ud800"}, 400, "prompt", "prompt: is not valid Unicode"),
    (COMPLETIONS, {"prompt": "a", "model": "gpt-5"}, 404, "model", "the model 'gpt-5' is not"),
    (COMPLETIONS, {"prompt": "a", "model": "\ud800"}, 400, "model", "model: is not valid Unicode"),
    (COMPLETIONS, {"prompt": "a" * 100}, 400, "prompt", "the prompt has 100 tokens, 99 are"),
    (COMPLETIONS, {"prompt": "a" * 90, "max_tokens": 11}, 400, "max_tokens", "ask for 10 at most"),
    (COMPLETIONS, {"prompt": "a", "temperature": 3}, 400, "temperature", "less than or equal to 2"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, 400, "temperature", "valid number"),
    (
        COMPLETIONS,
        {"prompt": "a", "n": 9},
        400,
        "n",
        "n: 9 answers exceed the limit of 8: ask for fewer",
    ),
    (COMPLETIONS, {"prompt": "a", "n": 0}, 400, "n", "greater than or equal to 1"),
    (COMPLETIONS, {"prompt": "a", "n": True}, 400, "n", "valid integer"),
    (COMPLETIONS, {"prompt": "a", "seed": 2**64}, 400, "seed", "seed: "),
    (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, 400, "stop", "holds more than 16 strings"),
    (COMPLETIONS, {"prompt": "a", "stop": ""}, 400, "stop", "holds an empty string"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix", "suffix: is not supported"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2}, 400, "best_of", "best_of: is not supported"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": 3}, 400, "presence_penalty", "equal to 2"),
    (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty", "than 0"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "has 'x' where the"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"05": 1}}, 400, "logit_bias", "has '05' where"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"300": 1}}, 400, "logit_bias", "no token 300"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 101}}, 400, "logit_bias", "equal to 100"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [300]}, 400, "stop_token_ids", "no token 300"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": 5}, 400, "stop_token_ids", "valid list"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [True]}, 400, "stop_token_ids.0", "integer"),
    (COMPLETIONS, {"prompt": "a", "min_tokens": 17}, 400, "min_tokens", "17 exceeds the 16 tokens"),
    (COMPLETIONS, {"prompt": "a", "bad_words": [""]}, 400, "bad_words", "holds an empty string"),
    (COMPLETIONS, {"prompt": "a", "bad_words": ["b"] * 1001}, 400, "bad_words", "at most 1000"),
    (
        COMPLETIONS,
        {"prompt": "a", "truncate_prompt_tokens": 0},
        400,
        "truncate_prompt_tokens",
        "must be -1, or 1 or more",
    ),
    (
        COMPLETIONS,
        {"prompt": "a", "repetition_penalty": 1.5, "repeat_penalty": 1.4},
        400,
        "repeat_penalty",
        "repeat_penalty: 1.4 contradicts repetition_penalty: give one of them",
    ),
    (
        CHAT,
        HI | {"max_tokens": 5, "max_completion_tokens": 6},
        400,
        "max_tokens",
        "max_tokens: 5 contradicts max_completion_tokens: give one of them",
    ),
    (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 1}, 400, "echo", "not supported"),
    (COMPLETIONS, {"prompt": "a", "adapters": {"x": 1}}, 400, "adapters", "no adapter 'x'"),
    (
        COMPLETIONS,
        {"prompt": "a", "model": "math", "adapters": {"prose": 1}},
        400,
        "adapters",
        "not with an adapter",
    ),
    (
        COMPLETIONS,
        {"prompt": "a", "adapters": {"math": 1e38}},
        400,
        "adapters",
        "adapters: adapter 'math': its weight must be from -10000 to 10000, not 1e+38",
    ),
    (CHAT, {}, 400, "messages", "messages: field required"),
    (CHAT, HI | {"add_special_tokens": True}, 400, "add_special_tokens", "set it to false"),
    (COMPLETIONS, {"prompt": "a", "add_special_tokens": False}, 400, None, "set it to true"),
    (CHAT, HI | {"reasoning_effort": "none"}, 400, "reasoning_effort", "chat_template_kwargs"),
    (CHAT, HI | {"enable_thinking": False}, 400, "enable_thinking", "chat_template_kwargs"),
    (CHAT, {"messages": []}, 400, "messages", "messages: list should have at least 1 item"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content", "field required"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "'system'"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "x"}]},
        400,
        "messages",
        "nobody is asking",
    ),
    (CHAT, HI | {"tools": [{"type": "function"}]}, 400, "tools", "tools: is not supported"),
    (
        CHAT,
        HI | {"chat_template": "{{ 1 }}"},
        400,
        "chat_template",
        "chat_template: is not supported",
    ),
    (CHAT, HI | {"chat_template_kwargs": 1}, 400, "chat_template_kwargs", "valid dictionary"),
    (
        CHAT,
        HI | {"continue_final_message": True, "add_generation_prompt": True},
        400,
        "continue_final_message",
        "excludes add_generation_prompt",
    ),
    (CHAT, HI | {"response_format": {"type": "json_object"}}, 400, "response_format", "supported"),
    (CHAT, HI | {"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs to be true"),
    (CHAT, HI | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "equal to 20"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages.0.content.0.type",
        "input should be 'text'",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": 5}]},
        400,
        "messages.0.content",
        "messages.0.content: input should be a valid string",
    ),
    (
        CHAT,
        HI | {"stream_options": {"include_usage": 1}},
        400,
        "stream_options.include_usage",
        "valid boolean",
    ),
    (
        CHAT,
        HI | {"stream_options": {"continuous_usage_stats": True}},
        400,
        "stream_options.continuous_usage_stats",
        "is not supported: leave it out or set it to false",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}]},
        400,
        "messages.0.tool_calls",
        "messages.0.tool_calls: is not supported: leave it out or set it to []",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
        400,
        "messages.0.content.0.x",
        "messages.0.content.0.x: is not a field of this request: leave it out",
    ),
    (COMPLETIONS, {"prompt": "a", "max_token": 3}, 400, "max_token", "use 'max_tokens', or leave"),
    (COMPLETIONS, {"prompt": "a", "x\n": 3}, 400, "x\\n", "is not a field of this request"),
    (CHAT, HI | {"prompt": "a"}, 400, "prompt", "send it to /v1/completions"),
]


@pytest.mark.parametrize(("path", "fields", "status", "param", "text"), REFUSED)
def test_refusals(
    path: str, fields: dict[str, Any], status: int, param: str | None, text: str
) -> None:
    async def test(server: Server) -> None:
        response = await server.client.post(path, content=json.dumps(fields), headers=JSON)
        error = response.json()["error"]
        assert response.status_code == status
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert text in error["message"]
        assert "\n" not in error["message"]
        if param is not None:
            assert error["param"] == param
        assert not server.engine.generations
        assert server.service.admission.waiting == 0

    run(test)


def test_values_that_ask_for_nothing_are_no_reason_to_refuse() -> None:
    async def test(server: Server) -> None:
        response = await server.post(
            CHAT,
            **HI,
            tools=[],
            tool_choice="auto",
            response_format={"type": "text"},
            presence_penalty=0.0,
            frequency_penalty=None,
            logit_bias={},
            add_special_tokens=False,
            logprobs=False,
            top_logprobs=0,
            store=False,
            metadata={"a": "b"},
            stream_options={"include_usage": None, "include_obfuscation": True},
        )
        assert response.status_code == 200
        answer: dict[str, object] = {
            "role": "assistant",
            "content": "a",
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        }
        messages = [HI["messages"][0], answer, {"role": "user", "content": "b"}]
        assert (await server.post(CHAT, messages=messages)).status_code == 200

    run(test)


def test_text_parts_are_joined_and_developers_are_the_system() -> None:
    async def test(server: Server) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
        body = (await server.post(CHAT, messages=messages)).json()
        assert body["choices"][0]["message"]["content"] == "A\nB"

    run(test)


OF_THE_SCHEMA: list[tuple[dict[str, Any], int]] = [
    ({}, 200),
    ({"top_k": 3, "logit_bias": {"5": -1}, "stop": ["a"], "seed": None}, 200),
    ({"user": {"a": 1}, "best_of": 1, "verbosity": "medium", "tools": []}, 200),
    ({"stream_options": {"include_usage": None, "include_obfuscation": 3}}, 200),
    ({"strange": None}, 200),
    ({"best_of": 2}, 400),
    ({"best_of": True}, 400),
    ({"strange": False}, 400),
    ({"presence_penalty": 3}, 400),
    ({"stream_options": {"continuous_usage_stats": True}}, 400),
    ({"stop_token_ids": [-1]}, 400),
]


def test_openapi_describes_the_requests() -> None:
    async def test(server: Server) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        document = (await server.client.get("/openapi.json")).json()
        assert set(document["paths"]) >= {COMPLETIONS, CHAT, "/health"}
        bases: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "a"}, CHAT: dict(HI)}
        for path, base in bases.items():
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            validator = jsonschema.Draft202012Validator(
                body["schema"] | {"components": document["components"]}
            )
            for extra, status in OF_THE_SCHEMA:
                response = await server.post(path, **(base | extra))
                assert response.status_code == status, extra
                assert validator.is_valid(base | extra) is (status == 200), extra

    run(test)


@pytest.mark.parametrize(("name", "bad"), [("logit_bias", 101), ("adapters", "much")])
def test_one_of_many_mistakes_is_told(name: str, bad: object) -> None:
    """A list of all takes a second in which nothing else is served."""
    members = {str(index): bad for index in range(1000)}
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate({"prompt": "a", name: members})
    assert refused.value.error_count() == 1
    assert refused.value.errors()[0]["loc"] == (name, "0")


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [-1] * 1000}),
        (ChatCompletionRequest, {"messages": [{}] * 1000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
    ],
)
def test_a_list_is_read_up_to_its_first_mistake(
    model: type[Fields], fields: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as refused:
        model.model_validate(fields)
    assert refused.value.error_count() <= 2
