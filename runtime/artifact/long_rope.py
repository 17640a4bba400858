"""LongRoPE: a model whose texts have another rotary embedding beyond a certain length.

Phi-3, Phi-3.5 and Phi-4-mini rotate the keys of a text by other angles once it is longer than the
model was first trained on. A graph picks the angles of each row by the row's length; what it cannot
do is to rotate keys again that are in the cache already.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eoracc.documents import Reader
from eoracc.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LONG_ROPE_KEY", "LongRope"]

LONG_ROPE_KEY = "eoracc.long_rope"
"""Metadata of a graph: its :class:`LongRope`."""

_READER = Reader(ArtifactError, "build the artifact again")


@dataclass(frozen=True)
class LongRope:
    """Lengths of the texts of a LongRoPE model, in tokens.

    Attributes:
      original: up to which texts have the short embedding; a longer one is computed anew.
      longest: of all.
    """

    original: int
    longest: int

    def to_metadata(self) -> dict[str, str]:
        """As an entry of a graph's metadata."""
        return {LONG_ROPE_KEY: json.dumps(asdict(self))}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> LongRope | None:
        """Read the entry of :meth:`to_metadata`; None where there is none.

        Raises:
          ArtifactError: it is damaged.

        >>> LongRope.of(LongRope(original=4096, longest=131072).to_metadata())
        LongRope(original=4096, longest=131072)
        """
        text = metadata.get(LONG_ROPE_KEY)
        if text is None:
            return None
        place = f"metadata {LONG_ROPE_KEY!r} of the model"
        content = _READER.as_object(_READER.parse(text, place), place)
        with _READER.refusing_form(place, "are damaged"):
            return cls(original=int(content["original"]), longest=int(content["longest"]))
