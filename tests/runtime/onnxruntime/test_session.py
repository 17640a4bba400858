from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.errors import BackendError
from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.onnxruntime.session import Session, open_session

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = [[5, 17, 200, 31, 8, 90, 44], [120, 7, 61], [33]]
UNIT_ROUNDOFF = 2.0**-24


@pytest.fixture(scope="module", params=[True, False], ids=["library", "function"])
def session(request: pytest.FixtureRequest, tiny_artifact: Path) -> Session:
    return open_session(tiny_artifact, library=request.param, threads=1)


def tolerance(logits: np.ndarray) -> float:
    # Two layers of at most 88 products each, seven linears a layer and the head; attention and
    # norms add as many again.
    bound = 2 * (2 * 7 + 1) * 88 * UNIT_ROUNDOFF * float(np.abs(logits).max())
    assert bound < 1e-3 * float(logits.std()), "the comparison would prove nothing"
    return bound


def test_chunks_through_the_cache_equal_one_call(session: Session) -> None:
    ids = np.array([PROMPTS[0]])
    mask = np.ones_like(ids)
    whole, _ = session.run(ids)
    assert whole.shape == (1, 7, 260)
    assert whole.dtype == np.float32
    for chunks in ((7,), (4, 3), (1,) * 7):
        parts = session.run_chunks(ids, mask, chunks)
        np.testing.assert_allclose(parts, whole, rtol=0, atol=tolerance(whole))


def test_padding_on_the_right_changes_nothing(session: Session) -> None:
    ids = np.zeros((3, 7), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = 1
    together, _ = session.run(ids, mask)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = session.run(np.array([prompt]))
        np.testing.assert_allclose(
            together[row, : len(prompt)], alone[0], rtol=0, atol=tolerance(alone)
        )


def test_cache_grows_by_what_was_fed(session: Session) -> None:
    _, past = session.run(np.array([PROMPTS[0]]))
    assert {name: array.shape for name, array in past.items()} == {
        f"past_key_values.{layer}.{part}": (1, 2, 7, 16)
        for layer in range(2)
        for part in ("key", "value")
    }


def test_last_logits_are_those_of_all(session: Session) -> None:
    ids = np.zeros((3, 7), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = 1
    whole, past = session.run(ids, mask)
    last, same = session.run(ids, mask, last_only=True)
    assert last.shape == (3, 1, 260)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(
            last[row, 0], whole[row, len(prompt) - 1], rtol=0, atol=tolerance(whole)
        )
    for name, array in past.items():
        np.testing.assert_array_equal(array, same[name])


def test_generates_a_batch_as_it_generates_each_row(session: Session) -> None:
    together = session.generate(PROMPTS, 12)
    assert together == [session.generate([prompt], 12)[0] for prompt in PROMPTS]
    assert [len(found) for found in together] == [12, 12, 12]


def test_stops_before_a_stop_token(session: Session) -> None:
    (free,) = session.generate([PROMPTS[0]], 12)
    stop = free[4]
    (stopped,) = session.generate([PROMPTS[0]], 12, stop=[stop])
    assert stopped == free[: free.index(stop)]


def test_greedy_follows_the_argmax_of_whole_calls(session: Session) -> None:
    tokens = list(PROMPTS[0])
    for _ in range(8):
        logits, _ = session.run(np.array([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    assert session.generate([PROMPTS[0]], 8) == [tokens[len(PROMPTS[0]) :]]


def test_model_that_is_no_model(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BackendError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        open_session(folder)
    # The package would announce there that it tries again.
    assert capsys.readouterr().out == ""


def test_library_that_is_no_library(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    library = read_model_files(folder).library
    assert library is not None
    library.write_bytes(b"no library")
    with pytest.raises(BackendError, match="ONNX Runtime cannot load it"):
        open_session(folder, library=library)
    open_session(folder, library=False)


def test_missing_package_is_named_with_its_install_line(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'eoracc\[cpu\]' \(or 'eoracc\[gpu\]'\)"):
        open_session(tiny_artifact)
