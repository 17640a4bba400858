from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler.config.sections import BuildConfig, CalibrationConfig
from eoracc.compiler.sweep.batch import make_batches
from eoracc.compiler.text.windows import (
    Windows,
    calibration_windows,
    checking_window,
    evaluation_windows,
)
from eoracc.errors import DataError
from eoracc.passes.solvers.gram import accumulate_gram
from tests.text_windows import prose, read, windows

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

# Every token is a byte, and `<pad>`, `<s>`, `</s>` are 0, 1, 2: what a window holds can be read.


def test_packs_contiguous_windows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = windows(tmp_path, tokenizer, "abcdefghijklmnopqrstuvwxyz", samples=3)
    assert read(tokenizer, found) == ["abcdefgh", "ijklmnop", "qrstuvwx"]
    assert found.input_ids.dtype == found.attention_mask.dtype == np.int64
    assert found.tokens == 24


def test_skips_an_offset(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = windows(tmp_path, tokenizer, "abcdefghijklmnopqrstuvwxyz", offset_tokens=10)
    assert read(tokenizer, found) == ["klmnopqr", "stuvwxyz"]


def test_random_windows_are_of_the_text_and_repeat(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "".join(f"{i:07d}." for i in range(50))
    one = windows(tmp_path, tokenizer, text, samples=5, seed=1)
    again = windows(tmp_path, tokenizer, text, samples=5, seed=1)
    other = windows(tmp_path, tokenizer, text, samples=5, seed=2)
    assert read(tokenizer, one) == read(tokenizer, again) != read(tokenizer, other)
    assert len(set(read(tokenizer, one))) == 5
    assert all(window in text for window in read(tokenizer, one))
    head = windows(tmp_path, tokenizer, text, samples=5, seed=1, limit_tokens=48)
    assert all(window in text[:48] for window in read(tokenizer, head))


def test_random_windows_of_a_long_text_begin_with_a_word_and_do_not_overlap(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    # A token is a byte: a character of several could be cut in two.
    text = prose(40_000).replace("é", "e").replace("日", "day")

    def random(seed: int) -> list[str]:
        found = windows(tmp_path, tokenizer, text, samples=20, seed=seed, sequence_length=64)
        return read(tokenizer, found)

    found = random(1)
    assert found == random(1) != random(2)
    starts = [text.index(window) for window in found]
    assert starts == sorted(starts)
    assert min(np.diff(starts)) >= 64
    assert all(window[0].isspace() for window in found)
    assert max(starts) > len(text) / 2


def test_random_windows_of_a_text_without_words(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "".join(f"{i:07d}." for i in range(10_000))
    found = read(tokenizer, windows(tmp_path, tokenizer, text, samples=5, seed=1))
    assert all(window in text for window in found)


def test_every_window_begins_with_bos_where_the_tokenizer_does(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    found = windows(tmp_path, bos_tokenizer, "abcdefghijklmnopqrstuvwxyz")
    assert read(bos_tokenizer, found) == ["<s>abcdefg", "<s>hijklmn"]


def test_padding_gives_a_document_a_window(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "one\n\n\n  \ntwo lines\nare one\n\nx\n"
    found = windows(tmp_path, bos_tokenizer, text, samples=3, layout="padding")
    assert read(bos_tokenizer, found) == ["<s>one", "<s>two lin", "<s>x"]
    assert found.attention_mask.tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1] * 8,
        [1, 1, 0, 0, 0, 0, 0, 0],
    ]
    assert (found.input_ids[found.attention_mask == 0] == 0).all()


def test_exactly_enough_text_is_enough(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert windows(tmp_path, tokenizer, "x" * 16).tokens == 16
    with pytest.raises(
        DataError,
        match=r"text\.txt: holds 15 tokens, 16 are needed: give more text or lower "
        r"calibration\.samples",
    ):
        windows(tmp_path, tokenizer, "x" * 15)


def config(folder: Path, calibration: dict[str, Any], verify: dict[str, Any]) -> BuildConfig:
    (folder / "text.txt").write_text("".join(f"p{i:02d}\n\n" for i in range(40)))
    return BuildConfig.model_validate(
        {
            "model": "m",
            "passes": ["calibrate"],
            "output": "o",
            "calibration": {"text": "text.txt", "samples": 3, "sequence_length": 10, **calibration},
            "verify": {"windows": 2, "window_length": 10, **verify},
        }
    )


def calibrated(built: BuildConfig) -> CalibrationConfig:
    assert built.calibration is not None
    return built.calibration


def test_held_out_windows_follow_those_of_calibration(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    built = config(tmp_path, {}, {})
    used = calibration_windows(calibrated(built), built.verify, tokenizer, config_dir=tmp_path)
    held = evaluation_windows(built.calibration, built.verify, tokenizer, config_dir=tmp_path)
    text = (tmp_path / "text.txt").read_text()
    assert "".join(read(tokenizer, used)) == text[:30]
    assert "".join(read(tokenizer, held)) == text[30:50]


def test_held_out_windows_follow_the_documents_of_calibration(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    built = config(tmp_path, {"layout": "padding"}, {})
    used = calibration_windows(calibrated(built), built.verify, tokenizer, config_dir=tmp_path)
    assert read(tokenizer, used) == ["p00", "p01", "p02"]
    held = evaluation_windows(built.calibration, built.verify, tokenizer, config_dir=tmp_path)
    assert "".join(read(tokenizer, held)) == "p03\n\np04\n\np05\n\np06\n\n"


def test_the_checking_window_follows_those_of_fidelity(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def checking(built: BuildConfig) -> Windows | None:
        return checking_window(built.calibration, built.verify, tokenizer, config_dir=tmp_path)

    for verify in ({}, {"text": "text.txt"}, {"offset_tokens": 4}):
        built = config(tmp_path, {}, verify)
        held = evaluation_windows(built.calibration, built.verify, tokenizer, config_dir=tmp_path)
        found = checking(built)
        assert found is not None
        text = (tmp_path / "text.txt").read_text()
        place = text.index("".join(read(tokenizer, held))) + held.tokens
        assert read(tokenizer, found) == [text[place : place + found.tokens]]
        assert found.tokens == built.verify.window_length
        # All of the text is for fidelity.
        count = (len(text) - place + held.tokens) // built.verify.window_length
        assert checking(config(tmp_path, {}, {**verify, "windows": count})) is None


def test_random_windows_keep_out_of_the_held_out_part(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    built = config(tmp_path, {"seed": 3}, {"offset_tokens": 40})
    used = calibration_windows(calibrated(built), built.verify, tokenizer, config_dir=tmp_path)
    text = (tmp_path / "text.txt").read_text()
    assert all(window in text[:40] for window in read(tokenizer, used))
    short = config(tmp_path, {"seed": 3}, {"offset_tokens": 20})
    with pytest.raises(DataError, match="may give calibration, before the held-out part, 20"):
        calibration_windows(calibrated(short), short.verify, tokenizer, config_dir=tmp_path)


@pytest.mark.parametrize(
    ("verify", "advice"),
    [
        ({}, "calibration.samples or verify.windows"),
        ({"offset_tokens": 20}, "verify.windows or verify.offset_tokens"),
        ({"text": "text.txt"}, "verify.windows"),
    ],
)
def test_held_out_text_that_is_too_short_names_the_settings_to_lower(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, verify: dict[str, Any], advice: str
) -> None:
    asked = config(tmp_path, {}, {"windows": 99, **verify})
    with pytest.raises(DataError, match=f"give more text or lower {re.escape(advice)}$"):
        evaluation_windows(asked.calibration, asked.verify, tokenizer, config_dir=tmp_path)


def test_a_mixture_is_all_texts_with_weights_of_mean_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 9)
    (tmp_path / "b.txt").write_text("stuvwxyz" * 9)
    mixture = [{"text": "a.txt", "weight": 3}, {"text": "b.txt", "samples": 1}]
    built = config(tmp_path, {"text": None, "mixture": mixture}, {"text": "a.txt"})
    found = calibration_windows(calibrated(built), built.verify, tokenizer, config_dir=tmp_path)
    rows = read(tokenizer, found)
    assert [row[0] in "abcdefgh" for row in rows] == [True, True, True, False]
    assert found.weights is not None
    np.testing.assert_allclose(found.weights, np.array([3, 3, 3, 1]) / 2.5, rtol=1e-6)
    single = config(tmp_path, {}, {})
    plain = calibration_windows(calibrated(single), single.verify, tokenizer, config_dir=tmp_path)
    assert plain.weights is None


def test_statistics_of_a_mixture_are_the_weighted_sum_of_those_of_its_texts() -> None:
    rng = np.random.default_rng(0)
    width, weights = 12, np.array([0.5, 2.0], np.float32)
    texts = [rng.standard_normal((2, 7, width)).astype(np.float32) for _ in weights]
    ids = np.zeros((4, 7), np.int64)
    mask = np.ones_like(ids)
    mask[3, 5:] = 0
    rows = np.concatenate(texts)
    (batch,) = make_batches(ids, mask, size=4, weights=np.repeat(weights, 2))
    gram = accumulate_gram([(rows.reshape(-1, width), batch.token_weights)], width)
    expected = np.zeros((width, width))
    for index, window in enumerate(rows):
        kept = window[mask[index].astype(bool)].astype(np.float64)
        expected += weights[index // 2] * kept.T @ kept
    # 28 float32 products of rows, and the roots of two weights.
    np.testing.assert_allclose(gram.matrix, expected, atol=34 * 2.0**-24 * np.abs(expected).max())
    assert gram.tokens == pytest.approx(0.5 * 14 + 2 * 12)
