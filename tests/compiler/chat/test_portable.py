"""A portable template renders every chat like its original, whatever the engine's options."""

from __future__ import annotations

import jinja2
import pytest

from eoracc.compiler.chat.portable import portable_template
from eoracc.errors import RequestError
from eoracc.runtime.decode.chat_template import ChatTemplate
from eoracc.runtime.request import ChatOptions
from tests.chats import CHATS, OPTIONS, SPECIAL_TOKENS, TEMPLATES, user

STATEMENTS = """
  {# a note #}
  {% macro show(text, mark='-', end=none) %}
    {{ mark ~ text }}
  {% endmacro %}
 {% for key, value in {'a': 1, 'b': 2}.items() if value > 0 %}
   {% if loop.first %}
 first
   {% elif value == 3 %}
     {% continue %}
   {% else %}
     {% break %}
   {% endif %}
   {{ show(key) }}{{ show(value, mark='*') }}

 {% else %}
   nothing
 {% endfor %}
{% for nothing in [] %}{% else %}none{% endfor %}
{% set block %}
  in a block {{ messages[0].content }}
{% endset %}
{% set first, second = [1, 2] %}{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}
{{- block }}|{{ first }}{{ second }}{{ ns.n }} {{ '{{ x }}{% y %}-}}' }}
{% raw %}{{ raw }} -%}{% endraw %}
{% generation %}answer{% endgeneration %}
{% for n in [1, [2, [3]]] recursive %}{{ loop(n) if n is not number else n }}{% endfor %}
"""


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_of_models_stay_what_they_are(name: str) -> None:
    source = TEMPLATES[name].read_text(encoding="utf-8")
    original = ChatTemplate(source)
    portable = ChatTemplate(portable_template(source, SPECIAL_TOKENS))
    rendered = 0
    for chat in CHATS.values():
        for options in OPTIONS.values():
            if options.continue_final_message:
                continue
            try:
                wanted = original.render(chat, options, SPECIAL_TOKENS)
            except RequestError:
                continue
            assert portable.render(chat, options) == wanted
            rendered += 1
    assert rendered > len(CHATS)


def test_no_option_of_an_engine_matters() -> None:
    portable = portable_template(STATEMENTS, {})
    wanted = ChatTemplate(STATEMENTS).render([user("hi")], ChatOptions())
    assert wanted.count("\n") > 5
    for trim in (False, True):
        for strip in (False, True):
            environment = jinja2.Environment(
                trim_blocks=trim,
                lstrip_blocks=strip,
                keep_trailing_newline=trim,
                extensions=["jinja2.ext.loopcontrols"],
                autoescape=False,  # noqa: S701 - no HTML
            )
            assert environment.from_string(portable).render(messages=[user("hi")]) == wanted


def test_missing_variables_are_those_of_transformers() -> None:
    source = "{{ tools is none }}{{ documents is none }}{{ pad_token }}{{ x is defined }}"
    portable = portable_template(source, {"pad_token": "<'pad'>", "eos_token": "</s>"})
    assert jinja2.Template(portable).render() == "TrueTrue<'pad'>False"
    assert jinja2.Template(portable).render(tools=[], documents=[]) == "FalseFalse<'pad'>False"
    assert "eos_token" not in portable
    assert portable_template("{{ messages[0].content }}", {}) == "{{- messages[0].content -}}"
