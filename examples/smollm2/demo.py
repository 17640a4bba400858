"""The main job end to end: fetch a model, build its artifact, let it talk. Run by ``make demo``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ARTIFACT = HERE / "build" / "smollm2-3bit"
PROMPT = "Explain in two sentences why the sky is blue."
# Taking the likeliest token each time, so small a model falls into loops.
SAMPLING = ("--temperature", "0.6", "--top-p", "0.9", "--seed", "0")


def run(*command: str | Path) -> None:
    """Run a Python command line; the demo ends with its exit code where that is not 0."""
    done = subprocess.run([sys.executable, *map(str, command)], check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def eoracc(*arguments: str | Path) -> None:
    """Run eoracc, and show what is run."""
    shown = [str(argument).removeprefix(f"{ROOT}/") for argument in arguments]
    sys.stdout.write(f"\n$ eoracc {subprocess.list2cmdline(shown)}\n")
    sys.stdout.flush()
    run("-m", "eoracc.compiler.cli", *arguments)


def main() -> None:
    """Fetch, build, run."""
    run("-m", "examples.smollm2.fetch")
    eoracc("build", HERE / "model.yaml", "--force")
    eoracc("run", ARTIFACT, PROMPT, "--max-new-tokens", "80", *SAMPLING)


if __name__ == "__main__":
    main()
