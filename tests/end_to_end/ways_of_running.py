"""Other ways of running an artifact than our runtime, and commands in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["build_in", "eoracc", "genai_tokens", "python", "stock_gaps", "stock_tokens", "until"]

_OPEN = """
import json, sys
import numpy, onnxruntime
folder, tokens = sys.argv[1], json.loads(sys.argv[2])
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
session = onnxruntime.InferenceSession(
    folder + "/model.onnx", options, providers=["CPUExecutionProvider"]
)
cache = {
    value.name: numpy.zeros((1, value.shape[1], 0, value.shape[3]), numpy.float32)
    for value in session.get_inputs() if value.name.startswith("past_key_values.")
}
takes = {value.name for value in session.get_inputs()}
"""
"""Unmodified ONNX Runtime: no library is registered, nothing of ours imported."""

_STOCK = (
    _OPEN
    + """
count = int(sys.argv[3])
names = [value.name for value in session.get_outputs()]
made, step, seen = [], tokens, 0
for _ in range(count):
    seen += len(step)
    feeds = {
        "input_ids": numpy.array([step]),
        "attention_mask": numpy.ones((1, seen), numpy.int64),
        "position_ids": numpy.arange(seen - len(step), seen)[None],
    }
    feeds = {name: array for name, array in feeds.items() if name in takes} | cache
    results = dict(zip(names, session.run(None, feeds)))
    cache = {name: results[name.replace("past_key_values.", "present.")] for name in cache}
    step = [int(results["logits"][0, -1].argmax())]
    made += step
print(json.dumps(made))
"""
)
"""Greedy tokens."""

_GAPS = (
    _OPEN
    + """
made = json.loads(sys.argv[3])
text = tokens + made[:-1]
feeds = {
    "input_ids": numpy.array([text]),
    "attention_mask": numpy.ones((1, len(text)), numpy.int64),
    "position_ids": numpy.arange(len(text))[None],
}
feeds = {name: array for name, array in feeds.items() if name in takes} | cache
feeds["logits_to_keep"] = numpy.array(len(made))
(logits,) = session.run(["logits"], feeds)[0]
print(json.dumps((logits.max(1) - logits[range(len(made)), made]).tolist()))
"""
)
"""By how much each made token is below the most likely one."""


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )


def eoracc(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "eoracc.compiler.cli", *arguments)


def build_in(work: Path, settings: Mapping[str, Any]) -> Path:
    """The artifact of a model.yaml in folder ``work``, given without its output."""
    artifact = work / "artifact"
    # JSON is YAML.
    (work / "model.yaml").write_text(json.dumps({**settings, "output": str(artifact)}))
    done = eoracc("build", work / "model.yaml")
    assert done.returncode == 0, done.stderr
    return artifact


def stock_tokens(artifact: Path, prompt: Sequence[int], count: int) -> list[int]:
    """``count`` greedy tokens of ONNX Runtime without the library, ends of text included."""
    done = python("-c", _STOCK, artifact, json.dumps(list(prompt)), str(count))
    assert done.returncode == 0, done.stderr
    made: list[int] = json.loads(done.stdout)
    return made


def stock_gaps(artifact: Path, prompt: Sequence[int], made: Sequence[int]) -> list[float]:
    """By how many logits each of ``made`` is below the best token, without the library."""
    done = python("-c", _GAPS, artifact, json.dumps(list(prompt)), json.dumps(list(made)))
    assert done.returncode == 0, done.stderr
    gaps: list[float] = json.loads(done.stdout)
    return gaps


def genai_tokens(
    artifact: Path, prompt: Sequence[int], count: int, *, adapter: str | None = None
) -> list[int]:
    """Greedy tokens of unmodified onnxruntime-genai, which finds the library by itself.

    It stops behind the first end of text. The adapter is set through its own API.
    """
    import onnxruntime_genai

    genai: Any = onnxruntime_genai
    config = genai.Config(str(artifact))
    options = {"model": {"decoder": {"session_options": {"log_severity_level": 3}}}}
    config.overlay(json.dumps(options))
    model = genai.Model(config)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(prompt) + count)
    generator = genai.Generator(model, parameters)
    adapters = genai.Adapters(model)
    if adapter is not None:
        adapters.load(str(artifact / "adapters" / f"{adapter}.onnx_adapter"), adapter)
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(list(prompt))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def until(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """``tokens`` up to the first of ``ends``."""
    found: NDArray[np.int64] = np.flatnonzero(np.isin(tokens, list(ends)))
    return list(tokens[: found[0]]) if len(found) else list(tokens)
