"""Save the state of a sweep, so that an interrupted build resumes after the last saved block.

The folder holds the result of every finished linear, the activations at the level reached, and
``state.json``. That file is replaced last: the files that it names are complete. All arrays are
safetensors.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from eoracc.compiler.sweep.batch import Batch
from eoracc.passes.graph.linears import Factorized, Linear
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["AdapterState", "SweepState"]

Array = NDArray[np.generic]
_INDEX = "state.json"

SAVE_INTERVAL_S = 10.0
"""Least time between two saves. Writing the activations of a small model takes as long as
compressing a block, and an interruption may cost a few seconds of work."""

_FACTORS = ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale")


@dataclass
class _State:
    """The saved state of one forward sweep.

    Attributes:
      folder: created by the first save.
      key: digest of everything that the result depends on; a folder with another key is deleted.
    """

    folder: Path
    key: str
    _saved_s: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._saved_s = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed since the last save."""
        return time.monotonic() - self._saved_s >= SAVE_INTERVAL_S

    def _finished(
        self, index: Mapping[str, Any]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Array]]]:
        """The record of each finished linear, with the arrays of its file.

        The factors of factorised weights are memory-mapped.
        """
        for file in index["operands"]:
            path = self.folder / file["name"]
            arrays = _map_factors(path)
            with safe_open(path, framework="numpy") as stored:
                arrays |= {name: stored.get_tensor(name) for name in {*stored.keys()} - {*arrays}}
            for meta in file["linears"]:
                yield meta, arrays

    def _read_activations(self, index: Mapping[str, Any], batches: Sequence[Batch]) -> None:
        # A sweep that has reached its end has saved none.
        for batch, name in zip(batches, index["activations"], strict=False):
            batch.values.clear()
            batch.values.update(load_file(self.folder / name))

    def _write(
        self,
        position: int,
        metas: Sequence[Mapping[str, Any]],
        arrays: dict[str, Array],
        batches: Sequence[Batch],
    ) -> str:
        """Save the linears that have been finished since the last save.

        Args:
          position: levels that are finished.
          metas: a record of each linear.
          arrays: their operands.
          batches: the activations at the level reached.

        Returns:
          The name of the file with the arrays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self._index() or {"key": self.key, "operands": [], "activations": []}
        name = f"operands-{position:05d}.safetensors"
        save_file(arrays, self.folder / name)
        stale: list[str] = index["activations"]
        live: list[str] = []
        # One file per batch: writing copies the arrays, and a copy of all at once would be the
        # peak of a build's memory.
        for i, batch in enumerate(batches):
            live.append(f"activations-{position:05d}-{i:04d}.safetensors")
            values = {key: np.ascontiguousarray(value) for key, value in batch.values.items()}
            save_file(values, self.folder / live[-1])
        index["operands"].append({"name": name, "linears": metas})
        index.update(activations=live, position=position)
        partial = self.folder / f"{_INDEX}.partial"
        partial.write_text(json.dumps(index))
        partial.replace(self.folder / _INDEX)
        for old in set(stale) - set(live):
            (self.folder / old).unlink(missing_ok=True)
        self._saved_s = time.monotonic()
        return name

    def _saved_names(self) -> set[str]:
        """Names of the saved linears."""
        index = self._index() or {"operands": []}
        return {meta["name"] for file in index["operands"] for meta in file["linears"]}

    def _index(self) -> dict[str, Any] | None:
        """The content of state.json; None where there is none with the same key."""
        path = self.folder / _INDEX
        if not path.exists():
            return None
        index: dict[str, Any] = json.loads(path.read_text())
        if index["key"] != self.key:
            shutil.rmtree(self.folder)
            return None
        return index


class SweepState(_State):
    """The saved state of a sweep that compresses."""

    def resume(
        self,
        linears: Sequence[Linear],
        batches: Sequence[Batch],
        comparisons: Mapping[str, dict[str, LowRank]],
    ) -> int:
        """Restore the saved state into the arguments.

        Args:
          linears: of the graph, in execution order.
          batches: whose activations are set.
          comparisons: factors of each comparator, by linear.

        Returns:
          How many levels are finished.
        """
        index = self._index()
        if index is None:
            return 0
        by_name = {linear.name: linear for linear in linears}
        for meta, arrays in self._finished(index):
            _restore(by_name[meta["name"]], meta, arrays, comparisons)
        self._read_activations(index, batches)
        return int(index["position"])

    def save(
        self,
        position: int,
        linears: Sequence[Linear],
        batches: Sequence[Batch],
        comparisons: Mapping[str, Mapping[str, LowRank]],
    ) -> None:
        """Save the linears that have been finished since the last save.

        Args:
          position: levels that are finished.
          linears: of those levels. The factors of factorised ones are memory-mapped from the saved
            file afterwards, to free the memory.
          batches: the activations at the level reached.
          comparisons: the comparators' factors.
        """
        saved = self._saved_names()
        # A linear that the passes skip has an error of zero on record, and no weight to save.
        fresh = [
            linear
            for linear in linears
            if linear.name not in saved
            and (
                linear.compressed is not None
                or linear.factorized is not None
                or linear.record.errors
            )
        ]
        arrays: dict[str, Array] = {}
        metas = [_pack(linear, arrays, comparisons) for linear in fresh]
        name = self._write(position, metas, arrays, batches)
        mapped = _map_factors(self.folder / name)
        for linear in fresh:
            if linear.factorized is not None:
                linear.hold_factors(_factorized(linear.name, mapped))


class AdapterState(_State):
    """The saved state of a sweep that solves one adapter."""

    def resume(
        self,
        factors: dict[str, LowRank],
        figures: dict[str, dict[str, float]],
        batches: Sequence[Batch],
    ) -> int:
        """Restore the saved state into the arguments.

        Args:
          factors: of the adapter, by linear.
          figures: errors of each linear.
          batches: whose activations are set.

        Returns:
          How many levels are finished.
        """
        index = self._index()
        if index is None:
            return 0
        for meta, arrays in self._finished(index):
            factors[meta["name"]] = _restore_factors(meta["name"], "", meta["bits"], arrays)
            figures[meta["name"]] = meta["figures"]
        self._read_activations(index, batches)
        return int(index["position"])

    def save(
        self,
        position: int,
        factors: Mapping[str, LowRank],
        figures: Mapping[str, Mapping[str, float]],
        batches: Sequence[Batch],
    ) -> None:
        """Save the factors that have been solved since the last save.

        Args:
          position: levels that are finished.
          factors: of the adapter, by linear.
          figures: errors of each linear.
          batches: the activations at the level reached.
        """
        saved = self._saved_names()
        arrays: dict[str, Array] = {}
        metas = [
            {
                "name": name,
                "bits": _pack_factors(name, "", low_rank, arrays),
                "figures": figures[name],
            }
            for name, low_rank in factors.items()
            if name not in saved
        ]
        self._write(position, metas, arrays, batches)


def _pack(
    linear: Linear, arrays: dict[str, Array], comparisons: Mapping[str, Mapping[str, LowRank]]
) -> dict[str, Any]:
    meta = {"name": linear.name, "errors": linear.record.errors, "notes": linear.record.notes}
    if linear.factorized is not None:
        # In the layout of the graph, which maps them from the file.
        arrays[f"{linear.name}/u"] = linear.factorized.u.T
        arrays[f"{linear.name}/v"] = linear.factorized.v.T
    weight = linear.compressed
    if weight is None:
        return meta
    arrays[f"{linear.name}/packed"] = weight.packed
    arrays[f"{linear.name}/scales"] = weight.scales
    if weight.zero_points is not None:
        arrays[f"{linear.name}/zero_points"] = weight.zero_points
    compared = {
        name: factors[linear.name]
        for name, factors in comparisons.items()
        if linear.name in factors
    }
    factors = compared if linear.factors is None else {"": linear.factors, **compared}
    return meta | {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "factors": {
            name: _pack_factors(linear.name, name, low_rank, arrays)
            for name, low_rank in factors.items()
        },
    }


def _restore(
    linear: Linear,
    meta: Mapping[str, Any],
    arrays: Mapping[str, Array],
    comparisons: Mapping[str, dict[str, LowRank]],
) -> None:
    # Replaced, not extended: the entries of earlier sweeps have been saved too.
    linear.record.errors = dict(meta["errors"])
    linear.record.notes[:] = meta["notes"]
    if f"{linear.name}/u" in arrays:
        product = _factorized(linear.name, arrays)
        linear.factorize(product.u, product.v)
    if "bits" not in meta:
        return
    linear.quantize(
        NBitsWeight(
            packed=arrays[f"{linear.name}/packed"],  # type: ignore[arg-type]
            scales=arrays[f"{linear.name}/scales"],  # type: ignore[arg-type]
            zero_points=arrays.get(f"{linear.name}/zero_points"),  # type: ignore[arg-type]
            bits=meta["bits"],
            group_size=meta["group_size"],
            in_features=linear.in_features,
        )
    )
    for name, bits in meta["factors"].items():
        factors = _restore_factors(linear.name, name, bits, arrays)
        if name:
            comparisons[name][linear.name] = factors
        else:
            linear.compensate(factors)


def _factorized(linear: str, arrays: Mapping[str, Array]) -> Factorized:
    """The factors of ``linear`` among ``arrays``, as views of those."""
    return Factorized(arrays[f"{linear}/u"].T, arrays[f"{linear}/v"].T)  # type: ignore[arg-type]


def _map_factors(path: Path) -> dict[str, Array]:
    """The factors of factorised weights in a safetensors file, memory-mapped."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = {name: entry for name, entry in header.items() if name.endswith(("/u", "/v"))}
    if not places:
        return {}
    content = np.asarray(np.memmap(path, np.uint8, "r", offset=8 + length))
    return {
        name: content[slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
        for name, entry in places.items()
    }


def _pack_factors(linear: str, name: str, factors: LowRank, arrays: dict[str, Array]) -> int:
    """Put the operands of ``factors`` into ``arrays``; return the bits of integer ones."""
    for part in _FACTORS:
        array = getattr(factors, part)
        if array is not None:
            arrays[f"{linear}/{part}/{name}"] = np.ascontiguousarray(array)
    return factors.bits


def _restore_factors(linear: str, name: str, bits: int, arrays: Mapping[str, Array]) -> LowRank:
    stored: dict[str, Any] = {part: arrays.get(f"{linear}/{part}/{name}") for part in _FACTORS}
    return LowRank(**stored, bits=bits)
