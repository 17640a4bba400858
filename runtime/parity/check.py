"""Check that an artifact computes what the compressed model computed in eager PyTorch.

The artifact contains the reference values (the record), so the check needs neither PyTorch nor the
original model. Every figure is measured twice: with the native library, and without it, through the
model-local functions that any ONNX Runtime can run. :mod:`eoracc.runtime.parity.engines` checks the
TensorRT engines of an artifact against the same record.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from eoracc.errors import ArtifactError, EoraccError
from eoracc.runtime.memory import peak_bytes, release_memory
from eoracc.runtime.onnxruntime.graph_session import GraphSession
from eoracc.runtime.onnxruntime.session import Session, open_session
from eoracc.runtime.onnxruntime.single_linears import open_linears

__all__ = [
    "PARITY_FILE",
    "CaseParity",
    "LinearParity",
    "ParityCase",
    "ParityLinear",
    "ParityRecord",
    "ParityReport",
    "check_cases",
    "check_parity",
]

PARITY_FILE = "parity.safetensors"
"""File of a record, at the artifact's root and in the folder of each TensorRT target."""

_GRAPHS = ("tensorrt_rtx", "tensorrt")
_GRAPH_FILE = "model.onnx"


@dataclass(frozen=True, eq=False)
class ParityLinear:
    """Reference outputs of one linear.

    Attributes:
      name: of the linear and of its node.
      outputs: ``float32 [rows, N]`` for the record's inputs of width K.
      tolerance: largest allowed deviation per output, ``float32 [rows, N]``.
    """

    name: str
    outputs: NDArray[np.float32]
    tolerance: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ParityCase:
    """Reference logits of the whole model for one way of calling it.

    Attributes:
      name: for the report.
      input_ids: ``int64 [B, S]``.
      attention_mask: ``int64 [B, S]``, right-padded.
      chunks: lengths of successive calls through the cache; they add up to S.
      rows: batch row of each kept token, ``int64 [P]``.
      columns: position of each kept token, ``int64 [P]``.
      logits: ``float32 [P, V]``.
      tolerance: largest allowed deviation of a logit.
      rounding: further deviation allowed where every value is rounded to the graph's narrow type,
        as on a GPU; 0 for a graph that computes in float32.
    """

    name: str
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    chunks: tuple[int, ...]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    logits: NDArray[np.float32]
    tolerance: float
    rounding: float = 0.0


@dataclass(frozen=True, eq=False)
class ParityRecord:
    """All reference values of a parity check.

    Attributes:
      inputs: of linears by width K, ``float32 [rows, K]``.
      linears: one per compressed linear.
      cases: one per way of calling the model.
      compression_effect: largest change of a logit of the first case by compression itself; a
        tolerance must be far below it to prove anything.
    """

    inputs: Mapping[int, NDArray[np.float32]]
    linears: Sequence[ParityLinear]
    cases: Sequence[ParityCase]
    compression_effect: float

    def save(self, path: Path) -> None:
        """Write the record as one safetensors file."""
        arrays: dict[str, NDArray[np.generic]] = {f"inputs/{k}": v for k, v in self.inputs.items()}
        for linear in self.linears:
            arrays[f"linear/{linear.name}/outputs"] = linear.outputs
            arrays[f"linear/{linear.name}/tolerance"] = linear.tolerance
        for position, case in enumerate(self.cases):
            for part in ("input_ids", "attention_mask", "rows", "columns", "logits"):
                arrays[f"case/{position}/{part}"] = getattr(case, part)
        index = {
            "linears": [linear.name for linear in self.linears],
            "cases": [
                {
                    "name": c.name,
                    "chunks": list(c.chunks),
                    "tolerance": c.tolerance,
                    "rounding": c.rounding,
                }
                for c in self.cases
            ],
            "compression_effect": self.compression_effect,
        }
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            path,
            metadata={"parity": json.dumps(index)},
        )

    @classmethod
    def load(cls, path: Path) -> ParityRecord:
        """Read what :meth:`save` wrote."""
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: build the artifact with 'verify.parity: true'")
        with safe_open(path, framework="numpy") as file:
            index = json.loads(file.metadata()["parity"])
            widths = [k.partition("/")[2] for k in file.keys() if k.startswith("inputs/")]  # noqa: SIM118 - no mapping
            return cls(
                inputs={int(width): file.get_tensor(f"inputs/{width}") for width in widths},
                linears=[
                    ParityLinear(
                        name,
                        file.get_tensor(f"linear/{name}/outputs"),
                        file.get_tensor(f"linear/{name}/tolerance"),
                    )
                    for name in index["linears"]
                ],
                cases=[
                    ParityCase(
                        name=case["name"],
                        chunks=tuple(case["chunks"]),
                        tolerance=case["tolerance"],
                        rounding=case.get("rounding", 0.0),  # absent in older artifacts
                        **{
                            part: file.get_tensor(f"case/{i}/{part}")
                            for part in ("input_ids", "attention_mask", "rows", "columns", "logits")
                        },
                    )
                    for i, case in enumerate(index["cases"])
                ],
                compression_effect=index["compression_effect"],
            )


@dataclass(frozen=True)
class LinearParity:
    """The linear with the largest share of its tolerance.

    Attributes:
      through: ``library`` or ``function``.
      linears: number of linears checked.
      worst: name of the linear with the largest share.
      tolerance_share: its largest deviation as a share of the tolerance; at most 1 passes.
      passed: whether all linears are within their tolerances.
    """

    through: str
    linears: int
    worst: str
    tolerance_share: float
    passed: bool


@dataclass(frozen=True)
class CaseParity:
    """Deviation of the logits for one way of calling the model.

    Attributes:
      through: ``library`` or ``function``, or the target whose graph it is.
      name: of the case.
      max_error: largest deviation of a logit.
      tolerance: largest allowed deviation.
      passed: whether all logits are within it.
    """

    through: str
    name: str
    max_error: float
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """Result of the parity gate.

    Attributes:
      passed: whether every check passed.
      linears: by ``through``.
      logits: by way of calling the model.
      compression_effect: see :class:`ParityRecord`.
    """

    passed: bool
    linears: tuple[LinearParity, ...]
    logits: tuple[CaseParity, ...]
    compression_effect: float

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ParityReport:
        """Inverse of :meth:`as_dict`."""
        return cls(
            passed=content["passed"],
            linears=tuple(LinearParity(**figure) for figure in content["linears"]),
            logits=tuple(CaseParity(**figure) for figure in content["logits"]),
            compression_effect=content["compression_effect"],
        )


def check_parity(folder: Path) -> ParityReport:
    """Compare the artifact in ``folder`` with the record of each target.

    The model for ONNX Runtime is checked with and without the native library. The graph of a
    TensorRT target is checked as its float32 twin; no engine is run. The caller has verified the
    manifest.

    Raises:
      ArtifactError: the record is missing, or a record or a model cannot be read.
    """
    graphs = [name for name in _GRAPHS if (folder / name / PARITY_FILE).is_file()]
    linears: list[LinearParity] = []
    logits: list[CaseParity] = []
    effects: list[float] = []
    if (folder / PARITY_FILE).is_file() or not graphs:
        record = ParityRecord.load(folder / PARITY_FILE)
        effects.append(record.compression_effect)
        for through in ("library", "function"):
            library = through == "library"
            linears.append(_check_linears(folder, record, library=library))
            release_memory()
            logits.extend(check_cases(folder, record.cases, library=library))
            release_memory()
    for name in graphs:
        record = ParityRecord.load(folder / name / PARITY_FILE)
        effects.append(record.compression_effect)
        session = GraphSession.open(folder / name / _GRAPH_FILE)
        logits.extend(_compare(session, case, through=name) for case in record.cases)
        del session
        release_memory()
    passed = all(f.passed for f in linears) and all(f.passed for f in logits)
    return ParityReport(passed, tuple(linears), tuple(logits), min(effects))


def _check_linears(folder: Path, record: ParityRecord, *, library: bool) -> LinearParity:
    worst, share = "", 0.0
    names = [linear.name for linear in record.linears]
    computed = open_linears(folder, names, library=library)
    for linear, run in zip(record.linears, computed, strict=True):
        outputs = run(record.inputs)
        error = np.abs(outputs.astype(np.float64) - linear.outputs)
        # Written so that NaN fails: only a value within tolerance passes.
        ratio = np.where(error <= linear.tolerance, error / (linear.tolerance + 1e-45), np.inf)
        if ratio.max() >= share:
            worst, share = linear.name, float(ratio.max())
    return LinearParity(
        "library" if library else "function", len(names), worst, share, passed=share <= 1
    )


def check_cases(
    folder: Path,
    cases: Iterable[ParityCase],
    *,
    library: bool,
    operands: Iterable[Mapping[str, NDArray[np.generic]]] = repeat({}),
) -> Iterator[CaseParity]:
    """Compare calls of the artifact in ``folder`` with reference logits.

    Args:
      folder: the artifact, or at least its model.
      cases: calls and their logits.
      library: use the native library, not the model-local functions.
      operands: further inputs of each case, for example those of an adapter.

    Yields:
      The deviation of each case.
    """
    # Lean: the check must not need the memory of the uncompressed model.
    session = open_session(folder, library=library, lean=True)
    for case, session.operands in zip(cases, operands, strict=False):
        yield _compare(session, case, through="library" if library else "function")


def _compare(session: Session | GraphSession, case: ParityCase, *, through: str) -> CaseParity:
    logits = session.run_chunks(case.input_ids, case.attention_mask, case.chunks)
    error = np.abs(logits[case.rows, case.columns] - case.logits).max()
    return CaseParity(
        through=through,
        name=case.name,
        max_error=float(error),
        tolerance=case.tolerance,
        passed=bool(error <= case.tolerance),
    )


if __name__ == "__main__":
    # A build runs the check in a process of its own, to measure the memory of the artifact alone.
    try:
        checked = check_parity(Path(sys.argv[1])).as_dict()
        sys.stdout.write(json.dumps({"report": checked, "peak_memory_bytes": peak_bytes()}) + "\n")
    except EoraccError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
