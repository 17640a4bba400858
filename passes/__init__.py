"""The passes: one module each, registered with :func:`eoracc.passes.base.register`."""

from __future__ import annotations

import importlib
import pkgutil

__all__ = ["load_passes"]


def load_passes() -> None:
    """Import every module below this package, so that every pass is registered."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
