"""The kinds of files that others hand to eoracc, and what reads each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import readers
from tests.fuzz.mutations import Random
from tests.fuzz.replies import Reply

__all__ = ["FAULTY", "KINDS", "Kind"]

_Reader = Callable[[Path, Random], Reply]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      folder: of the templates, which a case has a copy of.
      file: the path in it of the file that is changed.
      form: of the file's content, a key of :data:`tests.fuzz.mutations.FORMS`.
      read: read the file in the copy, as a command or the API does.
      others: templates that ``read`` needs beside it.
      listed: whether the file is one of an artifact's, whose manifest has its digest.
    """

    folder: str
    file: str
    form: str
    read: _Reader
    others: tuple[str, ...] = ()
    listed: bool = False

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.file}"


def _kinds() -> dict[str, Kind]:
    checkpoint = [
        Kind("checkpoint", "config.json", "json", readers.load_checkpoint),
        Kind("checkpoint", "generation_config.json", "json", readers.load_checkpoint),
        Kind("checkpoint", "model.safetensors", "safetensors", readers.load_or_inspect),
        Kind("shards", "model.safetensors.index.json", "json", readers.load_checkpoint),
        *(
            Kind("checkpoint", file, form, readers.load_tokenizer)
            for file, form in (
                ("tokenizer.json", "json"),
                ("tokenizer_config.json", "json"),
                ("special_tokens_map.json", "json"),
                ("added_tokens.json", "json"),
                ("chat_template.jinja", "text"),
            )
        ),
        Kind("sentencepiece", "tokenizer.model", "binary", readers.load_tokenizer),
        Kind("gguf", "model.gguf", "binary", readers.convert_or_inspect),
    ]
    artifact = [
        Kind("artifact", "manifest.json", "json", readers.read_artifact, ("project", "checkpoint")),
        *(
            Kind("artifact", file, form, readers.read_artifact, (), listed=True)
            for file, form in (
                ("report.json", "json"),
                ("parity.safetensors", "safetensors"),
                ("model.onnx", "binary"),
                ("model.onnx.data", "binary"),
                ("genai_config.json", "json"),
                ("tokenizer.json", "json"),
                ("tokenizer_config.json", "json"),
                ("chat_template.jinja", "text"),
                ("tokens.json", "json"),
                ("adapters/math.json", "json"),
                ("adapters/math.onnx_adapter", "binary"),
            )
        ),
    ]
    others = [
        Kind("peft", "adapter_config.json", "json", readers.import_adapter, ("artifact",)),
        Kind(
            "peft",
            "adapter_model.safetensors",
            "safetensors",
            readers.import_adapter,
            ("artifact",),
        ),
        Kind("project", "model.yaml", "yaml", readers.read_configuration),
        Kind("project", "text.txt", "text", readers.read_texts, ("checkpoint",)),
        Kind("project", "chats.jsonl", "jsonl", readers.read_texts, ("checkpoint",)),
        Kind("chat", "body.json", "body", readers.ask_server),
    ]
    return {kind.name: kind for kind in (*checkpoint, *artifact, *others)}


KINDS = _kinds()
"""Every kind by name."""

FAULTY = {
    name: Kind("chat", "body.json", "body", reader) for name, reader in readers.FAULTY.items()
}
"""Readers with a fault each, which the processes must see."""
