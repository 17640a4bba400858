"""Continuous batching: requests get the same result together and alone; failures are isolated."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.runtime import BackendError, Model, Piece, Request, RequestError, load
from eoracc.runtime.decode.continuation import Continuation, complete
from eoracc.runtime.decode.scheduler import Scheduler

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from eoracc.runtime import Completion

Event = Piece | Exception


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact, threads=1)


def requests(count: int) -> list[Request]:
    """Prompts and answers of all lengths, greedy and drawn."""
    rng = np.random.default_rng(count)
    return [
        Request(
            prompt=rng.integers(4, 260, rng.integers(1, 60)).tolist(),
            max_new_tokens=int(rng.integers(1, 25)),
            temperature=float(rng.choice([0.0, 0.9])),
            top_p=0.9,
            seed=index,
            logprobs=index % 3 or None,
            stop=["Q"] if index % 4 == 0 else (),
        )
        for index in range(count)
    ]


def alone(model: Model, request: Request) -> Completion:
    return model.generate_batch([request])[0]


def same(one: Completion, other: Completion) -> bool:
    """All but the last bits of probabilities, which the number of rows may change."""
    if one.logprobs is None or other.logprobs is None:
        return one == other
    bare = (dataclasses.replace(completion, logprobs=None) for completion in (one, other))
    # Logits of float32 through two layers, see test_rows.py, whose size is about one.
    bound = 2 * (2 * 7 + 1) * 88 * 2.0**-24 * 8
    return len(set(bare)) == 1 and all(
        a.token == b.token and abs(a.logprob - b.logprob) < bound
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    )


class Served:
    """A request in a scheduler with the events that its listener got."""

    def __init__(self, model: Model, scheduler: Scheduler, request: Request) -> None:
        self.events: list[Event] = []
        self.continuation: Continuation = model.prepare(request, self.events.append)
        scheduler.add(self.continuation)

    @property
    def completion(self) -> Completion:
        pieces = [event for event in self.events if isinstance(event, Piece)]
        assert len(pieces) == len(self.events), self.events
        return complete(pieces, len(self.continuation.prompt))


@pytest.mark.parametrize("chunk", [8, 256])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_batch_gets_what_each_gets_alone(model: Model, rows: int, chunk: int) -> None:
    asked = requests(14)
    scheduler = model.scheduler(max_rows=rows, chunk=chunk)
    served = [Served(model, scheduler, request) for request in asked]
    most = 0
    while scheduler.step():
        most = max(most, scheduler.active)
    assert most == rows
    for request, text in zip(asked, served, strict=True):
        assert same(text.completion, alone(model, request))


def test_who_comes_later_joins_and_changes_nothing(model: Model) -> None:
    asked = requests(9)
    scheduler = model.scheduler(max_rows=4, chunk=16)
    served = []
    for request in asked:
        served.append(Served(model, scheduler, request))
        scheduler.step()
        scheduler.step()
    while scheduler.step():
        pass
    for request, text in zip(asked, served, strict=True):
        assert same(text.completion, alone(model, request))


def test_long_prompt_does_not_keep_others_waiting(model: Model) -> None:
    scheduler = model.scheduler(max_rows=2, chunk=8)
    short = Served(model, scheduler, Request(prompt=[5, 6], max_new_tokens=20, ignore_end=True))
    scheduler.step()
    Served(model, scheduler, Request(prompt=[7] * 64, max_new_tokens=1))
    for step in range(8):
        made = len(short.continuation.tokens)
        scheduler.step()
        assert len(short.continuation.tokens) == made + 1, step
    scheduler.close()


def test_cancelled_wherever_they_are(model: Model) -> None:
    asked = [
        dataclasses.replace(request, ignore_end=True, max_new_tokens=30, stop=())
        for request in requests(6)
    ]
    long = Request(prompt=[9] * 60, max_new_tokens=5)
    scheduler = model.scheduler(max_rows=4, chunk=16)
    served = [Served(model, scheduler, request) for request in asked[:3]]
    while len(served[2].continuation.tokens) < 4:
        scheduler.step()
    filling = Served(model, scheduler, long)
    waiting = [Served(model, scheduler, request) for request in asked[3:]]
    scheduler.step()
    assert (scheduler.active, scheduler.waiting) == (4, 3)
    made = tuple(served[0].continuation.tokens)
    for text in (served[0], filling, waiting[1]):
        text.continuation.cancelled = True
    while scheduler.step():
        pass
    assert served[0].completion.finish_reason == "cancelled"
    assert served[0].completion.tokens == made
    assert filling.completion.tokens == waiting[1].completion.tokens == ()
    left = [
        (asked[1], served[1]),
        (asked[2], served[2]),
        (asked[3], waiting[0]),
        (asked[5], waiting[2]),
    ]
    for request, text in left:
        assert same(text.completion, alone(model, request))


@pytest.mark.parametrize("ending", [{0, 3}, {1, 3}, {2, 3}, {0, 1}, {0, 1, 2, 3}], ids=str)
def test_texts_that_end_together(model: Model, ending: set[int]) -> None:
    asked = [
        Request(prompt=[20 + row], max_new_tokens=8 if row in ending else 16, ignore_end=True)
        for row in range(4)
    ]
    scheduler = model.scheduler(max_rows=4)
    served = [Served(model, scheduler, request) for request in asked]
    while scheduler.step():
        pass
    for request, text in zip(asked, served, strict=True):
        assert same(text.completion, alone(model, request))


def test_run_that_fails_ends_whom_it_fails_for(model: Model) -> None:
    asked = [
        dataclasses.replace(request, ignore_end=True, max_new_tokens=12, stop=())
        for request in requests(4)
    ]
    expected = [alone(model, request) for request in asked]
    scheduler = model.scheduler(max_rows=4)
    served = [Served(model, scheduler, request) for request in asked]
    while len(served[3].continuation.tokens) < 3:
        scheduler.step()
    served[1].continuation.tokens[-1] = 260  # there is no such token: the run fails for all rows
    while scheduler.step():
        pass
    error = served[1].events[-1]
    assert isinstance(error, BackendError)
    assert "ONNX Runtime fails" in str(error)
    for row in (0, 2, 3):
        assert same(served[row].completion, expected[row])


def test_prompt_that_fails_ends_itself(model: Model) -> None:
    asked = requests(2)
    scheduler = model.scheduler(max_rows=2)
    served = [Served(model, scheduler, request) for request in asked]
    bad = Served(model, scheduler, Request(prompt=[5], max_new_tokens=3))
    bad.continuation.prompt[0] = 999
    while scheduler.step():
        pass
    assert isinstance(bad.events[-1], BackendError)
    for request, text in zip(asked, served, strict=True):
        assert same(text.completion, alone(model, request))


def test_fault_in_one_text_is_its_own(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a sampler, a tokenizer or a listener raises."""
    asked = requests(3)
    scheduler = model.scheduler(max_rows=3)
    served = [Served(model, scheduler, request) for request in asked]

    def fail(logits: NDArray[np.float32]) -> Piece | None:
        raise ZeroDivisionError(len(logits))

    monkeypatch.setattr(served[0].continuation, "push", fail)
    heard = []

    def refuse(event: Event) -> None:
        heard.append(event)
        raise ConnectionError

    served[1].continuation.listener = refuse
    while scheduler.step():
        pass
    assert isinstance(served[0].events[-1], ZeroDivisionError)
    assert heard
    assert same(served[2].completion, alone(model, asked[2]))


def test_close_cancels_the_rest(model: Model) -> None:
    scheduler = model.scheduler(max_rows=1, chunk=4)
    served = [Served(model, scheduler, request) for request in requests(3)]
    scheduler.step()
    scheduler.close()
    assert [text.completion.finish_reason for text in served] == ["cancelled"] * 3
    assert not scheduler.step()
    failed = Served(model, scheduler, requests(1)[0])
    scheduler.close(BackendError("broken"))
    assert [str(event) for event in failed.events] == ["broken"]


def test_nothing_asked_for_is_nothing_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = model.scheduler(max_rows=1)
    monkeypatch.setattr(scheduler._batch, "prefill", lambda *_, **__: pytest.fail("ran"))
    served = Served(model, scheduler, Request(prompt="abc", max_new_tokens=0))
    assert not scheduler.step()
    assert (served.completion.text, served.completion.finish_reason) == ("", "length")


@pytest.mark.parametrize("name", ["max_rows", "chunk"])
def test_nothing_at_a_time_is_refused(model: Model, name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name}: must be 1 or more, not 0"):
        model.scheduler(**{"max_rows": 1, name: 0})
