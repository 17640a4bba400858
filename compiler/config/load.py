"""Read a model.yaml: every mistake becomes a sentence with the file, the line and the field."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from eoracc.compiler.config.contradictions import contradictions
from eoracc.compiler.config.document import Document, suggest
from eoracc.compiler.config.sections import AdapterConfig, BuildConfig
from eoracc.compiler.config.yaml_tree import KeyPath, dotted
from eoracc.errors import ConfigError
from eoracc.passes.base import pass_type
from eoracc.printable import printable, quoted

__all__ = ["adapter_config", "load_config"]


def load_config(
    path: Path, overrides: Sequence[str] = (), *, trust_remote_code: bool = False
) -> BuildConfig:
    """Read and validate a model.yaml.

    Args:
      path: the file.
      overrides: assignments like ``calibration.samples=16`` or ``passes.eora.rank=0``, applied in
        order; the values are YAML.
      trust_remote_code: what the command line says; the file cannot allow it.

    Raises:
      ConfigError: one sentence per mistake, each with the line and the field.
    """
    document = Document.read(path)
    for assignment in overrides:
        document.override(assignment)
    try:
        config = BuildConfig.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(*_sentences(document, error.errors())) from None
    for where, problem in contradictions(config):
        raise ConfigError(f"{document.where(where)}: {dotted(where)}: {problem}")
    if config.trust_remote_code and not trust_remote_code:
        place: KeyPath = ("trust_remote_code",)
        raise ConfigError(
            f"{document.where(place)}: {dotted(place)}: the model needs Python code of its own "
            "repository, which a file cannot allow to run: add --trust-remote-code to the command "
            f"if you trust {quoted(config.model)}"
        )
    return config.model_copy(update={"trust_remote_code": trust_remote_code})


def adapter_config(options: Mapping[str, Any]) -> AdapterConfig:
    """Validate the options of ``eoracc adapter add`` as a section of an adapter.

    Args:
      options: of the command line, by the keys of the section.

    Raises:
      ConfigError: one sentence per mistake, each with the option.
    """
    try:
        config = AdapterConfig.model_validate(options)
    except ValidationError as error:
        sentences = [f"{_option(detail['loc'])}: {_problem(detail)}" for detail in error.errors()]
        raise ConfigError(*sentences) from None
    if config.field is not None and config.messages is not None:
        raise ConfigError("--messages: conflicts with --field: keep one of the two")
    held_out = config.verify
    if config.seed is not None and held_out.text is None and held_out.offset_tokens is None:
        raise ConfigError(
            "--seed: random windows come from anywhere in the text, so none of it is held out: "
            "give --held-out, or --held-out-offset to keep what follows it out of calibration"
        )
    return config


def _option(path: KeyPath) -> str:
    """The option of ``eoracc adapter add`` for a key of the section."""
    names: Mapping[KeyPath, str] = {
        ("text",): "data",
        ("verify", "text"): "held-out",
        ("verify", "offset_tokens"): "held-out-offset",
        ("verify", "window_length"): "sequence-length",
    }
    return f"--{names.get(path, str(path[-1])).replace('_', '-')}"


_VALUE_CHARS = 120
_MESSAGE_CHARS = 1_000

_FRIENDLY = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "model_type": "must be a mapping of keys to values",
    "dataclass_type": "must be a mapping of options",
    "too_short": "must not be empty",
}


def _sentences(document: Document, details: Sequence[ErrorDetails]) -> list[str]:
    """One sentence per mistake, in the order of the file."""
    mistakes = [
        detail
        for detail in details
        # pydantic also calls a list empty if it refused every item.
        if detail["type"] != "too_short"
        or not any(detail["loc"] == other["loc"][:-1] for other in details)
    ]
    mistakes.sort(key=lambda detail: document.line(detail["loc"]))
    return list(dict.fromkeys(_sentence(document, detail) for detail in mistakes))


def _sentence(document: Document, detail: ErrorDetails) -> str:
    """One validation error as ``file:line: field: what is wrong, and the remedy``."""
    path: KeyPath = detail["loc"]
    return f"{document.where(path)}: {dotted(path)}: {_problem(detail)}"


def _problem(detail: ErrorDetails) -> str:
    """What is wrong, and the remedy."""
    path: KeyPath = detail["loc"]
    kind, value = detail["type"], detail["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        problem = f"unknown key: {suggest(str(path[-1]), _known_keys(BuildConfig, path[:-1]))}"
    elif kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        problem = f"is missing: add '{path[-1]}: …'"
    elif kind == "literal_error":
        expected = detail["ctx"]["expected"]
        problem = f"must be {expected}, not {_shown(value)}"
        if isinstance(value, str):
            choices = re.findall(r"'([^']+)'", expected)
            problem += f": {suggest(value, choices)}"
    elif kind in _FRIENDLY:
        problem = _FRIENDLY[kind] + ("" if "empty" in _FRIENDLY[kind] else f", not {_shown(value)}")
    elif kind == "value_error" or kind.startswith(("pass_", "number_")):
        problem = printable(detail["msg"].removeprefix("Value error, "), _MESSAGE_CHARS)
    else:
        problem = f"{detail['msg'].replace('Input should', 'must')}, not {_shown(value)}"
    return problem


def _shown(value: object) -> str:
    """The value as Python spells it, cut short."""
    return quoted(value, _VALUE_CHARS)


def _known_keys(kind: object, path: KeyPath) -> list[str]:
    """Keys that are allowed at ``path`` under a value of type ``kind``."""
    if typing.get_origin(kind) is Annotated:
        return _known_keys(typing.get_args(kind)[0], path)
    if typing.get_origin(kind) in {types.UnionType, typing.Union}:
        return [key for option in typing.get_args(kind) for key in _known_keys(option, path)]
    if kind is BuildConfig and path[:2] == ("compare", "methods"):
        path = ("passes", *path[3:])  # each method is a list of passes
    if kind is BuildConfig and path[:1] == ("passes",) and len(path) > 2:
        return _known_keys(pass_type(str(path[2])), path[3:])
    keys = _fields(kind)
    if not path:
        return list(keys)
    if path[0] in keys:
        return _known_keys(keys[str(path[0])], path[1:])
    # Otherwise ``kind`` is a mapping: the key is arbitrary, and its values have the keys.
    return [key for value in typing.get_args(kind)[1:] for key in _known_keys(value, path[1:])]


def _fields(kind: object) -> dict[str, object]:
    """Keys and their types, of a section or of a dataclass; empty for anything else."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: known.annotation for name, known in kind.model_fields.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {known.name: hints[known.name] for known in dataclasses.fields(kind)}
    return {}
