"""eoracc: a compiler for compressed, compensated language models.

:mod:`eoracc.errors` has every error that it raises on purpose.
"""

from __future__ import annotations

from eoracc.errors import EoraccError

__all__ = ["EoraccError", "__version__"]

__version__ = "0.1.0"
