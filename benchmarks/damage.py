"""Damages every file that an interrupted build keeps, and resumes.

    python -m benchmarks.damage [--damages N] [CASE ...]

For each kind of kept work (`tests/kept_builds.py`) a tiny build is interrupted. For each kept file
and each kind of damage (`tests/damage.py`) the interrupted build is copied, damaged and resumed.
Its artifact must be that of an undisturbed build, byte for byte. All kinds of damage, or the next
N of them, are tried on the first file of a kind, and one after the other on the rest.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import click
from typing_extensions import override

from eoracc.compiler.kept.interval import SaveInterval
from eoracc.compiler.progress import SilentProgress
from eoracc.errors import EoraccError
from tests.damage import DAMAGES
from tests.kept_builds import KEPT_BUILDS, KeptBuild

__all__ = ["main", "tries"]


class _Lines(logging.Handler):
    """Collects the lines about discarded work."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def tries(files: Sequence[Path], damages: Iterator[str], count: int) -> Iterator[tuple[Path, str]]:
    """The files with the damages that are tried on them.

    Args:
      files: the kept files. Those whose names differ in numbers and linears only are of one kind.
      damages: names, taken in turn.
      count: damages for the first file of a kind.
    """
    seen: set[str] = set()
    for file in files:
        kind = re.sub(r"\d+|model\.[\w.]+(?=\.safetensors)|[0-9a-f]{32}", "N", file.as_posix())
        for damage in islice(damages, 1 if kind in seen else count):
            yield file, damage
        seen.add(kind)


@click.command()
@click.option("--damages", "count", default=len(DAMAGES), help="Damages for each kind of file.")
@click.argument("names", nargs=-1, type=click.Choice([*KEPT_BUILDS]))
def main(names: Sequence[str], count: int) -> None:
    """Damage kept files; exit code 1 if a resumed build fails or gives another artifact."""
    SaveInterval.is_due = True  # type: ignore[assignment, method-assign]
    handler = _Lines()
    log = logging.getLogger("eoracc.build.kept")
    log.addHandler(handler)
    log.propagate = False
    totals: Counter[str] = Counter()
    damages = cycle(DAMAGES)
    for name in names or KEPT_BUILDS:
        with tempfile.TemporaryDirectory() as folder:
            totals += _try_case(KEPT_BUILDS[name], name, Path(folder), handler, damages, count)
    print("in all:", dict(totals))
    sys.exit(1 if totals["failed"] else 0)


def _try_case(
    case: KeptBuild, name: str, folder: Path, handler: _Lines, damages: Iterator[str], count: int
) -> Counter[str]:
    begun_s = time.perf_counter()
    sound = case.prepare(folder / "sound")
    interrupted = Path(shutil.copytree(sound, folder / "interrupted"))
    expected = case.run(sound, SilentProgress())
    files = case.interrupt(interrupted)
    counts: Counter[str] = Counter()
    for file, damage in tries(files, damages, count):
        shutil.rmtree(folder / "tried", ignore_errors=True)
        workspace = Path(shutil.copytree(interrupted, folder / "tried"))
        DAMAGES[damage](workspace / file)
        handler.lines.clear()
        counts["tried"] += 1
        try:
            same = case.run(workspace, SilentProgress()) == expected
            outcome = "same" if same else "another artifact"
        except EoraccError as error:
            outcome = f"refused: {error}"
        except Exception as error:  # noqa: BLE001 - a traceback is what this looks for
            outcome = f"traceback: {type(error).__name__}: {error}"
        told = len(handler.lines)
        counts[outcome.partition(":")[0]] += 1
        counts["told in one line"] += told == 1
        if outcome != "same":
            counts["failed"] += 1
            print(f"{name}: {file}: {damage}: {outcome[:200]}")
        elif told != 1 and not (damage == "deleted" and file.suffix == ".json"):
            print(f"{name}: {file}: {damage}: same, told in {told} lines")
    print(
        f"{name}: {len(files)} files, {dict(counts)}, {time.perf_counter() - begun_s:.0f} s",
        flush=True,
    )
    return counts


if __name__ == "__main__":
    main()
