"""Seeded mutations of files: of their bytes, of the values in them, and of what they are.

A mutation takes a generator and the content of a whole file and gives another content. The same
generator state gives the same content, so that a case is its seed and nothing else is stored.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random  # noqa: TID251 - each case has a seeded generator of its own
from typing import Any

__all__ = ["FORMS", "Random", "mutate_bytes", "mutate_value", "replace_file"]

_Mutation = Callable[[Random, bytes], bytes]

_DEPTH = 3000
_LONG = 200_000

_STRANGE_TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b[31m\x1b]0;title\x07",
    "\ud800",
    "\u202e\ufeff\uffff",
    "[bold]x[/bold] [/]",
    "../../../etc/hostname",
    "/etc/hostname",
    "..\\..\\file",
    "C:\\file",
    "model.onnx",
    "none",
    "(a*)*b",
    "[",
    "{{ 7 * 7 }}",
    "{% for x in",
    "1e999",
    "NaN",
    "\n\n",
    "x" * 300,
)
_STRANGE_NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    4_000_000_000,
    1 << 40,
    10**12,
    (1 << 63) - 1,
    1 << 64,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-300,
    1e38,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
)


# --- bytes ----------------------------------------------------------------------------------------


def mutate_bytes(rng: Random, content: bytes) -> bytes:
    """One to three changes of ``content`` that know nothing of its format."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(_BYTE_MUTATIONS)(rng, content)
    return content


def _place(rng: Random, content: bytes) -> int:
    """A position, the beginning of a file being the more interesting half of it."""
    end = len(content) if rng.random() < 0.5 else min(len(content), 256)
    return rng.randrange(end + 1)


def _flip(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[min(_place(rng, content), len(changed) - 1)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut_end(rng: Random, content: bytes) -> bytes:
    return content[: _place(rng, content)]


def _cut_out(rng: Random, content: bytes) -> bytes:
    start = _place(rng, content)
    return content[:start] + content[start + rng.choice((1, 2, 4, 8, 64, 1024)) :]


def _insert(rng: Random, content: bytes) -> bytes:
    start = _place(rng, content)
    length = rng.choice((1, 2, 8, 64, 1024))
    new = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length), b"[" * length))
    return content[:start] + new + content[start:]


def _swap(rng: Random, content: bytes) -> bytes:
    first, second = sorted((_place(rng, content), _place(rng, content)))
    length = rng.choice((1, 4, 16, 64))
    a, b = content[first : first + length], content[second : second + length]
    return content[:first] + b + content[first + length : second] + a + content[second + length :]


def _repeat(rng: Random, content: bytes) -> bytes:
    start = _place(rng, content)
    part = content[start : start + rng.choice((1, 16, 256, 4096))]
    return content[:start] + part * rng.choice((2, 3, 50)) + content[start:]


def _number(rng: Random, content: bytes) -> bytes:
    """Write a number that is the edge of some type over a few bytes."""
    form = rng.choice(("<B", "<H", "<I", "<Q", "<f", "<d"))
    if form in ("<f", "<d"):
        new = struct.pack(form, rng.choice((0.0, -1.0, 1e38, float("nan"), float("inf"))))
    else:
        top = 1 << 8 * struct.calcsize(form)
        new = struct.pack(form, rng.choice((0, 1, top - 1, top // 2, top // 2 - 1, top // 16)))
    start = _place(rng, content)
    return content[:start] + new + content[start + len(new) :]


def _nothing(_rng: Random, _content: bytes) -> bytes:
    return b""


_BYTE_MUTATIONS: tuple[_Mutation, ...] = (
    _flip,
    _flip,
    _flip,
    _cut_end,
    _cut_out,
    _insert,
    _swap,
    _repeat,
    _number,
    _number,
    _nothing,
)


# --- values ---------------------------------------------------------------------------------------


class _Raw(str):
    """Text that stands in a JSON file as it is."""

    __slots__ = ()


def mutate_value(rng: Random, value: Any) -> Any:  # noqa: ANN401 - JSON
    """A copy of a JSON value with one to three changes at random places."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder = {"": json.loads(json.dumps(value))} if not _holds_raw(value) else {"": value}
        parent, key = rng.choice(_places(holder))
        _change(rng, parent, key, holder)
        value = holder.get("")
    return value


def _holds_raw(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_raw, value.values())) or any(map(_holds_raw, value))
    if isinstance(value, list):
        return any(map(_holds_raw, value))
    return isinstance(value, _Raw)


def _places(holder: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Every container of a value with every key of it; long lists give a few."""
    found: list[tuple[Any, Any]] = []
    pending: list[Any] = [holder]
    while pending:
        parent = pending.pop()
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        for key in keys if len(keys) <= 64 else (*keys[:32], *keys[-32:]):
            found.append((parent, key))
            if isinstance(parent[key], dict | list):
                pending.append(parent[key])
    return found


def _change(rng: Random, parent: Any, key: Any, holder: dict[str, Any]) -> None:  # noqa: ANN401
    kind = rng.random()
    if kind < 0.12:
        del parent[key]
    elif kind < 0.20 and isinstance(parent, dict):
        parent[rng.choice(_STRANGE_TEXTS)] = parent.pop(key)
    elif kind < 0.26 and isinstance(parent, dict):
        # The same key twice: JSON text alone can say so.
        parent[_Raw(f"{json.dumps(key)}: {_encode(_other(rng, parent[key]))}")] = None
    elif kind < 0.32:
        donor, donor_key = rng.choice(_places(holder))
        parent[key] = json.loads(_encode(donor[donor_key])) if not _holds_raw(donor) else None
    elif kind < 0.36 and isinstance(parent[key], list) and parent[key]:
        parent[key] = parent[key] * rng.choice((2, 100))
    else:
        parent[key] = _other(rng, parent[key])


def _other(rng: Random, value: object) -> Any:  # noqa: ANN401 - JSON
    """Another value: usually of the same type, sometimes of none that fits."""
    same = rng.random() < 0.4
    if isinstance(value, bool) and same:
        return not value
    if isinstance(value, int | float) and same:
        return rng.choice((*_STRANGE_NUMBERS, value + 1, -value, value * 2))
    if isinstance(value, str) and same:
        return rng.choice((*_STRANGE_TEXTS, value + "x", value[:-1], value.upper(), value * 9))
    choices: tuple[Any, ...] = (
        None,
        True,
        [],
        {},
        [None],
        [[]],
        {"": None},
        str(value)[:100],
        [value] if not isinstance(value, _Raw) else [],
        rng.choice(_STRANGE_NUMBERS),
        rng.choice(_STRANGE_NUMBERS),
        rng.choice(_STRANGE_TEXTS),
        _Raw("[" * _DEPTH + "]" * _DEPTH),
        _Raw('{"a":' * _DEPTH + "1" + "}" * _DEPTH),
        "y" * _LONG,
        _Raw("9" * 5000),
        list(range(1000)),
    )
    return rng.choice(choices)


def _encode(value: Any) -> str:  # noqa: ANN401 - JSON
    """JSON with the texts of :class:`_Raw` as they are, surrogates escaped and NaN spelled out."""
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, dict):
        parts = [
            str(key) if isinstance(key, _Raw) else f"{json.dumps(str(key))}: {_encode(item)}"
            for key, item in value.items()
        ]
        return f"{{{', '.join(parts)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_encode, value))}]"
    if type(value) is int:
        sign, digits = "-" if value < 0 else "", f"{abs(value):x}"
        # Python refuses to print numbers of so many digits.
        return f"{value}" if len(digits) < 1000 else f"{sign}1{'0' * len(digits)}"
    return json.dumps(value)


def _json(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.25:
        return mutate_bytes(rng, content)
    return _encode(mutate_value(rng, json.loads(content))).encode()


def _yaml(rng: Random, content: bytes) -> bytes:
    """JSON is YAML, and YAML has further ways of its own."""
    import yaml

    if rng.random() < 0.25:
        return mutate_bytes(rng, content)
    if rng.random() < 0.2:
        return _text(rng, content)
    return _encode(mutate_value(rng, yaml.safe_load(content))).encode()


_FRAGMENTS = (
    "{{",
    "}}",
    "{% for x in [",
    "{% if",
    "{# ",
    "{{ messages[99].content }}",
    "{{ ''.__class__ }}",
    "{% set x = 'a' * 100000 %}",
    "&a [*a, *a]",
    "*a",
    "!!python/name:os",
    "? ",
    "- - - -",
    ": :",
    "\t",
    "\x00",
    "\x1b[2J",
    "\x85\u2028",
    "(" * 500,
    "[" * 3000,
    "x" * 100_000,
)


def _text(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.4:
        return mutate_bytes(rng, content)
    text = content.decode()
    for _ in range(rng.choice((1, 1, 2))):
        start = rng.randrange(len(text) + 1)
        text = text[:start] + rng.choice(_FRAGMENTS) + text[start:]
    return text.encode(errors="surrogatepass")


def _jsonl(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.3:
        return _text(rng, content)
    lines = content.splitlines(keepends=True)
    chosen = rng.randrange(len(lines))
    lines[chosen] = _json(rng, lines[chosen].strip()) + b"\n"
    return b"".join(lines)


def _safetensors(rng: Random, content: bytes) -> bytes:
    """Changes in the header, whose length stays right, or anywhere."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, content)
    (length,) = struct.unpack_from("<Q", content)
    header = _json(rng, content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


FORMS: dict[str, _Mutation] = {
    "json": _json,
    "body": _json,
    "jsonl": _jsonl,
    "yaml": _yaml,
    "text": _text,
    "safetensors": _safetensors,
    "binary": mutate_bytes,
}
"""Mutations of a file's content by its form; a ``body`` is no file of its own."""


# --- the file itself ------------------------------------------------------------------------------


def replace_file(rng: Random, path: Path) -> None:
    """Put a folder, a pipe, a link, another file or nothing in the place of a file."""
    kind = rng.randrange(7)
    beside = sorted(other for other in path.parent.iterdir() if other != path and other.is_file())
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("nowhere")
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4 and beside:
        path.symlink_to(rng.choice(beside).name)
    elif kind == 5 and beside:
        path.write_bytes(rng.choice(beside).read_bytes())
