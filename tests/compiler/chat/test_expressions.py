"""A rewritten expression has its old value, in jinja2 and in onnxruntime-genai."""

from __future__ import annotations

import json

import pytest

from eoracc.compiler.chat.conversations import Conversation
from eoracc.compiler.chat.expressions import UnportableError
from eoracc.compiler.chat.genai import GenaiTemplates, Rendering
from eoracc.compiler.chat.portable import portable_template
from eoracc.runtime.decode.chat_template import ChatTemplate
from eoracc.runtime.request import ChatOptions
from tests.chats import user

TEXTS = ("<think>a</think>b</think>c", "plain user", "", "a/no_think", 'it\'s "x"\n\\t é.')

REWRITTEN = [
    "'</think>' in t",
    "'</think>' not in t and 'a' in t",
    "t in 'plain user'",
    "'role' in m",
    "'nothing' in m",
    "m.role in ['user', 'tool']",
    "m.role in ('user', 'tool')",
    "'a' in [t, 'a']",
    "t is in(['', 'plain user'])",
    "t.replace('</think>', '|')",
    "t | replace('a', 'bb')",
    "t.split('</think>', 1)[0]",
    "t.split('</think>', 1)[-1]",
    "t.rsplit('</think>', 1)[0]",
    "t.rsplit('</think>', 1)[-1]",
    "t.partition('</think>')[0] ~ t.partition('</think>')[2]",
    "t.find('</think>') >= 0",
    "t.find('a')",
    "t.count('</think>')",
    "t.startswith(('<', 'p'))",
    "t.endswith(('c', 'r'))",
    "(t | lower) ~ t.lower()",
    "(t.split('é')[0] | upper) ~ m.role.upper()",
    "m.role.title() ~ (m.role | capitalize) ~ ('' | title)",
    "m.keys() | join(',')",
    "m.values() | list | length",
    "m.items() | list | count",
    "[1, 2, 3] | reverse | join",
    "(t.split('</think>') | first).rstrip('a') ~ (t.split('</think>') | last)",
    "(t | first) ~ (t | last) ~ ([1, 2] | first)",
    "m is sequence",
    "'full' if m and {'a': {}}.a or missing else 'empty'",
    "not {'a': {}}['a'] and not t",
    "missing is undefined",
    "3 is odd and 4 is even",
    "t is eq('plain user') or t is ne('')",
    "1 < 2 < 3",
    "m | tojson(ensure_ascii=false, indent=none)",
    "m | tojson(indent=2)",
    "{'a': {}, 'b': [[], {'c': {}}], 'd': t} | tojson(indent=4)",
    "t.split('</think>')[-1].lstrip('\\n') | trim",
    "'it\\'s' ~ \"\\\"\" ~ '\\n\\t\\\\' ~ '\\u00e9' ~ 1 ~ true",
    "(1 + 2) * 3 - 4 // 2 % 3 + -1",
    "(t if t else 'empty') ~ ('x' if not t)",
    "t[1:3] ~ [1, 2, 3][::-1][0]",
    "missing | d('x')",
    "missing | default('x')",
    "(not t or not m) and m is mapping",
]


@pytest.fixture(scope="module")
def engine() -> GenaiTemplates:
    return GenaiTemplates({})


@pytest.mark.parametrize("expression", REWRITTEN)
def test_the_value_stays(expression: str, engine: GenaiTemplates) -> None:
    source = "{% for t in texts %}{% set m = messages[0] %}<{{ EXPR }}>{% endfor %}"
    source = "{% set texts = TEXTS %}" + source.replace("EXPR", expression)
    source = source.replace("TEXTS", json.dumps(TEXTS, ensure_ascii=False))
    portable = portable_template(source, {})
    wanted = ChatTemplate(source).render([user("hi")], ChatOptions())
    assert ChatTemplate(portable).render([user("hi")], ChatOptions()) == wanted
    rendering = Rendering(Conversation("one", [user("hi")]), wanted)
    assert engine.differences(portable, [rendering]) == []


@pytest.mark.parametrize(
    ("source", "construct"),
    [
        ("{{ dict(*messages) }}", "arguments with a star in line 1"),
        ("\n{% with a = 1 %}{% endwith %}", "With in line 2"),
        ("{% call f() %}{% endcall %}", "CallBlock in line 1"),
        ("{% filter upper %}a{% endfilter %}", "FilterBlock in line 1"),
        ("{% set a | upper %}a{% endset %}", "a block with a filter in line 1"),
        ("{% include 'other' %}", "Include in line 1"),
    ],
)
def test_a_construct_that_cannot_be_written_is_named(source: str, construct: str) -> None:
    with pytest.raises(UnportableError, match=construct):
        portable_template(source, {})
