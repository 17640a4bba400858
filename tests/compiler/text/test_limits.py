"""Tokens beyond the embedding, and windows beyond the positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.text.limits import TokenLimits
from eoracc.compiler.text.windows import calibration_windows, evaluation_windows
from eoracc.errors import ConfigError, DataError
from tests.text_windows import windows
from tests.tiny_artifact import write_byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

ROWS = 260
"""Tokens of the byte tokenizer."""


@pytest.fixture
def extended(tmp_path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer with two tokens more than the embedding has rows."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        write_byte_tokenizer(tmp_path)
    )
    tokenizer.add_tokens(["<extra0>", "<extra1>"])
    return tokenizer


@pytest.mark.parametrize("layout", ["packing", "padding"])
def test_token_beyond_the_embedding(
    tmp_path: Path, extended: PreTrainedTokenizerBase, layout: str
) -> None:
    text, options = "abc\n\nd<extra1>f", {"samples": 2, "sequence_length": 4, "layout": layout}
    assert windows(tmp_path, extended, text, limits=TokenLimits(ROWS + 2), **options).tokens
    with pytest.raises(
        DataError, match=r"text\.txt: holds '<extra1>', token 261 .* embedding has 261 rows"
    ):
        windows(tmp_path, extended, text, limits=TokenLimits(ROWS + 1), **options)


def test_text_without_such_a_token_is_taken(
    tmp_path: Path, extended: PreTrainedTokenizerBase
) -> None:
    assert windows(tmp_path, extended, "abc " * 9, limits=TokenLimits(ROWS)).tokens == 16


def test_beginning_beyond_the_embedding(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match="beginning of every text: holds '<s>', token 1 "):
        windows(tmp_path, bos_tokenizer, "abc " * 9, limits=TokenLimits(1))


def test_padding_is_within_the_embedding(tmp_path: Path, extended: PreTrainedTokenizerBase) -> None:
    extended.add_special_tokens({"pad_token": "<extra0>"})
    found = windows(
        tmp_path, extended, "abc", samples=1, layout="padding", limits=TokenLimits(ROWS)
    )
    assert found.input_ids.max() < ROWS
    assert found.tokens == 3


def test_windows_have_at_most_the_positions_of_the_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "text.txt").write_text("abcd " * 99)
    config = BuildConfig.model_validate(
        {
            "model": "m",
            "calibration": {"text": "text.txt", "samples": 2, "sequence_length": 16},
            "passes": ["calibrate", "quantize_gptq"],
            "verify": {"windows": 2, "window_length": 17},
            "output": "out",
        }
    )
    assert config.calibration is not None

    def calibrate(positions: int | None) -> int:
        assert config.calibration is not None
        limits = TokenLimits(ROWS, positions)
        return calibration_windows(
            config.calibration, config.verify, tokenizer, config_dir=tmp_path, limits=limits
        ).tokens

    def evaluate(positions: int | None) -> int:
        limits = TokenLimits(ROWS, positions)
        return evaluation_windows(
            config.calibration, config.verify, tokenizer, config_dir=tmp_path, limits=limits
        ).tokens

    assert calibrate(16) == calibrate(None) == 32
    assert evaluate(17) == evaluate(None) == 34
    with pytest.raises(
        ConfigError, match=r"calibration\.sequence_length: windows of 16 tokens .* 15 positions"
    ):
        calibrate(15)
    with pytest.raises(
        ConfigError, match=r"verify\.window_length: windows of 17 tokens .* 16 positions"
    ):
        evaluate(16)
