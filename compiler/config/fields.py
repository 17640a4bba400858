"""Building blocks of the sections of model.yaml: their base class, and fields with bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

__all__ = ["Count", "Length", "Name", "Offset", "Positive", "Section", "Share", "no_bool"]


class Section(BaseModel):
    """A section: unknown keys are errors, and the docstrings of its fields are their help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def no_bool(value: object) -> object:
    """Refuse ``yes`` and ``on``, which YAML reads as booleans and Python counts as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError(
            "number_type", "must be a number, not {value}", {"value": str(value).lower()}
        )
    return value


Count = Annotated[int, BeforeValidator(no_bool), Field(ge=1)]
Length = Annotated[int, BeforeValidator(no_bool), Field(ge=2)]
Offset = Annotated[int, BeforeValidator(no_bool), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(no_bool), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
