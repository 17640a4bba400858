"""The machine that a benchmark runs on, for its header and its JSON."""

from __future__ import annotations

import os
import platform
from typing import Any

from eoracc.compiler.targets.machine import processor_extensions, processor_field

__all__ = ["describe_machine", "machine_line"]


def describe_machine() -> dict[str, Any]:
    """The machine, as JSON holds it.

    Speed and, by the rounding of statistics, quality depend on it.

    Returns:
      ``processor``, its name; ``instruction_sets``, the extensions that libraries have kernels for;
      ``cores`` that the process may use; ``system``, the operating system and the architecture.
    """
    return {
        "processor": _processor(),
        "instruction_sets": processor_extensions(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine_line() -> str:
    """The same in one line."""
    machine = describe_machine()
    sets = ", ".join(machine["instruction_sets"]) or "unknown instruction sets"
    return f"{machine['processor']}, {machine['cores']} cores ({sets}), {machine['system']}"


def _processor() -> str:
    """The name that Linux gives it; what Python knows where Linux gives none (AArch64)."""
    return processor_field("model name") or platform.processor() or platform.machine()
