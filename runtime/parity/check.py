"""Check that an artifact computes what the compressed model computed in eager PyTorch.

The artifact contains the reference values (the record), so the check needs neither PyTorch nor the
original model. Every figure is measured twice: with the native library, and without it, through the
model-local functions that any ONNX Runtime can run. :mod:`eoracc.runtime.parity.engines` checks the
TensorRT engines of an artifact against the same record.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.failure import end_process
from eoracc.printable import printable
from eoracc.runtime.memory import peak_bytes, release_memory
from eoracc.runtime.onnxruntime.graph_session import GraphSession
from eoracc.runtime.onnxruntime.session import Session, open_session
from eoracc.runtime.onnxruntime.single_linears import open_linears
from eoracc.runtime.parity.record import PARITY_FILE, ParityCase, ParityRecord
from eoracc.runtime.parity.record_checks import read_record
from eoracc.runtime.parity.report import CaseParity, LinearParity, ParityReport, compare_logits

__all__ = ["check_cases", "check_parity"]

_READER = Reader(ArtifactError, "build the artifact again")
_GRAPHS = ("tensorrt_rtx", "tensorrt")
_GRAPH_FILE = "model.onnx"


def check_parity(folder: Path, library: Path | bool = True) -> ParityReport:
    """Compare the artifact in ``folder`` with the record of each target.

    The model for ONNX Runtime is checked with and without the native library. The graph of a
    TensorRT target is checked as its float32 twin; no engine is run. The caller has verified the
    manifest.

    Args:
      folder: the artifact.
      library: see :func:`eoracc.runtime.onnxruntime.session.open_session`.

    Raises:
      ArtifactError: the record is missing, or a record or a model cannot be read.
    """
    # The model is as foreign as the record: what it lacks shows where it is run.
    with _READER.refusing(folder, "cannot be run as its record asks"):
        return _check(folder, library)


def _check(folder: Path, library: Path | bool) -> ParityReport:
    graphs = [name for name in _GRAPHS if (folder / name / PARITY_FILE).is_file()]
    linears: list[LinearParity] = []
    logits: list[CaseParity] = []
    effects: list[float] = []
    if (folder / PARITY_FILE).is_file() or not graphs:
        record = read_record(folder / PARITY_FILE)
        effects.append(record.compression_effect)
        for native in (library, False):
            linears.append(_check_linears(folder, record, library=native))
            release_memory()
            logits.extend(check_cases(folder, record.cases, library=native))
            release_memory()
    for name in graphs:
        record = read_record(folder / name / PARITY_FILE)
        effects.append(record.compression_effect)
        session = GraphSession.open(folder / name / _GRAPH_FILE)
        logits.extend(_compare(session, case, name, case.tolerance) for case in record.cases)
        del session
        release_memory()
    passed = all(f.passed for f in linears) and all(f.passed for f in logits)
    return ParityReport(passed, tuple(linears), tuple(logits), min(effects))


def _check_linears(folder: Path, record: ParityRecord, *, library: Path | bool) -> LinearParity:
    worst, share = "", 0.0
    names = [linear.name for linear in record.linears]
    computed = open_linears(folder, names, library=library)
    for linear, run in zip(record.linears, computed, strict=True):
        outputs = run(record.inputs)
        expected = [len(linear.outputs), linear.kept.size]
        if list(outputs.shape) != expected:
            raise ArtifactError(
                f"{folder}: linear {printable(linear.name)}: gives {list(outputs.shape)} outputs, "
                f"its record has {expected}: build the artifact again"
            )
        largest = float(linear.shares(outputs, rounded=bool(library)).max())
        if largest >= share:
            worst, share = linear.name, largest
    return LinearParity(
        "library" if library else "function", len(names), worst, share, passed=share <= 1
    )


def check_cases(
    folder: Path,
    cases: Iterable[ParityCase],
    *,
    library: Path | bool,
    operands: Iterable[Mapping[str, NDArray[np.generic]]] = repeat({}),
) -> Iterator[CaseParity]:
    """Compare calls of the artifact in ``folder`` with reference logits.

    Args:
      folder: the artifact, or at least its model.
      cases: calls and their logits.
      library: the native library, True for the installed one; False for the model-local functions.
      operands: further inputs of each case, for example those of an adapter.

    Yields:
      The deviation of each case.
    """
    # Lean: the check must not need the memory of the uncompressed model.
    session = open_session(folder, library=library, lean=True)
    for case, session.operands in zip(cases, operands, strict=False):
        # Only the library rounds activations.
        tolerance = case.tolerance + (case.rounding if library else 0)
        yield _compare(session, case, "library" if library else "function", tolerance)


def _compare(
    session: Session | GraphSession, case: ParityCase, through: str, tolerance: float
) -> CaseParity:
    logits = session.run_chunks(case.input_ids, case.attention_mask, case.chunks)
    return compare_logits(case, logits, through=through, tolerance=tolerance)


if __name__ == "__main__":
    # A build runs the check in a process of its own, to measure the memory of the artifact alone.
    try:
        checked = check_parity(Path(sys.argv[1])).as_dict()
        sys.stdout.write(json.dumps({"report": checked, "peak_memory_bytes": peak_bytes()}) + "\n")
    except BaseException as error:  # noqa: BLE001 - panics of Rust libraries are no Exception
        sys.exit(end_process(error, prefix=""))
