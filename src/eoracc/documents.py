"""Documents from outside: text and JSON, read within bounds, each mistake in one sentence.

Every JSON, Jinja and YAML file of a checkpoint, an artifact or an adapter is read here. The size is
bounded before a byte is read, a named pipe or a device is refused without waiting for it, and the
nesting is bounded, so that code that walks a value may recurse. Of a key that occurs twice the last
value counts, as with Python's ``json``.
"""

from __future__ import annotations

import json
import os
import re
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from eoracc.errors import EoraccError, reason
from eoracc.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = [
    "MAX_DEPTH",
    "SETTINGS_BYTES",
    "VOCABULARY_BYTES",
    "Reader",
]

SETTINGS_BYTES = 16 << 20
"""Most bytes of settings; the largest known are tokenizer_config.json, with about 1 MB."""

VOCABULARY_BYTES = 256 << 20
"""Most bytes of a list of tokens or tensors; the largest tokenizer.json have about 40 MB."""

MAX_DEPTH = 100
"""Most levels of lists and objects; tokenizer.json has about 8."""

_MAX_DIGITS = 300
"""Most digits of an integer: a float can hold it. ``model_max_length`` often has 31."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class _MistakeError(Exception):
    """What is wrong with a document, without its name."""


class Reader:
    """Reads documents of one origin; its errors are of one class and end with one way out.

    >>> from eoracc.errors import ArtifactError
    >>> Reader(ArtifactError, "build the artifact again").parse('{"a": ', "report.json")
    Traceback (most recent call last):
    eoracc.errors.ArtifactError: report.json: is not valid JSON (Expecting value): build \
the artifact again
    """

    def __init__(
        self,
        error: type[EoraccError],
        remedy: str,
        *,
        constants: bool = False,
        half_pairs: bool = False,
    ) -> None:
        """Describe the errors.

        Args:
          error: class of every error.
          remedy: the way out, the end of every sentence.
          constants: allow NaN, Infinity and numbers beyond float64, as Python and transformers
            write them. They are no JSON.
          half_pairs: allow half surrogate pairs, where the caller checks the texts that it uses.
        """
        self._error = error
        self._remedy = remedy
        self._constants = constants
        self._half_pairs = half_pairs

    def read_bytes(self, path: Path, *, limit: int = SETTINGS_BYTES) -> bytes:
        """The content of a file.

        Raises:
          EoraccError: of the reader's class: the file is missing, no regular file, cannot be read,
            or has more than ``limit`` bytes.
        """
        with self.opened(path) as (file, size):
            if size > limit:
                self.refuse(path, f"has more than {limit:,} bytes, the limit for such a file")
            content = file.read(size + 1)
        if len(content) != size:
            self.refuse(path, "changes while it is read")
        return content

    @contextmanager
    def opened(self, path: Path) -> Iterator[tuple[BinaryIO, int]]:
        """A regular file, open for reading, and its size in bytes.

        Raises:
          EoraccError: of the reader's class: the file is missing, no regular file, or cannot be
            read.
        """
        if "\0" in str(path):
            self.refuse(path, "is no path")
        # Without O_NONBLOCK, opening a named pipe waits for a writer.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = os.open(path, flags)
            try:
                status = os.fstat(descriptor)
                if stat.S_ISDIR(status.st_mode):
                    self.refuse(path, "is a folder")
                if not stat.S_ISREG(status.st_mode):
                    self.refuse(path, "is no regular file")
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    yield file, status.st_size
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            self.refuse(path, "is missing")
        except OSError as error:
            self.refuse(path, f"cannot be read ({error.strerror})")

    def read_text(self, path: Path, *, limit: int = SETTINGS_BYTES) -> str:
        """The content of a UTF-8 file; lines end with a line feed, as Python reads text.

        Raises:
          EoraccError: as :meth:`read_bytes`, or it is not UTF-8.
        """
        text = self._decoded(self.read_bytes(path, limit=limit), path)
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def read_json(self, path: Path, *, limit: int = SETTINGS_BYTES) -> Any:  # noqa: ANN401 - JSON
        """The value in a JSON file.

        Raises:
          EoraccError: as :meth:`read_bytes`, or as :meth:`parse`.
        """
        return self.parse(self.read_bytes(path, limit=limit), path)

    def read_object(self, path: Path, *, limit: int = SETTINGS_BYTES) -> dict[str, Any]:
        """The object in a JSON file.

        Raises:
          EoraccError: as :meth:`read_json`, or the file holds another kind of value.
        """
        return self.as_object(self.read_json(path, limit=limit), path)

    def parse(self, content: str | bytes, place: object) -> Any:  # noqa: ANN401 - JSON
        """The value of a JSON text.

        Args:
          content: text, or bytes in UTF-8.
          place: file or field that it comes from, for errors.

        Raises:
          EoraccError: of the reader's class: it is not UTF-8, not JSON, nested too deeply, or holds
            a number or half a surrogate pair that cannot be represented.
        """
        text = content if isinstance(content, str) else self._decoded(content, place)
        try:
            return _parse(text, constants=self._constants, half_pairs=self._half_pairs)
        except _MistakeError as mistake:
            self.refuse(place, mistake)

    def as_object(self, value: object, place: object) -> dict[str, Any]:
        """``value``, which must be an object.

        Raises:
          EoraccError: it is of another kind.
        """
        if not isinstance(value, dict):
            self.refuse(place, f"is {_kind(value)} where a JSON object is expected")
        return value

    def refuse(self, place: object, problem: object) -> NoReturn:
        """Raise the error of ``place``.

        Args:
          place: file or field.
          problem: what is wrong with it, without the way out.
        """
        raise self._error(f"{printable(place, _PLACE_CHARS)}: {problem}: {self._remedy}") from None

    @contextmanager
    def refusing(self, place: object, problem: str) -> Iterator[None]:
        """Turn what a library raises inside into the error of ``place``, with its reason.

        A panic of a Rust library is no ``Exception``, and is turned too.

        Args:
          place: file that the library reads.
          problem: what the error says of it: "is no tokenizer".
        """
        try:
            yield
        except (EoraccError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            why = reason(error) or type(error).__name__
            where = printable(place, _PLACE_CHARS)
            raise self._error(f"{where}: {problem} ({why}): {self._remedy}") from error

    @contextmanager
    def refusing_form(self, place: object, problem: str) -> Iterator[None]:
        """Turn a missing or mistyped field that is met inside into the error of ``place``.

        Args:
          place: file whose value is taken apart inside.
          problem: what the error says of it: "does not describe a decoder".
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            self.refuse(place, problem)

    def _decoded(self, content: bytes, place: object) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            at = f"line {line}: " if b"\n" in content else ""
            self.refuse(place, f"{at}is not UTF-8 text (byte {error.start:,})")


_PLACE_CHARS = 1_000


def _parse(text: str, *, constants: bool, half_pairs: bool) -> Any:  # noqa: ANN401 - JSON
    if not text.strip():
        raise _MistakeError("is empty")
    if text.startswith("\ufeff"):
        raise _MistakeError("begins with a byte order mark, which JSON has not")
    try:
        value = (_ANY_NUMBERS if constants else _FINITE_NUMBERS).decode(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}: " if "\n" in text.strip() else ""
        raise _MistakeError(f"{at}is not valid JSON ({error.msg})") from None
    except RecursionError:
        raise _MistakeError(_TOO_DEEP) from None
    halves = not half_pairs and _SURROGATE.search(text) is not None
    if halves:
        _check_texts([value])
    _check_value(value, halves=halves)
    return value


_TOO_DEEP = f"is nested more than {MAX_DEPTH} levels deep"


def _check_value(value: object, *, halves: bool) -> None:
    """Refuse deep nesting and, with ``halves``, half surrogate pairs. Does not recurse."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for part in level:
            if isinstance(part, dict):
                if halves:
                    _check_texts(part)
                below += part.values()
            elif isinstance(part, list):
                below += part
        if halves:
            _check_texts(below)
        level = [part for part in below if isinstance(part, dict | list)]
        if not level:
            return
    raise _MistakeError(_TOO_DEEP)


def _check_texts(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, str) and _HALF_PAIR.search(value):
            raise _MistakeError(f"holds half a surrogate pair, in {value[:40]!a}, which is no text")


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise _MistakeError(f"holds a number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _MistakeError(f"holds {printable(text, 40)}, which is too large for a number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise _MistakeError(f"holds {name}, which is no number in JSON")


_ANY_NUMBERS = json.JSONDecoder(parse_int=_integer)
_FINITE_NUMBERS = json.JSONDecoder(
    parse_int=_integer, parse_float=_finite, parse_constant=_refuse_constant
)
