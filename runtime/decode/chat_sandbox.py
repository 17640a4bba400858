"""The sandbox that chat templates run in: jinja2's, with transformers' options, and with limits.

Options, filters, globals and tags are those of transformers' ``apply_chat_template``: they decide
white space and characters of the prompt.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from typing_extensions import override

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.parser import Parser
    from jinja2.runtime import Context, Macro

# ruff: noqa: ANN401 - values of a template have any type

__all__ = ["compile_template", "parse_template", "run_template"]

MAX_SECONDS = 10.0
"""Most seconds of one rendering, which takes milliseconds."""

MAX_TEXT = 1 << 26
"""Most characters of a text, or items of a list, that a template makes."""

# Names that no template can spell, so that none can replace these filters or call them.
_EACH, _CHECKED = "eoracc each", "eoracc checked"

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)
"""When the rendering under way must have ended, by ``time.monotonic``."""


def compile_template(source: str) -> Template:
    """A template, ready to run.

    Raises:
      TemplateError, SyntaxError, RecursionError, MemoryError: it is not valid Jinja, or nested too
        deeply for jinja2's parser or Python's compiler.
    """
    return _ENVIRONMENT.from_string(source)


def parse_template(source: str) -> nodes.Template:
    """The syntax tree of a template, with white space as it is rendered.

    Raises:
      TemplateSyntaxError: it is not valid Jinja.
    """
    return _ENVIRONMENT.parse(source)


def run_template(template: Template, variables: Mapping[str, Any]) -> str:
    """Render a template within the limits.

    Raises:
      Exception: the template may fail in any way.
    """
    token = _deadline.set(time.monotonic() + MAX_SECONDS)
    try:
        return str(_checked("".join(_each(template.generate(variables)))))
    finally:
        _deadline.reset(token)


class _TooLargeError(TemplateError):
    """A template works too long or makes too much."""


def _tick() -> None:
    if time.monotonic() > _deadline.get():
        raise _TooLargeError(f"it is not done after {MAX_SECONDS:g} seconds")


def _each(items: Iterable[Any]) -> Iterator[Any]:
    """``items``, for as long as the rendering may take."""
    for item in items:
        _tick()
        yield item


def _checked(value: Any) -> Any:
    """``value``, if it is not too large."""
    _tick()
    if isinstance(value, str | list | tuple) and len(value) > MAX_TEXT:
        raise _TooLargeError(f"it makes a text or list of more than {MAX_TEXT:,} items")
    return value


class _Bounded(NodeTransformer):
    """Puts a check into each loop, and behind whatever makes a text or a list."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2's naming
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _EACH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, _CHECKED)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, _CHECKED)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.filter = _filtered(node.filter, _CHECKED)
        return node


def _filtered(node: nodes.Node | None, name: str) -> nodes.Filter:
    lineno = 1 if node is None else node.lineno
    return nodes.Filter(node, name, [], [], None, None, lineno=lineno)


class _Generation(Extension):
    """``{% generation %}`` marks the text of the assistant for training, and changes nothing else.

    Its body is called like a macro, so that what is set inside is not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2 has it so

    @override
    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_text", lineno=lineno)
        return nodes.CallBlock(call, [], [], body, lineno=lineno)

    def _text(self, caller: Macro) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with transformers' options and with limits."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters |= {"tojson": _tojson, _EACH: _each, _CHECKED: _checked}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    @override
    def _generate(
        self,
        source: nodes.Template,
        name: str | None,
        filename: str | None,
        defer_init: bool = False,
    ) -> str:
        return super()._generate(_Bounded().visit(source), name, filename, defer_init=defer_init)

    @override
    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        return _checked(super().call(context, callee, *args, **kwargs))

    @override
    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size_of(operator, left, right) > MAX_TEXT:
            raise _TooLargeError(f"'{operator}' makes more than {MAX_TEXT:,} items or digits")
        return super().call_binop(context, operator, left, right)


def _size_of(operator: str, left: Any, right: Any) -> int:
    """About the size of ``left operator right``: characters, items, or bits."""
    sized = (str, list, tuple)
    if operator == "+":
        return len(left) + len(right) if isinstance(left, sized) and isinstance(right, sized) else 0
    if operator == "**":
        both = isinstance(left, int) and isinstance(right, int)
        return left.bit_length() * right if both else 0
    for value, factor in ((left, right), (right, left)):
        if isinstance(factor, int):
            if isinstance(value, sized):
                return len(value) * factor
            if isinstance(value, int):
                return value.bit_length() + factor.bit_length()
    return 0


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a text; jinja2's own filter escapes what HTML would misread."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    """The local time, as the prompt of other software has it."""
    return datetime.now().strftime(pattern)


class _Dict:
    """``dict`` in a template: makes dictionaries and has none of the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """``dict.fromkeys``."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` in a template; names that begin with an underscore are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Without a named 'self', which a template may use as a keyword.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(args[0], attributes)

    @override
    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not have the attribute {name!r}")


_ENVIRONMENT = _Environment()
