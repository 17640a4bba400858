"""Log-likelihoods of choices in eager PyTorch: the original model, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.question_sets import Question, encode_choices

__all__ = ["open_eager"]


def open_eager(folder: Path) -> Callable[[Question], list[float]]:
    """A function from a question to the log-likelihood of each of its choices, in nats.

    The common prefix of a question's choices runs once; the remaining tokens use its cache.

    Args:
      folder: a Hugging Face checkpoint, tokenizer included.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    def score(question: Question) -> list[float]:
        with torch.inference_mode():
            return _score(model, tokenizer, question)

    return score


def _score(model: Any, tokenizer: Tokenizer, question: Question) -> list[float]:
    from transformers import DynamicCache

    choices = encode_choices(tokenizer, question)
    # Each row keeps at least one token, whose logits predict the first token after the prompt.
    shared = _common_length([choice.tokens[: choice.start] for choice in choices]) - 1
    cache = DynamicCache(config=model.config)
    if shared > 0:
        prefix = torch.tensor([choices[0].tokens[:shared]])
        cache = model(prefix, past_key_values=cache, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(choices))
    longest = max(len(choice.tokens) for choice in choices)
    rows = [choice.tokens[shared:] for choice in choices]
    # Padding is on the right, where the attention of a valid token does not reach it.
    ids = torch.tensor([row + [0] * (longest - shared - len(row)) for row in rows])
    logits = model(ids, past_key_values=cache).logits
    scores = []
    for row, choice in enumerate(choices):
        # The logits of a token are at the position before it.
        places = slice(choice.start - shared - 1, len(choice.tokens) - shared - 1)
        log_probabilities = torch.log_softmax(logits[row, places].double(), dim=-1)
        targets = torch.tensor(choice.tokens[choice.start :])[:, None]
        scores.append(float(log_probabilities.gather(1, targets).sum()))
    return scores


def _common_length(rows: Sequence[Sequence[int]]) -> int:
    """The length of the common prefix of all ``rows``, in tokens."""
    length = min(map(len, rows))
    for place in range(length):
        if len({row[place] for row in rows}) > 1:
            return place
    return length
