"""An artifact in plain ONNX Runtime: logits and a key/value cache, in NumPy.

This is the form that parity is checked in and that servers build on; :mod:`eoracc.runtime.model`
generates text. Rows of a batch are padded on the right: the fused attention counts the ones of the
mask and takes them to be the first positions of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eoracc.errors import ArtifactError, BackendError
from eoracc.runtime.artifact.genai_files import import_backend, read_decoder

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

__all__ = [
    "DTYPES",
    "LINEARS_KEY",
    "LOGITS_TO_KEEP",
    "PAST",
    "PRESENT",
    "Cache",
    "Session",
    "open_inference",
    "open_linears",
    "open_session",
    "token_positions",
    "where_they_lie",
]

Cache = Mapping[str, NDArray[np.generic]]
"""Keys and values by input name, ``past_key_values.<i>.key|value``: ``[B, heads, P, head]``."""

LINEARS_KEY = "eoracc.linears"
"""Node metadata of a fused op: names of the linears in it, in the order of their rows."""

LOGITS_TO_KEEP = "logits_to_keep"
"""Optional input of the model: of how many last tokens of a row to give the logits; 1 if absent."""

_FUSED_INPUTS = 9
"""Inputs of the fused op that belong to its linears; a norm and a residual follow."""
_BIAS = 4
"""Of those, what the linear of the graph has not: another node adds it there."""
_FUSED_ATTRIBUTES = ("activation", "norm_epsilon")
PAST = "past_key_values."
PRESENT = "present."
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
_ERRORS_ONLY = 3
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class Session:
    """A decoder in ONNX Runtime.

    Attributes:
      operands: further inputs of every call by name, those of an adapter for example
        (:func:`eoracc.plugins.adapters.pack_adapter`).
    """

    def __init__(self, inference: Any) -> None:  # noqa: ANN401 - onnxruntime has no types
        self._inference = inference
        self.operands: Mapping[str, NDArray[np.generic]] = {}
        inputs = {value.name: value for value in inference.get_inputs()}
        self._needs_positions = "position_ids" in inputs
        optional = {value.name for value in inference.get_overridable_initializers()}
        self._trims_logits = LOGITS_TO_KEEP in optional
        self._empty = {
            name: (DTYPES[value.type], value.shape)
            for name, value in inputs.items()
            if name.startswith(PAST)
        }
        self._outputs = [value.name for value in inference.get_outputs()]

    def run(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        past: Cache | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[NDArray[np.float32], Cache]:
        """One call of the model.

        Args:
          input_ids: ``[B, S]``, the tokens after the past.
          attention_mask: ``[B, P + S]``, past included, padded on the right; None means all ones.
          past: what the call before returned; None at the beginning.
          last_only: compute the logits of each row's last token and no others.

        Returns:
          Logits ``float32 [B, S, V]``, those of padding undefined, or ``[B, 1, V]``; and the cache,
          grown by S.
        """
        batch, length = input_ids.shape
        past = self._no_past(batch) if past is None else past
        past_length = next((array.shape[2] for array in past.values()), 0)
        if attention_mask is None:
            attention_mask = np.ones((batch, past_length + length), np.int64)
        feeds: dict[str, NDArray[np.generic]] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            **past,
            **self.operands,
        }
        if self._needs_positions:
            positions = token_positions(attention_mask)
            feeds["position_ids"] = np.ascontiguousarray(positions[:, past_length:])
        if self._trims_logits and not last_only:
            feeds[LOGITS_TO_KEEP] = np.array(length, np.int64)
        results = dict(zip(self._outputs, self._inference.run(None, feeds), strict=True))
        present = {
            name.replace(PRESENT, PAST, 1): array
            for name, array in results.items()
            if name.startswith(PRESENT)
        }
        logits: NDArray[np.float32] = results["logits"].astype(np.float32, copy=False)
        last = np.clip(attention_mask.sum(axis=1) - 1 - past_length, 0, length - 1)
        if last_only:
            if not self._trims_logits:  # of an older artifact
                logits = logits[np.arange(batch), last][:, None]
        elif self._trims_logits:
            # They come as the last tokens of each row, which padding may follow.
            for row in np.flatnonzero(last < length - 1):
                logits[row] = np.roll(logits[row], last[row] + 1, axis=0)
        return logits, present

    def run_chunks(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        chunks: Sequence[int],
    ) -> NDArray[np.float32]:
        """Logits ``[B, S, V]`` of ``input_ids [B, S]``, fed through the cache in ``chunks``.

        Args:
          input_ids: ``[B, S]``.
          attention_mask: ``[B, S]``, padded on the right.
          chunks: lengths of the calls; they add up to S.
        """
        parts: list[NDArray[np.float32]] = []
        past: Cache | None = None
        start = 0
        for length in chunks:
            end = start + length
            logits, past = self.run(input_ids[:, start:end], attention_mask[:, :end], past)
            parts.append(logits)
            start = end
        return np.concatenate(parts, axis=1)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, stop: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy continuations of a batch of prompts.

        Args:
          prompts: token ids, at least one each.
          max_new_tokens: per prompt.
          stop: token ids that end a continuation; they are not part of it.
        """
        lengths = np.array([len(prompt) for prompt in prompts])
        mask = (np.arange(lengths.max(initial=0)) < lengths[:, None]).astype(np.int64)
        ids = np.zeros_like(mask)
        for index, prompt in enumerate(prompts):
            ids[index, : len(prompt)] = prompt
        logits, past = self.run(ids, mask, last_only=True)
        found: list[list[int]] = [[] for _ in prompts]
        running = np.ones(len(prompts), bool)
        for step in range(max_new_tokens):
            tokens = logits[:, -1].argmax(axis=-1)
            running &= ~np.isin(tokens, stop)
            for row in np.flatnonzero(running):
                found[row].append(int(tokens[row]))
            if not running.any() or step + 1 == max_new_tokens:
                break
            mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)
            logits, past = self.run(tokens[:, None].astype(np.int64), mask, past, last_only=True)
        return found

    def _no_past(self, batch: int) -> Cache:
        return {
            name: np.zeros((batch, shape[1], 0, shape[3]), dtype)
            for name, (dtype, shape) in self._empty.items()
        }


def token_positions(attention_mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each token among the valid tokens of its row, ``int64 [B, S]``."""
    positions: NDArray[np.int64] = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)
    return positions


def open_session(
    folder: Path, *, library: bool = True, threads: int | None = None, lean: bool = False
) -> Session:
    """Open the artifact in ``folder``.

    The caller verifies the manifest first
    (:func:`eoracc.runtime.artifact.manifest.verify_manifest`); :func:`eoracc.runtime.model.load`
    does so itself.

    Args:
      folder: the artifact.
      library: register the native library; without it the fused op runs through its model-local
        function, in any ONNX Runtime.
      threads: of one operator; None leaves the choice to ONNX Runtime.
      lean: spare memory and processor time. Without the library, ONNX Runtime would dequantize all
        weights at load, in several times their memory, and be fast from then on; lean, it does so
        at every call.

    Raises:
      BackendError: ONNX Runtime is missing or refuses the model.
      ArtifactError: genai_config.json is missing or damaged.
    """
    decoder = read_decoder(folder)
    native = decoder.library if library else None
    return Session(
        open_inference(str(decoder.model), native, threads, str(decoder.model), lean=lean)
    )


def open_inference(
    model: str | bytes,
    library: Path | None,
    threads: int | None,
    name: str,
    *,
    lean: bool = False,
    weights: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """An ``onnxruntime.InferenceSession``.

    Args:
      model: its path, or itself.
      library: the native library to register, or None.
      threads: of one operator; None leaves the choice to ONNX Runtime.
      name: what to call the model in an error.
      lean: see :func:`open_session`.
      weights: the folder of the files that ``model``, given as bytes, has its weights in.
      defaults: of optional inputs, in place of the model's own (:func:`where_they_lie`). A run that
        is content with them names none of them, which spares it half a microsecond each. They must
        live as long as the session.

    Raises:
      BackendError: ONNX Runtime is missing or refuses the model.
    """
    onnxruntime = import_backend("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        # DequantizeLinear and MatMul would become a product that rounds activations to int8.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if weights is not None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights))
        for optional, value in (defaults or {}).items():
            options.add_initializer(optional, value)
        if lean:
            # An arena would keep the largest of everything, and idle threads would spin.
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(
            model,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"] if lean else None,
        )
    except Exception as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise BackendError(f"{name}: ONNX Runtime cannot load it: {reason}") from error


def where_they_lie(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Any]:
    """C-contiguous arrays as ONNX Runtime's values, which read the arrays' memory and keep them.

    Raises:
      BackendError: ONNX Runtime is missing.
    """
    onnxruntime = import_backend("onnxruntime")
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def open_linears(
    folder: Path, names: Sequence[str], *, library: bool = True, threads: int | None = None
) -> Iterator[Callable[[Mapping[int, NDArray[np.float32]]], NDArray[np.float32]]]:
    """Single linears of the artifact, to be run on their own, from the operands that it stores.

    Args:
      folder: the artifact.
      names: of the linears.
      library: see :func:`open_session`.
      threads: see :func:`open_session`.

    Yields:
      For each name a function from inputs by width, ``{K: [rows, K]}``, to the linear's outputs,
      ``float32 [rows, N]``, without what is fused with it: norm, bias, activation, residual.

    Raises:
      ArtifactError: there is no such linear.
      BackendError: ONNX Runtime is missing or refuses the op.
    """
    import onnx_ir  # noqa: PLC0415 - only parity needs it

    decoder = read_decoder(folder)
    try:
        model = onnx_ir.load(decoder.model)
    except Exception as error:
        raise ArtifactError(f"{decoder.model}: cannot be read: {error}") from error
    places = {
        name: (node, part)
        for node in model.graph
        if node.domain == "eoracc"
        for part, name in enumerate(_linear_names(node))
    }
    native = decoder.library if library else None
    opened: tuple[ir.Node, Any] | None = None
    for name in names:
        if name not in places:
            raise ArtifactError(f"{decoder.model}: has no linear '{name}'")
        node, part = places[name]
        if opened is None or opened[0] is not node:  # merged linears come one after the other
            proto = onnx_ir.to_proto(_single(model, node)).SerializeToString()
            opened = node, open_inference(proto, native, threads, f"{folder}: {name}")
        sizes = node.attributes.get_ints("parts", ()) if len(_linear_names(node)) > 1 else ()
        start = sum(sizes[:part])
        rows = slice(start, start + sizes[part]) if sizes else slice(None)
        yield partial(_run_linear, opened[1], node.attributes["K"].as_int(), rows)


def _linear_names(node: ir.Node) -> list[str]:
    return node.metadata_props.get(LINEARS_KEY, str(node.name)).split(",")


def _single(model: ir.Model, node: ir.Node) -> ir.Model:
    """A model of ``node`` alone, weights included, without what is fused with its linears."""
    import onnx_ir  # noqa: PLC0415 - only parity needs it

    from eoracc.plugins.functions import local_function  # noqa: PLC0415 - it needs onnx_ir

    source = node.inputs[0]
    dtype = (source.dtype if source is not None else None) or onnx_ir.DataType.FLOAT
    x = onnx_ir.Value(name="x", type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape(["rows", None]))
    operands: list[ir.Value | None] = [x]
    for position, value in enumerate(node.inputs[1:_FUSED_INPUTS], start=1):
        if value is None or position == _BIAS:
            operands.append(None)
            continue
        constant = value.const_value
        if constant is None:
            raise ArtifactError(f"node {node.name}: its operand {value.name} is no initializer")
        try:
            array = constant.numpy()
        except (OSError, ValueError) as error:  # no such file, or one that is linked from elsewhere
            raise ArtifactError(
                f"{value.name}: cannot be read: {error}: copy or build the artifact again"
            ) from error
        operands.append(
            onnx_ir.Value(name=value.name, const_value=onnx_ir.tensor(array, name=value.name))
        )
    while operands[-1] is None:
        operands.pop()
    attributes = [a for a in node.attributes.values() if a.name not in _FUSED_ATTRIBUTES]
    single = onnx_ir.Node(node.domain, node.op_type, operands, attributes, name=node.name)
    # The artifact has the body for its own combination of fusions; without any it is another one.
    alike = len(attributes) == len(node.attributes) and [value is None for value in operands] == [
        value is None for value in node.inputs
    ]
    function = model.functions[node.op_identifier()] if alike else local_function(single)
    single.overload = function.overload
    y = single.outputs[0]
    y.name, y.type = "y", onnx_ir.TensorType(dtype)
    graph = onnx_ir.Graph(
        [x],
        [y],
        nodes=[single],
        initializers=[value for value in operands[1:] if value is not None],
        opset_imports=dict(model.opset_imports),
        name="linear",
    )
    return onnx_ir.Model(graph, ir_version=model.ir_version, functions=[function])


def _run_linear(
    inference: Any,  # noqa: ANN401 - onnxruntime has no types
    width: int,
    rows: slice,
    inputs: Mapping[int, NDArray[np.float32]],
) -> NDArray[np.float32]:
    dtype = DTYPES[inference.get_inputs()[0].type]
    outputs: NDArray[np.generic] = inference.run(None, {"x": inputs[width].astype(dtype)})[0]
    return outputs[:, rows].astype(np.float32, copy=False)
