"""Change files at random and read them: ``python -m tests.fuzz.mutate --count 10000 --seed 1``.

Prints a table by kind of file, and the first line of every kind of fault. ``--only KIND:NUMBER``
runs a single case again and prints all that it says.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.kinds import KINDS
from tests.fuzz.pool import FAULTS, Case, Outcome, run_cases
from tests.fuzz.templates import write_templates

__all__ = ["choose_cases", "main", "report", "table"]

_PROGRESS = 500


def choose_cases(count: int, kinds: list[str] | None = None) -> list[Case]:
    """``count`` cases, kind by kind in turn."""
    names = list(KINDS) if kinds is None else kinds
    return [Case(names[index % len(names)], index // len(names)) for index in range(count)]


def table(outcomes: list[Outcome]) -> str:
    """A line per kind: tried, accepted, refused, and each verdict that is a fault."""
    columns = ("tried", "accepted", "refused", *FAULTS)
    rows = []
    for name in (*KINDS, "all"):
        own = [item.verdict for item in outcomes if name in ("all", item.case.kind)]
        counts = Counter(own)
        counts["tried"] = len(own)
        if own:
            rows.append((name, *(str(counts[column]) for column in columns)))
    widths = [max(map(len, column)) for column in zip(("kind", *columns), *rows, strict=True)]
    lines = [("kind", *columns), *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def report(outcome: Outcome) -> None:
    """Print a line if the outcome is a fault."""
    if outcome.verdict in FAULTS:
        last = outcome.detail.strip().splitlines()[-1:] or [""]
        print(f"{outcome.case} {outcome.verdict}: {last[0][:200]}", flush=True)


def main() -> int:
    """Run the command line; 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS))
    parser.add_argument("--only", metavar="KIND:NUMBER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    cases = choose_cases(options.count, options.kinds)
    if options.only is not None:
        kind, _, number = options.only.rpartition(":")
        cases = [Case(kind, int(number))]
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        templates, work = Path(folder) / "templates", Path(folder) / "work"
        write_templates(templates)
        work.mkdir()
        run = run_cases(templates, work, cases, seed=options.seed, workers=options.workers)
        # Whoever stops it sees what there is.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            for outcome in run:
                outcomes.append(outcome)
                report(outcome)
                if len(outcomes) % _PROGRESS == 0:
                    print(f"{len(outcomes)} of {len(cases)}", file=sys.stderr, flush=True)
    if options.only is not None:
        print(outcomes[0].verdict, outcomes[0].detail, sep="\n")
    print(table(outcomes))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    return int(any(outcome.verdict in FAULTS for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
