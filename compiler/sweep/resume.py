"""Keep a sweep's finished blocks on disk, so that an interrupted build goes on where it was.

The folder holds what was made of every finished linear, the activations at the point reached, and
``state.json``, which is replaced last: whatever it names is complete. All arrays are safetensors.
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

__all__ = ["AdapterCheckpoint", "SweepCheckpoint"]

Array = NDArray[np.generic]
_STATE = "state.json"

SAVE_INTERVAL_S = 10.0
"""Least time between two saves: the activations of a small model take as long to write as a block
takes to compress, and an interruption may cost a few seconds of work."""

_FACTORS = ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale")


@dataclass
class _Checkpoint:
    """Progress of one forward sweep.

    Attributes:
      folder: made on the first save.
      key: digest of all that the result depends on; a folder with another key is discarded.
    """

    folder: Path
    key: str
    _saved_s: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._saved_s = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last save is long enough ago for another one."""
        return time.monotonic() - self._saved_s >= SAVE_INTERVAL_S

    def _finished(
        self, state: Mapping[str, Any]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Array]]]:
        """What is known of each finished linear, with the arrays of the file that holds it.

        The factors of weights are mapped and stay where they are.
        """
        for file in state["operands"]:
            path = self.folder / file["name"]
            arrays = _map_factors(path)
            with safe_open(path, framework="numpy") as stored:
                arrays |= {name: stored.get_tensor(name) for name in {*stored.keys()} - {*arrays}}
            for meta in file["linears"]:
                yield meta, arrays

    def _read_activations(self, state: Mapping[str, Any], batches: Sequence[Batch]) -> None:
        # None were kept of a sweep that has reached its end.
        for batch, name in zip(batches, state["activations"], strict=False):
            batch.values.clear()
            batch.values.update(load_file(self.folder / name))

    def _write(
        self,
        position: int,
        metas: Sequence[Mapping[str, Any]],
        arrays: dict[str, Array],
        batches: Sequence[Batch],
    ) -> str:
        """Add linears, which have been finished since the last time, to what is kept.

        Returns:
          The name of the file that holds their arrays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self._state() or {"key": self.key, "operands": [], "activations": []}
        name = f"operands-{position:05d}.safetensors"
        save_file(arrays, self.folder / name)
        stale: list[str] = state["activations"]
        live: list[str] = []
        # A file each: what is written is copied on its way, and all at once would be the most
        # memory that a build takes.
        for i, batch in enumerate(batches):
            live.append(f"activations-{position:05d}-{i:04d}.safetensors")
            values = {key: np.ascontiguousarray(value) for key, value in batch.values.items()}
            save_file(values, self.folder / live[-1])
        state["operands"].append({"name": name, "linears": metas})
        state.update(activations=live, position=position)
        partial = self.folder / f"{_STATE}.partial"
        partial.write_text(json.dumps(state))
        partial.replace(self.folder / _STATE)
        for old in set(stale) - set(live):
            (self.folder / old).unlink(missing_ok=True)
        self._saved_s = time.monotonic()
        return name

    def _kept(self) -> set[str]:
        """Names of the linears that are on disk."""
        state = self._state() or {"operands": []}
        return {meta["name"] for file in state["operands"] for meta in file["linears"]}

    def _state(self) -> dict[str, Any] | None:
        path = self.folder / _STATE
        if not path.exists():
            return None
        state: dict[str, Any] = json.loads(path.read_text())
        if state["key"] != self.key:
            shutil.rmtree(self.folder)
            return None
        return state


class SweepCheckpoint(_Checkpoint):
    """Progress of the sweep that compresses."""

    def resume(
        self,
        linears: Sequence[Linear],
        batches: Sequence[Batch],
        comparisons: Mapping[str, dict[str, LowRank]],
    ) -> int:
        """Put back what was kept into the arguments; return how many levels are finished."""
        state = self._state()
        if state is None:
            return 0
        by_name = {linear.name: linear for linear in linears}
        for meta, arrays in self._finished(state):
            _restore(by_name[meta["name"]], meta, arrays, comparisons)
        self._read_activations(state, batches)
        return int(state["position"])

    def save(
        self,
        position: int,
        linears: Sequence[Linear],
        batches: Sequence[Batch],
        comparisons: Mapping[str, Mapping[str, LowRank]],
    ) -> None:
        """Keep what has been finished since the last save; ``position`` levels are.

        Args:
          position: levels that are finished.
          linears: of those levels. The factors of those that have been factorised are mapped from
            what is kept, and no longer held in memory.
          batches: the activations at the point reached.
          comparisons: the comparators' factors.
        """
        kept = self._kept()
        # What a quantizing pass leaves out has an error of zero on record, and no weight to keep.
        fresh = [
            linear
            for linear in linears
            if linear.name not in kept
            and (linear.compressed is not None or linear.factorized is not None or linear.errors)
        ]
        arrays: dict[str, Array] = {}
        metas = [_keep(linear, arrays, comparisons) for linear in fresh]
        name = self._write(position, metas, arrays, batches)
        mapped = _map_factors(self.folder / name)
        for linear in fresh:
            if linear.factorized is not None:
                linear.hold_factors(_factorized(linear.name, mapped))


class AdapterCheckpoint(_Checkpoint):
    """Progress of the sweep that solves one adapter."""

    def resume(
        self,
        factors: dict[str, LowRank],
        figures: dict[str, dict[str, float]],
        batches: Sequence[Batch],
    ) -> int:
        """Put back what was kept into the arguments; return how many levels are finished.

        Args:
          factors: of the adapter, by linear.
          figures: what is on record of each of them.
          batches: whose activations are set.
        """
        state = self._state()
        if state is None:
            return 0
        for meta, arrays in self._finished(state):
            factors[meta["name"]] = _restore_factors(meta["name"], "", meta["bits"], arrays)
            figures[meta["name"]] = meta["figures"]
        self._read_activations(state, batches)
        return int(state["position"])

    def save(
        self,
        position: int,
        factors: Mapping[str, LowRank],
        figures: Mapping[str, Mapping[str, float]],
        batches: Sequence[Batch],
    ) -> None:
        """Keep what has been finished since the last save; ``position`` levels are."""
        kept = self._kept()
        arrays: dict[str, Array] = {}
        metas = [
            {
                "name": name,
                "bits": _keep_factors(name, "", found, arrays),
                "figures": figures[name],
            }
            for name, found in factors.items()
            if name not in kept
        ]
        self._write(position, metas, arrays, batches)


def _keep(
    linear: Linear, arrays: dict[str, Array], comparisons: Mapping[str, Mapping[str, LowRank]]
) -> dict[str, Any]:
    meta = {"name": linear.name, "errors": linear.errors, "notes": linear.notes}
    if linear.factorized is not None:
        # As the graph holds them, so that it can map them from the file.
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
        name: found[linear.name] for name, found in comparisons.items() if linear.name in found
    }
    factors = compared if linear.factors is None else {"": linear.factors, **compared}
    return meta | {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "factors": {
            name: _keep_factors(linear.name, name, found, arrays) for name, found in factors.items()
        },
    }


def _restore(
    linear: Linear,
    meta: Mapping[str, Any],
    arrays: Mapping[str, Array],
    comparisons: Mapping[str, dict[str, LowRank]],
) -> None:
    # Whole: what an earlier sweep has put there is part of what was kept.
    linear.errors = dict(meta["errors"])
    linear.notes[:] = meta["notes"]
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
    """The factors of weights in a safetensors file, mapped: what is used of them is read then."""
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


def _keep_factors(linear: str, name: str, factors: LowRank, arrays: dict[str, Array]) -> int:
    """Put the operands of ``factors`` into ``arrays``; return the bits of integer ones."""
    for part in _FACTORS:
        array = getattr(factors, part)
        if array is not None:
            arrays[f"{linear}/{part}/{name}"] = np.ascontiguousarray(array)
    return factors.bits


def _restore_factors(linear: str, name: str, bits: int, arrays: Mapping[str, Array]) -> LowRank:
    stored: dict[str, Any] = {part: arrays.get(f"{linear}/{part}/{name}") for part in _FACTORS}
    return LowRank(**stored, bits=bits)
