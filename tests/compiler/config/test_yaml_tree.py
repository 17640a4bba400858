from __future__ import annotations

import pytest

from eoracc.compiler.config.yaml_tree import dotted, read_yaml
from eoracc.errors import ConfigError

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


def test_every_value_has_its_line() -> None:
    value, lines = read_yaml("a: 1\nb:\n  - x\n  - {c: 2}\n", "m")
    assert value == {"a": 1, "b": ["x", {"c": 2}]}
    assert lines == {("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "c"): 4}
    assert read_yaml("# nothing\n", "m") == (None, {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: \x07\n", "m:2: is not valid YAML: the character U+0007 is not allowed"),
        ("a: [1\n", "m:2: is not valid YAML: expected ',' or ']'"),
        ('a: "\\U00110000"\n', "m: is not valid YAML: chr() arg"),
        ("a: 1\nb: 2001-99-99\n", "m:2: b: is no value: month must be in 1..12"),
        ("a: 0x_\n", "m:1: a: is no value: invalid literal"),
        (f"a: {'9' * 5000}\n", "m:1: a: is no value: Exceeds the limit"),
        ("!!int x: 1\n", "m:1: x: is no value: invalid literal"),
        ('a: "\\ud800"\n', "m:1: a: holds half a surrogate pair"),
        ("a: !!python/object:os.system x\n", "m:1: is not valid YAML: could not determine"),
        ("a: 1\na: 2\n", "m:2: a: occurs twice, first in line 1: keep one"),
        ("? [1, 2]\n: 3\n", "m:1: a key must be a single word"),
        ("a: &a [*a]\n", "m:1: an alias that contains itself"),
        ("[" * 51 + "]" * 51, "m:1: is nested more than 50 levels deep"),
        ("[" * 100_000, "m: is not valid YAML: it is nested too deeply"),
        ("- " * 100_000, "m: is not valid YAML: it is nested too deeply"),
        (BOMB, "values, those of aliases included"),
        ("a: 1\n---\nb: 2\n", "m:2: is not valid YAML: but found another document"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_each_mistake_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "m")
    (said,) = caught.value.sentences
    assert sentence in said
    assert said.startswith("m")
    assert len(said) < 600


def test_keys_are_cut_in_messages() -> None:
    assert dotted(("passes", 2, "x" * 100)) == f"passes.2.{'x' * 80}… (100 characters)"
