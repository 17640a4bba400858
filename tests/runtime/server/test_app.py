"""Routes and operation of the server, with an engine that echoes."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator

import pytest
from typing_extensions import override

from eoracc.errors import ApiError
from eoracc.log_lines import JsonLines
from eoracc.runtime.decode.continuation import Listener
from eoracc.runtime.folder_watch import FolderChange
from eoracc.runtime.request import Request
from eoracc.runtime.server.options import ServerOptions
from tests.runtime.server.fake import (
    BACKBONE,
    CHAT,
    COMPLETIONS,
    CONTEXT,
    HI,
    JSON,
    FakeEngine,
    FakeFolder,
    FakeGeneration,
    Server,
    completion,
    echo_prompt,
    run,
)

LONG = "x\x1b[2J\u202e" * 3000
"""A value that nobody wants to see in full, or raw."""


def test_completion() -> None:
    async def test(server: Server) -> None:
        body = (await server.post("/v1/completions", prompt="hello", max_tokens=5)).json()
        assert body["object"] == "text_completion"
        assert body["id"].startswith("cmpl-")
        assert body["model"] == BACKBONE
        assert body["system_fingerprint"] == "fp_0123"
        choice = {"index": 0, "text": "HELLO", "logprobs": None, "finish_reason": "stop"}
        assert body["choices"] == [choice]
        assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}

    run(test)


def test_defaults_are_those_of_openai() -> None:
    async def test(server: Server) -> None:
        await server.post("/v1/completions", prompt="x" * 30)
        await server.post("/v1/chat/completions", messages=[{"role": "user", "content": "x" * 30}])
        first, second = (one.request for one in server.engine.generations)
        assert first.max_new_tokens == 16
        assert second.max_new_tokens == CONTEXT - 30
        assert first.temperature == second.temperature == 1
        assert first.top_p == second.top_p == 1
        assert first.adapter is None

    run(test)


def test_chat_options_reach_the_template() -> None:
    async def test(server: Server) -> None:
        await server.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "hello"}],
            chat_template_kwargs={"prefix": "oh, "},
        )
        assert server.engine.generations[0].request.prompt == list(b"oh, hello")

    run(test)


def test_fields_reach_the_engine() -> None:
    async def test(server: Server) -> None:
        await server.post(
            "/v1/completions",
            prompt=[104, 105],
            model="math",
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            min_p=0.1,
            ignore_eos=True,
            seed=-3,
            stop="\n",
            stop_token_ids=[7, 8],
            include_stop_str_in_output=True,
            min_tokens=2,
            bad_words=["x"],
            logit_bias={"5": -1, "6": 2.5},
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repeat_penalty=1.25,
            max_tokens=3,
            logprobs=2,
            user="ignored",
            no_such_field=None,
        )
        request = server.engine.generations[0].request
        assert list(request.prompt) == [104, 105]
        assert request.adapter == "math"
        assert (request.temperature, request.top_p, request.min_p) == (0.5, 0.9, 0.1)
        assert (request.top_k, request.max_new_tokens, request.logprobs) == (7, 3, 2)
        assert request.seed == 2**63 - 3
        assert request.stop == ("\n",)
        assert request.ignore_end
        assert request.stop_token_ids == (7, 8)
        assert request.include_stop
        assert (request.min_new_tokens, request.bad_words) == (2, ("x",))
        assert request.logit_bias == {5: -1, 6: 2.5}
        assert (request.presence_penalty, request.frequency_penalty) == (0.5, -0.5)
        assert request.repetition_penalty == 1.25

    run(test)


@pytest.mark.parametrize(
    ("kept", "max_tokens", "prompt"),
    [
        (None, 5, range(80)),
        (3, 5, range(77, 80)),
        (200, 5, range(80)),
        (-1, 5, range(80)),
        (-1, 30, range(10, 80)),  # of a context of 100
    ],
)
def test_prompts_are_truncated(kept: int | None, max_tokens: int, prompt: range) -> None:
    async def test(server: Server) -> None:
        response = await server.post(
            "/v1/completions",
            prompt=list(range(80)),
            max_tokens=max_tokens,
            truncate_prompt_tokens=kept,
        )
        assert response.json()["usage"]["prompt_tokens"] == len(prompt)
        assert list(server.engine.generations[0].request.prompt) == list(prompt)

    run(test)


def test_several_prompts_and_choices() -> None:
    async def test(server: Server) -> None:
        response = await server.post(
            "/v1/completions", prompt=["ab", "cde"], n=2, seed=5, max_tokens=2, echo=True
        )
        body = response.json()
        assert [c["text"] for c in body["choices"]] == ["abAB", "abAB", "cdeCD", "cdeCD"]
        assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
        assert [c["finish_reason"] for c in body["choices"]] == ["stop"] * 2 + ["length"] * 2
        assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
        seeds = [one.request.seed for one in server.engine.generations]
        assert seeds == [5, 6, 5, 6]

    run(test, rows=4)


def test_logprobs_of_both_kinds() -> None:
    async def test(server: Server) -> None:
        response = await server.post("/v1/completions", prompt="hi", max_tokens=2, logprobs=2)
        assert response.json()["choices"][0]["logprobs"] == {
            "tokens": ["H", "I"],
            "token_logprobs": [-0.5, -0.5],
            "top_logprobs": [{"H": -0.5, "I": -1.5}, {"I": -0.5, "J": -1.5}],
            "text_offset": [0, 1],
        }
        response = await server.post(
            "/v1/completions", prompt="hi", max_tokens=2, logprobs=0, stream=True
        )
        events = [json.loads(line[6:]) for line in response.text.split("\n\n")[:2]]
        assert [e["choices"][0]["logprobs"]["text_offset"] for e in events] == [[0], [1]]
        messages = [{"role": "user", "content": "h"}]
        response = await server.post(
            "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=1
        )
        token = {"token": "H", "logprob": -0.5, "bytes": [72]}
        logprobs = response.json()["choices"][0]["logprobs"]
        assert logprobs["content"] == [token | {"top_logprobs": [token]}]
        response = await server.post("/v1/chat/completions", messages=messages)
        assert response.json()["choices"][0]["logprobs"] is None

    run(test)


def test_adapters_are_models() -> None:
    async def test(server: Server) -> None:
        listed = (await server.client.get("/v1/models")).json()
        cards = {card["id"]: card for card in listed["data"]}
        assert list(cards) == [BACKBONE, "math", "prose"]
        assert cards[BACKBONE]["parent"] is None
        assert cards["math"]["parent"] == BACKBONE
        assert all(card["max_model_len"] == CONTEXT for card in cards.values())
        assert (await server.client.get("/v1/models/math")).json() == cards["math"]
        missing = await server.client.get("/v1/models/poetry")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"

        await server.post("/v1/completions", prompt="a", adapters={"math": 0.5, "prose": -1})
        body = (await server.post("/v1/completions", prompt="a", model="prose")).json()
        assert body["model"] == "prose"
        asked = [one.request.adapter for one in server.engine.generations]
        assert asked == [{"math": 0.5, "prose": -1}, "prose"]

    run(test)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "the body is not valid JSON"),
        (b"", "the body must be a JSON object"),
        (b"[1]", "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b"\xff\xfe", "the body is not UTF-8 text"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature: input should be a finite number"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no number in JSON"),
    ],
)
def test_malformed_bodies(content: bytes, text: str) -> None:
    async def test(server: Server) -> None:
        response = await server.client.post(COMPLETIONS, content=content, headers=JSON)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["message"]
        assert "\n" not in error["message"]
        assert text in error["message"]

    run(test)


def test_paths_methods_and_types_that_are_not_served() -> None:
    async def test(server: Server) -> None:
        response = await server.client.get("/v2/models")
        assert response.status_code == 404
        assert response.json()["error"]["message"] == "there is no GET /v2/models here"
        response = await server.client.get(COMPLETIONS)
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
        assert response.json()["error"]["message"] == f"{COMPLETIONS} does not take GET: use POST"
        response = await server.client.post(COMPLETIONS, content=completion())
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "unsupported_media_type"
        assert not server.engine.generations

    run(test)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(chunked: bool) -> None:
    async def test(server: Server) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        content = chunks() if chunked else b" " * 1001
        response = await server.client.post(COMPLETIONS, content=content, headers=JSON)
        assert response.status_code == 413
        assert "more than 1000 bytes" in response.json()["error"]["message"]
        assert (await server.post(COMPLETIONS, prompt="a")).status_code == 200

    run(test, max_body_bytes=1000)


def test_limits_of_tokens() -> None:
    async def test(server: Server) -> None:
        assert (await server.post(COMPLETIONS, prompt="a" * 20)).status_code == 200
        too_long = await server.post(COMPLETIONS, prompt="a" * 21)
        assert "the prompt has 21 tokens, 20 are allowed" in too_long.json()["error"]["message"]
        too_much = await server.post(COMPLETIONS, prompt="a", max_tokens=31)
        assert too_much.json()["error"]["param"] == "max_tokens"
        await server.post(CHAT, **HI)
        assert server.engine.generations[-1].request.max_new_tokens == 30

    run(test, max_prompt_tokens=20, max_tokens=30)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("Bearer wrong", 401),
        ("Bearer secre", 401),
        ("Bearer ", 401),
        ("Basic secret", 401),
        ("secret", 401),
        ("Bearer s\u00e9cret", 401),
    ],
)
def test_api_key(given: str, status: int) -> None:
    async def test(server: Server) -> None:
        headers = {"Authorization": given.encode("latin-1")}
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            response = await server.client.get(path, headers=headers)  # type: ignore[arg-type]
            assert response.status_code == status
        for path in ("/health", "/health/live", "/health/ready"):
            response = await server.client.get(path, headers={"Authorization": ""})
            assert response.status_code == 200
        if status != 200:
            response = await server.client.get("/no/such/path", headers=headers)  # type: ignore[arg-type]
            assert response.status_code == status
            assert response.json()["error"]["code"] == "invalid_api_key"

    run(test, api_key="secret")


@pytest.mark.parametrize("key", ["", "schlüssel"])
def test_keys_that_no_client_could_send(key: str) -> None:
    with pytest.raises(ApiError, match="the API key must be ASCII text"):
        ServerOptions(api_key=key)


def test_a_backbone_named_like_an_adapter() -> None:
    from eoracc.runtime.server.served.catalog import Catalog

    with pytest.raises(ApiError, match="'math' is the name of the backbone and of an adapter"):
        Catalog("math", ["math"], context_length=1, created=0)


def test_what_can_be_got_has_a_head() -> None:
    async def test(server: Server) -> None:
        paths = ("/health", "/health/live", "/health/ready", "/metrics", "/openapi.json")
        for path in (*paths, "/v1/models", "/v1/models/math", "/v1/models/none"):
            wanted = await server.client.get(path)
            found = await server.client.head(path)
            assert found.status_code == wanted.status_code
            assert found.headers["content-type"] == wanted.headers["content-type"]

    run(test)


def test_the_schema_declares_the_type_of_the_metrics() -> None:
    async def test(server: Server) -> None:
        schema = (await server.client.get("/openapi.json")).json()
        declared = schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
        answer = await server.client.get("/metrics")
        assert list(declared) == [answer.headers["content-type"].partition(";")[0]]

    run(test)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"model": LONG}),
        (COMPLETIONS, {"adapters": {LONG: 1}}),
        (COMPLETIONS, {"adapters": {LONG: "x"}}),
        (COMPLETIONS, {"adapters": {"math": 1e4, LONG: 1e38}}),
        (COMPLETIONS, {"n": 10**400}),
        (COMPLETIONS, {"logit_bias": {LONG: 1}}),
        (COMPLETIONS, {"logit_bias": {"9" * 17: 1}}),
        (COMPLETIONS, {LONG: 1}),
        (COMPLETIONS, {LONG.replace("\x1b", "x"): {"x": LONG}}),
        (COMPLETIONS, {"stream_options": {LONG: LONG}}),
        (COMPLETIONS, {"stop_token_ids": [2**63 - 1] * 9000}),
        (CHAT, {"messages": [{"role": LONG, "content": "x"}]}),
        (CHAT, {"messages": [{"role": "assistant", "content": LONG}]}),
        (f"/{LONG.replace(chr(27), 'x')}", {}),
        (f"/v1/models/{LONG.replace(chr(27), 'x')}", {}),
    ],
)
def test_errors_repeat_little_of_a_bad_value(path: str, fields: dict[str, object]) -> None:
    async def test(server: Server) -> None:
        body = ({"prompt": "a"} if path == COMPLETIONS else {}) | fields
        answer = await server.client.post(path, json=body)
        assert 400 <= answer.status_code < 500
        error = answer.json()["error"]
        assert len(answer.content) < 1000
        assert error["message"].isprintable()
        assert (error["param"] or "x").isprintable()

    run(test)


def test_health_tells_draining_and_a_dead_engine() -> None:
    async def test(server: Server) -> None:
        async def health(path: str) -> int:
            status = (await server.client.get(path)).status_code
            assert (await server.client.head(path)).status_code == status
            return status

        assert await health("/health") == await health("/health/live") == 200
        server.service.draining = True
        assert await health("/health") == await health("/health/ready") == 503
        assert await health("/health/live") == 200
        refused = await server.post(COMPLETIONS, prompt="a")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert "retry-after" in refused.headers
        server.service.draining = False
        server.engine.alive = False
        assert await health("/health/ready") == 503
        assert await health("/health/live") == 500

    run(test)


def test_a_changed_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = FakeFolder()

    async def test(server: Server) -> None:
        gauge = "eoracc_artifact_changed"
        assert (await server.client.get("/health")).json() == HEALTHY
        assert await server.metric(gauge) == 0
        assert (await server.post(COMPLETIONS, prompt="a", model="poetry")).status_code == 404

        folder.change, folder.added = FolderChange("is gone"), ("poetry",)
        assert await server.settled(gauge, 1) == 1
        told = await server.client.get("/health")
        assert (told.status_code, told.json()) == (200, HEALTHY | {"artifact": "changed"})
        for status, fields in (
            (404, {"model": "poetry"}),
            (400, {"adapters": {"math": 0.5, "poetry": 0.5}}),
        ):
            refused = await server.post(COMPLETIONS, prompt="a", **fields)
            assert refused.status_code == status
            assert refused.json()["error"]["code"] == "artifact_changed"
            assert "restart" in refused.json()["error"]["message"]
        assert (await server.post(COMPLETIONS, prompt="a", model="math")).status_code == 200

    HEALTHY = {"status": "ready", "artifact": "loaded"}
    monkeypatch.setattr("eoracc.runtime.server.served.folder_monitor._INTERVAL_S", 0.01)
    run(test, folder=folder)


def test_an_error_of_the_engine_is_the_request_s_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: Server) -> None:
        response = await server.post(COMPLETIONS, prompt="a", model="prose", seed=13)
        assert response.status_code == 400
        assert "cannot be used with seed 13" in response.json()["error"]["message"]

        asked = asyncio.ensure_future(server.post(COMPLETIONS, prompt="a"))
        other = asyncio.ensure_future(server.post(COMPLETIONS, prompt="b"))
        while len(server.engine.generations) < 2:
            await asyncio.sleep(0.001)
        first, second = server.engine.generations
        first.listener(OSError("/secret/path"))
        response = await asked
        assert response.status_code == 500
        assert "secret" not in response.text
        assert response.json()["error"]["code"] == "engine_error"
        second.say(*FINISHED)
        assert (await other).json()["choices"][0]["text"] == "done"

    from tests.runtime.server.fake import piece

    FINISHED = (piece("do"), piece("ne", "stop"))
    with caplog.at_level(logging.ERROR, logger="eoracc.server"):
        run(test, engine=FakeEngine())
    assert "/secret/path" in caplog.text


def test_access_log_has_figures_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: Server) -> None:
        await server.client.post(
            COMPLETIONS,
            json={"prompt": "sesame", "max_tokens": 4},
            headers={"X-Request-ID": "abc-1"},
        )
        await server.client.get("/v1/models/poetry", headers={"X-Request-ID": "bad id\t"})

    with caplog.at_level(logging.INFO, logger="eoracc.access"):
        run(test)
    access = [record for record in caplog.records if record.name == "eoracc.access"]
    lines = [json.loads(JsonLines().format(record)) for record in access]
    assert "sesame" not in str(lines).lower()
    first, second = lines
    assert first["id"] == "abc-1"
    assert first["status"] == 200
    assert (first["prompt_tokens"], first["completion_tokens"]) == (6, 4)
    assert first["model"] == BACKBONE
    assert first["adapter"] is None
    assert first["first_token_ms"] <= first["latency_ms"]
    assert second["route"] == "/v1/models/{name}"
    assert second["id"] != "bad id\t"
    assert second["code"] == "model_not_found"


def test_an_answer_that_ends_before_submit_returns_counts_as_ended() -> None:
    """The engine's thread may be faster than the one that submits."""
    returned = threading.Event()

    class SlowToReturn(FakeEngine):
        @override
        def submit(self, request: Request, *, listener: Listener) -> FakeGeneration:
            generation = super().submit(request, listener=listener)
            assert returned.wait(10)
            return generation

    async def test(server: Server) -> None:
        body = (await server.post(COMPLETIONS, prompt="abc")).json()
        assert body["choices"][0]["text"] == "ABC"
        reason = f'eoracc_answers_total{{model="{BACKBONE}",reason="stop"}}'
        assert await server.settled(reason, 1) == 1
        returned.set()

    run(test, engine=SlowToReturn(echo_prompt))


def test_metrics_add_up() -> None:
    async def test(server: Server) -> None:
        for _ in range(3):
            await server.post(COMPLETIONS, prompt="abc", model="math", n=2)
        await server.post(COMPLETIONS, prompt="")
        route = f'route="{COMPLETIONS}"'
        assert await server.settled(f'eoracc_requests_total{{{route},status="200"}}', 3) == 3
        assert await server.settled(f'eoracc_requests_total{{{route},status="400"}}', 1) == 1
        assert await server.settled(f"eoracc_request_seconds_count{{{route}}}", 4) == 4
        assert await server.settled('eoracc_answers_total{model="math",reason="stop"}', 6) == 6
        assert await server.settled('eoracc_prompt_tokens_total{model="math"}', 18) == 18
        assert await server.settled('eoracc_completion_tokens_total{model="math"}', 18) == 18
        assert await server.settled("eoracc_time_to_first_token_seconds_count", 6) == 6
        assert await server.settled("eoracc_time_per_token_seconds_count", 12) == 12
        assert await server.settled("eoracc_queue_length", 0) == 0
        assert await server.settled("eoracc_active_rows", 0) == 0

    run(test)


def test_paths_of_strangers_make_no_labels() -> None:
    async def test(server: Server) -> None:
        for index in range(5):
            await server.client.get(f"/{index}")
        assert await server.metric('eoracc_requests_total{route="other",status="404"}') == 5

    run(test)
