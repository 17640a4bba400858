"""LongRoPE in the runtime against transformers, which generates each text alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.runtime import Model, Request, load
from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.decode import scoring
from eoracc.runtime.decode.continuation import complete
from eoracc.runtime.onnxruntime.session import open_session
from tests.tiny_artifact import write_tiny_artifact

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from eoracc.runtime import Piece

ORIGINAL, LONGEST, NEW = 32, 128, 20
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * index for index in range(8)],
    "long_factor": [1.0 + 0.6 * index for index in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
# Texts that stay short, that cross the original length at their first, second and a later token,
# and that are beyond it from the beginning, also after their first chunk.
LENGTHS = (3, 33, 32, 31, 20, 12, 60, 45)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("long_rope")
    fields = {"rope_parameters": ROPE, "original_max_position_embeddings": ORIGINAL}
    return write_tiny_artifact(work, family="phi3", compress=False, fields=fields)


@pytest.fixture(scope="module")
def model(artifact: Path) -> Model:
    return load(artifact, threads=1)


@pytest.fixture(scope="module")
def eager(artifact: Path) -> PreTrainedModel:
    return load_eager(artifact.parent / "checkpoint", {})


@pytest.fixture(scope="module")
def expected(eager: Any) -> dict[tuple[int, ...], list[int]]:  # noqa: ANN401 - untyped generate
    """Greedy continuations by prompt; transformers computes the cache anew where they cross."""
    rng = np.random.default_rng(5)
    prompts = [tuple(rng.integers(4, 260, length).tolist()) for length in LENGTHS]
    return {prompt: _greedy(eager, prompt) for prompt in prompts}


def _greedy(eager: Any, prompt: tuple[int, ...]) -> list[int]:  # noqa: ANN401
    made = eager.generate(
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("chunk", [8, 256])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_texts_together_are_those_of_transformers(
    model: Model, expected: dict[tuple[int, ...], list[int]], rows: int, chunk: int
) -> None:
    scheduler = model.scheduler(max_rows=rows, chunk=chunk)
    events: dict[tuple[int, ...], list[Piece | Exception]] = {prompt: [] for prompt in expected}
    for prompt, received in events.items():
        request = Request(prompt=list(prompt), max_new_tokens=NEW, ignore_end=True)
        scheduler.add(model.prepare(request, received.append))
    while scheduler.step():
        assert scheduler.active <= rows
    for prompt, received in events.items():
        assert not any(isinstance(event, Exception) for event in received), received
        completion = complete(received, len(prompt))  # type: ignore[arg-type]
        assert list(completion.tokens) == expected[prompt], len(prompt)


def test_plain_sessions_cross_too(
    artifact: Path, expected: dict[tuple[int, ...], list[int]]
) -> None:
    made = open_session(artifact, threads=1).generate(list(expected), NEW)
    assert made == list(expected.values())


@pytest.mark.parametrize("chunk", [16, 256])
def test_scores_are_those_of_transformers(
    model: Model, eager: PreTrainedModel, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts share a run, or are processed in chunks, the first of which is a short text."""
    monkeypatch.setattr(scoring, "PREFILL_CHUNK", chunk)
    rng = np.random.default_rng(6)
    texts = [rng.integers(4, 260, length).tolist() for length in (50, 9, 34, 100)]
    scores = model.score_continuations([(text[:1], text[1:]) for text in texts])
    for text, score in zip(texts, scores, strict=True):
        logits = torch.from_numpy(reference_logits(eager, np.array([text[:-1]])))
        logprobs = torch.log_softmax(logits[0], -1)[range(len(text) - 1), text[1:]]
        np.testing.assert_allclose(score.logprobs, logprobs, rtol=0, atol=1e-4)


def test_contexts(artifact: Path, model: Model) -> None:
    """eoracc's runtime takes all lengths, onnxruntime-genai those up to the original one."""
    assert model.context_length == LONGEST
    assert read_model_files(artifact).context_length == ORIGINAL
