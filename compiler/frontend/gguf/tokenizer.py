"""The tokenizer of a GGUF file: transformers' own reading of it, completed and corrected."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace
from tokenizers.decoders import Sequence as Decoders
from tokenizers.normalizers import NFC
from tokenizers.normalizers import Replace as ReplaceNormalizer
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Sequence, Split

from eoracc.compiler.frontend.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenization
from eoracc.compiler.frontend.gguf.reading import READER, WAY_OUT
from eoracc.compiler.frontend.quiet import quiet
from eoracc.documents import Reader
from eoracc.errors import ModelError
from eoracc.printable import quoted

if TYPE_CHECKING:
    from collections.abc import Sequence as Items

    from transformers import PreTrainedTokenizerBase

    from eoracc.compiler.frontend.gguf.reading import GgufFile

__all__ = ["Vocabulary", "read_tokenizer", "read_vocabulary"]

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
_SPECIAL_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")


class Vocabulary:
    """The checked keys of a tokenizer.

    Attributes:
      kind: ``tokenizer.ggml.model``: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
      pre: how a byte-level tokenizer cuts text; None for SentencePiece.
      tokens: the text of each id.
      types: of each token, as GGUF numbers them.
      special: ids of special tokens by GGUF's name, as far as the file has them.
      templates: chat templates by name; the unnamed one is ``default``.
    """

    def __init__(self, file: GgufFile) -> None:
        kind = file.text("tokenizer.ggml.model")
        if kind is None:
            raise file.refusal("it carries no tokenizer")
        if kind not in ("gpt2", "llama"):
            raise file.refusal(
                f"its tokenizer is of kind {quoted(kind)}, and gpt2 and llama are read"
            )
        self.kind = kind
        self.pre = _pre_tokenization(file) if kind == "gpt2" else None
        self.tokens: Items[str] = file.items("tokenizer.ggml.tokens", str) or []
        if not self.tokens:
            raise file.refusal("its vocabulary tokenizer.ggml.tokens is missing or empty")
        if len(set(self.tokens)) < len(self.tokens):
            raise file.refusal("its vocabulary tokenizer.ggml.tokens has a token twice")
        self.types: Items[int] = file.items("tokenizer.ggml.token_type", int) or []
        merges = file.items("tokenizer.ggml.merges", str)
        if kind == "gpt2":
            file.consume(["tokenizer.ggml.scores"])  # byte-level BPE has merges in their place
            if merges is None:
                raise file.refusal("key tokenizer.ggml.merges is missing")
        else:
            file.consume(["tokenizer.ggml.pre"])  # SentencePiece cuts nothing
        scores = file.items("tokenizer.ggml.scores", float)
        if kind == "llama" and merges is None and scores is None:
            raise file.refusal("key tokenizer.ggml.scores is missing")
        for name, values in (("token_type", self.types), ("scores", scores or [])):
            if values and len(values) != len(self.tokens):
                raise file.refusal(
                    f"key tokenizer.ggml.{name} has {len(values)} values for {len(self.tokens)} "
                    "tokens"
                )
        self.special = _special_ids(file, len(self.tokens))
        self.add_bos = file.flag("tokenizer.ggml.add_bos_token")
        self.add_eos = file.flag("tokenizer.ggml.add_eos_token")
        self.space_prefix = file.flag("tokenizer.ggml.add_space_prefix")
        self.templates = _templates(file)

    def controls(self) -> list[tuple[int, str]]:
        """Ids and texts of control tokens."""
        return self._of_type(_CONTROL)

    def added(self) -> list[tuple[int, str, bool]]:
        """Ids and texts of the tokens that are matched whole, and whether they are special."""
        return [
            (index, text, kind == _CONTROL)
            for kind in (_CONTROL, _USER_DEFINED)
            for index, text in self._of_type(kind)
        ]

    def _of_type(self, kind: int) -> list[tuple[int, str]]:
        return [
            (index, text)
            for index, (text, given) in enumerate(zip(self.tokens, self.types, strict=False))
            if given == kind
        ]


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Read the tokenizer's keys.

    Raises:
      ModelError: there is no tokenizer, or of an unknown kind, or a key does not fit.
    """
    return Vocabulary(file)


def read_tokenizer(file: GgufFile, vocabulary: Vocabulary) -> PreTrainedTokenizerBase:
    """The tokenizer as the model was trained with it.

    Raises:
      ModelError: transformers cannot build it.
    """
    from transformers import AutoTokenizer

    reader = Reader(ModelError, WAY_OUT)
    with reader.refusing(file.path, "transformers cannot read its tokenizer"), quiet():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            file.path.parent, gguf_file=file.path.name, trust_remote_code=False
        )
    if vocabulary.pre is not None:
        _respell_added_tokens(tokenizer, vocabulary)
        _set_pre_tokenization(tokenizer.backend_tokenizer, vocabulary.pre)
        if vocabulary.pre.add_bos and vocabulary.add_bos is None and "bos" in vocabulary.special:
            tokenizer.add_bos_token = True
    elif vocabulary.space_prefix is False:
        _drop_space_prefix(tokenizer.backend_tokenizer)
    if vocabulary.pre is None and file.architecture == "phi3":
        _strip_after_added_tokens(tokenizer)
    if len(vocabulary.templates) > 1 or "default" not in vocabulary.templates:
        tokenizer.chat_template = dict(vocabulary.templates) or None
    return tokenizer


def _pre_tokenization(file: GgufFile) -> PreTokenization:
    name = file.text("tokenizer.ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise file.refusal(
            f"its pre-tokenizer {quoted(name)} is not known (known: {', '.join(PRE_TOKENIZERS)})"
        )
    return PRE_TOKENIZERS[name]


def _special_ids(file: GgufFile, size: int) -> dict[str, int]:
    ids = {}
    for name in _SPECIAL_IDS:
        key = f"tokenizer.ggml.{name}_token_id"
        value = file.integer(key)
        if value is None:
            continue
        if not 0 <= value < size:
            raise file.refusal(f"key {key} is {value}, and the vocabulary has {size} tokens")
        ids[name] = value
    return ids


def _templates(file: GgufFile) -> dict[str, str]:
    templates = {}
    default = file.text("tokenizer.chat_template")
    if default is not None:
        templates["default"] = default
    names = file.items("tokenizer.chat_templates", str) or []
    prefix = "tokenizer.chat_template."
    stored = [key.removeprefix(prefix) for key in file.keys if key.startswith(prefix)]
    for name in sorted({*names, *stored}):
        template = file.text(prefix + name)
        if template is None:
            raise file.refusal(
                f"the chat template {quoted(name)} that tokenizer.chat_templates names is missing"
            )
        templates[name] = template
    return templates


def _respell_added_tokens(tokenizer: Any, vocabulary: Vocabulary) -> None:  # noqa: ANN401
    """Give added tokens of byte-level vocabularies their own text and id.

    transformers spells every token in the byte alphabet, and leaves out those that then differ:
    ``<｜User｜>`` of DeepSeek would be cut into pieces, and named special tokens of that kind get
    a new id behind the vocabulary.
    """
    content = READER.parse(tokenizer.backend_tokenizer.to_str(), "its tokenizer")
    known = {entry["id"]: entry for entry in content["added_tokens"]}
    added = vocabulary.added()
    if all(index in known and known[index]["content"] == text for index, text, _ in added) and all(
        index < len(vocabulary.tokens) for index in known
    ):
        return
    spelled = {index: text for text, index in content["model"]["vocab"].items()}
    for index, text, special in added:
        spelled[index] = text
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        known.setdefault(index, {"id": index, **flags})
        known[index].update(content=text, special=special)
    content["added_tokens"] = [
        known[index] for index in sorted(known) if index < len(vocabulary.tokens)
    ]
    content["model"]["vocab"] = {spelled[index]: index for index in sorted(spelled)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.update_post_processor()


def _set_pre_tokenization(backend: Tokenizer, pre: PreTokenization) -> None:
    splits = [Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    backend.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    if pre.nfc:
        backend.normalizer = NFC()
    if pre.ignore_merges:
        backend.model.ignore_merges = True


def _drop_space_prefix(backend: Tokenizer) -> None:
    """Let SentencePiece begin a text as it is; transformers always puts a space before it."""
    if isinstance(backend.pre_tokenizer, Metaspace):
        backend.pre_tokenizer = Metaspace(replacement=_SPACE, prepend_scheme="never", split=False)
    elif backend.pre_tokenizer is None:  # Phi-3: a normalizer puts it there
        backend.normalizer = ReplaceNormalizer(" ", _SPACE)
    else:  # Gemma never has one
        return
    backend.decoder = Decoders([Replace(_SPACE, " "), ByteFallback(), Fuse()])


def _strip_after_added_tokens(tokenizer: Any) -> None:  # noqa: ANN401
    """Let the tokens of Phi-3 take the white space after them, as its tokenizer.json has it.

    GGUF has no key for that. Its template writes a line break after every ``<|user|>``.
    """
    content = READER.parse(tokenizer.backend_tokenizer.to_str(), "its tokenizer")
    for entry in content["added_tokens"]:
        entry["rstrip"] = entry["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
