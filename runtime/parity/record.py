"""The record of a parity check: reference values that the build computed in eager PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.tensor_files import open_arrays

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PARITY_FILE", "ParityCase", "ParityLinear", "ParityRecord"]

PARITY_FILE = "parity.safetensors"
"""File of a record, at the artifact's root and in the folder of each TensorRT target."""

_READER = Reader(ArtifactError, "build the artifact again")


@dataclass(frozen=True, eq=False)
class ParityLinear:
    """Reference outputs of one linear.

    Attributes:
      name: of the linear and of its node.
      outputs: ``float32 [rows, N]`` for the record's inputs of width K.
      tolerance: largest allowed deviation per output, ``float32 [rows, N]``.
      rounding: further deviation allowed to the native library, which may round between integer
        factors, ``float32 [rows, N]``; None where it does not.
    """

    name: str
    outputs: NDArray[np.float32]
    tolerance: NDArray[np.float32]
    rounding: NDArray[np.float32] | None = None


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
            if linear.rounding is not None:
                arrays[f"linear/{linear.name}/rounding"] = linear.rounding
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
        """Read what :meth:`save` wrote; whether its arrays fit one another is not checked.

        Raises:
          ArtifactError: the file is missing or damaged.
        """
        if not path.is_file():
            raise ArtifactError(
                f"{path} is missing: build the artifact with 'verify.parity: true' and without "
                "--lean"
            )
        with open_arrays(path, _READER) as file:
            index = _READER.parse((file.metadata() or {}).get("parity", ""), f"{path}: metadata")
            names = set(file.keys())
            widths = [name.partition("/")[2] for name in names if name.startswith("inputs/")]

            def rounding(linear: str) -> NDArray[np.float32] | None:
                stored = f"linear/{linear}/rounding"
                return file.get_tensor(stored) if stored in names else None

            return cls(
                inputs={int(width): file.get_tensor(f"inputs/{width}") for width in sorted(widths)},
                linears=[
                    ParityLinear(
                        name,
                        file.get_tensor(f"linear/{name}/outputs"),
                        file.get_tensor(f"linear/{name}/tolerance"),
                        rounding(name),
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
