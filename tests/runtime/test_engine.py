"""The engine from many threads at once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from eoracc.runtime import (
    BackendError,
    BusyError,
    Engine,
    Model,
    Piece,
    Request,
    RequestError,
    load,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LONG = Request(prompt=[5, 6, 7], max_new_tokens=120, ignore_end=True)


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact, threads=1)


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, max_rows=4, prefill_chunk=16) as engine:
        yield engine


class Gate:
    """Lets the engine go no further than its next step, until it is opened."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self.reached = threading.Event()
        step: Callable[[], bool] = engine._scheduler.step

        def wait() -> bool:
            self.reached.set()
            assert self._open.wait(30)
            return step()

        monkeypatch.setattr(engine._scheduler, "step", wait)

    def open(self) -> None:
        self._open.set()


def test_requests_of_many_threads(engine: Engine, model: Model) -> None:
    asked = [
        Request(
            prompt=[10 + index] * (1 + 5 * index),
            max_new_tokens=3 + index,
            seed=index,
            temperature=0.7,
        )
        for index in range(12)
    ]
    found: dict[int, object] = {}

    def work(index: int) -> None:
        generation = engine.submit(asked[index])
        pieces = list(generation)
        assert pieces[-1].finish_reason is not None
        assert all(piece.finish_reason is None for piece in pieces[:-1])
        assert "".join(piece.text for piece in pieces) == generation.result().text
        assert generation.done
        found[index] = generation.result()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: model.generate_batch([one])[0] for index, one in enumerate(asked)}


def test_listener_hears_every_piece_in_the_engines_thread(engine: Engine) -> None:
    heard: list[Piece | Exception] = []
    names = set()

    def listen(event: Piece | Exception) -> None:
        heard.append(event)
        names.add(threading.current_thread().name)

    generation = engine.submit(LONG, listener=listen)
    assert list(generation) == heard
    assert names == {"eoracc-engine"}


def test_cancelled_text_ends_and_others_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(engine, monkeypatch)
    stopped, other = engine.submit(LONG), engine.submit(LONG)
    assert gate.reached.wait(30)
    stopped.cancel()
    gate.open()
    assert stopped.result().finish_reason == "cancelled"
    assert len(other.result().tokens) == 120
    other.cancel()  # too late to change anything
    assert other.result().finish_reason == "length"


def test_bounded_queue(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(model, max_rows=1, max_waiting=2) as engine:
        gate = Gate(engine, monkeypatch)
        first = engine.submit(LONG)
        assert gate.reached.wait(30)
        waiting = [engine.submit(LONG) for _ in range(2)]
        assert (engine.load.active, engine.load.waiting) == (0, 3)
        with pytest.raises(BusyError, match="2 requests are waiting already: try again later"):
            engine.submit(LONG)
        gate.open()
        results = {one.result() for one in (first, *waiting)}
        assert len(results) == 1
        assert engine.submit(LONG).result() in results
    assert (engine.load.active, engine.load.waiting) == (0, 0)


def test_bad_requests_are_refused_at_once(engine: Engine, model: Model) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.submit(Request(prompt=""))
    with pytest.raises(RequestError, match="the artifact takes no adapters"):
        engine.submit(Request(prompt="a", adapter="math"))
    with Engine(model, max_tokens=20) as small:
        with pytest.raises(RequestError, match="the prompt has 20 tokens, the model takes 20"):
            small.submit(Request(prompt=[5] * 20))
        answer = small.submit(Request(prompt=[5] * 15, ignore_end=True)).result()
        assert (len(answer.tokens), answer.finish_reason) == (5, "length")


def test_close_serves_what_was_submitted(model: Model) -> None:
    engine = Engine(model, max_rows=1)
    left = [engine.submit(LONG) for _ in range(3)]
    states = [engine.alive]
    assert engine.close()
    assert [*states, engine.alive] == [True, False]
    assert {len(one.result().tokens) for one in left} == {120}
    with pytest.raises(BusyError, match="the engine is closed"):
        engine.submit(LONG)
    assert engine.close()


def test_close_without_draining_cancels(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, max_rows=1)
    gate = Gate(engine, monkeypatch)
    left = [engine.submit(LONG) for _ in range(3)]
    assert gate.reached.wait(30)
    closing = threading.Thread(target=engine.close, kwargs={"drain": False})
    closing.start()
    while not engine._cancel:
        pass
    gate.open()
    closing.join()
    assert {one.result().finish_reason for one in left} == {"cancelled"}


def test_close_waits_no_longer_than_it_is_told(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, max_rows=1)
    gate = Gate(engine, monkeypatch)
    left = engine.submit(LONG)
    assert gate.reached.wait(30)
    served: list[bool] = []
    closing = threading.Thread(target=lambda: served.append(engine.close(timeout=0.01)))
    closing.start()
    while not engine._cancel:
        pass
    gate.open()
    closing.join()
    assert served == [False]
    assert left.result().finish_reason == "cancelled"


def test_engine_that_breaks_tells_everybody(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, max_rows=1)

    def fail() -> bool:
        raise ZeroDivisionError("a fault of our own")

    monkeypatch.setattr(engine._scheduler, "step", fail)
    generation = engine.submit(LONG)
    with pytest.raises(BackendError, match="the engine has failed: a fault of our own"):
        generation.result()
    with pytest.raises(BackendError):
        list(generation)
    engine._thread.join()
    with pytest.raises(BusyError):
        engine.submit(LONG)
    engine.close()
