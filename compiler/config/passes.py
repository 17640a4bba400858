"""Passes and their names as values of model.yaml, by the registry of passes."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError

from eoracc.compiler.config.document import suggest
from eoracc.compiler.config.fields import Name
from eoracc.errors import EoraccError
from eoracc.passes import load_passes
from eoracc.passes.base import Pass, pass_names, pass_type, passes_of
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.factorize.base import Factorization

__all__ = ["Comparator", "Methods", "PassItem", "comparator_names", "method_names"]


def method_names() -> tuple[str, ...]:
    """Methods that ``eoracc compare`` knows by name and can build from ``passes`` of any kind.

    ``none`` quantizes alone; the others are compensating and factorising passes.
    """
    load_passes()
    kinds = (Compensation, Factorization)
    return ("none", *(name for name in pass_names() if issubclass(pass_type(name), kinds)))


def comparator_names() -> tuple[str, ...]:
    """Compensating passes that ``verify.compare`` can score next to the shipped ones, sorted."""
    load_passes()
    return tuple(known.name for known in passes_of(Compensation) if known.comparable)


@cache
def _one_key(kind: type[Pass]) -> type[BaseModel]:
    """A model of ``{name: options}``, whose errors are located as in the file."""
    fields: dict[str, Any] = {kind.name: (kind, ...)}
    return create_model(kind.name, __config__=ConfigDict(extra="forbid"), **fields)


def _parse_pass(item: object) -> Pass:
    load_passes()
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise PydanticCustomError(
            "pass_shape", "must be a pass's name, or one name with its options: eora: {rank: 64}"
        )
    ((name, options),) = item.items()
    if name not in pass_names():
        raise PydanticCustomError(
            "pass_name",
            "there is no pass '{name}': {suggestion}",
            {"name": str(name), "suggestion": suggest(str(name), pass_names())},
        )
    model = _one_key(pass_type(name))
    try:
        parsed = model.model_validate({name: {} if options is None else options})
    except EoraccError as error:  # raised by a pass's own __post_init__
        raise PydanticCustomError("pass_options", "{text}", {"text": str(error)}) from None
    return typing.cast("Pass", getattr(parsed, name))


def _dump_pass(item: Pass) -> dict[str, Any]:
    return {item.name: TypeAdapter(type(item)).dump_python(item, mode="json")}


def _check_comparator(name: str) -> str:
    if name not in comparator_names():
        raise PydanticCustomError(
            "pass_comparator",
            "no compensating pass '{name}' can be compared: {suggestion}",
            {"name": name, "suggestion": suggest(name, comparator_names())},
        )
    return name


def _by_name(methods: object) -> object:
    """A list of names as the mapping that it is short for."""
    if isinstance(methods, list) and all(isinstance(name, str) for name in methods):
        return dict.fromkeys(methods)
    return methods


# Passes register themselves after this module is imported, so that no type here can list them:
# :mod:`eoracc.compiler.config.schema` adds them to the JSON schema.

PassItem = Annotated[
    Any, PlainValidator(_parse_pass), PlainSerializer(_dump_pass), WithJsonSchema({})
]
"""An item of ``passes``: a name, or a mapping of one name to options."""

Comparator = Annotated[str, AfterValidator(_check_comparator), WithJsonSchema({})]
"""An item of ``verify.compare``."""

Methods = Annotated[
    Mapping[Name, Annotated[tuple[PassItem, ...], Field(min_length=1)] | None],
    BeforeValidator(_by_name),
    WithJsonSchema({}),
]
"""``compare.methods``: by name, None for the method of that name."""
