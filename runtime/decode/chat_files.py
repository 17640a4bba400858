"""The chat templates and special tokens of a folder, found where transformers finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eoracc.documents import Reader
from eoracc.errors import ArtifactError, RequestError
from eoracc.printable import printable, quoted
from eoracc.runtime.decode.chat_template import ChatTemplate
from eoracc.runtime.decode.codec import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eoracc.runtime.request import ChatOptions, Message

__all__ = [
    "ADDITIONAL_FOLDER",
    "DEFAULT_NAME",
    "SPECIAL_TOKENS",
    "TEMPLATE_FILE",
    "Chat",
    "read_templates",
]

TEMPLATE_FILE = "chat_template.jinja"
ADDITIONAL_FOLDER = "additional_chat_templates"
DEFAULT_NAME = "default"
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""Special tokens that a template may name."""

_TOOLS_NAME = "tool_use"
_READER = Reader(ArtifactError, "replace it", constants=True)


class Chat:
    """Renders the chats of an artifact. Threads may share it.

    Attributes:
      sources: the templates by name; empty if there are none.
    """

    def __init__(self, folder: Path) -> None:
        """Read the templates and special tokens in ``folder``, which is not read again.

        Raises:
          ArtifactError: a file is damaged.
        """
        self.sources = read_templates(folder)
        self._folder = folder
        self._special_tokens = _read_special_tokens(folder)
        self._compiled: dict[str, ChatTemplate] = {}

    def source(self, options: ChatOptions) -> str:
        """The template for ``options``.

        Raises:
          ArtifactError: there is no template.
          RequestError: there is none of that name.
        """
        return self.sources[self._choose(options)]

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """The text of a chat, special tokens spelled out.

        Raises:
          ArtifactError: there is no template, or it is not valid.
          RequestError: there is no template of that name, or it refuses the messages.
        """
        name = self._choose(options)
        template = self._compiled.get(name)
        if template is None:
            origin = f"{self._folder}: chat template '{name}'"
            template = self._compiled[name] = ChatTemplate(self.sources[name], origin=origin)
        return template.render(messages, options, self._special_tokens)

    def _choose(self, options: ChatOptions) -> str:
        if not self.sources:
            raise ArtifactError(f"{self._folder}: has no chat template: use --no-chat")
        name = options.template
        if name is None:
            tools = options.tools is not None and _TOOLS_NAME in self.sources
            name = _TOOLS_NAME if tools else DEFAULT_NAME
        if name not in self.sources:
            raise RequestError(
                f"chat template {quoted(name)}: is none of "
                f"{printable(', '.join(sorted(self.sources)))}: choose one"
            )
        return name


def read_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by name.

    Files in Jinja replace all templates of tokenizer_config.json, which holds one as a text or
    several as a list.

    Raises:
      ArtifactError: a file is damaged.
    """
    files = {DEFAULT_NAME: folder / TEMPLATE_FILE}
    files |= {path.stem: path for path in sorted((folder / ADDITIONAL_FOLDER).glob("*.jinja"))}
    templates = {name: _READER.read_text(path) for name, path in files.items() if path.is_file()}
    if templates:
        return templates
    path = folder / CONFIG_FILE
    template = _read_json(path).get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {DEFAULT_NAME: template}
    try:
        named = {item["name"]: item["template"] for item in template}
    except (TypeError, KeyError):
        named = {None: None}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ArtifactError(
            f"{path}: 'chat_template' is neither a text nor a list of named templates: replace it"
        )
    return named


def _read_special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens by name, without those that the tokenizer lacks."""
    config = _read_json(folder / CONFIG_FILE)
    if "added_tokens_decoder" not in config:  # else special_tokens_map.json is out of date
        config |= _read_json(folder / "special_tokens_map.json")
    tokens = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a file, empty if there is no such file."""
    return _READER.read_object(path) if path.exists() else {}
