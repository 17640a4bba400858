"""Runs on a shared cache, against the parity form of the runtime, which keeps no buffer at all."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pytest

from eoracc.errors import BackendError
from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.decode.bank import NO_PLACE, AdapterBank
from eoracc.runtime.onnxruntime.graph import Binding, Graph
from eoracc.runtime.onnxruntime.inference import open_inference
from eoracc.runtime.onnxruntime.rows import GraphRows
from eoracc.runtime.onnxruntime.session import Session

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CONTEXT = 128
PROMPTS = [[5, 17, 200, 31, 8, 90, 44], [120, 7, 61], [33], list(range(40, 100))]
UNIT_ROUNDOFF = 2.0**-24


def tolerance(logits: NDArray[np.float32]) -> float:
    # Two layers of at most 88 products each, seven linears a layer and the head; attention and
    # norms add as many again.
    bound = 2 * (2 * 7 + 1) * 88 * UNIT_ROUNDOFF * float(np.abs(logits).max())
    assert bound < 1e-3 * float(logits.std()), "the comparison would prove nothing"
    return bound


Inference: TypeAlias = Any
"""Of onnxruntime, which has no types."""


@pytest.fixture(scope="module")
def inference(tiny_artifact: Path) -> Inference:
    decoder = read_model_files(tiny_artifact)
    assert decoder.shares_cache
    return open_inference(str(decoder.model), decoder.library, 1, "tiny")


@pytest.fixture(scope="module")
def reference(inference: Inference) -> Session:
    return Session(inference)


@pytest.fixture(params=[True, False], ids=["in place", "copied"])
def batch(
    request: pytest.FixtureRequest, inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> GraphRows:
    """Its buffers hold NaN before the first write.

    The fused attention can also be run as one that copies: its past is then a buffer of its own.
    """
    graph = Graph(inference, context_length=CONTEXT, in_place=request.param)
    plain = graph.new_caches

    def poisoned(rows: int, capacity: int) -> dict[str, NDArray[np.generic]]:
        caches = plain(rows, capacity)
        for cache in caches.values():
            cache.fill(np.nan)
        return caches

    monkeypatch.setattr(graph, "new_caches", poisoned)
    return GraphRows(graph, AdapterBank())


def whole(reference: Session, tokens: list[int]) -> NDArray[np.float32]:
    logits, _ = reference.run(np.array([tokens]))
    row: NDArray[np.float32] = logits[0]
    return row


def begin(batch: GraphRows, prompts: list[list[int]]) -> list[NDArray[np.float32]]:
    last = []
    for row, prompt in enumerate(prompts):
        batch.clear(row)
        last.append(batch.prefill(row, prompt, adapter=NO_PLACE)[0])
    return last


def check_decoding(
    batch: GraphRows, reference: Session, texts: list[list[int]], steps: int
) -> None:
    """Append ``steps`` tokens to each of ``texts``, which are in the batch but for the last one."""
    for step in range(steps):
        logits = batch.decode([text[-1] for text in texts], [NO_PLACE] * len(texts))
        for row, text in enumerate(texts):
            expected = whole(reference, text)[-1]
            np.testing.assert_allclose(logits[row], expected, rtol=0, atol=tolerance(expected))
            assert batch.length(row) == len(text)
            text.append((7 * step + 13 * row) % 260)


def test_rows_of_different_lengths_are_decoded_as_each_alone(
    batch: GraphRows, reference: Session
) -> None:
    last = begin(batch, PROMPTS)
    for prompt, logits in zip(PROMPTS, last, strict=True):
        expected = whole(reference, prompt)[-1]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance(expected))
    check_decoding(batch, reference, [[*prompt, 9] for prompt in PROMPTS], 6)


@pytest.mark.parametrize("chunks", [(7,), (3, 4), (1, 1, 5), (1,) * 7])
def test_chunks_of_a_prompt(batch: GraphRows, reference: Session, chunks: tuple[int, ...]) -> None:
    begin(batch, [PROMPTS[3]])  # a neighbour that must not matter
    batch.clear(1)
    expected, start = whole(reference, PROMPTS[0]), 0
    for length in chunks:
        part = PROMPTS[0][start : start + length]
        logits = batch.prefill(1, part, adapter=NO_PLACE, keep=length)
        assert logits.shape == (length, 260)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(
            logits, expected[start : start + length], rtol=0, atol=tolerance(expected)
        )
        start += length
    check_decoding(batch, reference, [[*PROMPTS[3], 1], [*PROMPTS[0], 1]], 2)


def test_prefill_beside_rows_that_are_being_decoded(batch: GraphRows, reference: Session) -> None:
    begin(batch, PROMPTS[:2])
    texts = [[*prompt, 3] for prompt in PROMPTS[:2]]
    check_decoding(batch, reference, texts, 2)
    batch.clear(2)
    batch.prefill(2, PROMPTS[3][:20], adapter=NO_PLACE)
    check_decoding(batch, reference, texts, 2)
    batch.prefill(2, PROMPTS[3][20:], adapter=NO_PLACE)
    check_decoding(batch, reference, [*texts, [*PROMPTS[3], 3]], 2)


def test_rows_move(batch: GraphRows, reference: Session) -> None:
    begin(batch, PROMPTS)
    texts = [[*prompt, 2] for prompt in PROMPTS]
    check_decoding(batch, reference, texts, 2)
    batch.move(3, 1)
    batch.move(2, 0)
    check_decoding(batch, reference, [texts[2], texts[3]], 2)
    begin(batch, [PROMPTS[1]])  # a shorter text where a longer one was
    check_decoding(batch, reference, [[*PROMPTS[1], 8], texts[3]], 2)


def test_room_grows_with_texts_and_rows(
    inference: Inference, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eoracc.runtime.onnxruntime.rows._SMALLEST", 4)
    graph = Graph(inference, context_length=CONTEXT, in_place=True)
    sizes = []
    plain = graph.new_caches

    def noted(rows: int, capacity: int) -> dict[str, NDArray[np.generic]]:
        sizes.append((rows, capacity))
        return plain(rows, capacity)

    monkeypatch.setattr(graph, "new_caches", noted)
    batch = GraphRows(graph, AdapterBank())
    texts = []
    for row, prompt in enumerate(PROMPTS[:3]):
        batch.clear(row)
        batch.prefill(row, prompt, adapter=NO_PLACE)
        texts.append([*prompt, 4])
    check_decoding(batch, reference, texts, 12)
    assert sizes == [(0, 0), (1, 4), (1, 8), (2, 8), (4, 8), (4, 16), (4, 32)]


def test_the_context_can_be_used_up(batch: GraphRows, reference: Session) -> None:
    text = [11] * (CONTEXT - 3)
    begin(batch, [text])
    check_decoding(batch, reference, [[*text, 5]], 3)


def test_several_texts_in_one_run(batch: GraphRows, reference: Session) -> None:
    begin(batch, [PROMPTS[3], PROMPTS[0]])  # forgotten
    logits = batch.process(PROMPTS, adapters=[NO_PLACE] * 4, keep=5)
    assert logits.shape == (4, 5, 260)
    for row, prompt in enumerate(PROMPTS):
        expected = whole(reference, prompt)[-5:]
        np.testing.assert_allclose(
            logits[row, -len(expected) :], expected, rtol=0, atol=tolerance(expected)
        )
    check_decoding(batch, reference, [[*prompt, 6] for prompt in PROMPTS], 2)


def test_failed_run_leaves_the_rows_as_they_were(batch: GraphRows, reference: Session) -> None:
    begin(batch, PROMPTS[:2])
    texts = [[*prompt, 3] for prompt in PROMPTS[:2]]
    check_decoding(batch, reference, texts, 1)
    with pytest.raises(BackendError, match=r"ONNX Runtime fails: .*below the 260 rows"):
        batch.decode([3, 260], [NO_PLACE] * 2)  # no such token
    assert [batch.length(row) for row in range(2)] == [len(text) - 1 for text in texts]
    check_decoding(batch, reference, texts, 2)


def test_older_artifact_gives_all_logits(
    batch: GraphRows, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph has no input for the number of tokens and always computes all logits."""
    graph = batch._graph
    monkeypatch.setattr(graph, "trims_logits", False)
    plain = Binding.read

    def read(binding: Binding, name: str, array: NDArray[np.generic]) -> None:
        plain(binding, name, array)
        if name == "input_ids":
            plain(binding, "logits_to_keep", np.array(array.shape[1], np.int64))

    monkeypatch.setattr(Binding, "read", read)
    batch.clear(0)
    logits = batch.prefill(0, PROMPTS[0], adapter=NO_PLACE, keep=2)
    expected = whole(reference, PROMPTS[0])[-2:]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance(expected))


def test_config_says_whether_the_cache_is_shared(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    config = json.loads((folder / "genai_config.json").read_text())
    config["search"]["past_present_share_buffer"] = False
    (folder / "genai_config.json").write_text(json.dumps(config))
    assert not read_model_files(folder).shares_cache


def test_no_memory_is_one_sentence(batch: GraphRows, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise MemoryError

    monkeypatch.setattr(batch._graph, "new_caches", fail)
    with pytest.raises(BackendError, match="no memory for 1 texts of 128 tokens"):
        batch.clear(0)
