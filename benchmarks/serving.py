"""Time ``eoracc serve`` from its clients' side: throughput, and percentiles of waiting times.

    python -m benchmarks.serving ARTIFACT [--clients 1 4 8 16] [--requests N] [--prompt-tokens N]
                                 [--new-tokens N] [--rows N] [--threads N] [--json FILE]
                                 [--llama-python PYTHON --gguf FILE]

The server runs in a process of its own, and so do its clients; all share the machine. Each client
sends one streamed request after the other. If the artifact has adapters, requests use the backbone
and the adapters in turn. Every answer has its full number of tokens, and the first requests are not
counted.

Percentiles are over requests: seconds to the first token, between two tokens, and to the last
token. The peer, llama-cpp-python's server, needs its ``server`` extra and serves one request at a
time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.machine import describe_machine, machine_line

QUANTILES = (50, 90, 99)
WARM_UP = 2
READY_S = 120
TIMEOUT_S = 600


@dataclass(frozen=True)
class Answer:
    """One request, in seconds from the beginning of its round.

    Attributes:
      begin: when it was sent.
      tokens: when each event with text arrived.
      made: number of tokens, counted by the server.
    """

    begin: float
    tokens: tuple[float, ...]
    made: int


@dataclass(frozen=True)
class Figures:
    """Figures of one server for one number of clients.

    Attributes:
      server: name of the server.
      clients: number of clients at the same time.
      requests: number of requests of all clients.
      tokens_per_s: tokens of all answers per second, from the first request to the last answer.
      requests_per_s: the same for requests.
      first_token_s: percentiles of the time to the first token.
      per_token_s: percentiles of a request's mean time between two tokens.
      request_s: percentiles of the time to the last token.
    """

    server: str
    clients: int
    requests: int
    tokens_per_s: float
    requests_per_s: float
    first_token_s: Mapping[str, float]
    per_token_s: Mapping[str, float]
    request_s: Mapping[str, float]


def summarize(server: str, clients: int, answers: Sequence[Answer]) -> Figures:
    """Figures of the ``answers`` to ``clients``."""
    seconds = max(answer.tokens[-1] for answer in answers) - min(answer.begin for answer in answers)
    return Figures(
        server=server,
        clients=clients,
        requests=len(answers),
        tokens_per_s=sum(answer.made for answer in answers) / seconds,
        requests_per_s=len(answers) / seconds,
        first_token_s=percentiles([answer.tokens[0] - answer.begin for answer in answers]),
        per_token_s=percentiles(
            [(answer.tokens[-1] - answer.tokens[0]) / max(answer.made - 1, 1) for answer in answers]
        ),
        request_s=percentiles([answer.tokens[-1] - answer.begin for answer in answers]),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The :data:`QUANTILES` of ``values`` by name."""
    return {f"p{q}": float(np.percentile(values, q)) for q in QUANTILES}


def free_port() -> int:
    """A free port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@contextmanager
def serving(command: Sequence[str], port: int) -> Iterator[str]:
    """Run a server as a child process; yield its URL once it answers."""
    url = f"http://127.0.0.1:{port}"
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + READY_S
        while True:
            try:
                httpx.get(f"{url}/v1/models")
                break
            except httpx.TransportError:
                if child.poll() is not None or time.monotonic() > end:
                    child.kill()
                    raise SystemExit(child.communicate()[1][-2000:]) from None
                time.sleep(0.1)
        yield url
    finally:
        child.terminate()
        child.communicate()


def prompt_of(number: int, tokens: int) -> str:
    """About ``tokens`` tokens, different for every ``number``, so that no cache has them."""
    words = np.random.default_rng(number).choice(
        ["state", "union", "people", "congress", "nation", "years", "great", "war", "peace"], tokens
    )
    return " ".join(words)


async def ask(client: httpx.AsyncClient, body: Mapping[str, Any], begin: float) -> Answer:
    """One streamed request."""
    sent = time.perf_counter() - begin
    times, made = [], 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            raise SystemExit((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("choices"):
                times.append(time.perf_counter() - begin)
            if event.get("usage"):
                made = event["usage"]["completion_tokens"]
    # A server without a count sends one event per token.
    return Answer(sent, tuple(times), made or len(times))


async def measure(
    url: str, models: Sequence[str], *, clients: int, requests: int, prompt_tokens: int, tokens: int
) -> list[Answer]:
    """Make ``requests`` with ``clients`` at the same time."""
    numbers = iter(range(requests))
    answers: list[Answer] = []
    begin = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:

        async def work() -> None:
            for number in numbers:
                body = {
                    "model": models[number % len(models)],
                    "prompt": prompt_of(number, prompt_tokens),
                    "max_tokens": tokens,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "ignore_eos": True,
                }
                answers.append(await ask(client, body, begin))

        await asyncio.gather(*(work() for _ in range(clients)))
    return answers


def run_server(
    name: str, command: Sequence[str], port: int, options: argparse.Namespace
) -> list[Figures]:
    """Figures of one server for every number of clients."""
    found = []
    with serving(command, port) as url:
        models = [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]]
        shape = {"prompt_tokens": options.prompt_tokens, "tokens": options.new_tokens}
        asyncio.run(measure(url, models, clients=1, requests=WARM_UP, **shape))
        for clients in options.clients:
            requests = max(options.requests, 2 * clients)
            answers = asyncio.run(measure(url, models, clients=clients, requests=requests, **shape))
            found.append(summarize(name, clients, answers))
            print(line_of(found[-1]), flush=True)
    return found


HEADING = (
    "server                    clients  tokens/s  requests/s   first token ms      per token ms"
    "        request ms\n"
    "                                                          p50   p90   p99   p50   p90   p99"
    "   p50    p90    p99"
)


def line_of(figures: Figures) -> str:
    """A row of the table."""
    parts = [
        f"{figures.server:24}  {figures.clients:7}  {figures.tokens_per_s:8.1f}",
        f"{figures.requests_per_s:10.2f}",
    ]
    widths = ((figures.first_token_s, 5), (figures.per_token_s, 5), (figures.request_s, 6))
    for values, width in widths:
        digits = 1 if values is figures.per_token_s else 0
        parts.append(" ".join(f"{1000 * value:{width}.{digits}f}" for value in values.values()))
    return "  ".join(parts)


def main() -> None:
    """Measure, print the table, and write JSON if a file is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=32, help="for each number of clients")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="approximate length")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--llama-python", help="interpreter with llama-cpp-python[server]")
    parser.add_argument("--gguf", type=Path, help="the GGUF file that it serves")
    options = parser.parse_args()

    print(f"{machine_line()}\n")
    print(HEADING)
    port = free_port()
    command = [sys.executable, "-m", "eoracc.compiler.cli", "serve", str(options.artifact)]
    command += ["--port", str(port), "--rows", str(options.rows)]
    command += ["--threads", str(options.threads), "--no-access-log"]
    figures = run_server("eoracc", command, port, options)
    if options.llama_python:
        port = free_port()
        command = [options.llama_python, "-m", "llama_cpp.server", "--model", str(options.gguf)]
        command += ["--port", str(port), "--n_threads", str(options.threads), "--n_ctx", "2048"]
        figures += run_server("llama-cpp-python", command, port, options)
    if options.json:
        content = {
            "machine": describe_machine(),
            "options": {key: str(value) for key, value in vars(options).items()},
            "figures": [asdict(line) for line in figures],
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
