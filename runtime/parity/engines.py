"""Check that TensorRT engines compute what the compressed model computed in eager PyTorch.

The record is the one that :mod:`eoracc.runtime.parity.check` compares the graph's float32 twin with
during the build. An engine may deviate more than the twin, because it rounds every value to
a narrow type. The build has measured the effect of that rounding, which is part of the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eoracc.errors import EoraccError
from eoracc.runtime.backends import Backend, BackendChoice, backends_of, open_backend
from eoracc.runtime.decode.bank import NO_PLACE
from eoracc.runtime.parity.record import PARITY_FILE, ParityCase
from eoracc.runtime.parity.record_checks import read_record
from eoracc.runtime.parity.report import CaseParity, compare_logits

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.runtime.artifact.manifest import Manifest
    from eoracc.runtime.decode.decoder import Decoder, Rows

__all__ = ["EngineParity", "check_engines"]


@dataclass(frozen=True)
class EngineParity:
    """Deviation of the engines of a target on this machine.

    Attributes:
      backend: the target.
      device: description of the GPU; empty if the engines did not run.
      not_run: reason why the engines did not run; None if they did.
      logits: by way of calling the model.
    """

    backend: Backend
    device: str
    not_run: str | None
    logits: tuple[CaseParity, ...]

    @property
    def passed(self) -> bool:
        """Whether all logits are within tolerance; true also if nothing ran."""
        return all(case.passed for case in self.logits)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "passed": self.passed}


def check_engines(
    folder: Path, manifest: Manifest, choice: BackendChoice, *, trust: bool = False
) -> list[EngineParity]:
    """Run the engines of a verified artifact on this machine's GPU and compare with their record.

    Args:
      folder: the artifact.
      manifest: of the artifact, verified.
      choice: the backend whose engines to run. ``auto`` tries all of them, and the result holds the
        reason for each one that does not run here.
      trust: execute the engines.

    Raises:
      EoraccError: the engines of the chosen backend do not run on this machine.
    """
    if choice == "onnxruntime":
        return []
    wanted: Sequence[Backend] = [name for name in backends_of(manifest) if name != "onnxruntime"]
    if choice != "auto":
        wanted = [choice]
    results = []
    for backend in wanted:
        try:
            opened = open_backend(folder, manifest, backend, threads=1, adapters=(), trust=trust)
        except EoraccError as error:
            if choice != "auto":
                raise
            results.append(EngineParity(backend, "", str(error), ()))
            continue
        record = read_record(folder / backend / PARITY_FILE)
        logits = tuple(_check_engine(opened.decoder, record.cases))
        results.append(EngineParity(backend, opened.device, None, logits))
    return results


def _check_engine(decoder: Decoder, cases: Iterable[ParityCase]) -> Iterator[CaseParity]:
    """Compare calls of ``decoder`` with reference logits.

    Args:
      decoder: opened engines.
      cases: calls and their logits.

    Raises:
      BackendError: a call fails.
    """
    for case in cases:
        rows = decoder.new_rows()
        logits = _run(rows, case, decoder.vocabulary)
        tolerance = case.tolerance + case.rounding
        yield compare_logits(case, logits, through="engine", tolerance=tolerance)


def _run(rows: Rows, case: ParityCase, vocabulary: int) -> NDArray[np.float32]:
    """Logits ``[B, S, V]``, NaN at padding, from the calls that generation makes.

    A chunk of one token is decoded for all rows in one call; longer chunks are processed row by
    row.
    """
    batch, length = case.input_ids.shape
    lengths = case.attention_mask.sum(axis=1)
    logits = np.full((batch, length, vocabulary), np.nan, np.float32)
    for row in range(batch):
        rows.clear(row)
    start = 0
    for size in case.chunks:
        # Rows are padded on the right, so that their tokens are at the beginning of the chunk.
        own = np.clip(lengths - start, 0, size)
        together = bool(start) and size == 1 and bool((own == 1).all())
        if together:
            tokens = case.input_ids[:, start].tolist()
            logits[:, start] = rows.decode(tokens, [NO_PLACE] * batch)
        else:
            for row in np.flatnonzero(own).tolist():
                end = start + int(own[row])
                part = case.input_ids[row, start:end].tolist()
                logits[row, start:end] = rows.prefill(row, part, adapter=NO_PLACE, keep=len(part))
        start += size
    return logits
