"""A model in ONNX Runtime and arrays bound to its inputs and outputs: no copies, no cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eoracc.errors import BackendError, reason
from eoracc.runtime.artifact.graph_names import LOGITS_TO_KEEP, PAST
from eoracc.runtime.artifact.long_rope import LongRope
from eoracc.runtime.onnxruntime.inference import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["Binding", "Graph"]


class Graph:
    """A model in ONNX Runtime, with the properties of its inputs and outputs.

    Attributes:
      context_length: most tokens of a row.
      long_rope: at which length the rotary embedding of a text changes; None where it never does.
      in_place: whether attention writes into the buffers that it reads its past from.
      vocabulary: number of logits of a token.
      trims_logits: whether there is an input for the number of tokens that get logits.
      needs_positions: whether there is an input for the positions of tokens.
    """

    def __init__(
        self,
        inference: Any,  # noqa: ANN401 - onnxruntime has no types
        *,
        context_length: int,
        in_place: bool,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the properties of a session.

        Args:
          inference: the session.
          context_length: most tokens of a row, of a model without LongRoPE.
          in_place: whether attention writes into the buffers that it reads its past from.
          defaults: that the session was opened with, kept here for as long as it lives.
        """
        self._inference = inference
        self._defaults = dict(defaults or {})
        self.long_rope = LongRope.of(inference.get_modelmeta().custom_metadata_map)
        self.context_length = context_length if self.long_rope is None else self.long_rope.longest
        self.in_place = in_place
        inputs = {value.name: value for value in inference.get_inputs()}
        optional = {value.name for value in inference.get_overridable_initializers()}
        self._caches = [
            (name, np.dtype(DTYPES[value.type]), int(value.shape[1]), int(value.shape[3]))
            for name, value in inputs.items()
            if name.startswith(PAST)
        ]
        logits = next(value for value in inference.get_outputs() if value.name == "logits")
        self.vocabulary = int(logits.shape[2])
        self._logits_type = np.dtype(DTYPES[logits.type])
        self.trims_logits = LOGITS_TO_KEEP in optional
        self.needs_positions = "position_ids" in inputs

    def new_caches(self, rows: int, capacity: int) -> dict[str, NDArray[np.generic]]:
        """Buffers ``[rows, heads, capacity, head]`` by past input; their content is arbitrary."""
        return {
            name: np.empty((rows, heads, capacity, size), dtype)
            for name, dtype, heads, size in self._caches
        }

    def new_logits(self, rows: int, tokens: int) -> NDArray[np.generic]:
        """A buffer ``[rows, tokens, V]`` of the model's type of logits."""
        return np.empty((rows, tokens, self.vocabulary), self._logits_type)

    def bind(self) -> Binding:
        """A new binding of inputs and outputs to arrays."""
        return Binding(self._inference)

    def reads_by_default(self, name: str, array: NDArray[np.generic]) -> bool:
        """Whether a run without a binding of input ``name`` reads this very ``array``."""
        default = self._defaults.get(name)
        return default is not None and default.data_ptr() == _address(array)


class Binding:
    """Arrays that ONNX Runtime reads from and writes to in place."""

    def __init__(self, inference: Any) -> None:  # noqa: ANN401 - onnxruntime has no types
        self._inference = inference
        self._binding = inference.io_binding()
        self._arrays: dict[str, NDArray[np.generic]] = {}

    def read(self, name: str, array: NDArray[np.generic]) -> None:
        """Bind input ``name`` to a C-contiguous ``array``."""
        self._arrays[name] = array  # ONNX Runtime keeps only its address
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, _address(array))

    def write(self, name: str, array: NDArray[np.generic]) -> None:
        """Bind output ``name`` to a C-contiguous ``array``."""
        self._arrays[name] = array
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, _address(array))

    def make(self, name: str) -> None:
        """Let ONNX Runtime allocate output ``name``, see :meth:`made`."""
        self._binding.bind_output(name, "cpu")

    def made(self) -> NDArray[np.generic]:
        """The array of :meth:`make` after a run; it must have been bound before other outputs."""
        array: NDArray[np.generic] = self._binding.get_outputs()[0].numpy()
        return array

    def run(self) -> None:
        """Run the model.

        Raises:
          BackendError: it fails.
        """
        try:
            self._inference.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime fails: {reason(error)}") from error


def _address(array: NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
