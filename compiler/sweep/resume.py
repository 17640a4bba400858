"""Save the state of a sweep, so that an interrupted build resumes after the last saved block.

The folder holds the result of every finished linear, the activations at the level reached, and
``state.json``. That record is replaced last: the files that it names are complete and on disk. All
arrays are safetensors.

Files are compared with their digests when the sweep resumes. It goes on before the first damaged
file of results. Activations that are damaged, or of a later block, are computed again by a forward
pass through the restored linears.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typing_extensions import override

from eoracc.compiler.kept.folder import KeptFolder
from eoracc.compiler.kept.interval import SaveInterval
from eoracc.compiler.kept.record import read_record
from eoracc.compiler.sweep.batch import Batch
from eoracc.passes.graph.linears import Factorized, Linear
from eoracc.passes.graph.record import LinearWarning
from eoracc.plugins.operands.dense import DenseWeight, StoredWeight
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["AdapterState", "Resumed", "SweepState", "saved_spent_s"]

Array = NDArray[np.generic]
_INDEX = "state.json"

_FLOATS = ("/u", "/v", "/dense")
"""Ends of the names of arrays that are memory-mapped."""

_FACTORS = ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale")


@dataclass(frozen=True)
class Resumed:
    """The point from which a sweep goes on.

    Attributes:
      position: levels whose linears have been restored.
      has_activations: whether the batches are at that level, and not at the graph inputs.
    """

    position: int
    has_activations: bool = True


class _State:
    """The saved state of one forward sweep.

    Attributes:
      folder: created by the first save.
      interval: tells when the next save is due.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Read nothing yet.

        Args:
          folder: of the state.
          key: digest of everything that the result depends on; the state of another key is
            discarded.
        """
        self.folder = folder
        self._kept = KeptFolder(folder, key)
        self.interval = SaveInterval()
        self._read: dict[str, Any] | None = None

    def discard(self) -> None:
        """Remove the saved state."""
        self._kept.clear()
        self._read = None

    def _finished(self) -> Iterator[tuple[dict[str, Any], dict[str, Array]]]:
        """The record of each finished linear, with the arrays of its file.

        Weights of floats, factors or pruned, are memory-mapped.
        """
        for step in self._index["steps"]:
            path = self.folder / step["file"]["name"]
            arrays = _map_floats(path)
            with safe_open(path, framework="numpy") as stored:
                arrays |= {name: stored.get_tensor(name) for name in {*stored.keys()} - {*arrays}}
            for meta in step["linears"]:
                yield meta, arrays

    def _read_activations(self, batches: Sequence[Batch]) -> Resumed:
        """Set the activations of ``batches``, where they are sound."""
        position = int(self._index["position"])
        saved = self._index["activations"]
        if saved is None or not self._kept.holds(saved):
            return Resumed(position, has_activations=False)
        # A sweep that has reached its end has saved none.
        for batch, file in zip(batches, saved, strict=False):
            batch.values.clear()
            batch.values.update(load_file(self.folder / file["name"]))
        return Resumed(position)

    def _write(
        self,
        position: int,
        metas: Sequence[Mapping[str, Any]],
        arrays: dict[str, Array],
        batches: Sequence[Batch],
    ) -> Path:
        """Save the linears that have been finished since the last save.

        Args:
          position: levels that are finished.
          metas: a record of each linear.
          arrays: their operands.
          batches: the activations at the level reached.

        Returns:
          The file with the arrays.
        """
        with self.interval.saving():
            name = f"operands-{position:05d}.safetensors"
            self._kept.put(name, _saving(arrays))
            live = []
            # One file per batch: writing copies the arrays, and a copy of all at once would be the
            # peak of a build's memory.
            for place, batch in enumerate(batches):
                live.append(f"activations-{position:05d}-{place:04d}.safetensors")
                values = {key: np.ascontiguousarray(value) for key, value in batch.values.items()}
                self._kept.put(live[-1], _saving(values))
            operands, *activations = self._kept.seal([name, *live])
            step = {"position": position, "file": operands, "linears": metas}
            steps = [*self._index["steps"], step]
            self._publish(
                {"position": position, "steps": steps, "activations": activations, **self._extras()}
            )
        return self.folder / name

    def _extras(self) -> Mapping[str, Any]:
        """Further entries of the record."""
        return {}

    def _saved_names(self) -> set[str]:
        """Names of the saved linears."""
        return {meta["name"] for step in self._index["steps"] for meta in step["linears"]}

    @property
    def _index(self) -> dict[str, Any]:
        """The content of the record: ``position``, ``steps`` and ``activations``.

        When it is read, what was saved after a damaged file of results is cut off.
        """
        if self._read is None:
            content = self._kept.read(_INDEX) or {"position": 0, "steps": [], "activations": []}
            steps = list(takewhile(lambda step: self._kept.holds([step["file"]]), content["steps"]))
            self._read = content
            if len(steps) < len(content["steps"]):
                position = steps[-1]["position"] if steps else 0
                self._publish({"position": position, "steps": steps, "activations": None})
        return self._read

    def _publish(self, content: dict[str, Any]) -> None:
        """Replace the record, and remove the files that it does not name."""
        self._kept.write(_INDEX, content)
        self._read = content
        named = {_INDEX}
        named.update(step["file"]["name"] for step in content["steps"])
        named.update(file["name"] for file in content["activations"] or ())
        self._kept.keep_only(named)


class SweepState(_State):
    """The saved state of a sweep that compresses.

    Attributes:
      spent_s: seconds of processor time of the passes, where a sweep of several contenders has
        measured them; saved with the state.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """See :class:`_State`."""
        super().__init__(folder, key)
        self.spent_s = 0.0

    @override
    def _extras(self) -> Mapping[str, Any]:
        return {"spent_s": self.spent_s}

    def resume(
        self,
        linears: Sequence[Linear],
        batches: Sequence[Batch],
        comparisons: Mapping[str, dict[str, LowRank]],
    ) -> Resumed:
        """Restore the saved state into the arguments.

        Args:
          linears: of the graph, in execution order.
          batches: whose activations are set.
          comparisons: factors of each comparator, by linear.

        Returns:
          Where to go on.
        """
        self.spent_s = self._index.get("spent_s", 0.0)
        by_name = {linear.name: linear for linear in linears}
        for meta, arrays in self._finished():
            _restore(by_name[meta["name"]], meta, arrays, comparisons)
        return self._read_activations(batches)

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
          linears: of those levels. Their weights of floats, factors or pruned, are memory-mapped
            from the saved file afterwards, to free the memory.
          batches: the activations at the level reached.
          comparisons: the comparators' factors.

        Raises:
          ArtifactError: the disk is full or fails; the state saved before is as it was.
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
        mapped = _map_floats(self._write(position, metas, arrays, batches))
        for linear in fresh:
            if linear.factorized is not None:
                linear.hold_factors(_factorized(linear.name, mapped))
            elif isinstance(linear.compressed, DenseWeight):
                linear.quantize(_dense(linear.name, mapped))


def saved_spent_s(folder: Path) -> float:
    """``spent_s`` of the sweep that is saved in ``folder``; 0 where none is.

    The caller has resumed that sweep, which discards what is damaged.
    """
    path = folder / _INDEX
    return float(read_record(path).content.get("spent_s", 0.0)) if path.exists() else 0.0


class AdapterState(_State):
    """The saved state of a sweep that solves one adapter."""

    def resume(
        self,
        factors: dict[str, LowRank],
        figures: dict[str, dict[str, float]],
        batches: Sequence[Batch],
    ) -> Resumed:
        """Restore the saved state into the arguments.

        Args:
          factors: of the adapter, by linear.
          figures: errors of each linear.
          batches: whose activations are set.

        Returns:
          Where to go on.
        """
        for meta, arrays in self._finished():
            factors[meta["name"]] = _restore_factors(meta["name"], "", meta["bits"], arrays)
            figures[meta["name"]] = meta["figures"]
        return self._read_activations(batches)

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

        Raises:
          ArtifactError: the disk is full or fails; the state saved before is as it was.
        """
        saved = self._saved_names()
        arrays: dict[str, Array] = {}
        metas = [
            {
                "name": name,
                "bits": _pack_factors(name, "", low_rank, arrays),
                "figures": dict(figures[name]),
            }
            for name, low_rank in factors.items()
            if name not in saved
        ]
        self._write(position, metas, arrays, batches)


def _saving(arrays: dict[str, Array]) -> Callable[[Path], None]:
    return lambda path: save_file(arrays, path)


def _pack(
    linear: Linear, arrays: dict[str, Array], comparisons: Mapping[str, Mapping[str, LowRank]]
) -> dict[str, Any]:
    meta = {
        "name": linear.name,
        "errors": dict(linear.record.errors),
        "notes": [*linear.record.notes],
        "warnings": [asdict(warning) for warning in linear.record.warnings],
        "sparsity": linear.record.sparsity,
    }
    if linear.factorized is not None:
        # In the layout of the graph, which maps them from the file.
        arrays[f"{linear.name}/u"] = linear.factorized.u.T
        arrays[f"{linear.name}/v"] = linear.factorized.v.T
    weight = linear.compressed
    if weight is None:
        return meta
    stored: dict[str, int] = {}
    if isinstance(weight, DenseWeight):
        arrays[f"{linear.name}/dense"] = weight.values.T
    else:
        arrays[f"{linear.name}/packed"] = weight.packed
        arrays[f"{linear.name}/scales"] = weight.scales
        if weight.zero_points is not None:
            arrays[f"{linear.name}/zero_points"] = weight.zero_points
        stored = {"bits": weight.bits, "group_size": weight.group_size}
    compared = {
        name: factors[linear.name]
        for name, factors in comparisons.items()
        if linear.name in factors
    }
    factors = compared if linear.factors is None else {"": linear.factors, **compared}
    return {
        **meta,
        **stored,
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
    linear.record.warnings = [LinearWarning(**warning) for warning in meta["warnings"]]
    linear.record.sparsity = meta.get("sparsity")
    if f"{linear.name}/u" in arrays:
        product = _factorized(linear.name, arrays)
        linear.factorize(product.u, product.v)
    if "factors" not in meta:
        return
    linear.quantize(_stored_weight(linear, meta, arrays))
    for name, bits in meta["factors"].items():
        factors = _restore_factors(linear.name, name, bits, arrays)
        if name:
            comparisons[name][linear.name] = factors
        else:
            linear.compensate(factors)


def _stored_weight(
    linear: Linear, meta: Mapping[str, Any], arrays: Mapping[str, Array]
) -> StoredWeight:
    if "bits" not in meta:
        return _dense(linear.name, arrays)
    return NBitsWeight(
        packed=arrays[f"{linear.name}/packed"],  # type: ignore[arg-type]
        scales=arrays[f"{linear.name}/scales"],  # type: ignore[arg-type]
        zero_points=arrays.get(f"{linear.name}/zero_points"),  # type: ignore[arg-type]
        bits=meta["bits"],
        group_size=meta["group_size"],
        in_features=linear.in_features,
    )


def _dense(linear: str, arrays: Mapping[str, Array]) -> DenseWeight:
    """The weight of ``linear`` among ``arrays``, as a view of it."""
    return DenseWeight(arrays[f"{linear}/dense"].T)  # type: ignore[arg-type]


def _factorized(linear: str, arrays: Mapping[str, Array]) -> Factorized:
    """The factors of ``linear`` among ``arrays``, as views of those."""
    return Factorized(arrays[f"{linear}/u"].T, arrays[f"{linear}/v"].T)  # type: ignore[arg-type]


def _map_floats(path: Path) -> dict[str, Array]:
    """The weights of floats, factors or pruned, in a safetensors file, memory-mapped."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = {name: entry for name, entry in header.items() if name.endswith(_FLOATS)}
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
