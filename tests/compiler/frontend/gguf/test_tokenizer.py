"""Tokens of converted files, compared with tokenizers as their models publish them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from eoracc.compiler.frontend.gguf.pre_tokenizers import PRE_TOKENIZERS
from eoracc.compiler.frontend.gguf.reading import GgufFile
from eoracc.compiler.frontend.gguf.tokenizer import read_tokenizer, read_vocabulary
from tests.gguf_files import write_gguf
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<unk>", "<s>", "</s>"]
PAIRS = [("1", "2"), ("12", "3"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("a", "b"), ("Ã", "©"), ("T", "h")]
MERGES = [" ".join(pair) for pair in PAIRS]
BYTE_LEVEL = [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES), "abc"]
HARD = [
    "The 12345 abc\n\n  indented  text\t\r\n",
    "I've IT'S don't",
    "cafe\u0301 caf\u00e9 \u1100\u1161",
    "中文 한국어 ไทย हिन्दी",
    "x<s>y</s> z",
    " leading, trailing ",
    "",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("checkpoint"), head_dim=8, vocab_size=600)


def converted(
    checkpoint: Path, folder: Path, tokens: Sequence[str], types: Sequence[int], **keys: object
) -> Any:  # noqa: ANN401
    """The tokenizer of a GGUF, after it was written to ``folder`` and read again."""
    from transformers import AutoTokenizer

    path = write_gguf(
        folder / "model.gguf",
        checkpoint,
        tokens=tokens,
        types=types,
        merges=MERGES,
        keys={f"tokenizer.{key}": value for key, value in keys.items()},
    )
    file = GgufFile(path)
    read_tokenizer(file, read_vocabulary(file)).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def byte_level(
    tokens: Sequence[str],
    patterns: Sequence[str],
    *,
    nfc: bool = False,
    ignore_merges: bool = False,
    bos: bool = False,
) -> Tokenizer:
    """A byte-level tokenizer as tokenizer.json would hold it."""
    model = BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=PAIRS,
        ignore_merges=ignore_merges,
    )
    tokenizer = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokens.index("<s>"))]
        )
    return tokenizer


def assert_same_tokens(given: Any, expected: Any) -> None:  # noqa: ANN401
    for text in HARD:
        wanted = expected(text).input_ids if callable(expected) else expected.encode(text).ids
        assert given(text).input_ids == wanted, text
        assert given.decode(wanted) == expected.decode(wanted, skip_special_tokens=False)


def types_of(tokens: Sequence[str], user_defined: Sequence[str] = ()) -> list[int]:
    return [
        4 if token in user_defined else 3 if token.startswith("<") and len(token) > 1 else 1
        for token in tokens
    ]


def test_patterns_are_those_that_transformers_has() -> None:
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    published = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS
    shared = PRE_TOKENIZERS.keys() & published.keys()
    assert len(shared) > 10
    for name in shared:
        assert PRE_TOKENIZERS[name].patterns == (published[name],), name


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_byte_level_tokens(pre: str, checkpoint: Path, tmp_path: Path) -> None:
    known = PRE_TOKENIZERS[pre]
    given = converted(checkpoint, tmp_path, BYTE_LEVEL, types_of(BYTE_LEVEL), **{"ggml.pre": pre})
    expected = byte_level(
        BYTE_LEVEL,
        known.patterns,
        nfc=known.nfc,
        ignore_merges=known.ignore_merges,
        bos=known.add_bos,
    )
    assert_same_tokens(given, expected)


def test_qwen2_composes_characters_first(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    given = converted(
        checkpoint, tmp_path, BYTE_LEVEL, types_of(BYTE_LEVEL), **{"ggml.pre": "qwen2"}
    )
    factory: Any = Qwen2Tokenizer
    expected = factory(
        vocab={token: index for index, token in enumerate(BYTE_LEVEL)},
        merges=PAIRS,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    assert_same_tokens(given, expected)
    assert given("cafe\u0301").input_ids == given("caf\u00e9").input_ids


def test_piece_that_is_a_token_needs_no_merges(checkpoint: Path, tmp_path: Path) -> None:
    given = converted(
        checkpoint, tmp_path, BYTE_LEVEL, types_of(BYTE_LEVEL), **{"ggml.pre": "llama-bpe"}
    )
    assert given.tokenize("abc") == ["abc"]
    assert given("abc").input_ids[0] == BYTE_LEVEL.index("<s>")


@pytest.mark.parametrize("flag", [True, False])
def test_first_token_is_the_one_that_the_file_asks_for(
    flag: bool, checkpoint: Path, tmp_path: Path
) -> None:
    given = converted(
        checkpoint,
        tmp_path,
        BYTE_LEVEL,
        types_of(BYTE_LEVEL),
        **{"ggml.pre": "llama-bpe" if not flag else "smollm", "ggml.add_bos_token": flag},
    )
    assert (given("a").input_ids[0] == BYTE_LEVEL.index("<s>")) is flag


def test_added_tokens_keep_text_and_id(checkpoint: Path, tmp_path: Path) -> None:
    """DeepSeek's and runs of spaces are written in letters that byte-level tokens lack."""
    tokens = [
        "<unk>",
        "<\uff5cbegin▁of▁sentence\uff5c>",
        "<\uff5cend▁of▁sentence\uff5c>",
        *BYTE_LEVEL[3:],
    ]
    tokens += ["<\uff5cUser\uff5c>", "   ", "<think>"]
    types = types_of(tokens, ["   ", "<think>"])
    given = converted(
        checkpoint, tmp_path, tokens, types, **{"ggml.pre": "llama-bpe", "ggml.add_bos_token": True}
    )
    assert len(given) == len(tokens)
    assert given.bos_token_id == 1
    text = "<\uff5cUser\uff5c>a   b<think>"
    expected = [1, *map(tokens.index, ["<\uff5cUser\uff5c>", "a", "   ", "b", "<think>"])]
    assert given(text).input_ids == expected
    assert given.decode(expected[1:]) == text
    assert given.decode(expected, skip_special_tokens=True) == "a   b<think>"


SENTENCEPIECE = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
SENTENCEPIECE += ["▁ab", "▁▁", "<|user|>"]
SENTENCEPIECE_TYPES = [2, 3, 3, *[6] * 256, *[1] * 7, 3]
SENTENCEPIECE_TYPES += [1] * (len(SENTENCEPIECE) - len(SENTENCEPIECE_TYPES))
SENTENCEPIECE_TYPES[SENTENCEPIECE.index("<|user|>")] = 3
SENTENCEPIECE_MERGES = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁", "▁")]
SENTENCEPIECE_KEYS = {
    "ggml.model": "llama",
    "ggml.pre": None,
    "ggml.merges": [" ".join(merge) for merge in SENTENCEPIECE_MERGES],
    "ggml.scores": [0.0] * 259 + [-float(index) for index in range(len(SENTENCEPIECE) - 259)],
    "ggml.unknown_token_id": 0,
}


def sentencepiece(checkpoint: Path, folder: Path, prefix: bool | None) -> Any:  # noqa: ANN401
    """:func:`converted`, of a SentencePiece tokenizer with that ``add_space_prefix``."""
    keys = {**SENTENCEPIECE_KEYS, "ggml.add_space_prefix": prefix}
    return converted(checkpoint, folder, SENTENCEPIECE, SENTENCEPIECE_TYPES, **keys)


PIECES = ["ab a b", " ab", "  ab", "<|user|>ab", "x<s>ab é", "a<|user|> ab"]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_begins_as_the_file_says(
    prefix: bool | None, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import LlamaTokenizer

    given = sentencepiece(checkpoint, tmp_path, prefix)
    factory: Any = LlamaTokenizer
    expected = factory(
        vocab={token: index for index, token in enumerate(SENTENCEPIECE)},
        merges=SENTENCEPIECE_MERGES,
        add_prefix_space=prefix,
        add_bos_token=True,
    )
    expected.add_tokens([AddedToken("<|user|>", special=True, normalized=False)])
    for text in PIECES:
        wanted = expected(text).input_ids
        assert given(text).input_ids == wanted, text
        assert given.decode(wanted) == expected.decode(wanted)


@pytest.mark.parametrize("prefix", [None, True, False])
def test_phi3_takes_the_space_after_added_tokens(prefix: bool | None, tmp_path: Path) -> None:
    checkpoint = tiny_model("phi3", tmp_path / "model", vocab_size=600)
    given = sentencepiece(checkpoint, tmp_path, prefix)
    # As the tokenizer.json of Phi-3 has it.
    expected = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(SENTENCEPIECE)},
            merges=SENTENCEPIECE_MERGES,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [] if prefix is False else [normalizers.Prepend("▁")]
    expected.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    expected.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([] if prefix is False else [decoders.Strip(" ", 1)]),
        ]
    )
    for text in ("<unk>", "<s>", "</s>", "<|user|>"):
        strip = text not in ("<unk>", "<s>")
        expected.add_tokens([AddedToken(text, special=True, normalized=False, rstrip=strip)])
    for text in [*PIECES, "<|user|>\nab</s>  a<s> b"]:
        wanted = expected.encode(text).ids
        assert given(text).input_ids == [1, *wanted], text
        assert given.decode(wanted) == expected.decode(wanted, skip_special_tokens=False)


@pytest.mark.parametrize("prefix", [None, False])
def test_gemma_begins_without_a_space(prefix: bool | None, tmp_path: Path) -> None:
    from transformers import GemmaTokenizer

    checkpoint = tiny_model("gemma3", tmp_path / "model", vocab_size=600)
    given = sentencepiece(checkpoint, tmp_path, prefix)
    factory: Any = GemmaTokenizer
    expected = factory(
        vocab={token: index for index, token in enumerate(SENTENCEPIECE)},
        merges=SENTENCEPIECE_MERGES,
        bos_token="<s>",
        eos_token="</s>",
    )
    expected.add_tokens([AddedToken("<|user|>", special=True, normalized=False)])
    for text in PIECES:
        wanted = expected(text, add_special_tokens=False).input_ids
        assert given(text, add_special_tokens=False).input_ids == wanted, text
        assert given.decode(wanted) == expected.decode(wanted)


def test_templates_have_names(checkpoint: Path, tmp_path: Path) -> None:
    given = converted(
        checkpoint,
        tmp_path,
        BYTE_LEVEL,
        types_of(BYTE_LEVEL),
        **{
            "chat_template": "plain",
            "chat_template.tool_use": "{{ tools }}",
            "chat_template.rag": "{{ documents }}",
            "chat_templates": ["tool_use", "rag"],
        },
    )
    assert given.chat_template == {
        "default": "plain",
        "tool_use": "{{ tools }}",
        "rag": "{{ documents }}",
    }
    assert (tmp_path / "chat_template.jinja").read_text() == "plain"
