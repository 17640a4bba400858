"""Places of adapters: a place holds the requested adapter for as long as it is reserved."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.errors import RequestError
from eoracc.plugins.adapters import (
    AdapterSlot,
    AdapterSlots,
    pack_adapter,
    stack_adapters,
    unpack_adapter,
)
from eoracc.runtime.decode.bank import NO_PLACE, AdapterBank, Weights
from tests.tiny_artifact import tiny_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from eoracc.plugins.operands.low_rank import LowRank

SLOTS = AdapterSlots(
    "int8",
    (
        AdapterSlot("qk", ("q", "k"), (32, 16), 24, 48),
        AdapterSlot("down", ("down",), (24,), 40, 24),
    ),
)
RANKS = {"math": 3, "prose": 20, "code": 1}


class Files:
    """Adapters as if read from files; each sum has distinguishable factors."""

    def __init__(self) -> None:
        self.read: list[Weights] = []

    def __call__(self, weights: Weights) -> Mapping[str, LowRank]:
        self.read.append(weights)
        rank = sum(RANKS[name] for name, _ in weights)
        seed = int(sum(len(name) * 10 + 1000 * (weight + 2) for name, weight in weights))
        kind = "int4" if weights == (("code", 1.0),) else "int8"
        return tiny_factors(SLOTS, rank=rank, seed=seed, factor_type=kind)


@pytest.fixture
def files() -> Files:
    return Files()


def make(files: Files, *, sums: int = 2) -> AdapterBank:
    return AdapterBank(SLOTS, list(RANKS), files, sums=sums)


def at(bank: AdapterBank, place: int) -> dict[str, NDArray[np.float32]]:
    """The products of the factors at ``place``."""
    arrays = {name: array[place : place + 1] for name, array in bank.inputs[1].items()}
    return {name: one.product() for name, one in unpack_adapter(SLOTS, arrays).items()}


def holds(bank: AdapterBank, place: int, weights: Weights) -> bool:
    expected = Files()(weights)
    found = at(bank, place)
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], one.product()) for name, one in expected.items()
    )


def test_every_adapter_has_its_place_from_the_beginning(files: Files) -> None:
    bank = make(files)
    version, _ = bank.inputs
    assert bank.names == tuple(RANKS)
    places = [bank.acquire(name) for name in RANKS]
    assert places == [0, 1, 2]
    assert all(holds(bank, place, ((name, 1.0),)) for place, name in enumerate(RANKS))
    assert bank.acquire({"math": 1.0, "prose": 0}) == 0
    assert bank.acquire(None) == bank.acquire("none") == bank.acquire({}) == NO_PLACE
    assert bank.inputs[0] == version
    assert len(files.read) == 3


def test_sum_gets_a_place_once_and_moves_nobody(files: Files) -> None:
    bank = make(files)
    version, before = bank.inputs
    copies = {name: array.copy() for name, array in before.items()}
    place = bank.acquire({"prose": 0.5, "math": 0.25})
    assert place == 3
    assert holds(bank, 3, (("math", 0.25), ("prose", 0.5)))
    assert bank.acquire({"math": 0.25, "prose": 0.5}) == 3
    assert len(files.read) == 4
    assert bank.inputs[0] == version + 1
    for place, name in enumerate(RANKS):
        assert holds(bank, place, ((name, 1.0),))
    for name, array in before.items():  # who still runs on them finds them unchanged
        np.testing.assert_array_equal(array, copies[name])


def test_sum_in_use_keeps_its_place(files: Files) -> None:
    bank = make(files, sums=1)
    choices = [{"math": weight} for weight in (0.5, 2.0, -1.0)]
    assert [bank.acquire(choice) for choice in choices] == [3, 4, 5]
    for choice in choices:
        bank.release(choice)
    assert bank.acquire({"math": 3.0}) == 3  # the one used longest ago makes room
    assert holds(bank, 3, (("math", 3.0),))
    assert holds(bank, 4, (("math", 2.0),))
    assert holds(bank, 5, (("math", -1.0),))
    assert bank.acquire({"math": 2.0}) == 4
    bank.release({"math": 2.0})
    assert bank.acquire({"prose": 4.0}) == 5  # 2.0 was used since
    assert bank.acquire({"prose": 5.0}) == 4
    assert bank.acquire({"prose": 6.0}) == 6  # all are in use: one more, rather than an error
    assert holds(bank, 6, (("prose", 6.0),))
    assert holds(bank, 3, (("math", 3.0),))


def test_released_twice_as_often_as_acquired_is_still_one_place(files: Files) -> None:
    bank = make(files, sums=1)
    for _ in range(3):
        assert bank.acquire({"math": 0.5}) == 3
        bank.release({"math": 0.5})
    assert bank.acquire({"math": 0.25}) == 3
    assert len(files.read) == 5


def test_arrays_lie_in_one_piece_in_the_order_of_a_run(files: Files) -> None:
    bank = make(files)
    for choice in (None, {"math": 0.5}):
        bank.acquire(choice)
        arrays = list(bank.inputs[1].values())
        assert list(bank.inputs[1]) == list(stack_adapters(SLOTS, []))
        starts = [array.ctypes.data for array in arrays]
        assert all(start % 64 == 0 for start in starts)
        for array, start, following in zip(arrays, starts, starts[1:], strict=False):
            assert 0 <= following - start - array.nbytes < 64
        assert all(array.flags.c_contiguous for array in arrays)


def test_bank_is_what_stacking_all_would_be(files: Files) -> None:
    bank = make(files)
    bank.acquire({"code": 0.5})
    expected = stack_adapters(
        SLOTS,
        [
            pack_adapter(SLOTS, Files()(weights))
            for weights in (*(((name, 1.0),) for name in RANKS), (("code", 0.5),))
        ],
    )
    assert bank.inputs[1].keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(bank.inputs[1][name], array)


def test_threads_share_it(files: Files) -> None:
    bank = make(files, sums=1)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            weights = (("math", float(rng.integers(2, 6))),)
            place = bank.acquire(dict(weights))
            if not holds(bank, place, weights):
                wrong.append((place, weights))
            bank.release(dict(weights))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # Three in use by the other threads, one kept, one new.
    assert len(next(iter(bank.inputs[1].values()))) <= 3 + 5


def test_nobody_waits_while_a_sum_is_read(files: Files) -> None:
    bank = make(files)
    reading, go_on = threading.Event(), threading.Event()

    def slow(weights: Weights) -> Mapping[str, LowRank]:
        reading.set()
        assert go_on.wait(30)
        return files(weights)

    bank._load = slow
    places: list[int] = []
    threads = [
        threading.Thread(target=lambda: places.append(bank.acquire({"math": 0.5})))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert reading.wait(30)
    assert bank.acquire("prose") == 1
    go_on.set()
    for thread in threads:
        thread.join()
    assert places == [3, 3]
    assert holds(bank, 3, (("math", 0.5),))
    assert len(next(iter(bank.inputs[1].values()))) == 4


def test_unknown_adapters_are_one_sentence(files: Files) -> None:
    bank = make(files)
    with pytest.raises(
        RequestError,
        match="adapter 'poems': the artifact has no such adapter: it has math, prose, code",
    ):
        bank.acquire({"math": 1, "poems": 1})
    with pytest.raises(RequestError, match="has no such adapter") as caught:
        bank.acquire("x\x1b[2J" * 10_000)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    with pytest.raises(RequestError, match="has no such adapter: it has none"):
        AdapterBank(SLOTS, [], files).acquire("math")
    with pytest.raises(
        RequestError, match=r"takes no adapters: build it with 'onnxruntime\.adapter"
    ):
        AdapterBank().acquire("math")
    with pytest.raises(
        RequestError, match="adapter 'math': its weight must be from -10000 to 10000, not inf"
    ):
        bank.acquire({"math": float("inf")})


def test_adapter_that_cannot_be_read_leaves_the_bank_as_it_was(files: Files) -> None:
    bank = make(files)
    before = bank.inputs

    def fail(weights: Weights) -> Mapping[str, LowRank]:
        raise RequestError(f"{weights[0][0]} is gone")

    bank._load = fail
    with pytest.raises(RequestError, match="math is gone"):
        bank.acquire({"math": 0.5})
    assert bank.inputs is before
    bank._load = files
    assert bank.acquire({"math": 0.5}) == 3


def test_artifact_without_slots_and_adapters() -> None:
    bank = AdapterBank()
    assert bank.names == ()
    assert bank.inputs == (0, {})
    assert bank.acquire(None) == NO_PLACE
    bank.release(None)
