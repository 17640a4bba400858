"""Measure accuracy on multiple-choice questions: the original model and artifacts of it.

    python -m benchmarks.multiple_choice [--original DIR] [--artifact LABEL=DIR[,ADAPTER] ...]
                                         [--limit N] [--seed N] [--json FILE] [--tasks DIR]

The sets are MMLU, Social IQa and LogiQA (``question_sets.py``). A choice's score is its
log-likelihood after the prompt, whole (*plain*) or divided by its number of characters
(*normalized*). The choice with the highest score is the answer, the first one among equals. In
lm-eval these rules are ``acc`` and ``acc_norm``; ``--tasks`` writes the same questions as tasks of
lm-eval.

The original runs in eager PyTorch in float32, artifacts run in ONNX Runtime as they are deployed.
Intervals are 95% intervals: Wilson's for a share, a paired bootstrap for the difference from the
original, with the p-value of McNemar's exact test. Scores are cached in ``.cache`` as they are
computed, so no question is scored twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, machine_line
from benchmarks.proportions import Interval, PairedDifference, compare_paired, wilson_interval
from benchmarks.question_sets import Question, load_questions, write_tasks

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "multiple_choice"

ORIGINAL = "original"

RULES: Mapping[str, Callable[[Question], list[int]]] = {
    "plain": lambda question: [1] * len(question.choices),
    "normalized": lambda question: [len(choice) for choice in question.choices],
}
"""Divisor of the log-likelihood of each choice."""

_BLOCK = 16
"""Number of questions that are scored and cached together."""

Scores = list[list[float]]
"""Log-likelihood of every choice of every question, in nats."""

Scorer = Callable[[Sequence[Question]], Scores]


@dataclass(frozen=True)
class System:
    """A model that answers questions.

    Attributes:
      label: for the table.
      identity: digest of everything that its scores depend on besides the questions.
      open: load the model; not called if all scores are cached.
    """

    label: str
    identity: str
    open: Callable[[], Scorer]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system on one set by one rule.

    Attributes:
      system: label of the model.
      questions: name of the set.
      rule: ``plain`` or ``normalized``.
      count: questions asked.
      accuracy: share of them that it answered correctly.
      interval: of the accuracy.
      against_original: difference from the original; None for the original, and without one.
    """

    system: str
    questions: str
    rule: str
    count: int
    accuracy: float
    interval: Interval
    against_original: PairedDifference | None = None


def correct(questions: Sequence[Question], scores: Scores, rule: str) -> NDArray[np.bool_]:
    """Whether each question is answered correctly, ``[questions]``."""
    chosen = [
        int(np.argmax(np.divide(likelihoods, RULES[rule](question))))
        for question, likelihoods in zip(questions, scores, strict=True)
    ]
    hits: NDArray[np.bool_] = np.equal([question.answer for question in questions], chosen)
    return hits


def rows(
    questions: Mapping[str, Sequence[Question]], scores: Mapping[str, Mapping[str, Scores]]
) -> list[Row]:
    """Every system on every set by every rule; ``scores`` by label, then by set."""
    found = []
    for name, asked in questions.items():
        for rule in RULES:
            answered = {
                label: correct(asked, by_set[name], rule) for label, by_set in scores.items()
            }
            for label, hits in answered.items():
                base = None if label == ORIGINAL else answered.get(ORIGINAL)
                found.append(
                    Row(
                        system=label,
                        questions=name,
                        rule=rule,
                        count=len(hits),
                        accuracy=float(hits.mean()),
                        interval=wilson_interval(int(hits.sum()), len(hits)),
                        against_original=None if base is None else compare_paired(base, hits),
                    )
                )
    return found


def score_cached(system: System, questions: Sequence[Question], cache: Path) -> Scores:
    """Scores of ``questions``; cached ones come from ``cache``, new ones are added to it."""
    path = cache / f"scores-{system.identity[:32]}.json"
    known: dict[str, list[float]] = json.loads(path.read_text()) if path.is_file() else {}
    keys = [_digest([json.dumps(asdict(question))]) for question in questions]
    missing = [
        (key, question) for key, question in zip(keys, questions, strict=True) if key not in known
    ]
    scorer = system.open() if missing else None
    for start in range(0, len(missing), _BLOCK):
        assert scorer is not None
        block = missing[start : start + _BLOCK]
        scores = scorer([question for _, question in block])
        known |= {key: score for (key, _), score in zip(block, scores, strict=True)}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(known), encoding="utf-8")
        partial.replace(path)
        sys.stderr.write(f"\r{system.label}: {start + len(block)} of {len(missing)} questions")
    if missing:
        sys.stderr.write("\n")
    return [known[key] for key in keys]


def original_system(folder: Path) -> System:
    """The checkpoint in ``folder``, in eager PyTorch in float32."""

    def opened() -> Scorer:
        from benchmarks.eager_choices import open_eager  # noqa: PLC0415 - PyTorch is heavy

        score = open_eager(folder)
        return lambda questions: [score(question) for question in questions]

    weights = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    identity = _digest(hashlib.sha256(path.read_bytes()).hexdigest() for path in weights)
    return System(ORIGINAL, identity, opened)


def artifact_system(label: str, folder: Path, adapter: str | None) -> System:
    """The artifact in ``folder``, with one of its adapters or with none."""
    from eoracc.runtime.artifact.manifest import read_manifest  # noqa: PLC0415

    def opened() -> Scorer:
        from eoracc.runtime import load  # noqa: PLC0415

        model = load(folder)

        def score(questions: Sequence[Question]) -> Scores:
            pairs = [
                (question.prompt, f" {choice}")
                for question in questions
                for choice in question.choices
            ]
            scored = iter(model.score_continuations(pairs, adapter=adapter))
            return [[next(scored).logprob for _ in question.choices] for question in questions]

        return score

    manifest = read_manifest(folder)
    added = [] if adapter is None else [adapter, str(manifest.files[f"adapters/{adapter}.json"])]
    return System(label, _digest([manifest.digest, *added]), opened)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def main() -> None:
    """Score the questions and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--original", type=Path, metavar="DIR", help="checkpoint, a Hugging Face folder"
    )
    parser.add_argument(
        "--artifact",
        action="append",
        default=[],
        type=_artifact,
        metavar="LABEL=DIR[,ADAPTER]",
        help="may be given again",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each set; default all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of questions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument(
        "--tasks", type=Path, metavar="DIR", help="also write the questions as lm-eval tasks"
    )
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    questions = load_questions(CACHE, limit=options.limit, seed=options.seed)
    if options.tasks is not None:
        names = ",".join(write_tasks(questions, options.tasks))
        sys.stderr.write(f"for lm-eval: --include_path {options.tasks} --tasks {names}\n")
    systems = [artifact_system(*artifact) for artifact in options.artifact]
    if options.original is not None:
        systems.insert(0, original_system(options.original))
    lines = rows(questions, score_all(systems, questions, CACHE))
    _print(lines)
    if options.json is not None:
        content = {
            "machine": describe_machine(),
            "limit": options.limit,
            "seed": options.seed,
            "rows": [*map(asdict, lines)],
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def score_all(
    systems: Sequence[System], questions: Mapping[str, Sequence[Question]], cache: Path
) -> dict[str, dict[str, Scores]]:
    """Scores by label, then by set; each system is opened at most once."""
    everything = [question for asked in questions.values() for question in asked]
    scores_of: dict[str, dict[str, Scores]] = {}
    for system in systems:
        scores = iter(score_cached(system, everything, cache))
        scores_of[system.label] = {
            name: [next(scores) for _ in asked] for name, asked in questions.items()
        }
    return scores_of


def _artifact(text: str) -> tuple[str, Path, str | None]:
    label, _, place = text.partition("=")
    folder, _, adapter = place.partition(",")
    if not label or not (Path(folder) / "manifest.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} names no artifact: give LABEL=DIR, as in compensated=build/out"
        )
    return label, Path(folder), adapter or None


def _print(lines: Sequence[Row]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(f"{machine_line()}\n", soft_wrap=True)
    table = Table(box=box.MARKDOWN)
    table.add_column("set", no_wrap=True)
    table.add_column("rule", no_wrap=True)
    table.add_column("system", no_wrap=True)
    for heading in ("n", "accuracy", "95%", "- original", "95%", "gained", "lost", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in lines:
        paired = row.against_original
        against: list[Any] = ["", "", "", "", ""]
        if paired is not None:
            against = [
                f"{paired.difference:+.1%}",
                f"{paired.interval.low:+.1%} … {paired.interval.high:+.1%}",
                f"{paired.gained}",
                f"{paired.lost}",
                f"{paired.p_value:.2f}",
            ]
        table.add_row(
            row.questions,
            row.rule,
            row.system,
            f"{row.count}",
            f"{row.accuracy:.1%}",
            f"{row.interval.low:.1%} … {row.interval.high:.1%}",
            *against,
        )
    console.print(table)


if __name__ == "__main__":
    main()
