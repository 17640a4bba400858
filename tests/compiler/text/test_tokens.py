from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.errors import DataError
from tests.text_windows import prose, windows

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


@pytest.mark.parametrize("words", [30, 400, 20_000])
@pytest.mark.parametrize("needed", [40, 5_000])
def test_reading_a_part_gives_the_tokens_of_the_whole(
    tmp_path: Path, merging_tokenizer: PreTrainedTokenizerBase, words: int, needed: int
) -> None:
    text = prose(words, seed=words)
    whole = merging_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(whole) < needed:
        with pytest.raises(DataError, match=f"holds {len(whole)} tokens, {needed} are needed"):
            windows(tmp_path, merging_tokenizer, text, samples=needed // 10, sequence_length=10)
        return
    found = windows(tmp_path, merging_tokenizer, text, samples=needed // 10, sequence_length=10)
    assert found.input_ids.ravel().tolist() == whole[:needed]
