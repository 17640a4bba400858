"""A chat template in the part of Jinja that other engines have too.

Engines in C++ know no ``trim_blocks`` and ``lstrip_blocks``, and few methods and filters. The
template is parsed as transformers parses it and written anew from its syntax tree:

- every tag eats the white space around it and text is an expression, so that no option matters;
- ``'x' in text``, ``replace`` and others are spelled with ``split`` and ``join``;
- ``tools`` and ``documents`` are none where they are missing, and special tokens are spelled out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import meta, nodes
from jinja2.visitor import NodeVisitor
from typing_extensions import override

from eoracc.compiler.chat.expressions import Expressions, UnportableError, quoted
from eoracc.runtime.decode.chat_sandbox import parse_template

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# ruff: noqa: N802 - the methods of a visitor are called after the nodes that they write

__all__ = ["portable_template"]

_INDENT = "  "

_RAW_TOOLS = (
    "{#- tools|tojson: with these words, onnxruntime-genai leaves descriptions of tools whole -#}"
)


def portable_template(source: str, special_tokens: Mapping[str, str]) -> str:
    """Rewrite a template.

    Args:
      source: a valid template.
      special_tokens: values of ``bos_token``, ``eos_token`` and so on.

    Raises:
      UnportableError: it has a construct that cannot be written.
    """
    # The search folds the constants of its tree.
    names = meta.find_undeclared_variables(parse_template(source))
    head = [
        f"{{%- if {name} is not defined -%}}{{%- set {name} = none -%}}{{%- endif -%}}"
        for name in ("tools", "documents")
        if name in names
    ]
    head += [
        f"{{%- set {name} = {quoted(token)} -%}}"
        for name, token in special_tokens.items()
        if name in names
    ]
    if "tools" in names:
        head.insert(0, _RAW_TOOLS)
    statements = _Statements()
    body = statements.write(parse_template(source).body)
    return "\n".join([*statements.expressions.macros(), *head, *body])


class _Statements(NodeVisitor):
    """Writes statements, one tag a line."""

    def __init__(self) -> None:
        self.expressions = Expressions()

    def write(self, body: Sequence[nodes.Node]) -> list[str]:
        """The lines of a sequence of statements."""
        return [line for node in body for line in self.visit(node)]

    @override
    def generic_visit(self, node: nodes.Node, *args: object, **kwargs: object) -> list[str]:
        raise UnportableError(f"{type(node).__name__} in line {node.lineno}")

    def _inner(self, body: Sequence[nodes.Node]) -> list[str]:
        return [_INDENT + line for line in self.write(body)]

    def _text(self, node: nodes.Node) -> str:
        return self.expressions.write(node)

    def visit_Output(self, node: nodes.Output) -> list[str]:
        return [f"{{{{- {self._text(part)} -}}}}" for part in node.nodes]

    def visit_If(self, node: nodes.If) -> list[str]:
        lines = []
        for word, branch in [("if", node), *(("elif", branch) for branch in node.elif_)]:
            test = self.expressions.condition(branch.test)
            lines += [f"{{%- {word} {test} -%}}", *self._inner(branch.body)]
        if node.else_:
            lines += ["{%- else -%}", *self._inner(node.else_)]
        return [*lines, "{%- endif -%}"]

    def visit_For(self, node: nodes.For) -> list[str]:
        test = "" if node.test is None else f" if {self.expressions.condition(node.test)}"
        recursive = " recursive" if node.recursive else ""
        loop = f"{self._text(node.target)} in {self._text(node.iter)}{test}{recursive}"
        lines = [f"{{%- for {loop} -%}}", *self._inner(node.body)]
        if node.else_:
            lines += ["{%- else -%}", *self._inner(node.else_)]
        return [*lines, "{%- endfor -%}"]

    def visit_Break(self, node: nodes.Break) -> list[str]:
        del node
        return ["{%- break -%}"]

    def visit_Continue(self, node: nodes.Continue) -> list[str]:
        del node
        return ["{%- continue -%}"]

    def visit_Assign(self, node: nodes.Assign) -> list[str]:
        return [f"{{%- set {self._text(node.target)} = {self._text(node.node)} -%}}"]

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> list[str]:
        if node.filter is not None:
            raise UnportableError(f"a block with a filter in line {node.lineno}")
        target = self._text(node.target)
        return [f"{{%- set {target} -%}}", *self._inner(node.body), "{%- endset -%}"]

    def visit_Macro(self, node: nodes.Macro) -> list[str]:
        required = len(node.args) - len(node.defaults)
        parameters = [argument.name for argument in node.args[:required]]
        parameters += [
            f"{argument.name}={self._text(default)}"
            for argument, default in zip(node.args[required:], node.defaults, strict=True)
        ]
        head = f"{{%- macro {node.name}({', '.join(parameters)}) -%}}"
        return [head, *self._inner(node.body), "{%- endmacro -%}"]

    def visit_CallBlock(self, node: nodes.CallBlock) -> list[str]:
        # 'generation', which only marks text for training, is a call of its extension.
        if isinstance(node.call.node, nodes.ExtensionAttribute):
            return self.write(node.body)
        return self.generic_visit(node)
