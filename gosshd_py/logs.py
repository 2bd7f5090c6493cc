"""What the log looks like: readable lines or JSON, on standard error, with nothing executable in it.

Clients choose user names, commands and version strings. Control characters are escaped and
lengths capped here, once, for every value that is ever logged.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog

MAX_TEXT = 256
"""Characters of one value; a longer one is cut and says so."""


def clean(text: str) -> str:
    """Escape the text and cap its length."""
    escaped = escape(text[:MAX_TEXT])
    return escaped if len(text) <= MAX_TEXT else f"{escaped}… ({len(text)} characters)"


def escape(text: str) -> str:
    r"""Write as \x1b and the like what could move a cursor or forge a line."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def _clean_traceback(text: str) -> str:
    """Keep a traceback's lines, indented: what a client has chosen can stand in any of them."""
    return "\n".join(f"  {escape(line)}" for line in text.split("\n"))


def _clean_values(
    _: object, __: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    return {key: _clean_value(key, value) for key, value in event.items()}


def _clean_value(key: str, value: object) -> object:
    if value is None or isinstance(value, int | float):
        return value
    return _clean_traceback(str(value)) if key == "exception" else clean(str(value))


class _Forward(logging.Handler):
    """Libraries log by `logging`; their warnings and errors take the same way as ours."""

    def emit(self, record: logging.LogRecord) -> None:
        # asyncio writes this for each packet to a client that has just vanished; "connection
        # closed" says it once.
        if record.getMessage() != "socket.send() raised exception.":
            log = structlog.get_logger()
            log.log(
                record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
            )


class _Lossy:
    """A stream whose reader may go away or whose disk may be full: then lines are lost, no more.

    A reader that is there and does not read (^S on the terminal) still stops the server.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def configure(
    log_format: str = "text", stream: TextIO | None = None, level: int = logging.NOTSET
) -> None:
    """Set up structlog for the whole process. log_format: "text" or "json". level: the least told."""
    stream = stream or sys.stderr
    colors = stream.isatty() and "NO_COLOR" not in os.environ
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper("iso", utc=log_format == "json"),
        structlog.processors.format_exc_info,
        _clean_values,
    ]
    render: Any = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=colors, pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Its lines are written whole, so those of several processes stay apart.
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Lossy(stream))),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)


def log_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """Log what asyncio has no one to raise to (loop.set_exception_handler)."""
    log = structlog.get_logger()
    exc = context.get("exception")
    if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE):
        # asyncio has paused accepting for a second and goes on by itself.
        log.error("connection not accepted", reason=f"out of file descriptors: {exc.strerror}")
    else:
        log.error(str(context["message"]), exc_info=exc)
