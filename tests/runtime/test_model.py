"""The whole runtime on a tiny artifact, against eager transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.runtime import (
    ArtifactError,
    BackendError,
    Model,
    Request,
    RequestError,
    load,
)
from eoracc.runtime.artifact.manifest import read_manifest
from eoracc.runtime.onnxruntime.session import open_session
from eoracc.runtime.request import RequestOptions
from tests.tiny_artifact import reseal, tiny_weights

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

TEXT = "a state of the union"
UNIT_ROUNDOFF = 2.0**-24


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact)


@pytest.fixture(scope="module")
def eager(tiny_artifact: Path) -> PreTrainedModel:
    """The compressed model in PyTorch."""
    from eoracc.compiler.eager.model import load_eager

    work = tiny_artifact.parent
    return load_eager(work / "checkpoint", tiny_weights(work))


def test_greedy_tokens_and_their_probabilities_are_those_of_transformers(
    model: Model, eager: PreTrainedModel
) -> None:
    import torch

    tokens = model.encode(TEXT)
    completion = model.generate(TEXT, 40, logprobs=3, ignore_end=True)
    assert completion.logprobs is not None
    assert completion.prompt_tokens == len(tokens)
    for token, listed in zip(completion.tokens, completion.logprobs, strict=True):
        with torch.no_grad():
            logits = eager(torch.tensor([tokens])).logits[0, -1].double()
        expected = torch.log_softmax(logits, -1)
        # Two layers of seven linears of at most 88 products, and as much for the rest; twice that
        # for the normalizer.
        bound = 4 * (2 * 7 + 1) * 88 * UNIT_ROUNDOFF * float(logits.abs().max())
        assert bound < 2e-3 * float(logits.std())
        assert token == int(logits.argmax()) == listed.token
        assert abs(listed.logprob - float(expected[token])) < bound
        best = expected.topk(3)
        assert [one for one, _ in listed.top] == best.indices.tolist()
        np.testing.assert_allclose([one for _, one in listed.top], best.values, rtol=0, atol=bound)
        tokens.append(token)


PRINTABLE = [chr(letter) for letter in range(ord("!"), ord("~") + 1)]


@pytest.mark.parametrize("rule", ["repetition", "bias", "end", "least", "words"])
def test_greedy_tokens_under_rules_are_those_of_transformers(
    model: Model, eager: PreTrainedModel, rule: str
) -> None:
    import torch

    prompt = model.encode(TEXT)
    free = model.generate(prompt, 30).tokens
    end = free[6]
    biases = {free[0]: -2.0, free[9]: 0.3}
    ours: dict[str, RequestOptions] = {
        "repetition": {"repetition_penalty": 1.5},
        "bias": {"logit_bias": biases},
        "end": {"stop_token_ids": [end]},
        "least": {"stop_token_ids": [end], "min_new_tokens": 11},
        "words": {"bad_words": PRINTABLE},
    }
    theirs: dict[str, dict[str, Any]] = {
        "repetition": {"repetition_penalty": 1.5},
        "bias": {"sequence_bias": [[[token], bias] for token, bias in biases.items()]},
        "end": {"eos_token_id": [2, end]},
        "least": {"eos_token_id": [2, end], "min_new_tokens": 11},
        "words": {"bad_words_ids": [model.encode(letter) for letter in PRINTABLE]},
    }
    generate: Any = eager.generate  # its type is that of a tensor
    with torch.no_grad():
        expected = generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            **({"eos_token_id": 2} | theirs[rule]),
        )
    options = ours[rule]
    options["include_stop"] = True
    found = model.generate(prompt, 30, **options)
    assert list(found.tokens) == expected[0, len(prompt) :].tolist()
    assert found.tokens != free


def test_greedy_tokens_agree_with_and_without_the_library(
    model: Model, tiny_artifact: Path
) -> None:
    prompt = model.encode(TEXT)
    generated = list(model.generate(TEXT, 64).tokens)
    for library in (True, False):
        session = open_session(tiny_artifact, library=library, threads=1)
        assert session.generate([prompt], 64, stop=[2]) == [generated]


def test_pieces_add_up_to_the_completion(model: Model) -> None:
    plain = Request(prompt=TEXT, max_new_tokens=60, ignore_end=True)
    for request in (
        plain,
        replace(plain, stop=["e", "~~"]),
        replace(plain, logprobs=1, temperature=1.3, seed=4),
    ):
        (whole,) = model.generate_batch([request])
        pieces = list(model.stream(request))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert tuple(token for piece in pieces for token in piece.tokens) == whole.tokens
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == whole.finish_reason
        assert all(piece.text for piece in pieces[:-1])
        if whole.logprobs is not None:
            assert tuple(one for piece in pieces for one in piece.logprobs or ()) == whole.logprobs


def test_text_ends_before_a_stop_string(model: Model) -> None:
    free = model.generate(TEXT, 60, ignore_end=True)
    stop = free.text[1:3]  # from the beginning, so that tokens are left to be spared
    place = free.text.index(stop)
    assert place > 0
    stopped = model.generate(TEXT, 60, ignore_end=True, stop=["never", stop])
    assert stopped.text == free.text[:place]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert len(stopped.tokens) < len(free.tokens)


def test_what_was_held_back_comes_at_the_end(model: Model) -> None:
    free = model.generate(TEXT, 60, ignore_end=True).text
    held = model.generate(TEXT, 60, ignore_end=True, stop=[free[-3:] + "~~~"])
    assert held.text == free
    assert held.finish_reason == "length"


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_tokens(model: Model, tiny_artifact: Path, threads: int) -> None:
    other = load(tiny_artifact, threads=threads)
    assert other.threads == threads
    assert other.generate(TEXT, 16) == model.generate(TEXT, 16)


def test_the_token_that_ends_the_text_is_left_out(tiny_artifact: Path, tmp_path: Path) -> None:
    free = load(tiny_artifact).generate([5, 6, 7], 12).tokens
    end = free[6]
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [2, end]
    (folder / "genai_config.json").write_text(json.dumps(config))
    reseal(folder)
    model = Model(folder, read_manifest(folder))
    ended = model.generate([5, 6, 7], 12)
    assert ended.tokens == free[: free.index(end)]
    assert ended.finish_reason == "stop"
    assert model.generate([5, 6, 7], 12, ignore_end=True).tokens == free


def test_sampling_repeats_with_its_seed_only(model: Model) -> None:
    def sample(seed: int | None) -> tuple[int, ...]:
        return model.generate(TEXT, 24, temperature=1.5, seed=seed).tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_narrow_filters_are_greedy(model: Model) -> None:
    greedy = model.generate(TEXT, 24)
    drawn = Request(prompt=TEXT, max_new_tokens=24, temperature=1.5, seed=1)
    narrow = [replace(drawn, top_p=1e-6), replace(drawn, top_k=1), replace(drawn, min_p=1.0)]
    assert model.generate_batch(narrow) == [greedy] * 3
    assert model.generate_batch([drawn]) != [greedy]


def test_batch_of_more_than_fit_at_a_time(model: Model) -> None:
    requests = [Request(prompt=[5 + index], max_new_tokens=4 + index % 3) for index in range(11)]
    expected = [model.generate_batch([request])[0] for request in requests]
    assert model.generate_batch(requests, max_rows=3) == expected
    assert model.generate_batch([]) == []


def test_bounds(model: Model) -> None:
    nothing = model.generate(TEXT, 0)
    assert (nothing.tokens, nothing.text, nothing.finish_reason) == ((), "", "length")
    assert len(model.generate([5] * 120, 99, ignore_end=True).tokens) == 8
    with pytest.raises(RequestError, match="the prompt is empty"):
        model.generate([])
    with pytest.raises(RequestError, match="the prompt has 128 tokens, the model takes 128"):
        model.generate("x" * 128)
    for token in (-1, 260):
        with pytest.raises(RequestError, match=r"a token is not in 0\.\.259"):
            model.generate([5, token])
    with pytest.raises(RequestError, match="adapter 'math': the artifact takes no adapters"):
        model.generate(TEXT, adapter="math")
    for options in ({"stop_token_ids": [5, 260]}, {"logit_bias": {260: 1.0}}):
        problem = f"{next(iter(options))}: there is no token 260: the model has 0 to 259"
        with pytest.raises(RequestError, match=problem):
            model.generate_batch([Request(prompt=TEXT, **options)])
    with pytest.raises(RequestError, match="top_p: must be above 0"):
        model.generate(TEXT, top_p=0)


def test_bad_stream_is_refused_before_it_is_read(model: Model) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        model.generate("", stream=True)


def test_stream_that_nobody_reads_to_its_end(model: Model) -> None:
    pieces = model.generate(TEXT, 60, stream=True, ignore_end=True)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert list(pieces) == []


def test_artifact_has_no_adapter_of_that_name(tiny_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="has no adapter 'math': it has none"):
        load(tiny_artifact, adapters=["math"])


def test_changed_byte_is_found_before_anything_is_loaded(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    library = folder / "libeoracc_ops.so"
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    monkeypatch.setattr(
        "eoracc.runtime.onnxruntime.inference.import_package", lambda _: pytest.fail("loaded")
    )
    with pytest.raises(ArtifactError, match=r"libeoracc_ops\.so: its content is not"):
        load(folder)


def test_missing_package_is_named_with_its_install_line(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        BackendError, match=r"onnxruntime is not installed: pip install 'eoracc\[cpu\]'"
    ):
        load(tiny_artifact)


def test_onnxruntime_genai_is_not_needed(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    assert load(tiny_artifact).generate("abc", 2).tokens


def test_runtime_needs_no_torch(tiny_artifact: Path) -> None:
    script = (
        "import sys\n"
        "from eoracc.runtime import load\n"
        "load(sys.argv[1]).generate('abc', 4)\n"
        "heavy = {'torch', 'transformers', 'onnx_ir', 'eoracc.compiler', 'eoracc.passes'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_artifact)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
