"""The template engine of unmodified onnxruntime-genai, compared with transformers' rendering."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eoracc.errors import reason
from eoracc.runtime.artifact.staged_folder import staged_folder
from eoracc.runtime.packages import import_package

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eoracc.compiler.chat.conversations import Conversation

__all__ = ["GenaiTemplates", "Rendering", "exceeds_genai"]

_CONFIG = {
    "model": {
        "type": "llama",
        "context_length": 1,
        "vocab_size": 1,
        "decoder": {"filename": "model.onnx"},
    },
    "search": {},
}
_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
}

_EXCERPT = 40

_LONGEST_TEMPLATE = 1 << 15
_LONGEST_PIECE = 1 << 13
_TAGS = re.compile(r"\{\{|\}\}|\{%|%\}|\{#|#\}")


def exceeds_genai(source: str) -> bool:
    """Whether a template is too long to be given to onnxruntime-genai.

    Its parser matches pieces by recursion and takes time quadratic in the whole: a template of a
    stranger could end the process, or hold it. Templates of models have some thousand characters.

    >>> exceeds_genai("{{ messages }}"), exceeds_genai("{# " + "long " * 2000 + "#}")
    (False, True)
    """
    return len(source) > _LONGEST_TEMPLATE or any(
        len(piece) > _LONGEST_PIECE for piece in _TAGS.split(source)
    )


@dataclass(frozen=True)
class Rendering:
    """A chat as transformers renders it.

    Attributes:
      conversation: the chat.
      text: what it becomes.
    """

    conversation: Conversation
    text: str


class GenaiTemplates:
    """Renders templates with onnxruntime-genai.

    The engine comes with a tokenizer. This one has a single token, so that it opens whatever the
    tokenizer of the artifact is.
    """

    def __init__(self, special_tokens: Mapping[str, str]) -> None:
        """Open the engine.

        Args:
          special_tokens: values of ``bos_token``, ``eos_token`` and so on.

        Raises:
          BackendError: onnxruntime-genai is missing.
        """
        genai = import_package("onnxruntime_genai")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **special_tokens}
        with staged_folder(Path(tempfile.gettempdir()) / "eoracc-tokenizer") as folder:
            for file, content in (
                ("genai_config.json", _CONFIG),
                ("tokenizer.json", _TOKENIZER),
                ("tokenizer_config.json", config),
            ):
                (folder / file).write_text(json.dumps(content), encoding="utf-8")
            self._tokenizer: Any = genai.Tokenizer(str(folder))

    def differences(self, source: str, renderings: Sequence[Rendering]) -> list[str]:
        """A sentence for each chat that ``source`` renders otherwise here."""
        if exceeds_genai(source):
            return [f"{each.conversation.name}: is too long to be tried" for each in renderings]
        sentences = []
        for rendering in renderings:
            try:
                text = self._render(source, rendering.conversation)
            except Exception as error:  # noqa: BLE001 - the engine has no narrower one
                found = f"fails: {reason(error).partition(' at row ')[0]}"
            else:
                if text == rendering.text:
                    continue
                found = _difference(text, rendering.text)
            sentences.append(f"{rendering.conversation.name}: {found}")
        return sentences

    def _render(self, source: str, conversation: Conversation) -> str:
        options = conversation.options
        arguments: dict[str, Any] = {"add_generation_prompt": options.begins_answer}
        if options.tools is not None:
            arguments["tools"] = json.dumps(options.tools)
        messages = json.dumps(conversation.messages)
        return str(self._tokenizer.apply_chat_template(messages, template_str=source, **arguments))


def _difference(text: str, wanted: str) -> str:
    r"""Where two texts part.

    >>> _difference("<user>\nHi", "<user>Hi")
    "'\\nHi' instead of 'Hi'"
    """
    place = 0
    while place < min(len(text), len(wanted)) and text[place] == wanted[place]:
        place += 1
    excerpts = (part[place : place + _EXCERPT] for part in (text, wanted))
    return " instead of ".join(map(repr, excerpts))
