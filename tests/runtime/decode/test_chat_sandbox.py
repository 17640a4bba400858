"""Chat templates have the language that transformers gives them, and a hostile one is stopped."""

from __future__ import annotations

import pytest

from eoracc.errors import RequestError
from eoracc.runtime.decode import chat_sandbox
from eoracc.runtime.decode.chat_template import ChatTemplate
from eoracc.runtime.request import ChatOptions
from tests.chats import CHATS, SPECIAL_TOKENS, WEATHER, assistant, of_transformers, user

LANGUAGE = [
    "a\n  {% if true %}\n  b\n  {% endif %}\n\n{# note #}\nc\n",
    "{{ messages | tojson }}{{ tools | tojson(indent=2) }}",
    "{{ messages | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{% continue %}x{% else %}none{% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% set s = namespace() %}{% for m in messages %}{% set s.n = m.role %}{% endfor %}{{ s.n }}",
    "{{ namespace(_private=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ dict(a=1) }}{{ dict.fromkeys('ab', 2) }}{{ dict.__mro__ }}",
    "{{ messages.append({}) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{% macro f(a, b='-') %}{{ b ~ a }}{{ caller() }}{% endmacro %}{% call f(1) %}!{% endcall %}",
    "{% filter upper %}a{{ messages[0].role }}{% endfilter %}",
    "{% set t | trim %} b {% endset %}[{{ t }}]",
    "{% for n in [[1, [2]], 3] recursive %}{{ loop(n) if n is iterable else n }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}",
    "{{ 'a' ~ 1 ~ none }} {{ 2 ** 5 * 'ab' }}{{ 7 // 2 }}{{ 1 / 2 }}",
    "{{ messages[0].foo.bar }}",
    "{{ bos_token }}{{ unk_token }}{{ pad_token is defined }}{{ tools }}{{ documents }}",
    "{{ messages[0].content is string }}{{ 'h' in messages[0].content }}{{ x is defined }}",
    "{% if 'thinking' in messages[-1] %}{{ messages[-1].reasoning_content }}{% endif %}",
    "{{ range(3) | list }}{{ messages[::-1] | length }}{% set a, b = 1, [2] %}{{ a }}{{ b }}",
]


@pytest.mark.parametrize("source", LANGUAGE)
def test_the_language_is_that_of_transformers(
    source: str,
) -> None:
    for chat in (CHATS["one turn"], CHATS["several turns"], [assistant("a", thinking="b")]):
        for options in (ChatOptions(), ChatOptions(tools=[WEATHER])):
            wanted = of_transformers(source, chat, options)
            if wanted is None:
                with pytest.raises(RequestError, match="the chat template refuses them"):
                    ChatTemplate(source).render(chat, options, SPECIAL_TOKENS)
            else:
                assert ChatTemplate(source).render(chat, options, SPECIAL_TOKENS) == wanted


def render(source: str) -> str:
    return ChatTemplate(source).render([user("hi")], ChatOptions())


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = 'a' * 99999 %}{% for a in n %}{% for b in n %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) if a < range(99999) | sum %}{% endfor %}",
        "{% for a in range(999) recursive %}{{ loop(range(999)) if loop.depth < 9 }}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(40) }}",
    ],
)
def test_a_template_without_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_SECONDS", 0.1)
    with pytest.raises(RequestError, match=r"refuses them: it is not done after 0\.1 seconds"):
        render(source)


@pytest.mark.parametrize(
    "growth",
    [
        "{% set n.x = n.x + n.x %}",
        "{% set n.x = n.x ~ n.x %}",
        "{% set n.x = 2 * n.x %}",
        "{% set n.x = n.x | replace('a', n.x) %}",
        "{% set n.x = n.x.replace('a', n.x) %}",
        "{% set n.x = [n.x, n.x] | join %}",
        "{% set n.y = n.y + n.y %}",
        "{% set t %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = t %}",
        "{{ 'a' * 9000 }}",
        "{{ 10 ** 100000 }}",
        "{{ 'a' * 10 ** 12 }}",
    ],
)
def test_a_text_that_grows_is_stopped(growth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_TEXT", 10_000)
    source = "{% set n = namespace(x='ab', y=[1]) %}{% for i in range(99) %}GROW{% endfor %}"
    with pytest.raises(RequestError, match=r"refuses them: .* more than 10,000 items"):
        render(source.replace("GROW", growth))


def test_a_template_that_calls_itself_is_stopped() -> None:
    with pytest.raises(RequestError, match="the chat template calls itself too often"):
        render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
