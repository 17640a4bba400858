"""Generation on engines against whole texts through the same graph, and on ONNX Runtime.

The engines are those of the stand-in: what is tested is what the runtime binds, copies and asks
for, with the graph that TensorRT is given, and not TensorRT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.runtime import BackendError, Model, load
from eoracc.runtime.decode.bank import NO_PLACE
from tests.runtime.tensorrt.engine_artifact import Oracle, tiny_adapter
from tests.runtime.tensorrt.stand_in import IExecutionContext, RefusedError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from eoracc.runtime.decode.decoder import Decoder, Rows
    from tests.runtime.tensorrt.machine import Machine

PROMPTS = [[5, 17, 200, 31, 8, 90, 44], [120, 7, 61], [33], list(range(40, 100))]
UNIT_ROUNDOFF = 2.0**-24


def tolerance(logits: NDArray[np.float32]) -> float:
    # Two layers of at most 88 products each, seven linears a layer and the head; attention and
    # norms add as many again.
    bound = 2 * (2 * 7 + 1) * 88 * UNIT_ROUNDOFF * float(np.abs(logits).max())
    assert bound < 1e-3 * float(logits.std()), "the comparison would prove nothing"
    return bound


def assert_close(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance(expected))


@pytest.fixture
def model(artifact: Path, machine: Machine) -> Model:
    assert not machine.used()
    model = load(artifact, threads=1, trust=True)
    assert model.backend == "tensorrt_rtx"
    assert model.device == "Stand-in GPU, compute capability 8.6"
    assert model.adapters == ("math", "prose")
    assert machine.used()
    return model


@pytest.fixture
def decoder(model: Model) -> Decoder:
    return model._decoder


def test_chunks_of_a_prompt(decoder: Decoder, oracle: Oracle) -> None:
    text = PROMPTS[3]
    expected = oracle.logits(text)
    for chunks in ((60,), (7, 53), (1, 1, 58), (33, 27)):
        rows = decoder.new_rows()
        rows.clear(0)
        start = 0
        for length in chunks:
            part = text[start : start + length]
            # More than a call takes, and logits that lie in several calls.
            logits = rows.prefill(0, part, adapter=NO_PLACE, keep=length)
            assert_close(logits, expected[start : start + length])
            start += length
        assert rows.length(0) == len(text)


def begin(rows: Rows, prompts: list[list[int]]) -> None:
    for row, prompt in enumerate(prompts):
        rows.clear(row)
        rows.prefill(row, prompt, adapter=NO_PLACE)


def check_decoding(rows: Rows, oracle: Oracle, texts: list[list[int]], steps: int) -> None:
    """Append ``steps`` tokens to each of ``texts``, which are in the cache but for the last one."""
    for step in range(steps):
        logits = rows.decode([text[-1] for text in texts], [NO_PLACE] * len(texts))
        for row, text in enumerate(texts):
            assert_close(logits[row], oracle.logits(text)[-1])
            assert rows.length(row) == len(text)
            text.append((7 * step + 13 * row) % 260)


def test_rows_of_different_lengths_are_decoded_as_each_alone(
    decoder: Decoder, oracle: Oracle
) -> None:
    rows = decoder.new_rows()
    begin(rows, PROMPTS)
    texts = [[*prompt, 9] for prompt in PROMPTS]
    check_decoding(rows, oracle, texts, 3)
    # Others join, and rows beyond what a call takes are decoded in several.
    rows.clear(4)
    rows.prefill(4, PROMPTS[0], adapter=NO_PLACE)
    check_decoding(rows, oracle, [*texts, [*PROMPTS[0], 1]], 2)


def test_rows_move_and_begin_anew(decoder: Decoder, oracle: Oracle) -> None:
    rows = decoder.new_rows()
    begin(rows, PROMPTS)
    texts = [[*prompt, 2] for prompt in PROMPTS]
    check_decoding(rows, oracle, texts, 1)
    rows.move(3, 1)
    rows.move(2, 0)
    check_decoding(rows, oracle, [texts[2], texts[3]], 2)
    rows.clear(0)
    rows.prefill(0, PROMPTS[1], adapter=NO_PLACE)
    check_decoding(rows, oracle, [[*PROMPTS[1], 8], texts[3]], 2)
    assert rows.decode([5], [NO_PLACE], first=1).shape == (1, 260)


def test_last_token_of_the_context(decoder: Decoder, oracle: Oracle) -> None:
    rows = decoder.new_rows()
    text = [11] * (decoder.context_length - 3)
    begin(rows, [text, [5]])
    check_decoding(rows, oracle, [[*text, 5], [5, 6]], 3)


def test_several_texts_in_one_run(decoder: Decoder, oracle: Oracle) -> None:
    rows = decoder.new_rows()
    begin(rows, [PROMPTS[3], PROMPTS[0]])  # forgotten
    texts = [*PROMPTS, PROMPTS[0][::-1]]
    logits = rows.process(texts, adapters=[NO_PLACE] * 5, keep=5)
    assert logits.shape == (5, 5, 260)
    for row, text in enumerate(texts):
        expected = oracle.logits(text)[-5:]
        assert_close(logits[row, -len(expected) :], expected)
    check_decoding(rows, oracle, [[*text, 6] for text in texts], 2)


def test_adapters_of_a_batch(model: Model, oracle: Oracle, artifact: Path) -> None:
    """An engine takes one adapter a call: rows of several are as many calls."""
    factors = {name: tiny_adapter(artifact, name) for name in model.adapters}
    places = [model.bank.acquire(name) for name in ("math", None, "prose", "math")]
    assert places[1] == NO_PLACE
    own = [factors.get(name or "") for name in ("math", None, "prose", "math")]
    rows = model._decoder.new_rows()
    texts = [list(prompt) for prompt in PROMPTS]
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        rows.clear(row)
        logits = rows.prefill(row, text, adapter=place)
        assert_close(logits[0], oracle.logits(text, own[row])[-1])
        text.append(row + 7)
    plain = oracle.logits(texts[0])[-1]
    assert np.abs(oracle.logits(texts[0], own[0])[-1] - plain).max() > 1e3 * tolerance(plain)
    for _ in range(3):
        logits = rows.decode([text[-1] for text in texts], places)
        for row, text in enumerate(texts):
            assert_close(logits[row], oracle.logits(text, own[row])[-1])
            text.append(3 * row + 20)


def test_failed_call_leaves_the_rows_as_they_were(
    decoder: Decoder, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = decoder.new_rows()
    begin(rows, PROMPTS[:2])
    texts = [[*prompt, 3] for prompt in PROMPTS[:2]]
    check_decoding(rows, oracle, texts, 1)
    plain = IExecutionContext._execute
    calls = 0

    def fail(context: IExecutionContext, stream: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RefusedError("no more")
        plain(context, stream)

    monkeypatch.setattr(IExecutionContext, "_execute", fail)
    with pytest.raises(BackendError, match="tensorrt_rtx fails: it refuses the call: no more"):
        # The second of three calls: what the first one wrote does not count.
        rows.prefill(1, [4] * 40, adapter=NO_PLACE)
    calls = 0
    with pytest.raises(BackendError, match="no more"):
        rows.decode([3, 4], [NO_PLACE, 0])
    monkeypatch.undo()
    assert [rows.length(row) for row in range(2)] == [len(text) - 1 for text in texts]
    check_decoding(rows, oracle, texts, 2)


def test_memory_is_given_back(artifact: Path, machine: Machine) -> None:
    model = load(artifact, threads=1, trust=True)
    loaded = machine.used()
    rows = model._decoder.new_rows()
    begin(rows, PROMPTS)
    rows.decode([1] * 4, [NO_PLACE] * 4)
    rows.decode([1] * 4, [NO_PLACE] * 4)
    held = machine.used()
    # Two layers of keys and values of two heads of 16, in float32, twice where a call writes anew.
    least = 4 * len(PROMPTS[3]) * 2 * 2 * 2 * 16 * 4
    assert held - loaded > least
    for row in range(4):
        rows.clear(row)
    assert machine.used() < loaded + least / 4
    del rows
    assert machine.used() == loaded
    del model
    assert machine.used() == 0


def test_no_memory_is_one_sentence(decoder: Decoder, oracle: Oracle, machine: Machine) -> None:
    rows = decoder.new_rows()
    begin(rows, PROMPTS[:2])
    machine.set_up(memory=machine.used() + 1000)
    rows.clear(2)
    with pytest.raises(BackendError, match="there is no memory left on the GPU"):
        rows.prefill(2, PROMPTS[0], adapter=NO_PLACE)
    machine.set_up()
    check_decoding(rows, oracle, [[*prompt, 9] for prompt in PROMPTS[:2]], 1)
