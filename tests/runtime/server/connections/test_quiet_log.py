from __future__ import annotations

import io
import json
import logging

from eoracc.log_lines import JsonLines
from eoracc.runtime.server.connections.quiet_log import LineBudget, RepeatFilter


class Clock:
    """Time that a test makes."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def logger_of(
    name: str, kept: logging.Filter, form: logging.Formatter | None = None
) -> tuple[logging.Logger, io.StringIO]:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(kept)
    handler.setFormatter(form)
    logger = logging.getLogger(f"test_quiet_log.{name}")
    logger.handlers = [handler]
    logger.propagate = False
    return logger, written


def test_a_repeated_message_is_written_once_a_minute_with_a_count() -> None:
    clock = Clock()
    logger, written = logger_of("a", RepeatFilter(clock=clock))
    for index in range(1000):
        logger.warning("connection %d is bad", index)
        logger.warning("something else")
        clock.now += 0.01
    assert written.getvalue() == "connection 0 is bad\nsomething else\n"
    clock.now += 60
    logger.warning("connection %d is bad", 1000)
    assert written.getvalue().endswith("connection 1000 is bad (and 999 more like this before)\n")
    clock.now += 60
    logger.warning("connection %d is bad", 1001)
    assert written.getvalue().endswith("connection 1001 is bad\n")


def _whole(text: str) -> float:
    return int(text)


def test_another_error_under_the_same_message_is_written() -> None:
    logger, written = logger_of("a", RepeatFilter(clock=Clock()))
    for convert in (_whole, float, _whole, float):
        try:
            convert("a")
        except ValueError:
            logger.exception("request failed")
    assert written.getvalue().count("request failed") == 2


def test_messages_that_all_differ_cannot_flood() -> None:
    clock = Clock()
    logger, written = logger_of("a", RepeatFilter(clock=clock))
    for index in range(5000):
        logger.warning(f"made of {index}")  # noqa: G004 - as asyncio does
        clock.now += 0.001
    assert written.getvalue().count("\n") == 101
    clock.now += 60
    logger.warning("made of 5001")
    assert written.getvalue().count("\n") == 102


def test_lines_are_limited_on_average() -> None:
    clock = Clock()
    logger, written = logger_of("a", LineBudget(10, 50, clock=clock), JsonLines())
    for _ in range(1000):
        logger.warning("request", extra={"fields": {"status": 401}})
    assert written.getvalue().count("\n") == 50
    clock.now += 1
    for _ in range(1000):
        logger.warning("request", extra={"fields": {"status": 401}})
    lines = [json.loads(line) for line in written.getvalue().splitlines()[50:]]
    assert [(line["status"], line.get("omitted")) for line in lines] == [
        (401, 950),
        *[(401, None)] * 9,
    ]
    clock.now += 3600
    for _ in range(1000):
        logger.warning("request", extra={"fields": {"status": 401}})
    assert written.getvalue().count('"status"') == 50 + 10 + 50
