"""The reader of a checkpoint's documents."""

from __future__ import annotations

from eoracc.documents import Reader
from eoracc.errors import ModelError

__all__ = ["CHECKPOINT"]

# transformers writes Infinity, which is no JSON, into configurations.
CHECKPOINT = Reader(ModelError, "fetch it again", constants=True)
"""Reads the documents of a checkpoint."""
