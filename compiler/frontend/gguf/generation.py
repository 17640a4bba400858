"""Where an answer ends, and how it is sampled, as generation_config.json says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eoracc.compiler.frontend.gguf.reading import GgufFile
    from eoracc.compiler.frontend.gguf.tokenizer import Vocabulary

__all__ = ["end_tokens", "sampling"]

_END_TEXTS = frozenset(
    {
        "<|call|>",
        "<|end_of_text|>",
        "<|end|>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|im_end|>",
        "<|return|>",
        "<EOT>",
        "<end_of_turn>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",  # of DeepSeek
    }
)
"""Control tokens at which llama.cpp ends an answer, whatever the file says about them."""

_SAMPLING = (
    ("temp", "temperature"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("penalty_repeat", "repetition_penalty"),
)


def end_tokens(vocabulary: Vocabulary) -> list[int]:
    """The tokens that end an answer: of a text, of a turn, of a message.

    Files often name only the first; a chat model ends its turns with a token that its template
    writes, and such tokens are known by their text.
    """
    ids = [vocabulary.special[name] for name in ("eos", "eot", "eom") if name in vocabulary.special]
    written = "".join(vocabulary.templates.values())
    ids += [
        index for index, text in vocabulary.controls() if text in _END_TEXTS and text in written
    ]
    return list(dict.fromkeys(ids))


def sampling(file: GgufFile) -> dict[str, Any]:
    """The defaults of ``general.sampling`` in the words of generation_config.json."""
    fields: dict[str, Any] = {}
    for key, field in _SAMPLING:
        value = file.real(f"general.sampling.{key}")
        if value is not None:
            fields[field] = value
    top_k = file.integer("general.sampling.top_k")
    if top_k is not None:
        fields["top_k"] = top_k
    if fields:
        fields["do_sample"] = fields.get("temperature", 1.0) > 0
        if not fields["do_sample"]:
            fields.pop("temperature")
    return fields
