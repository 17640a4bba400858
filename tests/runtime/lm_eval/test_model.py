"""The model class of lm-eval, against lm-eval's own class for transformers on the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.errors import ArtifactError, RequestError
from tests.tiny_artifact import tiny_weights, write_byte_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

    from eoracc.runtime.lm_eval import EoraccLM

PAIRS = [
    ("the sky", " is blue"),
    ("the sky", " is"),
    ("a", "b"),
    ("", "an empty context"),
    ("a context that ends in blanks  ", "and goes on"),
    ("one token", "s"),
    ("x" * 100, "y" * 90),  # longer than the model's 128 tokens
]
TEXTS = ["a", "a short text", "a text that is longer than the model takes at once, " * 6]
PROMPTS = [f"{letter}{' prompt' * times}" for letter in ascii_lowercase for times in (0, 1, 18)]
MAX_LENGTH = 128


def open_artifact(folder: Path, **arguments: Any) -> EoraccLM:  # noqa: ANN401 - model_args
    """lm-eval's model, imported when it is first needed: lm-eval takes seconds."""
    from eoracc.runtime.lm_eval import EoraccLM

    return EoraccLM(str(folder), **arguments)


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> EoraccLM:
    return open_artifact(tiny_artifact, batch_size=3)


@pytest.fixture(scope="module")
def oracle(tiny_artifact: Path) -> Iterator[TemplateLM]:
    """lm-eval's class around eager PyTorch with the artifact's weights, one text at a time."""
    import warnings

    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from eoracc.compiler.eager.model import load_eager

    eager = load_eager(tiny_artifact.parent / "checkpoint", tiny_weights(tiny_artifact.parent))
    tokenizer = AutoTokenizer.from_pretrained(tiny_artifact.parent / "checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield HFLM(pretrained=eager, tokenizer=tokenizer, backend="causal", batch_size=1)


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=index)
        for index, one in enumerate(arguments)
    ]


def tolerance(tokens: int) -> float:
    """Of a sum of ``tokens`` log-probabilities: 2 layers of 7 products of at most 88 terms each."""
    return tokens * 2 * 7 * 88 * 2.0**-24


def test_continuations_score_as_in_transformers(model: EoraccLM, oracle: TemplateLM) -> None:
    requests = instances("loglikelihood", PAIRS)
    ours = model.loglikelihood(requests, disable_tqdm=True)
    theirs = oracle.loglikelihood(requests, disable_tqdm=True)
    for pair, (logprob, greedy), (expected, expected_greedy) in zip(
        PAIRS, ours, theirs, strict=True
    ):
        assert logprob == pytest.approx(expected, abs=tolerance(len(pair[1]) + 2)), pair
        assert greedy == expected_greedy
    signal = np.ptp(
        [logprob / len(pair[1]) for pair, (logprob, _) in zip(PAIRS, theirs, strict=True)]
    )
    assert tolerance(1) < 1e-2 * signal


def test_greedy_continuations_are_told(model: EoraccLM, oracle: TemplateLM) -> None:
    requests = instances("generate_until", [(one, {"max_gen_toks": 2}) for one in PROMPTS])
    texts = oracle.generate_until(requests, disable_tqdm=True)
    # Random weights say many bytes that are no text and would be encoded as others.
    prompt, greedy = next(
        (one, text)
        for one, text in zip(PROMPTS, texts, strict=True)
        if len(text) == 2 and text.isascii() and text.isprintable()
    )
    pairs = [(prompt, greedy), (prompt, f"{greedy[0]}~"), (prompt, greedy[0])]
    requests = instances("loglikelihood", pairs)
    ours = model.loglikelihood(requests, disable_tqdm=True)
    theirs = oracle.loglikelihood(requests, disable_tqdm=True)
    assert [one for _, one in theirs] == [True, False, True]
    assert [one for _, one in ours] == [True, False, True]
    assert ours == model.loglikelihood(requests[::-1], disable_tqdm=True)[::-1]


def test_rolling_scores_are_those_of_transformers(model: EoraccLM, oracle: TemplateLM) -> None:
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    ours = model.loglikelihood_rolling(requests, disable_tqdm=True)
    theirs = oracle.loglikelihood_rolling(requests, disable_tqdm=True)
    for text, one, other in zip(TEXTS, ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=tolerance(len(text)))
    assert len(TEXTS[-1]) > 2 * MAX_LENGTH


@pytest.mark.parametrize("until", [["0"], ["\n\n"], []])
def test_texts_go_on_as_in_transformers(
    model: EoraccLM, oracle: TemplateLM, until: list[str]
) -> None:
    arguments = {"until": until, "max_gen_toks": 3, "do_sample": False}
    requests = instances("generate_until", [(prompt, arguments) for prompt in PROMPTS])
    ours = model.generate_until(requests, disable_tqdm=True)
    theirs = oracle.generate_until(requests, disable_tqdm=True)
    # Random weights say bytes that are no text, which every decoder shows in its own way; genai's
    # ends a string at a zero byte.
    valid = [
        (one, other)
        for one, other in zip(ours, theirs, strict=True)
        if not {"\ufffd", "\0"} & set(other)
    ]
    assert [one for one, _ in valid] == [other for _, other in valid]
    assert sum(bool(one) for one, _ in valid) >= 2


def test_a_batch_changes_nothing(model: EoraccLM, tiny_artifact: Path) -> None:
    single = open_artifact(tiny_artifact, batch_size=1)
    requests = instances("loglikelihood", PAIRS)
    for (one, _), (other, _) in zip(
        model.loglikelihood(requests, disable_tqdm=True),
        single.loglikelihood(requests, disable_tqdm=True),
        strict=True,
    ):
        assert one == pytest.approx(other, abs=tolerance(MAX_LENGTH))


def test_bos_is_there_once(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = write_with_bos(tiny_artifact, tmp_path)
    model = open_artifact(folder)
    assert model.prefix_token_id == 1
    (text,) = [model.tok_encode("sky")]
    assert text[0] == 1
    assert len(text) == 4
    assert model.tok_encode("sky", add_special_tokens=False) == text[1:]
    # A chat template spells BOS out.
    chat = model.apply_chat_template([{"role": "user", "content": "sky"}])
    assert chat == "<s>user: sky</s><s>assistant: "
    assert model.tok_encode(chat)[:2] == [1, model.tok_encode("u")[1]]
    answered = [{"role": "user", "content": "sky"}, {"role": "assistant", "content": "blue"}]
    # lm-eval gives the beginning of an answer so, for the model to continue.
    begun = model.apply_chat_template(answered, add_generation_prompt=False)
    assert begun == "<s>user: sky</s><s>assistant: blue"
    assert "m.role" in str(model.chat_template(True))
    assert model.chat_template(False) is None


def write_with_bos(artifact: Path, folder: Path) -> Path:
    from eoracc.runtime.artifact.manifest import Manifest, describe_folder, read_manifest

    copy = Path(shutil.copytree(artifact, folder / "artifact"))
    write_byte_tokenizer(copy, bos=True, chat=True)
    old = read_manifest(artifact)
    new = Manifest.of(describe_folder(copy), source=old.source, config={}, packages={}, parity={})
    (copy / "manifest.json").write_text(new.to_json())
    return copy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter": "math"}, "adapter 'math': the artifact takes no adapters"),
        ({"max_length": 129}, "max_length=129: must be at least 2 and at most 128"),
        ({"max_length": 1}, "max_length=1: must be at least 2"),
        ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
    ],
)
def test_a_bad_argument_is_one_sentence(
    tiny_artifact: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        open_artifact(tiny_artifact, **arguments)


def test_no_artifact_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="it is no eoracc artifact"):
        open_artifact(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "generation argument 'num_beams': is none of until"),
        ({"max_gen_toks": 128}, "max_gen_toks=128: the model takes 128 tokens"),
    ],
)
def test_a_task_may_ask_for_too_much(
    model: EoraccLM, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        model.generate_until(instances("generate_until", [("a", arguments)]), disable_tqdm=True)


def test_a_continuation_that_is_too_long_is_an_error(model: EoraccLM) -> None:
    requests = instances("loglikelihood", [("a", "b" * 129)])
    with pytest.raises(RequestError, match="a continuation has 129 tokens, the model takes 128"):
        model.loglikelihood(requests, disable_tqdm=True)


def test_results_are_offered_to_the_cache(model: EoraccLM) -> None:
    kept: dict[str, object] = {}

    class Hook:
        def add_partial(self, kind: str, texts: object, result: object) -> None:
            kept[f"{kind} {texts}"] = result

    model.set_cache_hook(Hook())
    results = [
        model.loglikelihood(instances("loglikelihood", [("a", "b")]), disable_tqdm=True),
        model.loglikelihood_rolling(
            instances("loglikelihood_rolling", [("a",)]), disable_tqdm=True
        ),
        model.generate_until(
            instances("generate_until", [("a", {"max_gen_toks": 1})]), disable_tqdm=True
        ),
    ]
    assert list(kept.values()) == [one[0] for one in results]
    assert list(kept) == [
        "loglikelihood ('a', 'b')",
        "loglikelihood_rolling ('a',)",
        "generate_until ('a', {'max_gen_toks': 1})",
    ]
