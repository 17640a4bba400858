"""model.yaml: what to build, validated before anything is loaded.

:func:`load_config` reads the file, applies ``--set`` overrides and returns a frozen
:class:`BuildConfig`; every mistake is reported with the file, the line and the field.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    create_model,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from eoracc.compiler.config.document import Document, KeyPath, dotted, suggest
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
from eoracc.compiler.config.tensorrt import EngineConfig, TensorRtConfig, TensorRtRtxConfig
from eoracc.errors import ConfigError, EoraccError
from eoracc.passes import load_passes
from eoracc.passes.base import Pass, pass_names, pass_type
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import Compensation, Rank, RankOverride
from eoracc.passes.compensate.quantize_factors import QuantizeFactors
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.solvers.factor_types import FactorType
from eoracc.plugins.adapters import AdapterSlots
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
    "TensorRtConfig",
    "TensorRtRtxConfig",
    "TextConfig",
    "VerifyConfig",
    "WeightedText",
    "adapter_config",
    "budget_bits",
    "engine_sections",
    "load_config",
    "method_names",
    "parse_budget",
    "pass_problems",
]

_QUANTIZE = ("quantize_gptq", "quantize_rtn")
_BY_WEIGHT = ("svd", "zeroquant_v2")
_BY_ACTIVATION = ("activation_scaled", "caldera", "eora", "lqer")
_FACTORIZE_BY_ACTIVATION = (
    "erc_svd",
    "factorize_activation_scaled",
    "nsvd",
    "saes_svd",
    "svd_llm",
    "svd_llm_v2",
)
_FACTORIZE = ("factorize_svd", *_FACTORIZE_BY_ACTIVATION)
_NEEDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "quantize_gptq": (("calibrate",),),
    **dict.fromkeys(_BY_WEIGHT, (_QUANTIZE,)),
    **dict.fromkeys(_BY_ACTIVATION, (("calibrate",), _QUANTIZE)),
    "quantize_factors": (_BY_WEIGHT + _BY_ACTIVATION,),
    **dict.fromkeys(_FACTORIZE_BY_ACTIVATION, (("calibrate",),)),
}
"""What must stand somewhere before a pass: one name out of every group."""

_BEFORE: Mapping[str, tuple[str, ...]] = {
    "allocate": _QUANTIZE,
    "pack_projections": ("calibrate", "calibrate_outputs", *_QUANTIZE, *_FACTORIZE),
}
"""What a pass must stand before, where both are there."""


def _adapter_name(name: str) -> str:
    try:
        check_adapter_name(name)
    except EoraccError as error:
        raise PydanticCustomError("pass_adapter", "{text}", {"text": str(error)}) from None
    return name


_AdapterName = Annotated[str, AfterValidator(_adapter_name)]


class TextConfig(Section):
    """Where text comes from."""

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
    """What a token of this text counts for, next to those of the others."""
    samples: Count | None = None
    """Windows of this text; null: as many as ``samples`` of the section says."""


class CalibrationConfig(Section):
    """The text that statistics are taken over, or several with weights."""

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
    """null: the first windows in order; a number: random windows, each from a stretch of the text
    of its own where the text is long enough."""
    layout: Literal["packing", "padding"] = "packing"
    """packing: the text cut into full windows; padding: one document a window, padded."""

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
    """Tokens to skip; null: none, or in the calibration text what calibration has used."""
    windows: Count = 8
    """Windows of held-out text."""
    window_length: Length = 512
    """Tokens per window."""

    def held_out_text(self, calibration: CalibrationConfig | None) -> TextConfig:
        """Where the held-out text is: a text of its own, or that of ``calibration``."""
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
    """What the factors are stored in; it must fit ``onnxruntime.adapter_type``."""
    overrides: Mapping[str, RankOverride] = {}
    """Another rank or type, or ``skip: true``, for linears by name pattern; the last match wins."""
    verify: HeldOutConfig = HeldOutConfig()
    """Held-out text of the task, which every adapter is scored on."""


class Limits(Section):
    """Fidelity limits; a build that exceeds one fails its gate (exit code 1)."""

    perplexity: Positive | None = None
    """Largest perplexity on the held-out text."""
    perplexity_ratio: Positive | None = None
    """Largest perplexity as a multiple of the original model's."""
    kl: Positive | None = None
    """Largest mean KL(original || compressed) per token, in nats."""
    top1_agreement: Share | None = None
    """Smallest share of tokens on which both models would say the same next."""


class VerifyConfig(HeldOutConfig):
    """The two gates: parity, and fidelity on held-out text."""

    compare: tuple[Literal["svd", "eora", "activation_scaled", "lqer", "zeroquant_v2"], ...] = ()
    """Compensations to score next to what is shipped, at the same ranks, without shipping them."""
    compare_adapters: bool = False
    """Whether to score adapters of the same ranks on the bare quantized weights too: the shared
    compensation alone, adapters alone, and both, per text. Doubles the time that adapters take."""
    limits: Limits = Limits()
    """Fidelity limits."""
    parity: bool = True
    """Whether to compare the artifact with the compressed model in eager PyTorch."""


TargetName = Literal["onnxruntime", "tensorrt_rtx", "tensorrt"]


class OnnxRuntimeConfig(Section):
    """Options of the target ``onnxruntime``."""

    accuracy_level: Annotated[Literal[0, 4], BeforeValidator(no_bool)] = 0
    """0: float32 sums of float activations, parity to float32 rounding. 4: activations may be
    rounded to int8, in blocks of 32 columns, which is faster; parity to that rounding."""
    adapter_type: Literal["int8", "float16", "none"] = "int8"
    """What adapters may be made of: int8 takes factors of 8 and of 4 bits; none leaves the places
    for them out of the model."""


@cache
def _pass_item(name: str) -> type[BaseModel]:
    """A model of ``{name: options}``, so that errors are located as in the file."""
    fields: dict[str, Any] = {name: (pass_type(name), ...)}
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def _parse_pass(item: object) -> Pass:
    load_passes()
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise PydanticCustomError(
            "pass_shape", "must be a pass's name, or one name with its options: eora: {rank: 64}"
        )
    ((name, options),) = item.items()
    if name not in pass_names():
        raise PydanticCustomError(
            "pass_name",
            "there is no pass '{name}': {suggestion}",
            {"name": str(name), "suggestion": suggest(str(name), pass_names())},
        )
    try:
        parsed = _pass_item(name).model_validate({name: {} if options is None else options})
    except EoraccError as error:  # raised by a pass's own __post_init__
        raise PydanticCustomError("pass_options", "{text}", {"text": str(error)}) from None
    return typing.cast("Pass", getattr(parsed, name))


def _dump_pass(item: Pass) -> dict[str, Any]:
    return {item.name: TypeAdapter(type(item)).dump_python(item, mode="json")}


_PassItem = Annotated[
    Any,
    PlainValidator(_parse_pass),
    PlainSerializer(_dump_pass),
    WithJsonSchema(
        {}
    ),  # the registry fills only later: eoracc.compiler.config.schema puts it there
]


def parse_budget(value: object) -> str:
    """A budget of ``eoracc compare`` in its shortest form.

    Args:
      value: bits per weight, as a number or a text, or the share of 16-bit bytes that is removed,
        as a text that ends with ``%``.

    Raises:
      ConfigError: it is neither.

    >>> parse_budget(3.50), parse_budget("30.0%"), parse_budget("99.99999%")
    ('3.5', '30%', '99.99999%')
    """
    text = str(value).strip()
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 < number < (100 if share else math.inf):
        raise ConfigError(
            f"{value!r} is no budget: give bits per weight, 3.5, or the share of 16-bit bytes that "
            "is removed, 30%"
        )
    text = repr(number).removesuffix(".0")
    return f"{text}%" if share else text


def budget_bits(budget: str) -> float:
    """Bits per weight of a budget that :func:`parse_budget` has given.

    >>> budget_bits("3.5"), budget_bits("25%")
    (3.5, 12.0)
    """
    share = budget.endswith("%")
    return 16 * (1 - float(budget[:-1]) / 100) if share else float(budget)


def method_names() -> tuple[str, ...]:
    """Methods that ``eoracc compare`` knows by name, what can be built from ``passes`` of any kind.

    ``none`` quantizes alone; the others are compensating and factorising passes.
    """
    load_passes()
    kinds = (Compensation, Factorization)
    return ("none", *(name for name in pass_names() if issubclass(pass_type(name), kinds)))


def _config_budget(value: object) -> str:
    try:
        return parse_budget(value)
    except ConfigError as error:
        raise PydanticCustomError("pass_budget", "{text}", {"text": str(error)}) from None


def _by_name(methods: object) -> object:
    """A list of names as the mapping that it is short for."""
    if isinstance(methods, list) and all(isinstance(name, str) for name in methods):
        return dict.fromkeys(methods)
    return methods


_Budget = Annotated[str, BeforeValidator(_config_budget)]

_Methods = Annotated[
    Mapping[Name, Annotated[tuple[_PassItem, ...], Field(min_length=1)] | None],
    BeforeValidator(_by_name),
    WithJsonSchema({}),  # likewise
]


class CompareConfig(Section):
    """What ``eoracc compare`` tries; its options ``--methods`` and ``--budgets`` win over it."""

    methods: _Methods = Field(default={})
    """Names of compensating and factorising passes, which take their places in ``passes``, and
    ``none`` for quantization alone; or a mapping of names of your own to lists of passes, which
    stand instead of ``passes``."""
    budgets: tuple[_Budget, ...] = ()
    """Bits per weight of the compressed linears, everything counted, ``3.5``; or the share of their
    bytes at 16 bits that is removed, ``30%``."""
    ood: HeldOutConfig | None = None
    """Text of another kind, to score perplexity and KL on as well."""


class BuildConfig(Section):
    """What ``eoracc build`` does: one model, its passes, its targets, its gates."""

    model: Name
    """A hub id, a local folder or a GGUF file; a relative path is relative to this file."""
    trust_remote_code: bool = False
    """Whether the model's own Python code may run while it is loaded."""
    calibration: CalibrationConfig | None = None
    """The text that statistics are taken over; needed by the pass ``calibrate``."""
    passes: tuple[_PassItem, ...] = Field(min_length=1)
    """What is done to the model, in order: names, or names with options."""
    targets: tuple[TargetName, ...] = Field(("onnxruntime",), min_length=1)
    """What the artifact runs on, one or several."""
    onnxruntime: OnnxRuntimeConfig = OnnxRuntimeConfig()
    """How that target computes."""
    tensorrt_rtx: TensorRtRtxConfig = TensorRtRtxConfig()
    """What engines that target builds."""
    tensorrt: TensorRtConfig = TensorRtConfig()
    """What engines that target describes, for ``eoracc engine`` to build."""
    adapters: Mapping[_AdapterName, AdapterConfig] = {}
    """Tasks by name: low-rank factors of each, solved from its text on top of the finished model,
    which they share and which none of them changes."""
    verify: VerifyConfig = VerifyConfig()
    """The gates."""
    compare: CompareConfig | None = None
    """What ``eoracc compare`` tries."""
    output: Name
    """The artifact's folder, relative to this file; it must not exist yet."""

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults filled in, as JSON-able data that validates to the same again."""
        return self.model_dump(mode="json")

    def model_source(self, config_dir: Path) -> str:
        """``model`` as the frontend takes it: a path where one exists, else a hub id."""
        path = config_dir / Path(self.model).expanduser()
        return str(path) if path.exists() else self.model

    def output_path(self, config_dir: Path) -> Path:
        """The artifact's folder."""
        return config_dir / Path(self.output).expanduser()


def load_config(path: Path, overrides: Sequence[str] = ()) -> BuildConfig:
    """Read and validate a model.yaml.

    Args:
      path: the file.
      overrides: assignments like ``calibration.samples=16`` or ``passes.eora.rank=0``, applied in
        order; the values are YAML.

    Raises:
      ConfigError: one sentence per mistake, each with the line and the field.
    """
    document = Document.read(path)
    for assignment in overrides:
        document.override(assignment)
    try:
        config = BuildConfig.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(document, error.errors()))) from None
    for where, problem in _contradictions(config):
        raise ConfigError(f"{document.where(where)}: {dotted(where)}: {problem}")
    return config


def adapter_config(options: Mapping[str, Any]) -> AdapterConfig:
    """An adapter's section of ``eoracc adapter add``.

    Args:
      options: what the command line says, by the keys of the section.

    Raises:
      ConfigError: one sentence per mistake, each with the option.
    """
    try:
        config = AdapterConfig.model_validate(options)
    except ValidationError as error:
        sentences = [f"{_option(one['loc'])}: {_problem(one)}" for one in error.errors()]
        raise ConfigError("\n".join(sentences)) from None
    if config.field is not None and config.messages is not None:
        raise ConfigError("--messages: stands next to --field: keep one of the two")
    held_out = config.verify
    if config.seed is not None and held_out.text is None and held_out.offset_tokens is None:
        raise ConfigError(
            "--seed: random windows come from anywhere in the text, so none of it is held out: "
            "give --held-out, or --held-out-offset to keep what follows it out of calibration"
        )
    return config


def _option(path: KeyPath) -> str:
    """The option of ``eoracc adapter add`` that a key of its section comes from."""
    names: Mapping[KeyPath, str] = {
        ("text",): "data",
        ("verify", "text"): "held-out",
        ("verify", "offset_tokens"): "held-out-offset",
        ("verify", "window_length"): "sequence-length",
    }
    return f"--{names.get(path, str(path[-1])).replace('_', '-')}"


def _contradictions(config: BuildConfig) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong although every field is right on its own."""
    names = [item.name for item in config.passes]
    for where, problem in pass_problems(config, config.passes):
        yield ("passes", *where), problem
    if config.calibration is not None:
        yield from _text_problems(("calibration",), config.calibration)
    yield from _held_out_problems(("calibration",), config.calibration, ("verify",), config.verify)
    if config.adapters and not set(names) & set(_QUANTIZE):
        yield ("adapters",), "needs a quantize pass: there is nothing for adapters to give back"
    for name, adapter in config.adapters.items():
        where = ("adapters", name)
        yield from _slot_problems(where, adapter, config)
        yield from _text_problems(where, adapter)
        yield from _held_out_problems(where, adapter, (*where, "verify"), adapter.verify)
    if config.verify.compare_adapters and not config.adapters:
        yield ("verify", "compare_adapters"), "compares adapters: give 'adapters: {NAME: …}'"
    if config.compare is not None:
        yield from _compare_problems(config, config.compare)
    for index, target in enumerate(config.targets):
        if target in config.targets[:index]:
            yield ("targets", index), f"'{target}' stands twice: keep one"
    for section, options in engine_sections(config).items():
        yield from _engine_problems((section,), options)


def engine_sections(config: BuildConfig) -> dict[str, EngineConfig]:
    """Sections of those targets that engines are built for."""
    sections = {"tensorrt_rtx": config.tensorrt_rtx, "tensorrt": config.tensorrt}
    return {name: options for name, options in sections.items() if name in config.targets}


def _engine_problems(where: KeyPath, options: EngineConfig) -> Iterator[tuple[KeyPath, str]]:
    """Which calls an engine cannot be built for."""
    if options.sequence[2] > options.context_length:
        yield (
            (*where, "sequence"),
            (
                f"goes to {options.sequence[2]} tokens, beyond context_length, "
                f"{options.context_length}: change one of the two"
            ),
        )
    if options.logits[2] > options.sequence[2]:
        yield (
            (*where, "logits"),
            (
                f"goes to {options.logits[2]} tokens, and a call has {options.sequence[2]} at "
                "most: lower it to that"
            ),
        )


def pass_problems(config: BuildConfig, passes: Sequence[Pass]) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong with ``passes``, those of ``config`` or others in their place.

    Yields:
      Where among them, and what.
    """
    names = [item.name for item in passes]
    for index, (name, item) in enumerate(zip(names, passes, strict=True)):
        where: KeyPath = (index, name)
        yield from ((where, problem) for problem in _misplaced(name, names[:index]))
        if name == "calibrate" and config.calibration is None:
            yield where, "needs a text: give 'calibration: {text: …}'"
        if isinstance(item, Calibrate) and (item.through, item.match) == ("original", "outputs"):
            yield (
                (*where, "match"),
                "contradicts 'through: original': keep one of the two",
            )
        if isinstance(item, QuantizeFactors):
            yield from ((where, text) for text in _cannot_round(item, passes[:index]))


def _compare_problems(config: BuildConfig, compare: CompareConfig) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong with methods and text of a comparison."""
    for name, passes in compare.methods.items():
        where: KeyPath = ("compare", "methods", name)
        if passes is None and name not in method_names():
            yield where, f"there is no such method: {suggest(name, method_names())}"
        for place, problem in pass_problems(config, passes or ()):
            yield (*where, *place), problem
    if compare.ood is not None:
        yield from _one_form(("compare", "ood"), compare.ood)
        if compare.ood.text is None:
            yield ("compare", "ood"), "needs a text of its own: give 'text: …'"


def _misplaced(name: str, before: Sequence[str]) -> Iterator[str]:
    """Why the pass ``name`` cannot stand after ``before``."""
    # A second 'calibrate' begins another sweep, but not where the first has nothing to show; a
    # survey may steer each of the two.
    if name in before and not (name in ("calibrate", "select_last_k") and before[-1] != name):
        yield "stands twice: keep one"
    for group in _NEEDS.get(name, ()):
        if not set(group) & set(before):
            wanted = " or ".join(f"'{other}'" for other in group)
            yield f"needs {wanted} before it: put it above"
    for other in _BEFORE.get(name, ()):
        if other in before:
            yield f"must stand before '{other}': move it up"
    if name in _QUANTIZE and set(_QUANTIZE) & set(before) - {name}:
        yield "the weights are quantized already: keep one quantize pass"


def _cannot_round(item: QuantizeFactors, before: Sequence[Pass]) -> Iterator[str]:
    """Why ``item`` cannot round what the compensating pass ``before`` it gives."""
    last = next((one for one in reversed(before) if isinstance(one, Compensation)), None)
    if last is not None and last.factor_type == "int4" and item.bits > 4:
        yield (
            f"factors of '{last.name}' have 4 bits already: give it 'factor_type: float16', "
            "or leave this pass out"
        )


def _slot_problems(
    where: KeyPath, adapter: AdapterConfig, config: BuildConfig
) -> Iterator[tuple[KeyPath, str]]:
    """Why what is built has no place for an adapter, or not for its factors.

    The artifact keeps adapters as ONNX Runtime takes them; where it has no part for ONNX Runtime,
    as engines do.
    """
    engines = {
        name: options
        for name, options in engine_sections(config).items()
        if options.adapter_type != "none"
    }
    for name, options in engines.items():
        if (rank := options.rank[2]) < adapter.rank:
            yield (
                (*where, "rank"),
                f"is {adapter.rank}, and {name}.rank ends at {rank}: change one of the two",
            )
    if "onnxruntime" in config.targets:
        yield from _factor_type_problems(
            where, adapter, "onnxruntime", config.onnxruntime.adapter_type
        )
    else:
        first = next(iter(engines), config.targets[0])
        yield from _factor_type_problems(where, adapter, first, "float16" if engines else "none")


def _factor_type_problems(
    where: KeyPath, adapter: AdapterConfig, section: str, slots: str
) -> Iterator[tuple[KeyPath, str]]:
    """Why the slots of a target do not take the factors of an adapter."""
    if slots == "none":
        choices = "int8 or float16" if section == "onnxruntime" else "float16"
        yield where, f"the model takes no adapters: set {section}.adapter_type to {choices}"
        return
    taken = AdapterSlots(slots, ()).factor_types
    asked = {(*where, "factor_type"): adapter.factor_type} | {
        (*where, "overrides", pattern, "factor_type"): override.factor_type
        for pattern, override in adapter.overrides.items()
    }
    for at, factor_type in asked.items():
        if factor_type is not None and factor_type not in taken:
            yield (
                at,
                (
                    f"is {factor_type}, while {section}.adapter_type is {slots}, which takes "
                    f"{' and '.join(taken)}: change one of the two"
                ),
            )


def _text_problems(where: KeyPath, source: CalibrationConfig) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong with where the text of a section comes from."""
    if source.mixture is None:
        if source.text is None:
            yield where, "needs a text: give 'text: …' or 'mixture: [{text: …, weight: …}, …]'"
        yield from _one_form(where, source)
        return
    for key in ("text", "field", "messages", "split"):
        if getattr(source, key) is not None:
            yield (*where, key), "stands next to 'mixture', whose texts have their own: remove it"
    for index, text in enumerate(source.mixture):
        yield from _one_form((*where, "mixture", index), text)


def _one_form(
    where: KeyPath, text: CalibrationConfig | HeldOutConfig | TextConfig
) -> Iterator[tuple[KeyPath, str]]:
    if text.field is not None and text.messages is not None:
        yield (*where, "messages"), "stands next to 'field': keep one of the two"


def _held_out_problems(
    where: KeyPath,
    calibration: CalibrationConfig | None,
    verify_at: KeyPath,
    verify: HeldOutConfig,
) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong with held-out text: its own, or what ``calibration`` leaves of its text."""
    yield from _one_form(verify_at, verify)
    if verify.text is not None:
        return
    own = dotted((*verify_at, "text"))
    for key in ("field", "messages", "split"):
        if getattr(verify, key) is not None:
            yield (*verify_at, key), f"belongs to a 'text': give {own} too"
    if calibration is None:
        yield verify_at, "needs held-out text: give 'verify: {text: …}'"
    elif calibration.mixture is not None:
        yield (
            verify_at,
            f"needs held-out text of its own, for {dotted(where)} has several: give {own}",
        )
    elif calibration.seed is not None and verify.offset_tokens is None:
        yield (
            (*where, "seed"),
            (
                "random windows come from anywhere in the text, so none of it is held out: give "
                f"{own}, or {dotted((*verify_at, 'offset_tokens'))} to keep what follows it out "
                "of calibration"
            ),
        )


_FRIENDLY = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "model_type": "must be a mapping of keys to values",
    "dataclass_type": "must be a mapping of options",
    "too_short": "must not be empty",
}


def _sentences(document: Document, details: Sequence[ErrorDetails]) -> list[str]:
    """One sentence per mistake, in the order of the file."""
    told = [
        detail
        for detail in details
        # A list whose items were all refused is not also empty.
        if detail["type"] != "too_short"
        or not any(detail["loc"] == other["loc"][:-1] for other in details)
    ]
    told.sort(key=lambda detail: document.line(detail["loc"]))
    return list(dict.fromkeys(_sentence(document, detail) for detail in told))


def _sentence(document: Document, detail: ErrorDetails) -> str:
    """One validation error as ``file:line: field: what is wrong, and the way out``."""
    path: KeyPath = detail["loc"]
    return f"{document.where(path)}: {dotted(path)}: {_problem(detail)}"


def _problem(detail: ErrorDetails) -> str:
    """What is wrong, and the way out."""
    path: KeyPath = detail["loc"]
    kind, value = detail["type"], detail["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        problem = f"unknown key: {suggest(str(path[-1]), _known_keys(BuildConfig, path[:-1]))}"
    elif kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        problem = f"is missing: add '{path[-1]}: …'"
    elif kind == "literal_error":
        expected = detail["ctx"]["expected"]
        problem = f"must be {expected}, not {value!r}"
        if isinstance(value, str):
            choices = re.findall(r"'([^']+)'", expected)
            problem += f": {suggest(value, choices)}"
    elif kind in _FRIENDLY:
        problem = _FRIENDLY[kind] + ("" if "empty" in _FRIENDLY[kind] else f", not {value!r}")
    elif kind == "value_error" or kind.startswith(("pass_", "number_")):
        problem = detail["msg"].removeprefix("Value error, ")
    else:
        problem = f"{detail['msg'].replace('Input should', 'must')}, not {value!r}"
    return problem


def _known_keys(kind: object, path: KeyPath) -> list[str]:
    """Keys that may stand at ``path`` under a value of type ``kind``."""
    if typing.get_origin(kind) is Annotated:
        return _known_keys(typing.get_args(kind)[0], path)
    if typing.get_origin(kind) in {types.UnionType, typing.Union}:
        return [key for option in typing.get_args(kind) for key in _known_keys(option, path)]
    if kind is BuildConfig and path[:2] == ("compare", "methods"):
        path = ("passes", *path[3:])  # each is a list like that one
    if kind is BuildConfig and path[:1] == ("passes",) and len(path) > 2:
        return _known_keys(pass_type(str(path[2])), path[3:])
    keys = _fields(kind)
    if not path:
        return list(keys)
    if path[0] in keys:
        return _known_keys(keys[str(path[0])], path[1:])
    # What is left are the values of mappings.
    return [key for value in typing.get_args(kind)[1:] for key in _known_keys(value, path[1:])]


def _fields(kind: object) -> dict[str, object]:
    """Keys and their types, of a section or of a dataclass; empty for anything else."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: known.annotation for name, known in kind.model_fields.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {known.name: hints[known.name] for known in dataclasses.fields(kind)}
    return {}
