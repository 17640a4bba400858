"""Ship a checkpoint's chat templates so that every reader of the artifact renders the same.

eoracc and transformers read chat_template.jinja and additional_chat_templates/, which hold the
templates unchanged. onnxruntime-genai prefers the template in tokenizer_config.json. There goes the
one that it renders as transformers renders the original, where the original is not that.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eoracc.compiler.chat.conversations import conversations_for
from eoracc.compiler.chat.expressions import UnportableError
from eoracc.compiler.chat.genai import GenaiTemplates, Rendering
from eoracc.compiler.chat.portable import portable_template
from eoracc.documents import Reader
from eoracc.errors import ArtifactError, BackendError, ModelError, RequestError
from eoracc.printable import quoted
from eoracc.runtime.artifact.versioned_json import is_file_name
from eoracc.runtime.decode.chat_files import ADDITIONAL_FOLDER, DEFAULT_NAME, TEMPLATE_FILE, Chat
from eoracc.runtime.decode.chat_template import ChatTemplate
from eoracc.runtime.decode.codec import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplates", "ship_chat"]

_READER = Reader(ModelError, "fetch the checkpoint again", constants=True)


@dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of a checkpoint, as transformers has them.

    Attributes:
      sources: by name.
      special_tokens: values of ``bos_token``, ``eos_token`` and so on.
    """

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplates:
        """The templates of a tokenizer.

        Raises:
          ModelError: the name of a template cannot be a file's.
        """
        template: Any = tokenizer.chat_template
        sources = {DEFAULT_NAME: template} if isinstance(template, str) else dict(template or {})
        for name in sources:
            if not is_file_name(f"{name}.jinja"):
                raise ModelError(
                    f"{tokenizer.name_or_path}: the name of chat template {quoted(name)} "
                    "cannot be that of a file: rename it"
                )
        return cls(sources, dict(tokenizer.special_tokens_map))


def ship_chat(templates: ChatTemplates, folder: Path, *, genai: bool) -> dict[str, Any]:
    """Write the templates into an artifact that has its tokenizer's files.

    Args:
      templates: of the checkpoint.
      folder: of the artifact.
      genai: whether onnxruntime-genai opens the artifact.

    Returns:
      The part of report.json on chats: the names of the ``templates``, ``notes``, and under
      ``onnxruntime_genai`` the number of ``chats`` compared, the ``differences`` and whether its
      template was ``rewritten``.
    """
    _write_files(templates.sources, folder)
    _write_config(templates.special_tokens, folder)
    report: dict[str, Any] = {"templates": sorted(templates.sources), "notes": []}
    for name, source in templates.sources.items():
        try:
            ChatTemplate(source, origin=f"chat template '{name}'")
        except ArtifactError as error:
            report["notes"].append(str(error))
    if genai and not report["notes"] and DEFAULT_NAME in templates.sources:
        report["onnxruntime_genai"] = _ship_for_genai(templates, folder)
    return report


def _write_files(sources: Mapping[str, str], folder: Path) -> None:
    shutil.rmtree(folder / ADDITIONAL_FOLDER, ignore_errors=True)
    (folder / TEMPLATE_FILE).unlink(missing_ok=True)
    for name, source in sources.items():
        path = folder / ADDITIONAL_FOLDER / f"{name}.jinja"
        if name == DEFAULT_NAME:
            path = folder / TEMPLATE_FILE
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")


def _write_config(
    special_tokens: Mapping[str, str], folder: Path, template: str | None = None
) -> None:
    """Set the special tokens and the template in tokenizer_config.json."""
    path = folder / CONFIG_FILE
    content = _READER.read_object(path) if path.exists() else {}
    content.pop("chat_template", None)
    for name, token in special_tokens.items():
        # A tokenizer's class has tokens that the checkpoint does not name.
        content[name] = content.get(name) or token
    if template is not None:
        content["chat_template"] = template
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _ship_for_genai(templates: ChatTemplates, folder: Path) -> dict[str, Any]:
    """Rewrite the default template for onnxruntime-genai if that helps; returns the comparison."""
    try:
        engine = GenaiTemplates(templates.special_tokens)
    except BackendError as error:
        return {"refused": str(error)}
    original = templates.sources[DEFAULT_NAME]
    renderings = _render(templates, folder)
    differences = engine.differences(original, renderings)
    rewritten = False
    if differences:
        try:
            portable = portable_template(original, templates.special_tokens)
        except UnportableError:
            portable = original
        remaining = engine.differences(portable, renderings)
        if rewritten := len(remaining) < len(differences):
            differences = remaining
            _write_config(templates.special_tokens, folder, portable)
    return {"chats": len(renderings), "differences": differences, "rewritten": rewritten}


def _render(templates: ChatTemplates, folder: Path) -> list[Rendering]:
    """The chats that the templates accept."""
    chat = Chat(folder)
    renderings = []
    for conversation in conversations_for(list(templates.sources.values())):
        try:
            text = chat.render(conversation.messages, conversation.options)
        except RequestError:
            continue
        renderings.append(Rendering(conversation, text))
    return renderings
