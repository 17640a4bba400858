from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.compiler.sweep.activation_store import ActivationStore
from eoracc.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def batches(seed: int) -> list[dict[str, NDArray[np.generic]]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "wide": rng.standard_normal((3, 4)).astype(np.float32).T,
            "mask": rng.random((2, 3)) > 0.5,
            "scalar": np.array(rng.integers(9)),
        }
        for _ in range(2)
    ]


def same(kept: list[dict[str, NDArray[np.generic]]], seed: int) -> bool:
    return all(
        left.keys() == right.keys()
        and all(left[k].dtype == right[k].dtype for k in left)
        and all(left[k].shape == right[k].shape for k in left)
        and all(np.array_equal(left[k], right[k]) for k in left)
        for left, right in zip(kept, batches(seed), strict=True)
    )


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_gives_back_what_was_put_wherever_it_lies(limit: int, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "kept", limit=limit)
    store.put("a", batches(1))
    store.put("b", batches(2))
    assert (tmp_path / "kept").exists() == (limit == 0)
    assert same(list(store.batches("a")), 1)
    assert same(list(store.batches("b")), 2)
    store.put("a", batches(3))
    assert same(list(store.batches("a")), 3), "it is replaced"
    store.drop("a")
    assert "a" not in store
    with pytest.raises(KeyError):
        next(store.batches("a"))
    store.clear()
    assert "b" not in store
    assert not (tmp_path / "kept").exists()


def test_changing_what_was_given_back_changes_nothing_that_is_kept(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "kept")
    store.put("a", batches(1))
    next(store.batches("a")).clear()
    assert same(list(store.batches("a")), 1)


def test_an_array_under_two_keys_counts_once(tmp_path: Path) -> None:
    shared = np.zeros(100)
    store = ActivationStore(tmp_path / "kept", limit=1000)
    store.put("a", [{"mask": shared}])
    store.put("b", [{"mask": shared, "few": np.zeros(20)}])
    assert not (tmp_path / "kept").exists()
    store.put("c", [{"more": np.zeros(10)}])
    assert (tmp_path / "kept").exists()
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_clears_what_a_run_that_was_killed_has_left(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old.safetensors").write_bytes(b"")
    ActivationStore(tmp_path / "kept").clear()
    assert not (tmp_path / "kept").exists()


def test_a_file_in_place_of_the_folder_is_cleared_or_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    store = ActivationStore(tmp_path / "kept", limit=0)
    with pytest.raises(ArtifactError, match=r"kept: .* cannot be kept there: File exists: free"):
        store.put("a", batches(1))
    store.clear()
    store.put("a", batches(1))
    assert same(list(store.batches("a")), 1)
