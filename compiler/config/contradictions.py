"""Sections of model.yaml that contradict each other, although each is right on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eoracc.compiler.config.document import suggest
from eoracc.compiler.config.passes import method_names
from eoracc.compiler.config.sections import (
    AdapterConfig,
    BuildConfig,
    CalibrationConfig,
    CompareConfig,
    HeldOutConfig,
    TextConfig,
    engine_sections,
)
from eoracc.compiler.config.tensorrt import EngineConfig
from eoracc.compiler.config.yaml_tree import KeyPath, dotted
from eoracc.passes.base import Pass
from eoracc.passes.imported import Imported
from eoracc.passes.recipe import Recipe
from eoracc.plugins.adapters import AdapterSlots

__all__ = ["contradictions", "pass_problems"]


def contradictions(config: BuildConfig) -> Iterator[tuple[KeyPath, str]]:
    """Find what is wrong although every field is right on its own.

    Yields:
      The path of the fault; then what is wrong and the remedy.
    """
    for where, problem in pass_problems(config, config.passes):
        yield ("passes", *where), problem
    yield from _size_problems(config)
    takes_over = any(isinstance(item, Imported) for item in config.passes)
    if config.compressed is not None and not takes_over:
        yield ("compressed",), "is read by the pass 'imported': add that to 'passes'"
    if config.calibration is not None:
        yield from _text_problems(("calibration",), config.calibration)
    yield from _held_out_problems(("calibration",), config.calibration, ("verify",), config.verify)
    if config.adapters and not config.recipe.stores_codes:
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
    pruning = None if config.recipe.stores_codes else config.recipe.pruning
    for index, target in enumerate(config.targets):
        if pruning is not None and config.recipe.compensations and target != "onnxruntime":
            yield (
                ("targets", index),
                (
                    f"'{target}' takes no low-rank factors beside weights of floats: put a "
                    f"quantize pass after '{pruning.name}', or take the compensation away"
                ),
            )
        if target in config.targets[:index]:
            yield ("targets", index), f"'{target}' occurs twice: keep one"
    for section, options in engine_sections(config).items():
        yield from _engine_problems((section,), options)


def _size_problems(config: BuildConfig) -> Iterator[tuple[KeyPath, str]]:
    """Find files of the artifact that a budget of its folder cannot foresee."""
    if config.recipe.folder_limit is None:
        return
    if any(target != "onnxruntime" for target in config.targets):
        yield (
            ("targets",),
            (
                "hold what 'size' cannot foresee: build for onnxruntime alone, or give "
                "'bits_per_weight' in its place"
            ),
        )
    if config.adapters:
        yield (
            ("adapters",),
            (
                "are not counted by 'size': add them later with 'eoracc adapter add', or give "
                "'bits_per_weight' in its place"
            ),
        )


def _engine_problems(where: KeyPath, options: EngineConfig) -> Iterator[tuple[KeyPath, str]]:
    """Find ranges of calls that no engine can be built for."""
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
    """Find what is wrong with ``passes``, those of ``config`` or others in their place.

    Yields:
      The path of the fault among them; then what is wrong and the remedy.
    """
    recipe = Recipe(passes)
    if config.calibration is None:
        for index, item in enumerate(passes):
            if item is recipe.calibrate:
                yield (index, item.name), "needs a text: give 'calibration: {text: …}'"
    if config.compressed is None:
        for index, item in enumerate(passes):
            if isinstance(item, Imported):
                yield (
                    (index, item.name),
                    "needs the checkpoint that it takes over: give 'compressed: …'",
                )
    yield from recipe.problems()


def _compare_problems(config: BuildConfig, compare: CompareConfig) -> Iterator[tuple[KeyPath, str]]:
    """Find what is wrong with the methods and the text of a comparison."""
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


def _slot_problems(
    where: KeyPath, adapter: AdapterConfig, config: BuildConfig
) -> Iterator[tuple[KeyPath, str]]:
    """Find why the artifact has no slots for an adapter, or none for the type of its factors.

    The artifact stores adapters as ONNX Runtime takes them; without that target, as engines do.
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
    """Find factors of an adapter that the slots of a target do not take."""
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
    """Find what is wrong with the sources of a section's text."""
    if source.mixture is None:
        if source.text is None:
            yield where, "needs a text: give 'text: …' or 'mixture: [{text: …, weight: …}, …]'"
        yield from _one_form(where, source)
        return
    for key in ("text", "field", "messages", "split"):
        if getattr(source, key) is not None:
            yield (*where, key), "conflicts with 'mixture', whose texts have their own: remove it"
    for index, text in enumerate(source.mixture):
        yield from _one_form((*where, "mixture", index), text)


def _one_form(
    where: KeyPath, text: CalibrationConfig | HeldOutConfig | TextConfig
) -> Iterator[tuple[KeyPath, str]]:
    if text.field is not None and text.messages is not None:
        yield (*where, "messages"), "conflicts with 'field': keep one of the two"


def _held_out_problems(
    where: KeyPath,
    calibration: CalibrationConfig | None,
    verify_at: KeyPath,
    verify: HeldOutConfig,
) -> Iterator[tuple[KeyPath, str]]:
    """Find what is wrong with held-out text: a text of its own, or the rest of ``calibration``."""
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
