"""model.yaml: what to build, validated before anything is loaded.

:func:`load_config` reads the file, applies ``--set`` overrides and returns a frozen
:class:`BuildConfig`; every mistake is reported with the file, the line and the field.
:func:`json_schema` is the published schema, options of every registered pass included.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    create_model,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from eoracc import EoraccError
from eoracc.compiler.errors import ConfigError
from eoracc.compiler.yaml_document import Document, KeyPath, dotted, suggest
from eoracc.passes import load_passes
from eoracc.passes.base import Pass, pass_names, pass_type

__all__ = [
    "BuildConfig",
    "CalibrationConfig",
    "Limits",
    "TextConfig",
    "VerifyConfig",
    "json_schema",
    "load_config",
    "option_docs",
]

_QUANTIZE = ("quantize_gptq", "quantize_rtn")
_NEEDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "quantize_gptq": (("calibrate",),),
    "eora": (("calibrate",), _QUANTIZE),
    "svd": (_QUANTIZE,),
}
"""What must stand somewhere before a pass: one name out of every group."""

_BEFORE: Mapping[str, tuple[str, ...]] = {"pack_projections": ("calibrate", *_QUANTIZE)}
"""What a pass must stand before, where both are there."""

_CALIBRATED = ("calibrate",)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _no_bool(value: Any) -> Any:
    # YAML's `yes` and `on` are booleans, and Python counts those as the numbers 1 and 0.
    if isinstance(value, bool):
        raise PydanticCustomError(
            "number_type", "must be a number, not {value}", {"value": str(value).lower()}
        )
    return value


_Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
_Length = Annotated[int, BeforeValidator(_no_bool), Field(ge=2)]
_Offset = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
_Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
_Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1)]
_Name = Annotated[str, Field(min_length=1)]


class TextConfig(_Section):
    """Where text comes from."""

    text: _Name
    """A text file, a .jsonl file, a data set folder, or a data set id of the hub."""
    field: str | None = None
    """The field of each record that holds the text (.jsonl and data sets)."""
    messages: str | None = None
    """The field of each record that holds a list of chat messages, put through the tokenizer's
    chat template; instead of ``field``."""
    split: str | None = None
    """The split of a data set, ``train`` unless given."""


class CalibrationConfig(TextConfig):
    """The text that statistics are taken over."""

    samples: _Count = 64
    """Windows of text."""
    sequence_length: _Length = 512
    """Tokens per window."""
    seed: _Seed | None = None
    """null: the first windows in order; a number: random windows."""
    layout: Literal["packing", "padding"] = "packing"
    """packing: the text cut into full windows; padding: one document a window, padded."""


class Limits(_Section):
    """Fidelity limits; a build that exceeds one fails its gate (exit code 1)."""

    perplexity: _Positive | None = None
    """Largest perplexity on the held-out text."""
    perplexity_ratio: _Positive | None = None
    """Largest perplexity as a multiple of the original model's."""
    kl: _Positive | None = None
    """Largest mean KL(original || compressed) per token, in nats."""
    top1_agreement: _Share | None = None
    """Smallest share of tokens on which both models would say the same next."""


class VerifyConfig(_Section):
    """The two gates: parity, and fidelity on held-out text."""

    text: _Name | None = None
    """Held-out text; the calibration text unless given."""
    field: str | None = None
    """As in ``calibration``."""
    messages: str | None = None
    """As in ``calibration``."""
    split: str | None = None
    """As in ``calibration``."""
    offset_tokens: _Offset | None = None
    """Tokens to skip; null: none, or in the calibration text what calibration has used."""
    windows: _Count = 8
    """Windows of held-out text."""
    window_length: _Length = 512
    """Tokens per window."""
    compare: tuple[Literal["svd", "eora"], ...] = ()
    """Compensations to score next to what is shipped, at the same ranks, without shipping them."""
    limits: Limits = Limits()
    """Fidelity limits."""
    parity: bool = True
    """Whether to compare the artifact with the compressed model in eager PyTorch."""


@cache
def _pass_item(name: str) -> type[BaseModel]:
    """A model of ``{name: options}``, so that errors are located as in the file."""
    fields: dict[str, Any] = {name: (pass_type(name), ...)}
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def _parse_pass(item: Any) -> Pass:
    load_passes()
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise PydanticCustomError(
            "pass_shape", "must be a pass's name, or one name with its options: eora: {{rank: 64}}"
        )
    ((name, options),) = item.items()
    if name not in pass_names():
        raise PydanticCustomError(
            "pass_name",
            "there is no pass '{name}': {suggestion}",
            {"name": str(name), "suggestion": suggest(str(name), pass_names())},
        )
    try:
        parsed = _pass_item(name).model_validate({name: {} if options is None else options})
    except EoraccError as error:  # raised by a pass's own __post_init__
        raise PydanticCustomError("pass_options", "{text}", {"text": str(error)}) from None
    return typing.cast("Pass", getattr(parsed, name))


def _dump_pass(item: Pass) -> dict[str, Any]:
    return {item.name: TypeAdapter(type(item)).dump_python(item, mode="json")}


_PassItem = Annotated[
    Any,
    PlainValidator(_parse_pass),
    PlainSerializer(_dump_pass),
    WithJsonSchema({}),  # the registry fills only later: see json_schema
]


class BuildConfig(_Section):
    """What ``eoracc build`` does: one model, its passes, its targets, its gates."""

    model: _Name
    """A hub id, a local folder or a GGUF file; a relative path is relative to this file."""
    trust_remote_code: bool = False
    """Whether the model's own Python code may run while it is loaded."""
    calibration: CalibrationConfig | None = None
    """The text that statistics are taken over; needed by the pass ``calibrate``."""
    passes: tuple[_PassItem, ...] = Field(min_length=1)
    """What is done to the model, in order: names, or names with options."""
    targets: tuple[Literal["onnxruntime"], ...] = Field(("onnxruntime",), min_length=1)
    """What the artifact runs on."""
    verify: VerifyConfig = VerifyConfig()
    """The gates."""
    output: _Name
    """The artifact's folder, relative to this file; it must not exist yet."""

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults filled in, as JSON-able data that validates to the same again."""
        return self.model_dump(mode="json")

    def model_source(self, config_dir: Path) -> str:
        """``model`` as the frontend takes it: a path where one exists, else a hub id."""
        path = config_dir / Path(self.model).expanduser()
        return str(path) if path.exists() else self.model

    def output_path(self, config_dir: Path) -> Path:
        """The artifact's folder."""
        return config_dir / Path(self.output).expanduser()

    def verify_text(self) -> TextConfig:
        """The held-out text's source: its own, or that of the calibration."""
        own = self.verify
        if own.text is not None:
            return TextConfig(
                text=own.text, field=own.field, messages=own.messages, split=own.split
            )
        assert self.calibration is not None  # noqa: S101 - load_config has checked
        return self.calibration


def load_config(path: Path, overrides: Sequence[str] = ()) -> BuildConfig:
    """Read and validate a model.yaml.

    Args:
      path: the file.
      overrides: assignments like ``calibration.samples=16`` or ``passes.eora.rank=0``, applied in
        order; the values are YAML.

    Raises:
      ConfigError: one sentence per mistake, each with the line and the field.
    """
    document = Document.read(path)
    for assignment in overrides:
        document.override(assignment)
    try:
        config = BuildConfig.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(document, error.errors()))) from None
    for where, problem in _contradictions(config):
        raise ConfigError(f"{document.where(where)}: {dotted(where)}: {problem}")
    return config


def _contradictions(config: BuildConfig) -> list[tuple[KeyPath, str]]:
    """What is wrong although every field is right on its own."""
    found: list[tuple[KeyPath, str]] = []
    names = [item.name for item in config.passes]
    for index, name in enumerate(names):
        where: KeyPath = ("passes", index, name)
        if name in names[:index]:
            found.append((where, "stands twice: keep one"))
        for group in _NEEDS.get(name, ()):
            if not set(group) & set(names[:index]):
                wanted = " or ".join(f"'{other}'" for other in group)
                found.append((where, f"needs {wanted} before it: put it above"))
        for other in _BEFORE.get(name, ()):
            if other in names[:index]:
                found.append((where, f"must stand before '{other}': move it up"))
        if name in _QUANTIZE and set(_QUANTIZE) & set(names[:index]):
            found.append((where, "the weights are quantized already: keep one quantize pass"))
        if name in _CALIBRATED and config.calibration is None:
            found.append((where, "needs a text: give 'calibration: {text: …}'"))
    for section, text in (("calibration", config.calibration), ("verify", config.verify)):
        if text is not None and text.field is not None and text.messages is not None:
            found.append(((section, "messages"), "stands next to 'field': keep one of the two"))
    verify = config.verify
    if verify.text is None:
        for key in ("field", "messages", "split"):
            if getattr(verify, key) is not None:
                found.append((("verify", key), "belongs to a 'text': give verify.text too"))
        if config.calibration is None:
            found.append((("verify",), "needs held-out text: give 'verify: {text: …}'"))
        elif config.calibration.seed is not None and verify.offset_tokens is None:
            problem = (
                "random windows come from anywhere in the text, so none of it is held out: give "
                "verify.text, or verify.offset_tokens to keep what follows it out of calibration"
            )
            found.append((("calibration", "seed"), problem))
    return found


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
    told = [
        detail
        for detail in details
        # A list whose items were all refused is not also empty.
        if detail["type"] != "too_short"
        or not any(detail["loc"] == other["loc"][:-1] for other in details)
    ]
    told.sort(key=lambda detail: document.line(detail["loc"]))
    return list(dict.fromkeys(_sentence(document, detail) for detail in told))


def _sentence(document: Document, detail: ErrorDetails) -> str:
    """One validation error as ``file:line: field: what is wrong, and the way out``."""
    path: KeyPath = detail["loc"]
    kind, value = detail["type"], detail["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        problem = f"unknown key: {suggest(str(path[-1]), _known_keys(BuildConfig, path[:-1]))}"
    elif kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        problem = f"is missing: add '{path[-1]}: …'"
    elif kind == "literal_error":
        expected = detail["ctx"]["expected"]
        problem = f"must be {expected}, not {value!r}"
        if isinstance(value, str):
            choices = re.findall(r"'([^']+)'", expected)
            problem += f": {suggest(value, choices)}"
    elif kind in _FRIENDLY:
        problem = _FRIENDLY[kind] + ("" if "empty" in _FRIENDLY[kind] else f", not {value!r}")
    elif kind == "value_error" or kind.startswith(("pass_", "number_")):
        problem = detail["msg"].removeprefix("Value error, ")
    else:
        problem = f"{detail['msg'].replace('Input should', 'must')}, not {value!r}"
    return f"{document.where(path)}: {dotted(path)}: {problem}"


def _known_keys(kind: Any, path: KeyPath) -> list[str]:
    """Keys that may stand at ``path`` under a value of type ``kind``."""
    while typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return [key for option in typing.get_args(kind) for key in _known_keys(option, path)]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not path:
            return list(kind.model_fields)
        if kind is BuildConfig and path[0] == "passes" and len(path) > 2:
            return _known_keys(pass_type(str(path[2])), path[3:])
        known = kind.model_fields.get(str(path[0]))
        return [] if known is None else _known_keys(known.annotation, path[1:])
    if dataclasses.is_dataclass(kind):
        names = [option.name for option in dataclasses.fields(kind)]
        if not path:
            return names
        hints = typing.get_type_hints(kind)
        return _known_keys(hints[str(path[0])], path[1:]) if path[0] in names else []
    arguments = typing.get_args(kind)
    if path and arguments:  # an item of a list, or a value of a mapping
        mapping = typing.get_origin(kind) in (dict, Mapping)
        return _known_keys(arguments[1 if mapping else 0], path[1:])
    return []


def option_docs(kind: type[Pass]) -> tuple[str, dict[str, str]]:
    """A pass's help text, and that of each option, from its docstring's ``Options:`` section."""
    text, _, options = inspect.cleandoc(kind.__doc__ or "").partition("\nOptions:\n")
    docs: dict[str, str] = {}
    current = ""
    for line in options.splitlines():
        entry = re.match(r"  (\w+): (.*)", line)
        if entry:
            current = entry.group(1)
            docs[current] = entry.group(2).strip()
        elif line.startswith("    ") and current:
            docs[current] += " " + line.strip()
        elif line.strip():
            break
    return text.strip(), docs


def json_schema() -> dict[str, Any]:
    """The JSON schema of model.yaml, draft 2020-12, options of all passes included."""
    load_passes()
    schema = BuildConfig.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    choices: list[dict[str, Any]] = []
    for name in pass_names():
        options = TypeAdapter(pass_type(name)).json_schema(ref_template="#/$defs/{model}")
        definitions.update(options.pop("$defs", {}))
        text, docs = option_docs(pass_type(name))
        options["description"] = text
        for key, entry in options.get("properties", {}).items():
            if key in docs:
                entry["description"] = docs[key]
        required = bool(options.get("required"))
        definitions[name] = options
        reference = {"$ref": f"#/$defs/{name}"}
        if not required:
            choices.append({"const": name, "description": text})
            reference = {"anyOf": [reference, {"type": "null"}]}
        choices.append(
            {
                "type": "object",
                "properties": {name: reference},
                "required": [name],
                "additionalProperties": False,
            }
        )
    definitions["Pass"] = {"anyOf": choices}
    schema["properties"]["passes"]["items"] = {"$ref": "#/$defs/Pass"}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "eoracc model.yaml"
    return schema
