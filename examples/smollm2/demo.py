"""Fetch a model, build its artifact and generate text; ``make demo`` runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ARTIFACT = HERE / "build" / "smollm2-3bit"
PROMPT = "Explain in two sentences why the sky is blue."
# With greedy decoding a model of this size repeats itself.
SAMPLING = ("--temperature", "0.6", "--top-p", "0.9", "--seed", "0")


def run(*command: str | Path) -> None:
    """Run a Python command line; the demo ends with its exit code if that is not 0."""
    done = subprocess.run([sys.executable, *map(str, command)], check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def eoracc(*arguments: str | Path) -> None:
    """Print an eoracc command line and run it."""
    shown = [str(argument).removeprefix(f"{ROOT}/") for argument in arguments]
    sys.stdout.write(f"\n$ eoracc {subprocess.list2cmdline(shown)}\n")
    sys.stdout.flush()
    run("-m", "eoracc.compiler.cli", *arguments)


def main() -> None:
    """Fetch the model, build the artifact, generate text."""
    run("-m", "examples.smollm2.fetch")
    eoracc("build", HERE / "model.yaml", "--force")
    eoracc("run", ARTIFACT, PROMPT, "--max-new-tokens", "80", *SAMPLING)


if __name__ == "__main__":
    main()
