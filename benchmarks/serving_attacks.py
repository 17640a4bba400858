"""What one hostile client does to ``eoracc serve``, and what others notice of it.

    python benchmarks/serving_attacks.py ARTIFACT [--idle N] [--requests N] [--seconds S]
                                         [--descriptors N] [--body-bytes N] [--json FILE]

The server runs in a process of its own on a free port. Each attack is told in figures:

- idle: connections that send half of their headers and wait. Seconds until ``/health`` answers,
  connections that are still open at the end, bytes of log a minute.
- requests: as many at once. How each was answered.
- prompts: bodies of the largest size that cost the most to read, one after the other, each beside
  a stream. The longest time between two events of the stream, in milliseconds, and the status.

The limit of open files of this process must exceed the number of connections: ``ulimit -n 8192``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

READY_S = 120
STREAM = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}
HALF = b"GET /health HTTP/1.1\r\nHost: a\r\n"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
      port: on 127.0.0.1.
      log: file of its standard error.
    """

    port: int
    log: Path

    @property
    def url(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(artifact: Path, *, descriptors: int | None, options: list[str]) -> Iterator[Served]:
    """A server with a limit of open files; its log is kept while the context lasts."""
    command = [sys.executable, "-m", "eoracc.compiler.cli", "serve", str(artifact)]
    command += ["--port", "0", "--threads", "1", *options]
    if descriptors is not None:
        command = ["sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh", *command]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stderr=stream)
        try:
            yield Served(_port(process, log), log)
        finally:
            process.terminate()
            process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and process.poll() is None:
        if match := re.search(r"serving .* at http://\S+:(\d+)/v1", log.read_text()):
            return int(match[1])
        time.sleep(0.1)
    raise SystemExit(log.read_text())


def idle(server: Served, count: int, seconds: float) -> dict[str, Any]:
    """Open ``count`` connections with half of their headers, for ``seconds``."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            client.sendall(HALF)
            client.setblocking(False)
            clients.append(client)
        begin, size = time.monotonic(), server.log.stat().st_size
        first = httpx.get(f"{server.url}/health", timeout=60)
        answered_s = time.monotonic() - begin
        later = Counter[int]()
        while time.monotonic() - begin < seconds:
            later[httpx.get(f"{server.url}/health", timeout=60).status_code] += 1
            time.sleep(0.5)
        minutes = (time.monotonic() - begin) / 60
        return {
            "connections": count,
            "health": first.status_code,
            "health_s": round(answered_s, 3),
            "health_later": dict(later),
            "still_open": sum(map(_is_open, clients)),
            "log_bytes_per_minute": round((server.log.stat().st_size - size) / minutes),
        }


def _is_open(client: socket.socket) -> bool:
    try:
        while client.recv(4096):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


async def requests(server: Served, count: int) -> dict[str, Any]:
    """Send ``count`` requests at once, each on a connection of its own."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

        async def ask(number: int) -> str:
            body = {"prompt": f"{number}", "max_tokens": 4}
            try:
                return str((await client.post("/v1/completions", json=body)).status_code)
            except httpx.HTTPError as error:
                return type(error).__name__

        begin = time.monotonic()
        answers = Counter(await asyncio.gather(*map(ask, range(count))))
    return {"requests": count, "seconds": round(time.monotonic() - begin, 2), **answers}


def hostile_bodies(size: int) -> Mapping[str, tuple[str, bytes]]:
    """Paths and bodies of about ``size`` bytes by the name of what is costly about them."""
    completions, chat = "/v1/completions", "/v1/chat/completions"

    def filled(path: str, head: str, item: str, tail: str) -> tuple[str, bytes]:
        count = (size - len(head) - len(tail)) // (len(item) + 1)
        return path, (head + ",".join([item] * count) + tail).encode()

    def text(path: str, head: str, filling: str, tail: str) -> tuple[str, bytes]:
        count = (size - len(head) - len(tail)) // len(filling)
        return path, (head + filling * count + tail).encode()

    message = '{"role":"user","content":"a"}'
    one = '{"max_tokens":1,"messages":['
    biases = ",".join(f'"{token}":1' for token in range(size // 10))
    return {
        "blanks": text(completions, '{"prompt":"', " ", '"}'),
        "blanks, cut": text(completions, '{"truncate_prompt_tokens":9,"prompt":"', " ", '"}'),
        "words, cut": text(completions, '{"truncate_prompt_tokens":9,"prompt":"', "a bc ", '"}'),
        "half the blanks": (completions, json.dumps({"prompt": " " * (size // 2)}).encode()),
        "one letter": text(completions, '{"prompt":"', "a", '"}'),
        "chat of blanks": text(chat, one + '{"role":"user","content":"', " ", '"}]}'),
        "many messages": filled(chat, one, message, "]}"),
        "many documents": filled(chat, f'{one}{message}],"documents":[', "{}", "]}"),
        "many parts": filled(
            chat, one + '{"role":"user","content":[', '{"type":"text","text":""}', "]}]}"
        ),
        "token ids": filled(completions, '{"prompt":[', "1", "]}"),
        "token ids, cut": filled(completions, '{"truncate_prompt_tokens":9,"prompt":[', "1", "]}"),
        "lists of ids": filled(completions, '{"prompt":[', "[1]", "]}"),
        "prompts": filled(completions, '{"prompt":[', '""', "]}"),
        "one stop string": text(completions, '{"prompt":"a","stop":"', "a", '"}'),
        "one bad word": text(completions, '{"prompt":"a","bad_words":["', " ", '"]}'),
        "bad words": (
            completions,
            json.dumps({"prompt": "a", "n": 8, "bad_words": ["a" * 250] * 1000}).encode(),
        ),
        "biases": (completions, f'{{"prompt":"a","n":8,"logit_bias":{{{biases}}}}}'.encode()),
        "end tokens": filled(completions, '{"prompt":"a","n":8,"stop_token_ids":[', "1", "]}"),
        "bad ids": filled(completions, '{"prompt":"a","stop_token_ids":[', "-1", "]}"),
        "objects": filled(completions, '{"prompt":"a","metadata":[', "{}", "]}"),
        "nested lists": (completions, b'{"prompt":"a","metadata":' + b"[" * (size - 30)),
        "field names": (
            completions,
            ("{" + ",".join(f'"{n}":0' for n in range(size // 10)) + "}").encode(),
        ),
        "chunks": (completions, b""),
    }


async def prompts(server: Served, size: int, names: list[str] | None) -> dict[str, Any]:
    """Send each hostile body beside a stream; milliseconds between events of the stream."""
    figures: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        figures["(none)"] = {"gap_ms": await gap_during(client, lambda: asyncio.sleep(2))}
        for name, (path, body) in hostile_bodies(size).items():
            if names and name not in names:
                continue
            content = _one_byte_chunks(size // 6) if name == "chunks" else body

            statuses: list[str] = []
            begin = time.monotonic()

            async def send(
                path: str = path, content: Any = content, statuses: list[str] = statuses
            ) -> None:
                try:
                    response = await client.post(path, content=content, headers=JSON)
                    statuses.append(str(response.status_code))
                except httpx.HTTPError as error:
                    statuses.append(type(error).__name__)

            gap = await gap_during(client, send)
            seconds = round(time.monotonic() - begin, 2)
            figures[name] = {"gap_ms": gap, "status": statuses[0], "seconds": seconds}
            print(name, figures[name], file=sys.stderr)
    return figures


async def _one_byte_chunks(count: int) -> AsyncIterator[bytes]:
    """A chunked body whose chunks have one byte each; httpx frames them one by one."""
    yield b'{"prompt":"'
    for _ in range(count):
        yield b"a"
    yield b'","max_tokens":1}'


async def gap_during(
    client: httpx.AsyncClient, work: Callable[[], Coroutine[Any, Any, None]]
) -> float:
    """The longest time between two events of a stream while ``work`` is done, in milliseconds."""
    doing: asyncio.Task[None] | None = None
    longest = 0.0
    while doing is None or not doing.done():
        last = None
        async with client.stream("POST", "/v1/completions", json=STREAM) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic()
                if doing is None:
                    doing = asyncio.create_task(work())
                elif last is not None:
                    longest = max(longest, now - last)
                last = now
                if doing.done():
                    break
    return round(1000 * longest, 1)


def main() -> None:
    """Run all attacks and print their figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--descriptors", type=int, help="open files that the server may have")
    parser.add_argument("--body-bytes", type=int, default=(1 << 20) - 100)
    parser.add_argument("--bodies", nargs="*", help="names of the bodies to send; default: all")
    parser.add_argument("--only", choices=["idle", "requests", "prompts"])
    parser.add_argument("--json", type=Path)
    arguments, options = parser.parse_known_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ.pop("EORACC_API_KEY", None)
    figures: dict[str, Any] = {}
    with serving(arguments.artifact, descriptors=arguments.descriptors, options=options) as server:
        if arguments.only in {None, "idle"}:
            figures["idle"] = idle(server, arguments.idle, arguments.seconds)
        if arguments.only in {None, "requests"}:
            figures["requests"] = asyncio.run(requests(server, arguments.requests))
        if arguments.only in {None, "prompts"}:
            figures["prompts"] = asyncio.run(
                prompts(server, arguments.body_bytes, arguments.bodies)
            )
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
