"""The runtime on SmolLM2-135M; unmodified onnxruntime-genai says what is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.runtime import Engine, Model, Request, load
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import read_manifest
from tests.end_to_end.ways_of_running import genai_tokens, until
from tests.tiny_artifact import tiny_factors, tiny_slots

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.runtime import Completion

pytestmark = pytest.mark.real

PROMPTS = ("The capital of France is", "Once upon a time there was", "def main():\n    ")
ADAPTERS = {"math": (16, "int8"), "prose": (48, "int8"), "code": (16, "int4")}
TOKENS = 32


@pytest.fixture(scope="module")
def artifact(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounded to 3 bits, with adapters of random factors."""
    from eoracc.compiler import driver
    from eoracc.compiler.config.sections import BuildConfig
    from eoracc.compiler.progress import SilentProgress

    folder = tmp_path_factory.mktemp("runtime")
    text = smollm2_gguf.parent / "speeches-2000-2024.txt"
    config = BuildConfig.model_validate(
        {
            "model": str(smollm2_gguf),
            "calibration": {"text": str(text), "samples": 1},
            "passes": [{"quantize_rtn": {"bits": 3, "group_size": 64}}],
            "onnxruntime": {"accuracy_level": 0, "adapter_type": "int8"},
            "verify": {"text": str(text), "windows": 1, "compare": [], "parity": False},
            "output": "artifact",
        }
    )
    output = driver.build(config, config_dir=folder, progress=SilentProgress()).output
    slots = tiny_slots(output)
    for seed, (name, (rank, kind)) in enumerate(ADAPTERS.items()):
        factors = tiny_factors(slots, rank=rank, seed=seed, factor_type=kind, size=0.5)
        add_adapter(output, Adapter(name, factors, read_manifest(output).digest))
    return output


@pytest.fixture(scope="module")
def model(artifact: Path) -> Model:
    return load(artifact)


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_greedy_tokens_are_those_of_genai(
    model: Model, artifact: Path, adapter: str | None
) -> None:
    for prompt in PROMPTS:
        tokens = model.encode(prompt)
        made = model.generate(tokens, TOKENS, adapter=adapter)
        expected = genai_tokens(artifact, tokens, TOKENS, adapter=adapter)
        assert list(made.tokens) == until(expected, model.tokenizer.ends)


def test_mixed_batch_equals_serving_one_by_one(model: Model) -> None:
    choices = [None, *ADAPTERS, {"math": 0.5, "code": 0.5}]
    asked = [
        Request(prompt=prompt, adapter=choice, max_new_tokens=TOKENS, logprobs=0, ignore_end=True)
        for prompt in PROMPTS
        for choice in choices
    ]
    alone = [model.generate_batch([request])[0] for request in asked]
    with Engine(model, max_rows=5) as engine:
        served = [engine.submit(request) for request in asked]
        together = [generation.result() for generation in served]
    assert len({one.tokens for one in alone}) == len(asked)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    # 30 blocks of seven linears of at most 1536 products, logits up to 32; rounding errors of a
    # linear's output add up like those of a random walk over its products and over the linears.
    bound = np.sqrt(30 * 7 * 1536) * 2.0**-24 * 32
    assert bound < 2e-3
    assert max(map(_largest_difference, together, alone)) < bound


def _largest_difference(one: Completion, other: Completion) -> float:
    assert one.logprobs is not None
    assert other.logprobs is not None
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    return max(abs(a.logprob - b.logprob) for a, b in pairs)


def test_scores_and_generation_agree(model: Model) -> None:
    """What greedy decoding makes is what scoring calls greedy, with the same probabilities."""
    for adapter in (None, "math"):
        context = model.encode(PROMPTS[0])
        made = model.generate(context, 12, adapter=adapter, logprobs=0, ignore_end=True)
        assert made.logprobs is not None
        (score,) = model.score_continuations([(context, made.tokens)], adapter=adapter)
        assert score.greedy
        bound = np.sqrt(30 * 7 * 1536) * 2.0**-24 * 32
        np.testing.assert_allclose(
            score.logprobs, [one.logprob for one in made.logprobs], rtol=0, atol=bound
        )
