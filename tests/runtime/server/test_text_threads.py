from __future__ import annotations

import asyncio
import threading
import time

from eoracc.runtime.server.text_threads import TextThreads
from tests.runtime.server.fake import Server, run


def test_a_short_text_does_not_wait_for_a_long_one() -> None:
    async def test() -> None:
        threads, end = TextThreads(), threading.Event()
        message = {"role": "user", "content": "x" * (1 << 15)}
        texts = ["x" * (1 << 15), [message], list(range(1 << 15))]
        long = [asyncio.create_task(threads.run(lambda _: end.wait(10), text)) for text in texts]
        await asyncio.sleep(0.01)
        for short in ("short", [{"role": "user", "content": "x"}], [1, 2]):
            assert await asyncio.wait_for(threads.run(len, short), 5) == len(short)
        end.set()
        assert await asyncio.gather(*long) == [True] * 3
        threads.close()

    asyncio.run(test())


def test_a_prompt_that_waits_too_long_for_its_tokens_gets_503() -> None:
    async def test(server: Server) -> None:
        begin = time.monotonic()
        first, second = await asyncio.gather(
            server.post("/v1/completions", prompt="slow", max_tokens=1),
            server.post("/v1/completions", prompt="slow", max_tokens=1),
        )
        assert first.status_code == second.status_code == 503
        assert second.json()["error"]["code"] == "queue_timeout"
        assert time.monotonic() - begin < 0.5
        assert server.service.admission.waiting == 0

    run(test, queue_timeout_s=0.1)


def test_prompts_that_cannot_fit_are_refused_before_they_are_read() -> None:
    async def test(server: Server) -> None:
        for prompt in (" " * 1000, [5] * 1000):
            response = await server.post("/v1/completions", prompt=prompt, max_tokens=1)
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "context_length_exceeded"
        response = await server.post(
            "/v1/completions", prompt=[97] * 1000, max_tokens=1, truncate_prompt_tokens=5
        )
        assert response.json()["usage"]["prompt_tokens"] == 5

    run(test)
