"""The TensorRT backend: an engine with its bank of adapters."""

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

    from eoracc.runtime.artifact.long_rope import LongRope
    from eoracc.runtime.decode.bank import FactorsOf

__all__ = ["TensorRTDecoder"]

_INPUTS = ("input_ids", "attention_mask", "position_ids", LOGITS_POSITIONS, WRITE_INDICES)


class TensorRTDecoder:
    """A :class:`eoracc.runtime.decode.decoder.Decoder` on a GPU.

    Attributes:
      bank: the adapters.
      context_length: most tokens of a row.
      long_rope: None, since engines are not built for longer texts than its original length.
      vocabulary: number of logits of a token.
      device_name: name of the GPU with its compute capability.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.bank = network.adapters
        self.context_length = network.context_length
        self.long_rope: LongRope | None = None
        self.vocabulary = network.vocabulary
        device = network.device
        self.device_name = f"{device.name}, compute capability {device.compute_capability}"

    @classmethod
    def open(
        cls, folder: Path, adapters: Sequence[str], load: FactorsOf, *, trust: bool = False
    ) -> TensorRTDecoder:
        """Load the engine for the GPU of this machine.

        Args:
          folder: of the target, verified.
          adapters: names of the adapters to load.
          load: reads the factors of a weighted sum of adapters.
          trust: execute the engine, which is code for the GPU.

        Raises:
          ArtifactError: there is no engine for this GPU, it is not trusted, or a file is damaged.
          BackendError: the driver, the GPU or TensorRT is missing, TensorRT has another version, or
            memory is exhausted.
        """
        engines = read_engine_set(folder)
        _check_inputs(folder, engines)
        # The driver comes first: without one, TensorRT fails slowly and with long messages.
        device = open_device()
        engine_file = find_engine(folder, engines, device)
        library = Library(engines.package)
        library.check_version(folder, engines)
        path = folder / engine_file.file
        if not trust:
            raise ArtifactError(
                f"{path}: is code of the artifact's builder, which the GPU would execute: add "
                "--trust (trust=True) if you trust the builder"
            )
        engine = library.load_engine(path)
        contexts = Contexts(library, engine, engines, device)
        if engines.adapter_type == "none":
            adapters = ()
        bank = DeviceAdapters(device, engines, adapters, load)
        return cls(Network(device, contexts, engines, bank))

    def new_rows(self) -> TensorRTRows:
        """A new cache without rows."""
        return TensorRTRows(self._network)

    def device_bytes(self) -> int:
        """Growth of the GPU memory in use since this was opened, by all processes."""
        return self._network.device.taken_bytes()


def _check_inputs(folder: Path, engines: EngineSet) -> None:
    for binding in engines.bindings:
        name = binding.name
        known = name in _INPUTS or name.startswith(PAST) or name.endswith((LORA_A, LORA_B))
        if binding.mode == "input" and not known:
            raise ArtifactError(
                f"{folder}: its engines have an input '{name}' that this eoracc does not "
                "know: use the eoracc that built it, or build it again"
            )
