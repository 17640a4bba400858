"""Engines behind the whole runtime: generating, scoring, serving, choosing a backend."""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.runtime import ArtifactError, BackendError, Engine, Model, Request, RequestError, load
from tests.runtime.tensorrt.engine_artifact import Oracle, tiny_adapter, write_engine_artifact

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.plugins.operands.low_rank import LowRank
    from tests.runtime.tensorrt.machine import Machine

PROMPTS = [list(b"a state of the union"), [77], list(range(40, 100)), [9, 8, 7], [100] * 30]
CHOICES = [None, "math", "prose", "math", {"math": 0.5, "prose": -1.0}]
UNIT_ROUNDOFF = 2.0**-24


@pytest.fixture
def model(artifact: Path, machine: Machine) -> Model:
    del machine
    model = load(artifact, threads=1, trust=True)
    assert model.backend == "tensorrt_rtx"
    return model


def factors_of(artifact: Path, adapter: str | None) -> dict[str, LowRank] | None:
    return None if adapter is None else tiny_adapter(artifact, adapter)


def test_greedy_tokens_are_those_of_whole_texts(
    model: Model, oracle: Oracle, artifact: Path
) -> None:
    for prompt, adapter in zip(PROMPTS, (None, "math", "prose", None, "math"), strict=True):
        made = model.generate(prompt, 12, adapter=adapter, ignore_end=True).tokens
        assert list(made) == oracle.greedy(prompt, 12, factors_of(artifact, adapter))


def test_a_batch_gets_what_each_gets_alone(model: Model) -> None:
    requests = [
        Request(
            prompt=prompt,
            adapter=CHOICES[index],
            max_new_tokens=5 + 4 * index,
            temperature=0.7 * (index % 2),
            seed=index,
            ignore_end=True,
        )
        for index, prompt in enumerate(PROMPTS)
    ]
    together = model.generate_batch(requests, max_rows=4)
    assert together == [model.generate_batch([request])[0] for request in requests]
    assert len({one.tokens for one in together}) == len(requests)
    pieces = list(model.stream(requests[0]))
    assert "".join(piece.text for piece in pieces) == together[0].text


def test_backends_of_one_artifact_agree(model: Model, artifact: Path) -> None:
    """The graphs differ by the rounding of scales and factors to float16, and no more."""
    other = load(artifact, threads=1, backend="onnxruntime")
    assert (other.backend, other.device) == ("onnxruntime", "CPU, 1 threads")
    text = PROMPTS[0] + PROMPTS[2]
    for adapter in (None, "math"):
        ours, theirs = (
            np.array(one.score(text, adapter=adapter).logprobs) for one in (model, other)
        )
        # Each of 15 products on the way to a logit is rounded once, by 2**-11 of itself; logits of
        # this model are of size one, and errors of many roundings add up as their root.
        bound = 8 * np.sqrt(15) * 2.0**-11
        assert bound < 0.1 * ours.std()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


def test_scores(model: Model, oracle: Oracle) -> None:
    text = PROMPTS[2] + PROMPTS[0]
    logits = oracle.logits(text[:-1]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = model.score(text).logprobs
    bound = 4 * (2 * 7 + 1) * 88 * UNIT_ROUNDOFF * float(np.abs(logits).max())
    assert bound < 2e-3 * float(logits.std())
    np.testing.assert_allclose(
        found, expected[np.arange(len(text) - 1), text[1:]], rtol=0, atol=bound
    )
    pairs = [(prompt, [5, 6]) for prompt in PROMPTS]
    together = model.score_continuations(pairs)
    for pair, one in zip(pairs, together, strict=True):
        (alone,) = model.score_continuations([pair])
        np.testing.assert_allclose(one.logprob, alone.logprob, rtol=0, atol=2 * bound)


def test_threads_share_engines(model: Model) -> None:
    """Each thread has its own rows, independent of calls of other threads."""
    expected = [model.generate(prompt, 8, ignore_end=True).tokens for prompt in PROMPTS]
    found: list[tuple[int, ...] | None] = [None] * len(PROMPTS)

    def work(index: int) -> None:
        found[index] = model.generate(PROMPTS[index], 8, ignore_end=True).tokens

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    with Engine(model, max_rows=3) as engine:
        served = [
            engine.submit(Request(prompt=prompt, max_new_tokens=8, ignore_end=True))
            for prompt in PROMPTS
        ]
        assert [one.result().tokens for one in served] == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cache_and_factors_of_narrow_types(
    dtype: str, libcuda: Path, machine: Machine, tmp_path: Path
) -> None:
    del machine
    folder = write_engine_artifact(tmp_path, libcuda, dtype=dtype, adapter_type=dtype, narrow=True)
    model, oracle = load(folder, threads=1, trust=True), Oracle(folder)
    text = PROMPTS[2]
    for adapter in (None, "math"):
        logits = oracle.logits(text[:-1], factors_of(folder, adapter)).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found = np.array(model.score(text, adapter=adapter).logprobs)
        # Only keys, values and factors are rounded: three times in each of two layers.
        bound = 8 * np.sqrt(6) * {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        assert bound < 0.5 * found.std()
        difference = np.abs(found - expected[np.arange(len(text) - 1), text[1:]])
        assert UNIT_ROUNDOFF < difference.max() < bound, "rounded, and no more"


# --- choosing -------------------------------------------------------------------------------------


def test_auto_says_why_it_takes_no_engines(artifact: Path, machine: Machine) -> None:
    machine.set_up(capability=(9, 0))
    model = load(artifact, threads=1, trust=True)
    assert model.backend == "onnxruntime"
    assert model.fallback_reason is not None
    assert "has no engine for the compute capability 9.0" in model.fallback_reason
    assert model.generate([5], 3, ignore_end=True).tokens
    with pytest.raises(ArtifactError, match=r"it has engines for 8\.0, 8\.6; build it for this"):
        load(artifact, backend="tensorrt_rtx", trust=True)


def test_machines_that_cannot_run_engines(
    artifact: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.set_up(devices=0)
    with pytest.raises(BackendError, match=r"there is no GPU 0: .* shows 0 .*CUDA_VISIBLE_DEVICES"):
        load(artifact, backend="tensorrt_rtx", trust=True)
    machine.set_up()
    machine.install_tensorrt(None)
    with pytest.raises(
        BackendError, match=r"^tensorrt-rtx is not installed: pip install 'eoracc\["
    ):
        load(artifact, backend="tensorrt_rtx", trust=True)
    machine.install_tensorrt("9.9")
    with pytest.raises(BackendError, match=r"1\.7\.1\.116 and 9\.9 is installed: pip install"):
        load(artifact, backend="tensorrt_rtx", trust=True)
    machine.install_tensorrt("1.7.1.116")
    monkeypatch.setattr("eoracc.runtime.tensorrt.cuda._LIBRARIES", ("libcuda-that-is-not.so",))
    with pytest.raises(BackendError, match=r"^no NVIDIA driver is found on this machine: "):
        load(artifact, backend="tensorrt_rtx", trust=True)
    assert load(artifact, threads=1, trust=True).backend == "onnxruntime"


def test_backends_that_an_artifact_has_not(artifact: Path, tiny_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has not been built for the backend tensorrt: it has"):
        load(artifact, backend="tensorrt", trust=True)
    with pytest.raises(ArtifactError, match=r"add 'tensorrt_rtx' to 'targets' and build it again"):
        load(tiny_artifact, backend="tensorrt_rtx")
    with pytest.raises(BackendError, match=r"backend 'cuda': is unknown: choose one of auto"):
        load(tiny_artifact, backend="cuda")  # type: ignore[arg-type]
    assert load(tiny_artifact, threads=1).fallback_reason is None


# --- adapters -------------------------------------------------------------------------------------


def test_engines_without_places_for_adapters(
    libcuda: Path, machine: Machine, tmp_path: Path
) -> None:
    del machine
    folder = write_engine_artifact(tmp_path, libcuda, adapter_type="none")
    model = load(folder, threads=1, trust=True)
    assert model.adapters == ()
    with pytest.raises(RequestError, match=r"build it with 'tensorrt_rtx\.adapter_type: float16'"):
        model.generate([5], 1, adapter="math")
    assert model.generate([5], 2, ignore_end=True).tokens


def test_adapter_beyond_the_rank_that_engines_take(
    libcuda: Path, machine: Machine, tmp_path: Path
) -> None:
    del machine
    folder = write_engine_artifact(tmp_path, libcuda, rank=(2, 4, 8))
    with pytest.raises(ArtifactError, match="adapter 'prose': has rank 9, and the engines take 8"):
        load(folder, backend="tensorrt_rtx", trust=True)
    model, oracle = load(folder, adapters=["math"], threads=1, trust=True), Oracle(folder)
    assert model.backend == "tensorrt_rtx"
    # The lowest rank is 2: no adapter is one of zeros.
    made = model.generate(PROMPTS[0], 6, ignore_end=True).tokens
    assert list(made) == oracle.greedy(PROMPTS[0], 6)
    with pytest.raises(ArtifactError, match="no adapter 'nobody'"):
        load(folder, adapters=["nobody"], trust=True)


def test_sums_of_adapters_come_and_go(model: Model, machine: Machine, artifact: Path) -> None:
    oracle = Oracle(artifact)
    math = tiny_adapter(artifact, "math")
    for step in range(12):  # more than are kept
        weight = 0.1 * (step + 1)
        model.generate(PROMPTS[0], 1, adapter={"math": weight})
        if step == 8:
            held = machine.used()
    assert machine.used() <= held, "the memory of sums that nobody uses is given back"
    completion = model.generate(PROMPTS[0], 5, adapter={"math": 1.0}, ignore_end=True)
    assert list(completion.tokens) == oracle.greedy(PROMPTS[0], 5, math)


def test_sums_come_from_what_was_loaded(model: Model, artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    other = load(folder, threads=1, trust=True)
    assert other.backend == "tensorrt_rtx"
    shutil.rmtree(folder)
    for adapter in CHOICES:
        found, wanted = (
            one.generate(PROMPTS[0], 8, adapter=adapter, ignore_end=True).tokens
            for one in (other, model)
        )
        assert found == wanted
    change = other.folder_watch.check()
    assert change is not None
    assert change.text == "is gone"
