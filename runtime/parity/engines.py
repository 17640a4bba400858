"""Check that engines compute what the compressed model computed in eager PyTorch.

The record is the one that the graph was checked with when the artifact was built, beside it. An
engine may be off by more than the graph's float32 twin: by what rounding every value to its type
does, which has been measured then and is part of the record.
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
from eoracc.runtime.parity.check import PARITY_FILE, CaseParity, ParityCase, ParityRecord

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.runtime.artifact.manifest import Manifest
    from eoracc.runtime.decode.decoder import Decoder, Rows

__all__ = ["EngineParity", "check_engines"]


@dataclass(frozen=True)
class EngineParity:
    """What the engines of a target compute on this machine.

    Attributes:
      backend: the target.
      device: the GPU, in words; empty where they were not run.
      not_run: why they were not; None where they were.
      logits: per way of calling the model.
    """

    backend: Backend
    device: str
    not_run: str | None
    logits: tuple[CaseParity, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing that was run is off; also where nothing was run."""
        return all(case.passed for case in self.logits)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "passed": self.passed}


def check_engines(folder: Path, manifest: Manifest, choice: BackendChoice) -> list[EngineParity]:
    """Run the engines of a verified artifact on this machine's GPU and compare with their record.

    Args:
      folder: the artifact.
      manifest: what it says of itself, verified.
      choice: whose engines: of one backend, which must run then, or with ``auto`` of every one,
        where those that do not run here say why.

    Raises:
      EoraccError: the engines that were asked for do not run on this machine.
    """
    if choice == "onnxruntime":
        return []
    wanted: Sequence[Backend] = [name for name in backends_of(manifest) if name != "onnxruntime"]
    if choice != "auto":
        wanted = [choice]
    found = []
    for backend in wanted:
        try:
            opened = open_backend(folder, manifest, backend, threads=1, adapters=())
        except EoraccError as error:
            if choice != "auto":
                raise
            found.append(EngineParity(backend, "", str(error), ()))
            continue
        record = ParityRecord.load(folder / backend / PARITY_FILE)
        logits = tuple(_check_engine(opened.decoder, record.cases))
        found.append(EngineParity(backend, opened.device, None, logits))
    return found


def _check_engine(decoder: Decoder, cases: Iterable[ParityCase]) -> Iterator[CaseParity]:
    """Compare calls of ``decoder`` with what they should give.

    Args:
      decoder: engines, opened.
      cases: what the calls are, and their logits.

    Raises:
      BackendError: a call fails.
    """
    for case in cases:
        rows = decoder.new_rows()
        logits = _run(rows, case, decoder.vocabulary)
        error = np.abs(logits[case.rows, case.columns] - case.logits).max()
        tolerance = case.tolerance + case.rounding
        yield CaseParity(
            through="engine",
            name=case.name,
            max_error=float(error),
            tolerance=tolerance,
            passed=bool(error <= tolerance),
        )


def _run(rows: Rows, case: ParityCase, vocabulary: int) -> NDArray[np.float32]:
    """Logits ``[B, S, V]``, NaN at padding: calls as generating makes them.

    A chunk of one token is decoded, all rows that have one in a call; longer ones are processed row
    by row.
    """
    batch, length = case.input_ids.shape
    lengths = case.attention_mask.sum(axis=1)
    logits = np.full((batch, length, vocabulary), np.nan, np.float32)
    for row in range(batch):
        rows.clear(row)
    start = 0
    for size in case.chunks:
        # Rows are padded on the right: whoever has tokens here has them from the chunk's beginning.
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
