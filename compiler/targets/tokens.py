"""The tokenizer of an artifact, held against transformers' on the original checkpoint.

The shipped files are opened as the runtime opens them, before anything slow is done. Compared are
strings that tokenizers are known to treat differently, added tokens with and without blanks
around them, rendered chats, and the beginning of the held-out text. A part of them goes into the
artifact, where ``eoracc verify`` compares them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from eoracc.compiler.chat.genai import exceeds_genai
from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.compiler.frontend.quiet import quiet
from eoracc.errors import EoraccError, ModelError, reason
from eoracc.runtime.decode.chat_files import read_templates
from eoracc.runtime.decode.codec import CONFIG_FILE, TOKENIZER_FILE, Codec
from eoracc.runtime.packages import import_package
from eoracc.runtime.parity.tokens import (
    TokenCase,
    TokenDifference,
    compare_tokens,
    write_token_cases,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from eoracc.compiler.config.sections import TargetName
    from eoracc.compiler.frontend.load import LoadedModel

__all__ = ["ShippedTokenizer", "compare_with_genai", "ship_tokenizer", "tokenizer_report"]

_STRINGS = (
    "",
    " ",
    "Hello world",
    " Hello  world ",
    "   three   blanks   before\n   and\n\n\nlines \t tab\ttab\r\nreturn ",
    "don't DON'T we'll I've you're he'd it\u2019s 's 'S ' s do n't",
    "1 12 123 1234567890 3.14 1,000 a  12  b3c \u0664\u0662 \u00bd \u2167",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m A\u030angstro\u0308m \u1e9b\u0323",
    "\ufb01ne \uff26ull \u2460 \u2122 x\u00b2 \u2026",
    "MiXeD CASE \u0130stanbul STRASSE Stra\u00dfe \u039f\u0394\u039f\u03a3",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3002 \ud55c\uad6d\uc5b4 \u4e2d\u6587\uff0c1815\u5e74",
    "\u0645\u0631\u062d \u05e9\u05dc\u05d5 \u0e2a\u0e27\u0e31 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f466 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "zero\u200bwidth\u200c \u200d soft\u00adhyphen nbsp\u00a0here \u3000wide \ufeffmark",
    "def f(x):\n    return {'a': [x, -1]} # it's\n\n\tif (x != y) && z_1 -> \"...\";",
    "<s> </s><|endoftext|>a<|im_end|> <unk> <0x41> \u2581x [INST] <pad>",
    "Wait . Really ? Yes , ' so ' they 're done !",
    "\ufffd bell\x07 \x7f \u0378 \uffff",
)

_ADDED = 24
"""Added tokens that are tried, from both ends of their list."""

_HELD_OUT = 1 << 18
"""Characters of held-out text that are compared, in pieces."""

_PIECE = 200

_CHATS = (
    [{"role": "user", "content": "Hello \u65e5\u672c, what's 12+3?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Two  blanks\nand a line "},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."},
        {"role": "user", "content": "Why?"},
    ],
)


@dataclass(frozen=True)
class ShippedTokenizer:
    """The tokenizer of an artifact, which has been compared with transformers'.

    Attributes:
      cases: what transformers gives, for other tokenizers to be compared with.
      notes: what there is to say about the checkpoint's own files.
    """

    cases: Sequence[TokenCase]
    notes: Sequence[str] = field(default=())


def ship_tokenizer(
    loaded: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    held_out: Iterable[str] = (),
) -> ShippedTokenizer:
    """Write a checkpoint's tokenizer into an artifact, and compare it with transformers'.

    A record for later comparisons goes beside it, see :mod:`eoracc.runtime.parity.tokens`.

    Args:
      loaded: the checkpoint.
      tokenizer: its tokenizer in transformers.
      folder: of the artifact.
      held_out: texts; the beginning is compared.

    Raises:
      ModelError: the tokenizer cannot be shipped, or gives other tokens than transformers.
    """
    loaded.write_tokenizer(tokenizer, folder)
    with quiet():
        hard = list(_hard_cases(tokenizer))
        cases = [*hard, *_chat_cases(tokenizer), *_text_cases(tokenizer, held_out)]
    difference = compare_tokens(Codec(folder), cases)
    if difference is not None:
        raise ModelError(
            f"{loaded.folder}: {TOKENIZER_FILE} does not say all of its tokenizer "
            f"{type(tokenizer).__name__}, so that the artifact would compute other tokens: "
            f"{difference}"
        )
    write_token_cases(folder, hard)
    return ShippedTokenizer(
        cases=cases,
        notes=_notes(loaded.folder, tokenizer, hard),
    )


def tokenizer_report(
    folder: Path, shipped: ShippedTokenizer, targets: Iterable[TargetName]
) -> dict[str, Any]:
    """The part of report.json on the tokenizer.

    Args:
      folder: of the artifact, with genai_config.json.
      shipped: its tokenizer.
      targets: of the build; onnxruntime-genai opens what ``onnxruntime`` writes.
    """
    genai = compare_with_genai(folder, shipped.cases) if "onnxruntime" in targets else {}
    return {"notes": [*shipped.notes], "onnxruntime_genai": genai}


def compare_with_genai(folder: Path, cases: Sequence[TokenCase]) -> dict[str, Any]:
    """What unmodified onnxruntime-genai does with an artifact's tokenizer.

    Args:
      folder: of the artifact, with genai_config.json.
      cases: the right tokens.

    Returns:
      For report.json: ``texts`` that were compared, ``other_tokens``, how many of them differ, and
      the ``first`` difference; or ``refused``, why genai does not open the files. Empty where genai
      is not installed.
    """
    try:
        genai = import_package("onnxruntime_genai")
    except EoraccError:
        return {}
    if any(map(exceeds_genai, _genai_sources(folder))):
        return {"refused": "its chat template is too long"}
    try:
        tokenizer = genai.Tokenizer(str(folder))
    except Exception as error:  # noqa: BLE001 - genai raises nothing narrower
        return {"refused": reason(error)}
    differences = []
    for case in cases:
        tokenizer.update_options(add_special_tokens="true" if case.special else "false")
        try:
            found = [int(token) for token in tokenizer.encode(case.text)]
        except Exception as error:  # noqa: BLE001 - as above
            return {"refused": f"{case.text[:40]!r}: {reason(error)}"}
        if found != list(case.tokens):
            differences.append(TokenDifference(case, found))
    shortest = min(differences, key=lambda difference: len(difference.case.text), default=None)
    return {
        "texts": len(cases),
        "other_tokens": len(differences),
        "first": None if shortest is None else str(shortest),
    }


def _genai_sources(folder: Path) -> list[str]:
    """Chat templates that onnxruntime-genai may parse when it opens a tokenizer."""
    config = folder / CONFIG_FILE
    content = CHECKPOINT.read_object(config) if config.is_file() else {}
    template = content.get("chat_template")
    return [*read_templates(folder).values(), *([template] if isinstance(template, str) else [])]


def _case(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> TokenCase:
    # verbose=False: a text may be longer than the model's context here.
    encoded = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    tokens = [int(token) for token in encoded]
    decoded = str(tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""
    return TokenCase(text, special, tokens, decoded)


def _hard_cases(tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenCase]:
    added = list(tokenizer.get_added_vocab())
    chosen = dict.fromkeys((*added[: _ADDED // 2], *added[-_ADDED // 2 :]))
    around = [
        f"a{token}b {token} c  {token}  d\n{token}\n{token}{token}. {token.upper()} {token.lower()}"
        for token in chosen
    ]
    for text in (*_STRINGS, *around):
        yield _case(tokenizer, text, special=True)
        yield _case(tokenizer, text, special=False)


def _chat_cases(tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenCase]:
    if not tokenizer.chat_template:
        return
    for messages in _CHATS:
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # noqa: BLE001, S112 - a template may refuse a role in any way
            continue
        yield _case(tokenizer, str(text), special=False)


def _text_cases(tokenizer: PreTrainedTokenizerBase, held_out: Iterable[str]) -> Iterator[TokenCase]:
    pieces = (
        document[start : start + _PIECE]
        for document in held_out
        for start in range(0, len(document), _PIECE)
    )
    for text in islice(pieces, _HELD_OUT // _PIECE):
        yield _case(tokenizer, text, special=False)


def _notes(
    folder: Path, tokenizer: PreTrainedTokenizerBase, cases: Sequence[TokenCase]
) -> list[str]:
    """Where transformers does not follow the checkpoint's own tokenizer.json."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return []
    # Tokens that tokenizer_config.json adds are no part of this file.
    added = [*tokenizer.get_added_vocab()]
    plain = [case for case in cases if not any(token in case.text for token in added)]
    plain = [case for case in plain if not case.special]
    difference = compare_tokens(Codec(folder), plain)
    if difference is None:
        return []
    return [
        (
            f"{path}: transformers' {type(tokenizer).__name__}, whose tokens are used, does not "
            f"follow this file ({difference}): set tokenizer_class to PreTrainedTokenizerFast in "
            "tokenizer_config.json if the file is right"
        )
    ]
