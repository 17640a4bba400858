"""The sections of model.yaml: what to build, as frozen pydantic models.

:func:`eoracc.compiler.config.load.load_config` reads a file into a :class:`BuildConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from eoracc.compiler.config.budget import Budget
from eoracc.compiler.config.fields import (
    Count,
    Length,
    Name,
    Offset,
    Positive,
    Section,
    Share,
    no_bool,
)
from eoracc.compiler.config.passes import Comparator, Methods, PassItem
from eoracc.compiler.config.tensorrt import EngineConfig, TensorRtConfig, TensorRtRtxConfig
from eoracc.errors import EoraccError
from eoracc.passes.compensate.base import Rank, RankOverride
from eoracc.passes.recipe import Recipe
from eoracc.passes.solvers.factor_types import FactorType
from eoracc.runtime.adapters.adapter import check_adapter_name

__all__ = [
    "AdapterConfig",
    "BuildConfig",
    "CalibrationConfig",
    "CompareConfig",
    "HeldOutConfig",
    "Limits",
    "OnnxRuntimeConfig",
    "TargetName",
    "TextConfig",
    "VerifyConfig",
    "WeightedText",
    "engine_sections",
]


def _adapter_name(name: str) -> str:
    try:
        check_adapter_name(name)
    except EoraccError as error:
        raise PydanticCustomError("pass_adapter", "{text}", {"text": str(error)}) from None
    return name


_AdapterName = Annotated[str, AfterValidator(_adapter_name)]


class TextConfig(Section):
    """The source of a text."""

    text: Name
    """A text file, a .jsonl file, a data set folder, or a data set id of the hub."""
    field: str | None = None
    """The field of each record that holds the text (.jsonl and data sets)."""
    messages: str | None = None
    """The field of each record that holds a list of chat messages, put through the tokenizer's
    chat template; instead of ``field``."""
    split: str | None = None
    """The split of a data set, ``train`` unless given."""


class WeightedText(TextConfig):
    """One text of a mixture."""

    weight: Positive = 1.0
    """Weight of each token of this text, relative to the other texts."""
    samples: Count | None = None
    """Windows of this text; null takes ``samples`` of the section."""


class CalibrationConfig(Section):
    """The text that statistics are taken over, or several texts with weights."""

    text: Name | None = None
    """A text file, a .jsonl file, a data set folder, or a data set id of the hub."""
    field: str | None = None
    """The field of each record that holds the text (.jsonl and data sets)."""
    messages: str | None = None
    """The field of each record that holds a list of chat messages, put through the tokenizer's
    chat template; instead of ``field``."""
    split: str | None = None
    """The split of a data set, ``train`` unless given."""
    mixture: Annotated[tuple[WeightedText, ...], Field(min_length=1)] | None = None
    """Several texts instead of one: statistics are their weighted sum, ``sum_t a_t X_t X_t^T``."""
    samples: Count = 64
    """Windows of text; of each text in a mixture."""
    sequence_length: Length = 512
    """Tokens per window."""
    seed: Offset | None = None
    """null: the first windows in order; a number: random windows, which do not overlap if the text
    is long enough."""
    layout: Literal["packing", "padding"] = "packing"
    """packing: the text is cut into full windows; padding: a padded window for each document."""

    def texts(self) -> tuple[WeightedText, ...]:
        """All texts with their weights; one of weight 1 where there is no mixture."""
        if self.mixture is not None:
            return self.mixture
        assert self.text is not None  # noqa: S101 - load_config has checked
        return (
            WeightedText(
                text=self.text, field=self.field, messages=self.messages, split=self.split
            ),
        )


class HeldOutConfig(Section):
    """Held-out text."""

    text: Name | None = None
    """Held-out text; the calibration text unless given."""
    field: str | None = None
    """As in ``calibration``."""
    messages: str | None = None
    """As in ``calibration``."""
    split: str | None = None
    """As in ``calibration``."""
    offset_tokens: Offset | None = None
    """Tokens to skip; null: none, or in the calibration text those that calibration uses."""
    windows: Count = 8
    """Windows of held-out text."""
    window_length: Length = 512
    """Tokens per window."""

    def held_out_text(self, calibration: CalibrationConfig | None) -> TextConfig:
        """The source of the held-out text: its own text, or that of ``calibration``."""
        if self.text is not None:
            return TextConfig(
                text=self.text, field=self.field, messages=self.messages, split=self.split
            )
        assert calibration is not None  # noqa: S101 - load_config has checked
        return calibration.texts()[0]


class AdapterConfig(CalibrationConfig):
    """One task: its text, and the adapter that is solved for it."""

    rank: Rank = 16
    """Columns of the adapter's factors in each linear; 0 leaves the linears alone."""
    factor_type: FactorType = "int8"
    """Type in which the factors are stored; it must fit ``onnxruntime.adapter_type``."""
    overrides: Mapping[str, RankOverride] = {}
    """Other options, or ``skip: true``, for linears by name pattern; the last match wins."""
    verify: HeldOutConfig = HeldOutConfig()
    """Held-out text of the task, on which every adapter is scored."""


class Limits(Section):
    """Fidelity limits; a build that exceeds one fails its gate (exit code 1)."""

    perplexity: Positive | None = None
    """Largest perplexity on the held-out text."""
    perplexity_ratio: Positive | None = None
    """Largest perplexity as a multiple of the original model's."""
    kl: Positive | None = None
    """Largest mean KL(original || compressed) per token, in nats."""
    top1_agreement: Share | None = None
    """Smallest share of tokens after which both models predict the same next token."""


class VerifyConfig(HeldOutConfig):
    """The two gates: parity, and fidelity on held-out text."""

    compare: tuple[Comparator, ...] = ()
    """Compensations to score next to what is shipped, at the same ranks, without shipping them."""
    compare_adapters: bool = False
    """Whether to score adapters of the same ranks on the bare quantized weights too: per text, the
    shared compensation alone, adapters alone, and both. Doubles the time for adapters."""
    limits: Limits = Limits()
    """Fidelity limits."""
    parity: bool = True
    """Whether to compare the artifact with the compressed model in eager PyTorch. The loaded graph
    is compared with the original either way."""


TargetName = Literal["onnxruntime", "tensorrt_rtx", "tensorrt"]


class OnnxRuntimeConfig(Section):
    """Options of the target ``onnxruntime``."""

    accuracy_level: Annotated[Literal[0, 4], BeforeValidator(no_bool)] = 4
    """4: activations may be rounded to int8, in blocks of 32 columns, which is faster; parity to
    that rounding. Where its tolerance is not below the effect of compression, the artifact has
    level 0, and a warning says so. 0: float32 sums of float activations, parity to float32
    rounding."""
    adapter_type: Literal["int8", "float16", "none"] = "int8"
    """Types of adapters: int8 takes factors of 8 and of 4 bits; none builds a model without slots
    for adapters."""


class CompareConfig(Section):
    """Settings of ``eoracc compare``; its options ``--methods`` and ``--budgets`` override them."""

    methods: Methods = Field(default={})
    """Names of compensating and factorising passes, each put into ``passes`` at its place, and
    ``none`` for quantization alone; or a mapping of your own names to lists of passes, each used
    instead of ``passes``."""
    budgets: tuple[Budget, ...] = ()
    """Bits per weight of the compressed linears, everything counted (``3.5``), the share of their
    bytes at 16 bits that is removed (``30%``), or the size of the artifact's folder (``90MB``)."""
    ood: HeldOutConfig | None = None
    """Text of another kind, to score perplexity and KL on as well."""


class BuildConfig(Section):
    """A build: one model, its passes, its targets, its gates."""

    model: Name
    """A hub id, ``NAME/MODEL`` or ``NAME/MODEL@REVISION``, a local folder or a GGUF file; a
    relative path is relative to this file."""
    compressed: Name | None = None
    """A checkpoint that somebody else has made from ``model``: quantized, pruned or otherwise
    changed. The pass ``imported`` takes its weights over; a hub id or a local folder, as
    ``model``."""
    trust_remote_code: bool = False
    """Whether the model needs Python code of its own repository. The code runs only with
    ``--trust-remote-code`` on the command line: a file cannot allow it."""
    calibration: CalibrationConfig | None = None
    """The text that statistics are taken over; needed by the pass ``calibrate``."""
    passes: tuple[PassItem, ...] = Field(min_length=1)
    """The passes that change the model, in order: names, or names with options."""
    targets: tuple[TargetName, ...] = Field(("onnxruntime",), min_length=1)
    """One or several backends that the artifact is built for."""
    onnxruntime: OnnxRuntimeConfig = OnnxRuntimeConfig()
    """Options of the target ``onnxruntime``."""
    tensorrt_rtx: TensorRtRtxConfig = TensorRtRtxConfig()
    """Options of the target ``tensorrt_rtx``."""
    tensorrt: TensorRtConfig = TensorRtConfig()
    """Options of the target ``tensorrt``."""
    adapters: Mapping[_AdapterName, AdapterConfig] = {}
    """Tasks by name. Low-rank factors of each task are solved from its text on top of the finished
    model, which all tasks share and none changes."""
    verify: VerifyConfig = VerifyConfig()
    """The gates."""
    compare: CompareConfig | None = None
    """Settings of ``eoracc compare``."""
    output: Name
    """The artifact's folder, relative to this file; it must not exist yet."""

    @property
    def recipe(self) -> Recipe:
        """``passes`` as one object."""
        return Recipe(self.passes)

    def resolved(self) -> dict[str, Any]:
        """All settings with defaults as JSON-able data, which validates to an equal config."""
        return self.model_dump(mode="json")

    def model_source(self, config_dir: Path) -> str:
        """``model`` as the frontend takes it: a path where one exists, else a hub id."""
        return _source(self.model, config_dir)

    def compressed_source(self, config_dir: Path) -> str | None:
        """``compressed`` as the frontend takes it; None where there is none."""
        return None if self.compressed is None else _source(self.compressed, config_dir)

    def output_path(self, config_dir: Path) -> Path:
        """The artifact's folder."""
        return config_dir / Path(self.output).expanduser()


def _source(name: str, config_dir: Path) -> str:
    path = config_dir / Path(name).expanduser()
    return str(path) if path.exists() else name


def engine_sections(config: BuildConfig) -> dict[str, EngineConfig]:
    """Sections of the configured targets that build engines."""
    sections = {"tensorrt_rtx": config.tensorrt_rtx, "tensorrt": config.tensorrt}
    return {name: options for name, options in sections.items() if name in config.targets}
