from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors import SafetensorError

from eoracc.compiler.sweep.batch import Batch
from eoracc.compiler.sweep.resume import SweepState, saved_spent_s
from eoracc.errors import ArtifactError
from eoracc.passes import load_passes
from eoracc.passes.compensate.base import compensation_solver
from eoracc.passes.graph.linears import Linear
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.plugins.operands.low_rank import LowRank
from tests.passes.groups import qkv

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

load_passes()

Comparisons = dict[str, dict[str, LowRank]]


def batches(*values: Mapping[str, NDArray[np.generic]]) -> list[Batch]:
    mask = np.ones((1, 3), np.int64)
    return [Batch(mask, dict(each)) for each in values]


def compressed(*, symmetric: bool) -> tuple[Linear, Linear, Comparisons]:
    """Two linears, the first one compressed and noted upon, with a comparison."""
    group = qkv()
    first, second = group.linears
    skip = {second.name: {"skip": True}}
    options = {"bits": 3, "symmetric": symmetric, "overrides": skip}
    TypeAdapter(QuantizeRtn).validate_python(options).call(group)
    svd = compensation_solver("svd")
    first.compensate(svd(first, None, 5, "float16"))
    first.record.notes.append("a note")
    return first, second, {"svd": {first.name: svd(first, None, 2, "float16")}}


@pytest.mark.parametrize("symmetric", [True, False])
def test_puts_back_what_it_kept(tmp_path: Path, *, symmetric: bool) -> None:
    first, second, comparisons = compressed(symmetric=symmetric)
    state = SweepState(tmp_path / "sweep", "key")
    values = {"a": np.arange(6, dtype=np.float32).reshape(1, 3, 2)}
    flags = {"b": np.array([[True, False, True]])}
    state.save(4, [first, second], batches(values, flags), comparisons)

    again = list(qkv().linears)
    found: Comparisons = {"svd": {}}
    live = batches({"stale": values["a"]}, {})
    assert state.resume(again, live, found).position == 4
    assert again[0].quantized is not None
    np.testing.assert_array_equal(again[0].effective_weight(), first.effective_weight())
    assert (again[0].quantized.zero_points is None) is symmetric
    assert (again[0].record.errors, again[0].record.notes) == (first.record.errors, ["a note"])
    # What was left out on purpose stays on record as lossless.
    assert again[1].compressed is None
    assert again[1].record.errors == second.record.errors == {"quantize_rtn": 0.0}
    kept, expected = found["svd"][first.name], comparisons["svd"][first.name]
    np.testing.assert_array_equal(kept.product(), expected.product())
    assert [sorted(batch.values) for batch in live] == [["a"], ["b"]]
    np.testing.assert_array_equal(live[0].values["a"], values["a"])
    np.testing.assert_array_equal(live[1].values["b"], flags["b"])
    assert live[1].values["b"].dtype == bool


def test_later_saves_add_linears_and_replace_activations(tmp_path: Path) -> None:
    first, second, comparisons = compressed(symmetric=False)
    state = SweepState(tmp_path / "sweep", "key")
    state.save(1, [first], batches({"a": np.zeros((2, 2), np.float32)}), comparisons)
    state.save(2, [first, second], batches({"c": np.ones((2, 2), np.float32)}), comparisons)
    names = sorted(path.name for path in state.folder.iterdir())
    assert names == [
        "activations-00002-0000.safetensors",
        "operands-00001.safetensors",
        "operands-00002.safetensors",
        "state.json",
    ]
    again = list(qkv().linears)
    live = batches({})
    assert state.resume(again, live, {"svd": {}}).position == 2
    assert list(live[0].values) == ["c"]
    assert again[0].quantized is not None


def test_another_key_discards_it(tmp_path: Path) -> None:
    first, second, comparisons = compressed(symmetric=False)
    folder = tmp_path / "sweep"
    SweepState(folder, "old").save(3, [first, second], batches({}), comparisons)
    linears = list(qkv().linears)
    assert SweepState(folder, "new").resume(linears, batches({}), {"svd": {}}).position == 0
    assert not folder.exists()
    assert linears[0].quantized is None


def test_nothing_kept_begins_at_the_beginning(tmp_path: Path) -> None:
    live = batches({"input_ids": np.zeros((1, 3), np.float32)})
    assert SweepState(tmp_path / "none", "key").resume([], live, {}).position == 0
    assert list(live[0].values) == ["input_ids"]


def test_files_that_the_state_does_not_name_are_not_read(tmp_path: Path) -> None:
    first, second, comparisons = compressed(symmetric=False)
    state = SweepState(tmp_path / "sweep", "key")
    state.save(1, [first, second], batches({}), comparisons)
    # As an interruption in the middle of a save leaves it.
    (state.folder / "operands-00002.safetensors").write_bytes(b"half")
    (state.folder / "state.json.partial").write_text("{")
    assert state.resume(list(qkv().linears), batches({}), {"svd": {}}).position == 1


def factorized() -> Linear:
    """A linear of 40 x 72 as a product of rank 5, with an error on record."""
    (first, _) = qkv().linears
    rng = np.random.default_rng(2)
    first.factorize(
        rng.standard_normal((40, 5), np.float32), rng.standard_normal((5, 72), np.float32)
    )
    first.record.errors["factorize_svd"] = 0.5
    return first


def is_mapped(array: NDArray[np.generic]) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


def test_factors_of_weights_are_kept_and_mapped_from_there(tmp_path: Path) -> None:
    first = factorized()
    product = first.effective_weight()
    state = SweepState(tmp_path / "sweep", "key")
    state.save(1, [first], batches({}), {})
    again = qkv().linears[0]
    assert state.resume([again], batches({}), {}).position == 1
    assert again.record.errors == {"factorize_svd": 0.5}
    for linear in (first, again):
        np.testing.assert_array_equal(linear.effective_weight(), product)
        assert linear.factorized is not None
        assert is_mapped(linear.factorized.u)
        assert is_mapped(linear.factorized.v)
        stored = linear.node.inputs[1]
        assert stored is not None
        assert stored.const_value is not None
        assert is_mapped(stored.const_value.numpy()), "the graph holds no copy"


def test_what_an_earlier_sweep_has_put_on_record_is_not_there_twice(tmp_path: Path) -> None:
    first, second, comparisons = compressed(symmetric=True)
    state = SweepState(tmp_path / "sweep", "key")
    state.save(1, [first, second], batches({}), comparisons)
    again = list(qkv().linears)
    again[0].record.notes.append("a note")
    again[0].record.errors["of another run"] = 1.0
    state.resume(again, batches({}), {"svd": {}})
    assert (again[0].record.errors, again[0].record.notes) == (first.record.errors, ["a note"])


def test_seconds_that_a_shared_sweep_has_spent_are_kept_with_its_results(tmp_path: Path) -> None:
    first, second, comparisons = compressed(symmetric=True)
    assert saved_spent_s(tmp_path) == 0.0
    state = SweepState(tmp_path, "key")
    state.spent_s = 2.5
    state.save(1, [first, second], batches({}), comparisons)
    again = SweepState(tmp_path, "key")
    again.resume(list(qkv().linears), batches({}), {"svd": {}})
    assert again.spent_s == saved_spent_s(tmp_path) == 2.5


def test_a_full_disk_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, comparisons = compressed(symmetric=True)
    state = SweepState(tmp_path, "key")
    values = np.ones((2, 2), np.float32)
    state.save(1, [first], batches({"a": values}), comparisons)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("eoracc.compiler.sweep.resume.save_file", fail)
    with pytest.raises(ArtifactError, match=r"kept there: No space left on device: free some"):
        state.save(2, [first, second], batches({"a": 2 * values}), comparisons)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
