"""Small tokenizers of the kinds that checkpoints bring, trained on a few sentences.

Each member of :data:`ZOO` writes the tokenizer's files and a config.json into a folder, so that
``AutoTokenizer.from_pretrained(folder)`` opens them. The ids of ``<unk>``, ``<s>`` and ``</s>`` are
0, 1 and 2.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["STRINGS", "ZOO", "write_files"]

_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_TRAINING = [
    "The capital of France is Paris, and it's well known. You've never seen 1815 or 12345!",
    "def main(argument):\n    return [argument + 1, 'two  words']\n\n\n# it's done\t\tend",
    "éàü naïve café Ünïcode 日本語の文 مرحبا بالعالم 😀 Straße ﬁne ① user assistant system",
    "hello Hello HELLO world World don't DON'T we'll they're cannot walking walked",
]

STRINGS = [
    "",
    " ",
    "Hello world",
    "  Hello   world  ",
    "e\u0301cole \u00e9cole A\u030angstro\u0308m",
    "\ufb01ne \u2460 \uff21 \u00bd",
    "Emoji \U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f466 and \u200c\u200b joiners",
    "tab\tnewline\n\n\nspaces    end \r\n",
    "don't DON'T we'll it's 's 'S they're \u2019s",
    "1 12 123 1234 12345 a  12  b3c 1,000.50",
    "HELLO Hello hello hELLO \u0130stanbul \u1e9e",
    "\u65e5\u672c\u8a9e\u306e\u6587 \u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31\u0e2a",
    "a </s> b</s>c <s>d <|end|> e<|end|>f  <|end|>  g [TOOL] x[TOOL]y Tool tool toolbox",
    "<unk> <0x41> \u2581x \ufffd . , ! do n't 's it 's",
    "nul\x00 bell\x07 \U000e0001 \uffff",
]
"""Strings that tokenizers treat differently, beside those that a build tries."""


def _train(
    model: Any,  # noqa: ANN401 - tokenizers has no types for what follows
    trainer: Any,  # noqa: ANN401
    *,
    normalizer: Any = None,  # noqa: ANN401
    pre_tokenizer: Any = None,  # noqa: ANN401
    decoder: Any = None,  # noqa: ANN401
) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator(_TRAINING, trainer)
    return tokenizer


def _byte_level(pattern: str | None = None, **parts: Any) -> Tokenizer:  # noqa: ANN401
    """Byte-level BPE that splits by ``pattern``; by GPT-2's where there is none."""
    steps = parts.pop("steps", [])
    if pattern is not None:
        steps = [*steps, pre_tokenizers.Split(Regex(pattern), "isolated")]
    last = pre_tokenizers.ByteLevel(
        add_prefix_space=parts.pop("add_prefix_space", False), use_regex=pattern is None
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    return _train(
        models.BPE(),
        trainer,
        pre_tokenizer=pre_tokenizers.Sequence([*steps, last]),
        decoder=decoders.ByteLevel(),
        **parts,
    )


def _sentencepiece(normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:  # noqa: ANN401
    """BPE on characters with single bytes for what it lacks, as SentencePiece trains it."""
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=[*_SPECIAL, *_BYTES], show_progress=False
    )
    tokenizer = _train(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainer,
        normalizer=normalizer,
        pre_tokenizer=pre_tokenizer or pre_tokenizers.Metaspace(),
        decoder=decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    )
    if pre_tokenizer is None:
        tokenizer.pre_tokenizer = None
    content = json.loads(tokenizer.to_str())
    # Bytes are plain tokens: their spelling in a text is text.
    content["added_tokens"] = content["added_tokens"][: len(_SPECIAL)]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _unigram(normalizer: Any = None, scheme: str = "always") -> Tokenizer:  # noqa: ANN401
    return _train(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
        ),
        normalizer=normalizer,
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoder=decoders.Metaspace(prepend_scheme=scheme),
    )


def write_files(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    model_type: str = "llama",
    **config: object,
) -> Path:
    """Write tokenizer.json, tokenizer_config.json and config.json.

    Args:
      folder: created where it is missing.
      tokenizer: with ``<unk>``, ``<s>`` and ``</s>``.
      model_type: of config.json.
      **config: fields of tokenizer_config.json, beside or instead of the usual ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _deepseek() -> Tokenizer:
    patterns = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥]+")
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return _byte_level(steps=[*steps, pre_tokenizers.Digits(individual_digits=True)])


def _falcon() -> Tokenizer:
    steps = [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
    tokenizer = _byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def _added(tokenizer: Tokenizer, *tokens: AddedToken) -> Tokenizer:
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def _llama2() -> Tokenizer:
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    return _sentencepiece(normalizers.Sequence(steps))


def _vocab_and_merges(folder: Path) -> Path:
    """Qwen2's older form: vocab.json and merges.txt alone."""
    write_files(folder, _byte_level(_QWEN2), model_type="qwen2", tokenizer_class="Qwen2Tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return folder


def _no_config(folder: Path) -> Path:
    """tokenizer.json alone."""
    write_files(folder, _byte_level(_LLAMA3))
    (folder / "tokenizer_config.json").unlink()
    return folder


ZOO: Mapping[str, Callable[[Path], Path]] = {
    "gpt2": lambda f: write_files(f, _byte_level()),
    "gpt2_prefix_space": lambda f: write_files(f, _byte_level(add_prefix_space=True)),
    "gpt2_class_prefix_space": lambda f: write_files(
        f, _byte_level(), tokenizer_class="GPT2Tokenizer", add_prefix_space=True
    ),
    "qwen2_nfc": lambda f: write_files(
        f, _byte_level(_QWEN2, normalizer=normalizers.NFC()), model_type="qwen2"
    ),
    "nfkc_lowercase": lambda f: write_files(
        f,
        _byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    ),
    "llama3": lambda f: write_files(f, _byte_level(_LLAMA3), clean_up_tokenization_spaces=True),
    "o200k": lambda f: write_files(f, _byte_level(_O200K)),
    "deepseek": lambda f: write_files(f, _deepseek(), tokenizer_class="LlamaTokenizerFast"),
    "starcoder_digits": lambda f: write_files(
        f, _byte_level(steps=[pre_tokenizers.Digits(individual_digits=True)])
    ),
    "falcon": lambda f: write_files(f, _falcon()),
    "llama2_legacy": lambda f: write_files(f, _llama2()),
    "metaspace_first": lambda f: write_files(
        f,
        _sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    ),
    "metaspace_always": lambda f: write_files(
        f, _sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"))
    ),
    "metaspace_never": lambda f: write_files(
        f, _sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"))
    ),
    "unigram_nfkc_clean_up": lambda f: write_files(
        f,
        _unigram(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        clean_up_tokenization_spaces=True,
    ),
    "unigram_first": lambda f: write_files(f, _unigram(scheme="first")),
    "added_lstrip_rstrip": lambda f: write_files(
        f,
        _added(
            _byte_level(),
            AddedToken("<|end|>", lstrip=True, special=True),
            AddedToken("[TOOL]", rstrip=True, special=True),
        ),
    ),
    "added_single_word": lambda f: write_files(
        f, _added(_byte_level(), AddedToken("tool", single_word=True, normalized=False))
    ),
    "added_normalized": lambda f: write_files(
        f,
        _added(
            _byte_level(normalizer=normalizers.Lowercase()),
            AddedToken("tool", normalized=True),
            AddedToken("[TOOL]", normalized=False),
        ),
    ),
    "added_in_config": lambda f: write_files(
        f,
        _byte_level(),
        additional_special_tokens=["<|end|>"],
        added_tokens_decoder={
            "400": {
                "content": "[TOOL]",
                "lstrip": True,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
                "special": False,
            }
        },
    ),
    "add_bos_token": lambda f: write_files(f, _byte_level(), add_bos_token=True),
    "split_special_tokens": lambda f: write_files(f, _byte_level(), split_special_tokens=True),
    "llama_class": lambda f: write_files(
        f, _llama2(), tokenizer_class="LlamaTokenizer", legacy=True, add_bos_token=True
    ),
    "llama_class_new": lambda f: write_files(
        f, _llama2(), tokenizer_class="LlamaTokenizerFast", legacy=False, add_prefix_space=False
    ),
    "gemma_class": lambda f: write_files(
        f, _llama2(), model_type="gemma", tokenizer_class="GemmaTokenizer"
    ),
    "cohere_class": lambda f: write_files(
        f, _byte_level(), model_type="cohere", tokenizer_class="CohereTokenizer"
    ),
    "phi3_added": lambda f: write_files(
        f,
        _added(
            _llama2(),
            AddedToken("<|end|>", rstrip=True, special=True),
            AddedToken("[TOOL]", lstrip=True, rstrip=True, special=False, normalized=False),
        ),
        model_type="phi3",
        tokenizer_class="LlamaTokenizer",
    ),
    "vocab_and_merges": _vocab_and_merges,
    "no_tokenizer_config": _no_config,
}
