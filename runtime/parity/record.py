"""The record of a parity check: reference values that the build computed in eager PyTorch.

A file keeps outputs of linears in a byte each (:mod:`eoracc.runtime.parity.linear_codes`), and of
what is too much for a small folder every so many-th value. Files of older builds, without a
version, have all values in float32.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.printable import quoted
from eoracc.runtime.parity.linear_codes import HALF_STEP, LinearCodes, decode, encode
from eoracc.runtime.parity.sample import Sample
from eoracc.tensor_files import open_arrays

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PARITY_FILE", "ParityCase", "ParityLinear", "ParityRecord"]

PARITY_FILE = "parity.safetensors"
"""File of a record, at the artifact's root and in the folder of each TensorRT target."""

_READER = Reader(ArtifactError, "build the artifact again")
_VERSION = 2
_CASE_ARRAYS = ("input_ids", "attention_mask", "rows", "columns", "logits")


@dataclass(frozen=True, eq=False)
class ParityLinear:
    """Reference outputs of one linear.

    Attributes:
      name: of the linear and of its node.
      outputs: ``float32 [rows, N]`` for the record's inputs of width K.
      tolerance: largest allowed deviation per output, ``float32 [rows, N]``.
      rounding: further deviation allowed to the native library, which may round between integer
        factors, ``float32 [rows, N]``; None where it does not.
      sample: which of the linear's outputs these are; None for all.
      codes: that the arrays are decoded from, so that outputs are off by up to
        :data:`~eoracc.runtime.parity.linear_codes.HALF_STEP` tolerances, and by any multiple of
        the codes' period. None for arrays that are whole.
    """

    name: str
    outputs: NDArray[np.float32]
    tolerance: NDArray[np.float32]
    rounding: NDArray[np.float32] | None = None
    sample: Sample | None = None
    codes: LinearCodes | None = None

    @property
    def kept(self) -> Sample:
        """Which of the linear's outputs are kept, the same ones of each row."""
        return self.sample or Sample(self.outputs.shape[1])

    def shares(self, outputs: NDArray[np.float32], *, rounded: bool) -> NDArray[np.float64]:
        """Deviations as shares of what is allowed, ``[rows, N]`` of the outputs that are kept.

        Args:
          outputs: all of the linear, for the record's inputs.
          rounded: whether they may be rounded between factors.

        Returns:
          Shares of at most 1 pass; what is not, NaN too, is infinite.
        """
        tolerance = self.tolerance.astype(np.float64)
        error = outputs[:, self.kept.places()].astype(np.float64) - self.outputs
        allowed = tolerance
        if self.codes is not None:
            period = self.codes.period * tolerance
            with np.errstate(invalid="ignore"):
                error -= period * np.rint(error / period)
            allowed = allowed + HALF_STEP * tolerance
        if rounded and self.rounding is not None:
            allowed = allowed + self.rounding
        error = np.abs(error)
        # Written so that NaN fails: only a value within what is allowed passes.
        return np.where(error <= allowed, error / (allowed + 1e-45), np.inf)


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
      logits: ``float32 [P, V]``, of those that are kept.
      tolerance: largest allowed deviation of a logit.
      rounding: further deviation allowed where values are rounded: activations to int8 by the
        native library, or every value to the graph's narrow type on a GPU. 0 where all is float32.
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
    sample: Sample | None = None

    @property
    def kept(self) -> Sample:
        """Which logits are kept of each token."""
        return self.sample or Sample(self.logits.shape[1])

    def kept_logits(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Those of ``logits [P, V]``, of the kept tokens, that the record has, ``[P, V kept]``."""
        places = np.stack([self.kept.places(token) for token in range(len(logits))])
        return np.take_along_axis(logits, places, axis=1)


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

    def encode(self) -> bytes:
        """The content of the record's file, in the format of safetensors."""
        arrays: dict[str, NDArray[np.generic]] = {f"inputs/{k}": v for k, v in self.inputs.items()}
        if self.linears:
            codes = [_codes(linear) for linear in self.linears]
            arrays["linears/outputs"] = np.concatenate([one.outputs.ravel() for one in codes])
            arrays["linears/levels"] = np.concatenate([one.levels for one in codes])
            arrays["linears/scales"] = np.stack([one.scales for one in codes])
            arrays["linears/bytes"] = np.array([len(one.outputs) for one in codes], np.uint8)
        for position, case in enumerate(self.cases):
            for part in _CASE_ARRAYS:
                arrays[f"case/{position}/{part}"] = getattr(case, part)
        index = {
            "version": _VERSION,
            "linears": [[linear.name, *astuple(linear.kept)] for linear in self.linears],
            "cases": [
                {
                    "name": c.name,
                    "chunks": list(c.chunks),
                    "tolerance": c.tolerance,
                    "rounding": c.rounding,
                    "sample": astuple(c.kept),
                }
                for c in self.cases
            ],
            "compression_effect": self.compression_effect,
        }
        return save(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            metadata={"parity": json.dumps(index, separators=(",", ":"))},
        )

    def save(self, path: Path) -> None:
        """Write the record's file."""
        path.write_bytes(self.encode())

    @classmethod
    def load(cls, path: Path) -> ParityRecord:
        """Read what :meth:`save` wrote; whether its arrays fit one another is not checked.

        Raises:
          ArtifactError: the file is missing, damaged, or of another version.
        """
        if not path.is_file():
            raise ArtifactError(
                f"{path} is missing: build the artifact with 'verify.parity: true' and without "
                "--lean"
            )
        with open_arrays(path, _READER) as file:
            index = _READER.parse((file.metadata() or {}).get("parity", ""), f"{path}: metadata")
            version = index.get("version", 1)
            if version not in (1, _VERSION):
                raise ArtifactError(
                    f"{path}: has version {quoted(version)}, this eoracc reads 1 and {_VERSION}: "
                    "use the eoracc that built it, or build again"
                )
            names = set(file.keys())
            widths = [name.partition("/")[2] for name in names if name.startswith("inputs/")]
            linears = _linears(file, index) if version > 1 else _old_linears(file, index, names)
            return cls(
                inputs={int(width): file.get_tensor(f"inputs/{width}") for width in sorted(widths)},
                linears=list(linears),
                cases=[
                    ParityCase(
                        name=case["name"],
                        chunks=tuple(case["chunks"]),
                        tolerance=case["tolerance"],
                        rounding=case.get("rounding", 0.0),  # absent in older artifacts
                        sample=Sample(*case["sample"]) if "sample" in case else None,
                        **{part: file.get_tensor(f"case/{i}/{part}") for part in _CASE_ARRAYS},
                    )
                    for i, case in enumerate(index["cases"])
                ],
                compression_effect=index["compression_effect"],
            )


def _codes(linear: ParityLinear) -> LinearCodes:
    return linear.codes or encode(linear.outputs, linear.tolerance, linear.rounding)


def _linears(file: Any, index: Mapping[str, Any]) -> Iterator[ParityLinear]:  # noqa: ANN401 - safetensors has no types
    if not index["linears"]:
        return
    outputs, levels = (file.get_tensor(f"linears/{part}") for part in ("outputs", "levels"))
    scales = file.get_tensor("linears/scales")
    widths = file.get_tensor("linears/bytes").tolist()
    rows = scales.shape[2] - 1
    for (name, *sample), own_scales, width in zip(index["linears"], scales, widths, strict=True):
        kept = Sample(*sample)
        size = width * rows * kept.count
        codes = LinearCodes(
            outputs[:size].reshape(width, rows, kept.count), levels[: kept.count], own_scales
        )
        outputs, levels = outputs[size:], levels[kept.count :]
        yield ParityLinear(name, *decode(codes), kept, codes)


def _old_linears(
    file: Any,  # noqa: ANN401 - likewise
    index: Mapping[str, Any],
    names: Collection[str],
) -> Iterator[ParityLinear]:
    """The linears of a file without a version."""
    for name in index["linears"]:
        rounding = f"linear/{name}/rounding"
        yield ParityLinear(
            name,
            file.get_tensor(f"linear/{name}/outputs"),
            file.get_tensor(f"linear/{name}/tolerance"),
            file.get_tensor(rounding) if rounding in names else None,
        )
