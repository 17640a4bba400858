"""A TensorRT target of an artifact as generating and scoring want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.graph_names import (
    LOGITS_POSITIONS,
    LORA_A,
    LORA_B,
    PAST,
    WRITE_INDICES,
)
from eoracc.runtime.tensorrt.adapters import DeviceAdapters
from eoracc.runtime.tensorrt.contexts import Contexts
from eoracc.runtime.tensorrt.cuda import open_device
from eoracc.runtime.tensorrt.engine_set import EngineSet, read_engine_set
from eoracc.runtime.tensorrt.library import Library, find_engine
from eoracc.runtime.tensorrt.network import Network
from eoracc.runtime.tensorrt.rows import TensorRTRows

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.runtime.decode.bank import FactorsOf

__all__ = ["TensorRTDecoder"]

_INPUTS = ("input_ids", "attention_mask", "position_ids", LOGITS_POSITIONS, WRITE_INDICES)


class TensorRTDecoder:
    """An engine on a GPU, with the adapters that it runs with.

    Attributes:
      bank: the adapters.
      context_length: tokens of a row at most.
      vocabulary: width of the logits.
      device_name: the GPU and its compute capability, in words.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.bank = network.adapters
        self.context_length = network.context_length
        self.vocabulary = network.vocabulary
        device = network.device
        self.device_name = f"{device.name}, compute capability {device.compute_capability}"

    @classmethod
    def open(cls, folder: Path, adapters: Sequence[str], load: FactorsOf) -> TensorRTDecoder:
        """Load the engine for the GPU of this machine.

        Args:
          folder: of the target, verified.
          adapters: names of those to load.
          load: reads them.

        Raises:
          ArtifactError: there is no engine for this GPU, or what is there is damaged.
          BackendError: there is no driver, GPU or TensorRT, another version of it, or no memory.
        """
        engines = read_engine_set(folder)
        _check_inputs(folder, engines)
        # The driver comes first: without it TensorRT itself only fails at length.
        device = open_device()
        found = find_engine(folder, engines, device)
        library = Library(engines.package)
        library.check_version(folder, engines)
        engine = library.load_engine(folder / found.file)
        contexts = Contexts(library, engine, engines, device)
        if engines.adapter_type == "none":
            adapters = ()
        bank = DeviceAdapters(device, engines, adapters, load)
        return cls(Network(device, contexts, engines, bank))

    def new_rows(self) -> TensorRTRows:
        """A cache of its own, without a row yet."""
        return TensorRTRows(self._network)

    def device_bytes(self) -> int:
        """Of the GPU's memory, held more than before this was opened, by whatever process."""
        return self._network.device.taken_bytes()


def _check_inputs(folder: Path, engines: EngineSet) -> None:
    for one in engines.bindings:
        known = one.name in _INPUTS or one.name.startswith(PAST)
        if one.mode == "input" and not (known or one.name.endswith((LORA_A, LORA_B))):
            raise ArtifactError(
                f"{folder}: its engines have an input '{one.name}' that this eoracc does not "
                "know: use the eoracc that built it, or build it again"
            )
