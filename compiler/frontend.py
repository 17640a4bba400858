"""From a checkpoint to the graph IR.

A source is a Hugging Face hub id, a local folder in safetensors form, or a single GGUF file, which
is converted once. mobius builds the graph (opset 24: MatMul, RMSNormalization, RotaryEmbedding,
Attention with past and present); what it leaves out of a family is put right here, so that every
later stage sees a graph that equals the eager model.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from eoracc.compiler.errors import ModelError
from eoracc.compiler.linears import find_linears
from eoracc.compiler.projections import PARTS
from eoracc.compiler.quiet import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["WINDOW_KEY", "LoadedModel", "load"]

WINDOW_KEY = "eoracc.local_window_size"
"""Node metadata of an ``Attention``: the keys that a query sees, itself included; 0 means all."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A checkpoint and its graph.

    Attributes:
      model: opset 24, float32; inputs ``input_ids [B, S]``, ``attention_mask [B, P + S]``,
        ``position_ids [B, S]``, ``past_key_values.<i>.key|value [B, H, P, D]``; outputs
        ``logits [B, S, V]``, ``present.<i>.key|value``. Weights are read when they are used.
      folder: the checkpoint in safetensors form.
      config: its transformers configuration.
      digest: sha256 over config.json and the weight files, hexadecimal.
    """

    model: ir.Model
    folder: Path
    config: PretrainedConfig
    digest: str

    def tokenizer_files(self) -> list[Path]:
        """What an artifact must carry to tokenize, chat and generate as the checkpoint does."""
        return [
            self.folder / name for name in _TOKENIZER_FILES if (self.folder / name).is_file()
        ]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer.

        Raises:
          ModelError: the folder holds none.
        """
        from transformers import AutoTokenizer

        try:
            with quiet():
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{self.folder} has no tokenizer that can be read ({_first_line(error)}): "
                "add tokenizer.json and tokenizer_config.json"
            ) from error
        return tokenizer


def load(source: str, *, work: Path, trust_remote_code: bool = False) -> LoadedModel:
    """Read a checkpoint and build its graph.

    Args:
      source: hub id, local folder, or GGUF file.
      work: where a GGUF file is converted to, as ``work/source``; reused while the file is the same.
      trust_remote_code: let transformers run configuration code that the checkpoint brings.

    Raises:
      ModelError: the checkpoint is missing, damaged, or of an architecture that is not supported.
    """
    folder = _resolve(source, work)
    _check_config_file(folder)
    weight_files = _weight_files(folder)
    config = _read_config(folder, trust_remote_code=trust_remote_code)
    model = _build(folder, config, trust_remote_code=trust_remote_code)
    _strip_provenance(model)
    _mark_windows(model, config)
    _restore_tie(model, config)
    _restore_biases(model, folder, weight_files)
    _restore_embedding_scale(model, config)
    _restore_attention_scale(model, config)
    _check_finite(model)
    return LoadedModel(
        model=model,
        folder=folder,
        config=config,
        digest=_digest([folder / "config.json", *weight_files]),
    )


# --- where the checkpoint lies --------------------------------------------------------------------


def _resolve(source: str, work: Path) -> Path:
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        from eoracc.compiler.gguf import convert

        return convert(path, work / "source")
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is neither a model folder nor a .gguf file")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise ModelError(
            f"model folder {path} does not exist: give a hub id, an existing folder or a GGUF file"
        )
    return _download(source)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with quiet():
            return Path(snapshot_download(repository, allow_patterns=list(_HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{repository!r} is no local folder and cannot be fetched from the hub "
            f"({_first_line(error)}): check the name, the network and access rights"
        ) from error


def _check_config_file(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({_first_line(error)}): fetch it again") from error
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise ModelError(f"{path} has no field model_type: it is not a model's configuration")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder``, sorted, each one seen to be complete."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a valid safetensors index: fetch it again") from error
        files = sorted(folder / Path(name).name for name in names)
    elif (folder / _SINGLE).is_file():
        files = [folder / _SINGLE]
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt")
        )
        if pickled:
            raise ModelError(
                f"{folder} holds its weights as pickle ({pickled[0]}), which is not read because "
                "unpickling runs code: convert it with save_pretrained(safe_serialization=True)"
            )
        raise ModelError(f"{folder} holds no weights: {_SINGLE} or {_INDEX} is missing")
    for path in files:
        _check_safetensors(path)
    return files


def _check_safetensors(path: Path) -> None:
    """See that the header parses and that the data it announces is all there.

    The layout is ``u64 header size | JSON header | data``; a reader that maps the file would
    otherwise find a short one only when the missing tensor is read.
    """
    if not path.is_file():
        raise ModelError(f"weight file {path} is missing: fetch the checkpoint again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ModelError(f"{path} is truncated inside its header: fetch it again")
        try:
            header = json.loads(stream.read(length))
            data = max(
                (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"),
                default=0,
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{path} has a header that is not safetensors: fetch it again") from error
    if 8 + length + data != size:
        raise ModelError(
            f"{path} is truncated: its header announces {8 + length + data} bytes, it has {size}"
            if 8 + length + data > size
            else f"{path} has {size - 8 - length - data} bytes that its header does not know"
        )


def _digest(files: Sequence[Path]) -> str:
    sha256 = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK):
                sha256.update(block)
    return sha256.hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


# --- the graph ------------------------------------------------------------------------------------


def _read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # noqa: BLE001 - transformers validates with many exception types
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        raise ModelError(
            f"{folder / 'config.json'}: transformers cannot read a configuration of model_type "
            f"{model_type!r} ({_first_line(error)})"
        ) from error
    return config


def _build(folder: Path, config: PretrainedConfig, *, trust_remote_code: bool) -> ir.Model:
    import mobius

    unsupported = (
        f"{folder}: architecture {_architecture(config)} is not supported; supported are decoders "
        "of text with a key/value cache, such as Llama, Qwen2, Qwen3, Gemma3 (text), Phi-3, "
        "Mistral and SmolLM"
    )
    if config.model_type not in mobius.registry or not _architecture(config).endswith("ForCausalLM"):
        raise ModelError(unsupported)
    try:
        with quiet():
            package = mobius.build(
                str(folder),
                execution_provider="onnx-standard",
                dtype="f32",
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # noqa: BLE001 - a builder of 300 architectures raises anything
        raise ModelError(
            f"{folder}: the graph of {_architecture(config)} cannot be built ({_first_line(error)})"
        ) from error
    model: ir.Model | None = package.get("model") if len(package) == 1 else None
    if model is None or not {"input_ids", "logits", "present.0.key"} <= {
        str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)
    }:
        raise ModelError(unsupported)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise ModelError(f"{folder}: the checkpoint has no tensor {name}, which its config asks for")
    return model


def _architecture(config: PretrainedConfig) -> str:
    architectures = config.architectures or []
    return str(architectures[0]) if architectures else str(config.model_type)


# --- what mobius leaves out -----------------------------------------------------------------------


def _windows(config: Any) -> list[int]:
    """Keys that a query of each layer sees; 0 where there is no window."""
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    if not window:
        return [0] * layers
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [int(window)] * layers
    return [int(window) if kind == "sliding_attention" else 0 for kind in layer_types]


def _mark_windows(model: ir.Model, config: PretrainedConfig) -> None:
    """Note each layer's window on its Attention, and mask by it where the graph does not yet.

    mobius bakes the window into the additive float mask of some families (Gemma3) and leaves it
    out where its mask is the boolean padding mask (Mistral, Phi-3).
    """
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    windows = _windows(config)
    if len(attentions) != len(windows):
        return
    masked: dict[tuple[ir.Value, int], ir.Value] = {}
    for node, window in zip(attentions, windows, strict=True):
        node.metadata_props[WINDOW_KEY] = str(window)
        mask = node.inputs[3]
        if not window or mask is None or mask.dtype == ir.DataType.FLOAT:
            continue
        if (mask, window) not in masked:
            masked[mask, window] = _window_mask(model.graph, mask, window, before=node)
        node.replace_input_with(3, masked[mask, window])


def _window_mask(graph: ir.Graph, mask: ir.Value, window: int, *, before: ir.Node) -> ir.Value:
    """``mask [B, 1, S, T]`` and ``query - key < window``, where query ``S - 1`` is at ``T - 1``."""
    tape = ir.tape.Tape()
    prefix = f"window_{window}"

    def constant(role: str, value: int | list[int]) -> ir.Value:
        initializer = tape.initializer(ir.tensor(np.array(value, np.int64)), f"{prefix}.{role}")
        graph.register_initializer(initializer)
        return initializer

    def length(name: str) -> ir.Value:
        source = next(value for value in graph.inputs if value.name == name)
        return tape.op("Squeeze", [tape.op("Shape", [source], {"start": 1, "end": 2})])

    queries, keys, one = length("input_ids"), length("attention_mask"), constant("one", 1)
    query = tape.op("Range", [tape.op("Sub", [keys, queries]), keys, one])
    column = tape.op("Unsqueeze", [query, constant("axes", [1])])
    key = tape.op("Range", [constant("zero", 0), keys, one])
    near = tape.op("Less", [tape.op("Sub", [column, key]), constant("keys", window)])
    combined = tape.op("And", [mask, near])
    combined.dtype, combined.shape = ir.DataType.BOOL, mask.shape
    graph.insert_before(before, tape.nodes)
    return combined


def _strip_provenance(model: ir.Model) -> None:
    """Drop what the tracer noted on each node: names say it already, and it is 20 kB a block."""
    for node in model.graph:
        node.metadata_props.clear()


def _restore_tie(model: ir.Model, config: PretrainedConfig) -> None:
    """Make a tied head multiply with the embedding itself, which mobius does for most families.

    Gemma3 comes with a transposed second view of it, which would be stored a second time.
    """
    graph = model.graph
    embedding = graph.initializers.get("model.embed_tokens.weight")
    separate = graph.initializers.get("lm_head.weight_t")
    if not config.tie_word_embeddings or embedding is None or separate is None:
        return
    for node, position in list(separate.uses()):
        transpose = ir.node("Transpose", [embedding], {"perm": [1, 0]}, name="lm_head/Transpose")
        transpose.outputs[0].name = "v_lm_head.Transpose"
        transpose.outputs[0].dtype = embedding.dtype
        transpose.outputs[0].shape = separate.shape
        graph.insert_before(node, transpose)
        node.replace_input_with(position, transpose.outputs[0])
    del graph.initializers["lm_head.weight_t"]


def _restore_biases(model: ir.Model, folder: Path, weight_files: Sequence[Path]) -> None:
    """Add the biases that mobius leaves out (Llama's ``mlp_bias``); refuse any other lost tensor."""
    from safetensors import safe_open

    linears = {linear.name: linear for linear in find_linears(model)}
    for path in weight_files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                module, _, kind = name.rpartition(".")
                if _is_placed(name, model.graph) or (module in linears and kind == "weight"):
                    continue
                if module not in linears or kind != "bias":
                    raise ModelError(
                        f"{folder}: tensor {name} has no place in the graph: "
                        "this variant of the architecture is not supported"
                    )
                bias = tensors.get_tensor(name).float().numpy()
                _add_bias(model.graph, linears[module].node, name, bias)


def _is_placed(name: str, graph: ir.Graph) -> bool:
    module, _, kind = name.rpartition(".")
    parent, _, role = module.rpartition(".")
    stored = [name, *(f"{parent}.{part}.{kind}" for part in PARTS.get(role, ()))]
    # Frequencies are no parameter: old checkpoints carry them, the graph has their tables.
    return kind == "inv_freq" or any(
        key in graph.initializers or f"{key}_t" in graph.initializers for key in stored
    )


def _add_bias(graph: ir.Graph, matmul: ir.Node, name: str, bias: NDArray[np.generic]) -> None:
    tensor = ir.tensor(bias.astype(np.float32), name=name)
    value = ir.Value(
        name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    product = matmul.outputs[0]
    add = ir.node("Add", [product, value], name=f"{matmul.name}_bias")
    add.outputs[0].name = f"{product.name}_bias"
    add.outputs[0].dtype, add.outputs[0].shape = product.dtype, product.shape
    product.replace_all_uses_with(add.outputs[0])
    add.replace_input_with(0, product)
    graph.insert_after(matmul, add)


def _restore_embedding_scale(model: ir.Model, config: PretrainedConfig) -> None:
    """Give Gemma's embedding scale, ``sqrt(hidden_size)``, its float32 value.

    mobius rounds it to float16, which eager float32 does not; the difference of 1e-4 would reach
    every logit through the residual.
    """
    exact = np.float32(config.hidden_size**0.5)
    for gather in [node for node in model.graph if node.op_type == "Gather"]:
        for use in gather.outputs[0].uses():
            scale = use.node.inputs[1] if use.node.op_type == "Mul" else None
            if scale is None or scale.const_value is None or scale.const_value.size != 1:
                continue
            stored = scale.const_value.numpy()
            if stored.item() == float(np.float16(exact)) and stored.item() != float(exact):
                replacement = ir.Value(
                    name=f"{scale.name}.float32",
                    const_value=ir.tensor(np.full(stored.shape, exact, np.float32)),
                    shape=scale.shape,
                    type=ir.TensorType(ir.DataType.FLOAT),
                )
                model.graph.register_initializer(replacement)
                use.node.replace_input_with(1, replacement)
                if not scale.uses():
                    del model.graph.initializers[str(scale.name)]


def _restore_attention_scale(model: ir.Model, config: PretrainedConfig) -> None:
    """Scale scores by ``query_pre_attn_scalar ** -0.5`` where the configuration says so (Gemma).

    mobius takes the head dimension instead, which Gemma3 27B does not have there.
    """
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if not scalar:
        return
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes.add(ir.AttrFloat32("scale", float(scalar) ** -0.5))


def _check_finite(model: ir.Model) -> None:
    """See that everything but the linears' weights is finite; those are checked as they are read."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        linear = all(use.node.op_type in ("MatMul", "Transpose") for use in value.uses())
        if linear or tensor is None or not tensor.dtype.is_floating_point():
            continue
        if not np.isfinite(tensor.numpy()).all():
            raise ModelError(f"{name} holds NaN or Inf: the checkpoint is damaged, fetch it again")
