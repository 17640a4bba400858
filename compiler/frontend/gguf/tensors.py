"""Which tensor of a GGUF file becomes which parameter of the model."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from eoracc.compiler.frontend.quiet import quiet
from eoracc.errors import reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig

    from eoracc.compiler.frontend.gguf.reading import GgufFile

__all__ = ["match_tensors"]

_REMAINS = ("attn_rot_embd.weight", "attn.rot_embd.weight")
"""Tables of rotary embeddings that old converters left in; the frequencies come from the keys."""


def match_tensors(file: GgufFile, config: PretrainedConfig) -> None:
    """Count the tensors that transformers loads as read, by its own table of names.

    Raises:
      ModelError: a parameter of the model has no tensor in the file, or one of another size.
    """
    import torch  # noqa: PLC0415 - slow to import
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

    factory: Any = AutoModelForCausalLM
    reader: Any = modeling_gguf_pytorch_utils
    try:
        with quiet(), torch.device("meta"):
            model = factory.from_config(copy.deepcopy(config), trust_remote_code=False)
        processor = reader.TENSOR_PROCESSORS.get(file.architecture, reader.TensorProcessor)
        names: dict[str, str] = reader.get_gguf_hf_weights_map(
            model, processor(config=config.to_dict())
        )
    except Exception as error:
        raise file.refusal(f"transformers cannot build its model ({reason(error)})") from error
    # The stacked weights of experts are a parameter, not a module with a weight: no suffix there.
    stored = {*file.tensors, *(name.removesuffix(".weight") for name in file.tensors)}
    filled = {parameter for name, parameter in names.items() if name in stored}
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    for parameter, weight in model.state_dict().items():
        sources = [name for name in file.tensors if names.get(name) == parameter]
        shape = file.shape(sources[0]) if sources else None
        if shape is not None and math.prod(shape) != weight.numel():
            raise file.refusal(
                f"tensor {sources[0]} is {_times(shape)} where the keys of the file make it "
                f"{_times(weight.shape)}"
            )
        if parameter not in filled and parameter not in tied:
            name = next((name for name, target in names.items() if target == parameter), None)
            raise file.refusal(f"tensor {name or parameter} is missing")
    file.consume_tensors(
        name
        for name in file.tensors
        if {name, name.removesuffix(".weight")} & names.keys() or name.endswith(_REMAINS)
    )


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
