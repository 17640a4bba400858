"""Tokenizers for the tests of texts and windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.text_windows import prose
from tests.tiny_artifact import write_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_byte_tokenizer(tmp_path_factory.mktemp("t")))


@pytest.fixture(scope="module")
def bos_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = write_byte_tokenizer(tmp_path_factory.mktemp("t"), bos=True, chat=True)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def merging_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-pair tokenizer with merges, also of blanks and line ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose(400), "\n\n\n   x" * 50], trainer)
    factory: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerBase = factory(tokenizer_object=tokenizer)
    return fast
