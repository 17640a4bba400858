"""A server under load from another process, and how it ends."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from eoracc.runtime import Model, load
from tests.runtime.server.child import KEY, ServerProcess

REQUESTS, AT_ONCE = 200, 16
HEADERS = {"Authorization": f"Bearer {KEY}"}
PROMPTS = ("a state of the union", "The", "b", "1+1=", "x y z", "congress" * 8)
ADAPTERS: tuple[str | Mapping[str, float] | None, ...] = (
    None,
    "math",
    "prose",
    {"math": 0.5, "prose": 0.5},
)


@dataclass(frozen=True)
class Ask:
    """One request of a load."""

    prompt: str
    adapter: int
    max_tokens: int
    stream: bool
    manner: str

    @property
    def body(self) -> dict[str, Any]:
        adapter = ADAPTERS[self.adapter]
        fields: dict[str, Any] = {"prompt": self.prompt, "max_tokens": self.max_tokens}
        fields |= {"temperature": 0, "stream": self.stream, "ignore_eos": True}
        if isinstance(adapter, str):
            fields["model"] = adapter
        elif adapter is not None:
            fields["adapters"] = adapter
        return fields


def load_of(seed: int, count: int) -> list[Ask]:
    rng = np.random.default_rng(seed)
    asks = []
    for _ in range(count):
        manner = str(rng.choice(["plain", "slow", "vanish"], p=[0.8, 0.1, 0.1]))
        asks.append(
            Ask(
                prompt=PROMPTS[rng.integers(len(PROMPTS))],
                adapter=int(rng.integers(len(ADAPTERS))),
                max_tokens=int(rng.integers(1, 40)),
                stream=manner != "plain" or bool(rng.integers(2)),
                manner=manner,
            )
        )
    return asks


async def ask(client: httpx.AsyncClient, one: Ask) -> str | None:
    """The answer's text; None from a client that vanishes."""
    if not one.stream:
        response = await client.post("/v1/completions", json=one.body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])
    text = ""
    async with client.stream("POST", "/v1/completions", json=one.body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if one.manner == "vanish":
                return None
            if one.manner == "slow":
                await asyncio.sleep(0.02)
            if line == "data: [DONE]":
                return text
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    raise AssertionError("the stream has no end")


async def ask_all(url: str, asks: list[Ask]) -> list[str | None]:
    limit = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=60) as client:

        async def one(which: Ask) -> str | None:
            async with limit:
                return await ask(client, which)

        return await asyncio.gather(*map(one, asks))


def expected(model: Model, one: Ask) -> tuple[str, int]:
    """Text and number of tokens, served alone."""
    made = model.generate(
        one.prompt, one.max_tokens, adapter=ADAPTERS[one.adapter], ignore_end=True
    )
    return made.text, len(made.tokens)


def metrics(server: ServerProcess) -> Counter[str]:
    text = httpx.get(f"{server.root}/metrics", headers=HEADERS).text
    found: Counter[str] = Counter()
    for name, value in re.findall(r"^(eoracc_\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
        found[name] += float(value)  # type: ignore[assignment] # whole numbers, mostly
    return found


async def come_to_rest(server: ServerProcess) -> Counter[str]:
    for _ in range(200):
        found = metrics(server)
        if not (found["eoracc_active_rows"] or found["eoracc_queue_length"]):
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(found)


def test_no_request_is_lost_and_every_answer_is_the_one_served_alone(
    server: ServerProcess, adapted_artifact: Path
) -> None:
    asks = load_of(0, REQUESTS)
    assert Counter(one.manner for one in asks).keys() == {"plain", "slow", "vanish"}
    before = metrics(server)
    answers = asyncio.run(ask_all(server.root, asks))
    after = asyncio.run(come_to_rest(server))

    model = load(adapted_artifact, threads=1)
    tokens = made = 0
    for one, answer in zip(asks, answers, strict=True):
        text, count = expected(model, one)
        tokens += count
        if one.manner != "vanish":
            made += count
            assert answer == text
    difference = after - before
    assert difference["eoracc_requests_total"] == REQUESTS + 1  # the first look at the metrics
    assert difference["eoracc_answers_total"] == REQUESTS
    assert made <= difference["eoracc_completion_tokens_total"] <= tokens
    assert difference["eoracc_prompt_tokens_total"] == sum(len(one.prompt) for one in asks)
    assert difference["eoracc_batch_rows_sum"] > difference["eoracc_batch_rows_count"]


def test_serving_loads_no_torch(adapted_artifact: Path) -> None:
    program = (
        "import sys\n"
        "from eoracc.compiler.cli import main\n"
        "import eoracc.runtime.server.process as process\n"
        "process.run = lambda *_, **__: None\n"
        "main(['serve', sys.argv[1], '--port', '0'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'eoracc.compiler.driver', 'eoracc.passes'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(adapted_artifact)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n", done.stderr


LONG = {"prompt": "a", "max_tokens": 120, "temperature": 0, "ignore_eos": True}


async def stop_amid(
    server: ServerProcess, count: int, number: signal.Signals
) -> tuple[list[httpx.Response | None], int, int]:
    """Responses to ``count`` requests during which the server gets a signal; health, a late one."""
    async with httpx.AsyncClient(base_url=server.root, headers=HEADERS, timeout=60) as client:

        async def one() -> httpx.Response | None:
            try:
                return await client.post("/v1/completions", json=LONG)
            except httpx.TransportError:
                return None

        tasks = [asyncio.create_task(one()) for _ in range(count)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        server.signal(number)
        health = 0
        while health != 503:
            health = (await client.get("/health")).status_code
        late = (await client.post("/v1/completions", json=LONG)).status_code
        return await asyncio.gather(*tasks), health, late


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_was_taken_in_finish(
    adapted_artifact: Path, number: signal.Signals
) -> None:
    with ServerProcess(adapted_artifact, "--rows", "1") as server:
        responses, health, late = asyncio.run(stop_amid(server, 12, number))
        assert (health, late) == (503, 503)
        assert [one.status_code if one else None for one in responses] == [200] * 12
        bodies = [one.json()["choices"][0]["text"] for one in responses if one is not None]
        assert len(set(bodies)) == 1
        assert server.wait() == 0
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port or 0))
    assert not [line for line in server.lines if "Traceback" in line]


def test_what_does_not_finish_within_the_grace_is_told_so(adapted_artifact: Path) -> None:
    with ServerProcess(adapted_artifact, "--rows", "1", "--grace", "0.3") as server:
        responses, _, _ = asyncio.run(stop_amid(server, 60, signal.SIGTERM))
        statuses = Counter(one.status_code if one else None for one in responses)
        assert set(statuses) == {200, 503}
        codes = {one.json()["error"]["code"] for one in responses if one and one.is_error}
        assert codes == {"shutting_down"}
        assert server.wait() == 0
    assert len(server.log) >= 60
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_refusal_reaches_a_client_that_is_still_sending(server: ServerProcess) -> None:
    """A connection that is closed with bytes unread is reset, which overtakes the answer."""
    body = b" " * 2**23
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 0), timeout=30) as client:
        client.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 415 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--api-key", "schlüssel"], "error: the API key must be ASCII text"),
        (["--model-name", "math"], "error: 'math' is the name of the backbone and of an adapter"),
        (["--host", "no.such.host.invalid"], "error: no.such.host.invalid:0: cannot listen there"),
        (["--rows", "0"], "Invalid value for '--rows'"),
    ],
)
def test_options_that_cannot_be(adapted_artifact: Path, options: list[str], text: str) -> None:
    command = [sys.executable, "-m", "eoracc.compiler.cli", "serve", str(adapted_artifact)]
    done = subprocess.run(
        [*command, "--port", "0", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_that_is_taken_and_a_folder_that_is_none(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eoracc.compiler.cli", "serve", str(tmp_path)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*command, "--port", str(port)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: cannot listen there (Address already in use)" in done.stderr
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "manifest.json" in done.stderr
