"""Requests with different adapters in one batch, against each alone and against merged weights."""

from __future__ import annotations

import dataclasses
import gc
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.plugins.adapters import pack_adapter, stack_adapters
from eoracc.plugins.op import ADAPTER_INDEX
from eoracc.runtime import ArtifactError, Engine, Model, Request, RequestError, load
from eoracc.runtime.adapters.adapter import Adapter, combine
from eoracc.runtime.adapters.files import read_adapter
from eoracc.runtime.adapters.slots import read_slots
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.artifact.manifest import read_manifest
from eoracc.runtime.onnxruntime.graph import Binding
from eoracc.runtime.onnxruntime.inference import open_inference, ort_values
from eoracc.runtime.onnxruntime.session import Session
from eoracc.runtime.request import adapter_weights
from tests.tiny_artifact import tiny_factors, tiny_slots, tiny_weights, write_tiny_artifact

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from eoracc.plugins.operands.low_rank import LowRank
    from eoracc.runtime.request import AdapterChoice

PROMPT = list(b"a state of the union")
UNIT_ROUNDOFF = 2.0**-24
TYPES: dict[str, dict[str, str | None]] = {
    "int8": {"math": "int8", "prose": "int4", "code": "int8"},
    "float16": {"math": None, "prose": None, "code": None},
}
RANKS = {"math": 16, "prose": 5, "code": 33}
CHOICES: list[AdapterChoice] = [
    None,
    "math",
    "prose",
    "code",
    {"math": 0.5, "prose": 0.5},
    {"code": -2.0},
]


def tiny_adapter(folder: Path, name: str) -> dict[str, LowRank]:
    slots = tiny_slots(folder)
    kind = TYPES[slots.type][name]
    factors = tiny_factors(slots, rank=RANKS[name], seed=len(name), factor_type=kind, size=1.0)
    if name == "prose":  # an adapter need not have factors for every linear
        factors = {linear: one for linear, one in factors.items() if "mlp" in linear}
    return factors


@pytest.fixture(scope="module", params=["int8", "float16"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_artifact(tmp_path_factory.mktemp("slots"), adapter_type=request.param)
    for name in RANKS:
        digest = read_manifest(folder).digest
        add_adapter(folder, Adapter(name, tiny_adapter(folder, name), digest))
    return folder


@pytest.fixture(scope="module")
def model(artifact: Path) -> Model:
    return load(artifact, threads=1)


def merged(artifact: Path, choice: AdapterChoice) -> PreTrainedModel:
    """The compressed model in PyTorch, its weights with the adapter added."""
    from eoracc.compiler.eager.model import load_eager

    work = artifact.parent
    weights = tiny_weights(work)
    terms = [(read_adapter(artifact, name), weight) for name, weight in adapter_weights(choice)]
    if len(terms) > 1:  # integers of several scales are rounded anew, which is tested elsewhere
        terms = [(combine(terms, "sum"), 1.0)]
    for adapter, weight in terms:
        for linear, factors in adapter.factors.items():
            weights[linear] = weights[linear] + np.float32(weight) * factors.product()
    return load_eager(work / "checkpoint", weights)


def logits_of(eager: PreTrainedModel, tokens: list[int]) -> NDArray[np.float64]:
    import torch

    with torch.no_grad():
        logits: NDArray[np.float64] = eager(torch.tensor([tokens])).logits[0].double().numpy()
    return logits


def bound_of(logits: NDArray[np.float64]) -> float:
    # As in test_batch.py, with up to 33 ranks on top; twice that for the normalizer.
    return 4 * (2 * 7 + 1) * (88 + 33) * UNIT_ROUNDOFF * float(np.abs(logits).max())


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_adapters_are_added_to_the_weights(
    model: Model, artifact: Path, choice: AdapterChoice
) -> None:
    logits = logits_of(merged(artifact, choice), PROMPT)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    score = model.score(PROMPT, adapter=choice)
    wanted = expected[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    bound = bound_of(logits)
    np.testing.assert_allclose(score.logprobs, wanted, rtol=0, atol=bound)
    if choice is not None:
        plain = model.score(PROMPT).logprobs
        assert np.abs(np.array(plain) - wanted).max() > 100 * bound, "the adapter does nothing"


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_adapters_are_added_while_decoding(
    model: Model, artifact: Path, choice: AdapterChoice
) -> None:
    eager = merged(artifact, choice)
    made = model.generate(PROMPT, 8, adapter=choice, logprobs=0, ignore_end=True)
    logits = logits_of(eager, [*PROMPT, *made.tokens])[len(PROMPT) - 1 : -1]
    assert made.logprobs is not None
    assert list(made.tokens) == logits.argmax(-1).tolist()
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        [one.logprob for one in made.logprobs],
        expected[np.arange(8), made.tokens],
        rtol=0,
        atol=bound_of(logits),
    )


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            prompt=rng.integers(4, 260, rng.integers(1, 40)).tolist(),
            adapter=CHOICES[index % len(CHOICES)],
            max_new_tokens=int(rng.integers(4, 30)),
            temperature=0.8 * (index % 2),
            seed=index,
            logprobs=0,
            ignore_end=True,
        )
        for index in range(18)
    ]


def test_mixed_batch_equals_serving_one_by_one(model: Model) -> None:
    asked = requests()
    with Engine(model, max_rows=8, prefill_chunk=16) as engine:
        served = [engine.submit(request) for request in asked]
        together = [generation.result() for generation in served]
    one_by_one = load(model.folder, threads=1)
    for request, found in zip(asked, together, strict=True):
        (alone,) = one_by_one.generate_batch([request])
        assert found.tokens == alone.tokens
        assert found.text == alone.text
        assert found.logprobs is not None
        assert alone.logprobs is not None
        np.testing.assert_allclose(
            [one.logprob for one in found.logprobs],
            [one.logprob for one in alone.logprobs],
            rtol=0,
            # Logits of this model stay below 10.
            atol=bound_of(np.array([10.0])),
        )


def test_same_prompt_with_each_adapter_differs(model: Model) -> None:
    asked = [Request(prompt=PROMPT, adapter=choice, max_new_tokens=12) for choice in CHOICES]
    assert len({completion.tokens for completion in model.generate_batch(asked)}) == len(CHOICES)


def test_sum_that_comes_while_others_are_decoded(model: Model, artifact: Path) -> None:
    """Rows keep the adapters at their places while the bank changes."""
    model = load(artifact, threads=1)
    first = Request(prompt=PROMPT, adapter="code", max_new_tokens=40, ignore_end=True)
    expected = model.generate_batch([first])[0]
    scheduler = model.scheduler(max_rows=4)
    heard: list[object] = []
    one = model.prepare(first, heard.append)
    scheduler.add(one)
    for weight in (0.25, 0.5, 0.75):
        for _ in range(4):
            scheduler.step()
        late = dataclasses.replace(first, adapter={"math": weight}, max_new_tokens=8)
        scheduler.add(model.prepare(late, lambda _: None))
    while scheduler.step():
        pass
    assert tuple(one.tokens) == expected.tokens
    assert model.bank.acquire({"math": 0.5}) == 4


def test_sum_that_comes_to_a_row_that_was_used(artifact: Path) -> None:
    """The row is decoded as before, but the bank is another."""
    model = load(artifact, threads=1)
    scheduler = model.scheduler(max_rows=1)
    for choice in ("code", {"math": 0.25}, {"math": 0.5}):
        request = Request(prompt=PROMPT, adapter=choice, max_new_tokens=8, ignore_end=True)
        heard: list[object] = []
        one = model.prepare(request, heard.append)
        scheduler.add(one)
        while scheduler.step():
            pass
        assert tuple(one.tokens) == load(artifact, threads=1).generate_batch([request])[0].tokens


def test_inputs_are_bound_only_for_a_bank_that_the_session_was_not_opened_with(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[str] = []
    read = Binding.read

    def note(binding: Binding, name: str, array: NDArray[np.generic]) -> None:
        bound.append(name)
        read(binding, name, array)

    monkeypatch.setattr(Binding, "read", note)
    model = load(artifact, threads=1)
    operands = set(model.bank.inputs[1])  # type: ignore[attr-defined]
    assert len(operands) > 20
    plain = {name: model.generate(PROMPT, 4, adapter=name) for name in (*RANKS, None)}
    assert len({one.tokens for one in plain.values()}) == len(plain)
    assert not operands & set(bound)
    assert "adapter_index" in bound
    model.generate(PROMPT, 4, adapter={"math": 0.5})  # makes another bank
    assert operands < set(bound)
    assert {name: model.generate(PROMPT, 4, adapter=name) for name in plain} == plain


@pytest.mark.parametrize("library", [True, False], ids=["kernel", "function"])
def test_session_with_a_bank_for_its_defaults(artifact: Path, library: bool) -> None:
    """Rows read the same values from defaults as from inputs."""
    slots, decoder = read_slots(artifact), read_model_files(artifact)
    packed = [pack_adapter(slots, tiny_adapter(artifact, name)) for name in RANKS]
    bank = stack_adapters(slots, packed)
    native = decoder.library if library else None
    defaults = ort_values(bank)
    plain = Session(open_inference(str(decoder.model), native, 1, "tiny"))
    ready = Session(open_inference(str(decoder.model), native, 1, "tiny", defaults=defaults))
    found = []
    for place in (-1, 0, 1, 2):
        index = {ADAPTER_INDEX: np.array([place], np.int32)}
        plain.operands, ready.operands = {**bank, **index}, index
        expected, _ = plain.run(np.array([PROMPT]))
        logits, _ = ready.run(np.array([PROMPT]))
        np.testing.assert_array_equal(logits, expected)
        found.append(logits)
    assert all(np.abs(one - found[0]).max() > 1e-3 for one in found[1:])


def test_weights_that_say_the_same(model: Model) -> None:
    plain = model.generate(PROMPT, 8, adapter="math")
    same: list[Mapping[str, float]] = [{"math": 1.0}, {"math": 1.0, "code": 0.0}]
    for choice in same:
        assert model.generate(PROMPT, 8, adapter=choice) == plain
    assert model.generate(PROMPT, 8, adapter="none") == model.generate(PROMPT, 8)


def test_some_of_the_adapters(artifact: Path) -> None:
    model = load(artifact, threads=1, adapters=["prose"])
    assert model.adapters == ("prose",)
    whole = load(artifact, threads=1)
    assert sorted(whole.adapters) == sorted(RANKS)
    expected = whole.generate(PROMPT, 12, adapter="prose")
    assert model.generate(PROMPT, 12, adapter="prose") == expected
    with pytest.raises(RequestError, match="adapter 'math': the artifact has no such adapter: it"):
        model.generate(PROMPT, adapter="math")
    with pytest.raises(ArtifactError, match="has no adapter 'poems': it has "):
        load(artifact, adapters=["poems"])
    assert load(artifact, threads=1, adapters=[]).generate(PROMPT, 8) == whole.generate(PROMPT, 8)


def test_continuations_under_adapters(model: Model) -> None:
    pairs = [(PROMPT[:10], PROMPT[10:]), (PROMPT[:4], PROMPT[4:9])]
    plain = model.score_continuations(pairs)
    with_adapter = model.score_continuations(pairs, adapter="math")
    whole = model.score(PROMPT, adapter="math").logprobs
    bound = bound_of(np.array([10.0]))
    np.testing.assert_allclose(with_adapter[0].logprobs, whole[9:], rtol=0, atol=bound)
    assert abs(plain[0].logprob - with_adapter[0].logprob) > 10 * bound


def test_streams_give_their_adapters_back(artifact: Path) -> None:
    model = load(artifact, threads=1)
    request = Request(prompt=PROMPT, adapter={"math": 0.5}, max_new_tokens=8, ignore_end=True)
    begun, never, whole = (model.stream(request) for _ in range(3))
    next(begun)
    assert model.bank._users[("math", 0.5),] == 3
    del begun, never
    gc.collect()
    list(whole)
    assert not model.bank._users
