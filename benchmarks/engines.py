"""Run one inference engine in a process of its own, controlled over its standard streams.

    python benchmarks/engines.py genai|llama_cpp PATH [--threads N] [--option NAME=VALUE ...]

Engines have thread pools that spin after their work, runtimes that cannot be loaded twice, and
output of their own on standard output; separate processes isolate them. This file imports nothing
from the project, so it runs in any interpreter that has the engine. The first line on standard
output is ``{"ready": VERSION}`` or ``{"missing": REASON}``. The answer to each line on standard
input, ``{"measure": "decode"|"prefill", "tokens": N}``, is ``{"seconds": [...]}``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any, Protocol

PROMPT_TOKENS = 32
CONTEXT_TOKENS = 1024
"""Positions of the key/value cache, the same for every engine."""


class Engine(Protocol):
    """A loaded model that decodes greedily, one sequence at a time."""

    version: str
    """Name and version, for the report."""

    def start(self, prompt: list[int]) -> None:
        """Clear the cache, process ``prompt`` and choose the first token after it."""

    def step(self) -> None:
        """Process the last chosen token and choose the next one."""


class GenAI:
    """A model folder of onnxruntime-genai: made by its builder, or an artifact of ours."""

    def __init__(self, path: str, threads: int, options: dict[str, Any]) -> None:
        og = import_module("onnxruntime_genai")
        config = og.Config(path)
        session = {"intra_op_num_threads": threads, **options}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        model = og.Model(config)
        params = og.GeneratorParams(model)
        # A minimum length keeps the end token from stopping the measurement.
        params.set_search_options(
            do_sample=False, max_length=CONTEXT_TOKENS, min_length=CONTEXT_TOKENS
        )
        self._generator = og.Generator(model, params)
        self.version = f"onnxruntime-genai {version('onnxruntime-genai')}"

    def start(self, prompt: list[int]) -> None:
        """See :class:`Engine`."""
        self._generator.rewind_to(0)
        self._generator.append_tokens(prompt)
        self._generator.generate_next_token()

    def step(self) -> None:
        """See :class:`Engine`."""
        self._generator.generate_next_token()


class LlamaCpp:
    """A GGUF file in llama.cpp, through the C interface, which does not copy the logits."""

    def __init__(self, path: str, threads: int, options: dict[str, Any]) -> None:
        self._api = import_module("llama_cpp")
        self._llama = self._api.Llama(
            path,
            n_ctx=CONTEXT_TOKENS,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            **options,
        )
        self._context = self._llama.ctx
        self._sampler = self._api.llama_sampler_init_greedy()
        self._token = (self._api.llama_token * 1)()
        self.version = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"

    def start(self, prompt: list[int]) -> None:
        """See :class:`Engine`."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._process((self._api.llama_token * len(prompt))(*prompt))

    def step(self) -> None:
        """See :class:`Engine`."""
        self._process(self._token)

    def _process(self, tokens: Any) -> None:
        batch = self._api.llama_batch_get_one(tokens, len(tokens))
        if code := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with code {code}")
        self._token[0] = self._api.llama_sampler_sample(self._sampler, self._context, -1)


ENGINES: dict[str, Callable[[str, int, dict[str, Any]], Engine]] = {
    "genai": GenAI,
    "llama_cpp": LlamaCpp,
}


def seconds(engine: Engine, measure: str, tokens: int) -> list[float]:
    """Times of ``tokens`` decoding steps after a short prompt, or of one prompt of ``tokens``."""
    if measure == "prefill":
        return [_timed(engine.start, _prompt(tokens))]
    engine.start(_prompt(PROMPT_TOKENS))
    for _ in range(2):  # threads wake up
        engine.step()
    return [_timed(engine.step) for _ in range(tokens)]


def _prompt(length: int) -> list[int]:
    # Speed does not depend on the tokens; any ordinary ones will do.
    return [1000 + 7 * i % 4999 for i in range(length)]


def _timed(run: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("path", help="model folder or file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON")
    arguments = parser.parse_args()
    # Engines print to standard output; keep their text out of the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    named = (option.partition("=") for option in arguments.option)
    options = {name: json.loads(value) for name, _, value in named}
    try:
        engine = ENGINES[arguments.engine](arguments.path, arguments.threads, options)
    except ImportError as error:
        answers.write(json.dumps({"missing": f"{error}"}) + "\n")
        return
    answers.write(json.dumps({"ready": engine.version}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        taken = seconds(engine, request["measure"], request["tokens"])
        answers.write(json.dumps({"seconds": taken}) + "\n")


if __name__ == "__main__":
    main()
