"""Expressions of Jinja, written from their syntax tree for engines with few methods and filters.

A rewritten expression has the value of the original, with two exceptions: ``upper``,
``capitalize`` and ``title`` change letters of ASCII only, and ``title`` sees a single word.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from jinja2 import nodes
from jinja2.visitor import NodeVisitor
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# ruff: noqa: D102, N802 - the methods of a visitor are called after the nodes that they write

__all__ = ["Expressions", "UnportableError", "quoted"]

_OPERATORS: dict[type[nodes.BinExpr], str] = {
    nodes.Add: "+",
    nodes.Sub: "-",
    nodes.Mul: "*",
    nodes.Div: "/",
    nodes.FloorDiv: "//",
    nodes.Mod: "%",
    nodes.Pow: "**",
    nodes.And: "and",
    nodes.Or: "or",
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "lteq": "<=", "gt": ">", "gteq": ">="}
_FILTER_NAMES = {"count": "length", "d": "default"}
_TEST_NAMES = {"sequence": "iterable"}
_COMPARING_TESTS = {"odd": "% 2 == 1", "even": "% 2 == 0", "eq": "==", "equalto": "==", "ne": "!="}
_TOJSON_DEFAULTS = {"ensure_ascii": False, "indent": None, "separators": None, "sort_keys": False}
_ESCAPES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"})

_UPPERCASE = ", ".join(f"'{letter}': '{letter.upper()}'" for letter in string.ascii_lowercase)
_REWRITTEN = {
    ("capitalize", 0): "eoracc_capitalize({text})",
    ("first", 0): "({text}[:1] if {text} is string else {text}[0])",
    ("keys", 0): "({text}.items()|map(attribute=0)|list)",
    ("last", 0): "({text}[-1:] if {text} is string else {text}[-1])",
    ("lower", 0): "({text}|lower)",
    ("reverse", 0): "{text}[::-1]",
    ("title", 0): "eoracc_capitalize({text})",
    ("upper", 0): "eoracc_upper({text})",
    ("values", 0): "({text}.items()|map(attribute=1)|list)",
    ("count", 1): "({text}.split({0})|length - 1)",
    ("find", 1): "({text}.split({0})[0]|length if {found} else -1)",
    ("partition", 1): (
        "([{text}.split({0})[0], {0}, ({text}.split({0})[1:]|join({0}))] if {found}"
        " else [{text}, '', ''])"
    ),
    ("rsplit once", 1): (
        "([({text}.split({0})[:-1]|join({0})), {text}.split({0})[-1]] if {found} else [{text}])"
    ),
    ("split once", 1): (
        "([{text}.split({0})[0], ({text}.split({0})[1:]|join({0}))] if {found} else [{text}])"
    ),
    ("replace", 2): "({text}.split({0})|join({1}))",
}
"""Methods and filters by name and number of arguments, in terms of those that all engines have."""

_JOIN_EMPTY = (
    # Other engines break the line inside an empty object or list, where Python writes {} and [].
    # The replaced text can only come from there: JSON escapes line ends inside strings.
    "{%- set ns = namespace(text=text) -%}{%- for depth in range(16) -%}"
    "{%- set inner = '\\n' ~ (' ' * (indent * (depth + 1))) ~ '\\n' ~ (' ' * (indent * depth)) -%}"
    "{%- set ns.text = ns.text.split('{' ~ inner ~ '}')|join('{}') -%}"
    "{%- set ns.text = ns.text.split('[' ~ inner ~ ']')|join('[]') -%}"
    "{%- endfor -%}{{- ns.text -}}"
)
_MACROS = {
    "eoracc_capitalize": f"{{{{- {{{_UPPERCASE}}}.get(text[:1], text[:1]) ~ (text[1:]|lower) -}}}}",
    "eoracc_upper": (
        "{%- set ns = namespace(text=text) -%}"
        f"{{%- for lower, upper in {{{_UPPERCASE}}}.items() -%}}"
        "{%- set ns.text = ns.text.split(lower)|join(upper) -%}"
        "{%- endfor -%}{{- ns.text -}}"
    ),
    "eoracc_lines": _JOIN_EMPTY,
}
"""Bodies of macros of the arguments ``text`` and, for ``eoracc_lines``, ``indent``."""


class UnportableError(ValueError):
    """A construct that cannot be written; the text names it."""


def quoted(text: str) -> str:
    r"""A string literal with the escapes that all engines know.

    >>> quoted("it's\n")
    "'it\\'s\\n'"
    """
    return f"'{text.translate(_ESCAPES)}'"


class Expressions(NodeVisitor):
    """Writes expressions, and remembers the macros that they call."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def macros(self) -> list[str]:
        """Definitions of the macros that the expressions written so far call."""
        return [
            f"{{%- macro {name}(text, indent=0) -%}}{_MACROS[name]}{{%- endmacro -%}}"
            for name in sorted(self._used)
        ]

    def write(self, node: nodes.Node) -> str:
        """An expression, in parentheses if it has an operator.

        Raises:
          UnportableError: it has a kind of node that cannot be written.
        """
        return str(self.visit(node))

    def condition(self, node: nodes.Node) -> str:
        """An expression of which only its truth counts: elsewhere an empty dictionary is true.

        Raises:
          UnportableError: it has a kind of node that cannot be written.
        """
        if isinstance(node, nodes.And | nodes.Or):
            operator = _OPERATORS[type(node)]
            return f"({self.condition(node.left)} {operator} {self.condition(node.right)})"
        text = self.write(node)
        if isinstance(node, nodes.Name | nodes.Getattr | nodes.Getitem):
            return f"({text} and {text} != {{}})"
        return text

    @override
    def generic_visit(self, node: nodes.Node, *args: object, **kwargs: object) -> str:
        if isinstance(node, nodes.BinExpr):
            return f"({self.write(node.left)} {_OPERATORS[type(node)]} {self.write(node.right)})"
        raise UnportableError(f"{type(node).__name__} in line {node.lineno}")

    # --- values -----------------------------------------------------------------------------------

    def visit_Const(self, node: nodes.Const) -> str:
        if isinstance(node.value, str):
            return quoted(node.value)
        return "none" if node.value is None else str(node.value).lower()

    def visit_TemplateData(self, node: nodes.TemplateData) -> str:
        return quoted(node.data)

    def visit_Name(self, node: nodes.Name) -> str:
        return node.name

    def visit_NSRef(self, node: nodes.NSRef) -> str:
        return f"{node.name}.{node.attr}"

    def visit_List(self, node: nodes.List) -> str:
        return f"[{self._list(node.items)}]"

    def visit_Tuple(self, node: nodes.Tuple) -> str:
        return self._list(node.items) if node.ctx == "store" else f"[{self._list(node.items)}]"

    def visit_Dict(self, node: nodes.Dict) -> str:
        pairs = (f"{self.write(pair.key)}: {self.write(pair.value)}" for pair in node.items)
        return f"{{{', '.join(pairs)}}}"

    def visit_Keyword(self, node: nodes.Keyword) -> str:
        return f"{node.key}={self.write(node.value)}"

    def visit_Getattr(self, node: nodes.Getattr) -> str:
        return f"{self.write(node.node)}.{node.attr}"

    def visit_Getitem(self, node: nodes.Getitem) -> str:
        return f"{self.write(node.node)}[{self.write(node.arg)}]"

    def visit_Slice(self, node: nodes.Slice) -> str:
        bounds = (
            [node.start, node.stop] if node.step is None else [node.start, node.stop, node.step]
        )
        return ":".join("" if bound is None else self.write(bound) for bound in bounds)

    # --- operators --------------------------------------------------------------------------------

    def visit_Not(self, node: nodes.Not) -> str:
        return f"(not {self.condition(node.node)})"

    def visit_Neg(self, node: nodes.Neg) -> str:
        return f"(-{self.write(node.node)})"

    def visit_Pos(self, node: nodes.Pos) -> str:
        return self.write(node.node)

    def visit_Concat(self, node: nodes.Concat) -> str:
        return f"({' ~ '.join(map(self.write, node.nodes))})"

    def visit_CondExpr(self, node: nodes.CondExpr) -> str:
        # Without another value it is undefined, which is the empty text in all uses but a test.
        other = "''" if node.expr2 is None else self.write(node.expr2)
        return f"({self.write(node.expr1)} if {self.condition(node.test)} else {other})"

    def visit_Compare(self, node: nodes.Compare) -> str:
        parts = []
        left = node.expr
        for operand in node.ops:
            if operand.op in _COMPARISONS:
                operator = _COMPARISONS[operand.op]
                parts.append(f"({self.write(left)} {operator} {self.write(operand.expr)})")
            else:
                contains = self._contains(left, operand.expr)
                parts.append(contains if operand.op == "in" else f"(not {contains})")
            left = operand.expr
        return parts[0] if len(parts) == 1 else f"({' and '.join(parts)})"

    def _contains(self, item: nodes.Expr, holder: nodes.Expr) -> str:
        """``item in holder``, which elsewhere is false for every text."""
        left, right = self.write(item), self.write(holder)
        literal = isinstance(holder, nodes.Literal) and not isinstance(holder, nodes.Const)
        never_in_text = isinstance(item, nodes.Const) and not isinstance(item.value, str)
        if literal or never_in_text:
            return f"({left} in {right})"
        found = f"({right}.split({left})|length > 1)"
        are_texts = f"{right} is string"
        if not isinstance(item, nodes.Const):
            found = f"(not {left} or {found})"
            are_texts = f"({right} is string and {left} is string)"
        return f"({found} if {are_texts} else ({left} in {right}))"

    # --- tests, filters and calls -----------------------------------------------------------------

    def visit_Test(self, node: nodes.Test) -> str:
        value, name = self.write(node.node), _TEST_NAMES.get(node.name, node.name)
        arguments = self._arguments(node)
        if name == "in" and node.args:
            return self._contains(node.node, node.args[0])
        if name == "undefined":
            return f"(not ({value} is defined))"
        if name in _COMPARING_TESTS:
            return f"({value} {_COMPARING_TESTS[name]} {arguments})"
        return f"({value} is {name}{f'({arguments})' if arguments else ''})"

    def visit_Filter(self, node: nodes.Filter) -> str:
        if node.node is None:
            raise UnportableError(f"a filter block in line {node.lineno}")
        value, name = self.write(node.node), _FILTER_NAMES.get(node.name, node.name)
        plain = self._method(value, node.node, name, node.args) if not node.kwargs else None
        if plain is not None:
            return plain
        arguments = self._arguments(node)
        text = f"({value}|{name}{f'({arguments})' if arguments else ''})"
        if name == "tojson" and arguments.startswith("indent="):
            self._used.add("eoracc_lines")
            return f"eoracc_lines({text}, {arguments})"
        return text

    def visit_Call(self, node: nodes.Call) -> str:
        if isinstance(node.node, nodes.Getattr) and not node.kwargs:
            holder = node.node.node
            plain = self._method(self.write(holder), holder, node.node.attr, node.args)
            if plain is not None:
                return plain
        return f"{self.write(node.node)}({self._arguments(node)})"

    def _method(
        self, text: str, node: nodes.Expr, name: str, args: Sequence[nodes.Expr]
    ) -> str | None:
        """A method or filter in other words; None where it needs none."""
        if name in ("startswith", "endswith") and args and isinstance(args[0], nodes.Tuple):
            ends = (f"{text}.{name}({self.write(item)})" for item in args[0].items)
            return f"({' or '.join(ends)})"
        if name in ("split", "rsplit") and len(args) == 2 and self.write(args[1]) == "1":
            name, args = f"{name} once", args[:1]
        pattern = _REWRITTEN.get((name, len(args)))
        if pattern is None:
            return None
        self._used |= {macro for macro in _MACROS if pattern.startswith(macro)}
        found = self._contains(args[0], node) if len(args) == 1 else ""
        return pattern.format(*map(self.write, args), text=text, found=found)

    def _list(self, items: Iterable[nodes.Node]) -> str:
        return ", ".join(map(self.write, items))

    def _arguments(self, node: nodes.Call | nodes.Filter | nodes.Test) -> str:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise UnportableError(f"arguments with a star in line {node.lineno}")
        named: list[nodes.Keyword | nodes.Pair] = [*node.kwargs]
        if isinstance(node, nodes.Filter) and node.name == "tojson":
            named = [pair for pair in named if not _is_default(pair)]
        return self._list([*node.args, *named])


def _is_default(pair: nodes.Pair | nodes.Keyword) -> bool:
    """Whether an argument of ``tojson`` asks for the default."""
    value = pair.value
    return isinstance(value, nodes.Const) and value.value is _TOJSON_DEFAULTS.get(str(pair.key), 0)
