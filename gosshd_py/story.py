"""A trace as a story on the terminal: one line for each event, indented by where it happens."""

from __future__ import annotations

import os
import select
from collections import deque
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from .lifecycle import EVENTS, Meaning
from .logs import escape
from .trace import Record, plain

INDENT = {"tcp": 0, "ssh": 1, "channel": 2, "pty": 3, "process": 4, "trace": 0}
COLORS = {"tcp": "blue", "ssh": "magenta", "channel": "cyan", "pty": "green", "process": "yellow", "trace": "red"}  # fmt: skip
"""Of the lanes."""

BAD = ("refused", "failed", "rejected", "dropped", "hit")
WAITING = ("paused", "resumed", "ignored")
"""Last parts of the names of events that stand out, or stand back."""

UNKNOWN = Meaning("trace", (), "", "")


KEPT = 1000
"""Connections that are over, of which something may still be told: a program that ends late."""


class Unbuffered:
    """A stream whose writes are done, or have failed, when they return.

    A buffer is locked while it is written, and a terminal that takes nothing more would keep that
    lock to the end of the process, which Python then aborts.
    """

    def __init__(self, stream: TextIO) -> None:
        self._fd = os.dup(stream.fileno())
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        """Write all of it; what the terminal has no character for becomes a question mark."""
        data = text.encode(self.encoding, "replace")
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # somebody who has this terminal, too, has made it so
                select.select([], [self._fd], [])
        return len(text)

    def close(self) -> None:
        """Close what is ours; the stream itself stays open."""
        os.close(self._fd)

    def flush(self) -> None:
        """There is nothing to flush."""

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._fd)

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd


class _Terminal(Console):
    """A console that takes it calmly when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        """Write into nothing from here on; what the stream still holds could not be written."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.file.fileno())
        os.close(nothing)


class _Told:
    """What the story remembers of a connection."""

    def __init__(self, began: int) -> None:
        self.began = began
        self.glosses: set[str] = set()
        """Events that have been explained."""


class Story:
    """Writes records for people; an Output of a Tracer. Times are milliseconds since the accept.

    On a terminal a line is cut at its width; what an event means is told in full, on a line of its
    own if it needs that, the first time that it happens on a connection. Elsewhere lines are whole.
    """

    pace = 0.1

    def __init__(self, stream: TextIO) -> None:
        self._console = _Terminal(file=stream, highlight=False)
        self._whole = not stream.isatty()
        self._told: dict[int, _Told] = {}
        self._over: deque[int] = deque()

    def start(self) -> None:
        """There is nothing to say before something happens."""

    def write(self, record: Record) -> None:
        """Write a line. Raises OSError."""
        told = self._told.setdefault(record.connection, _Told(record.us))
        if record.event == "tcp.closed":
            self._over.append(record.connection)
            if len(self._over) > KEPT:
                self._told.pop(self._over.popleft(), None)
        line = line_of(record, (record.us - told.began) / 1000)
        gloss = Text(EVENTS.get(record.event, UNKNOWN).gloss, style="dim italic")
        line.append("  ")
        if self._whole:
            self._console.print(line + gloss, soft_wrap=True)
        elif line.cell_len + gloss.cell_len <= self._console.width or record.event in told.glosses:
            self._console.print(line + gloss, no_wrap=True, overflow="ellipsis")
        else:
            self._console.print(line, no_wrap=True, overflow="ellipsis")
            for part in gloss.wrap(self._console, max(self._console.width - GLOSS, 20)):
                self._console.print(Text(" " * GLOSS) + part, no_wrap=True)
        told.glosses.add(record.event)

    def close(self) -> None:
        """Leave the stream to its owner, but for what was made for us."""
        if isinstance(self._console.file, Unbuffered):
            self._console.file.close()


GLOSS = 18
"""Columns before the meaning of an event that has a line of its own."""


def line_of(record: Record, ms: float) -> Text:
    """What the story says of an event, `ms` milliseconds after its connection began."""
    meaning = EVENTS.get(record.event, UNKNOWN)
    lane = meaning.lane if record.channel is None or meaning.lane != "ssh" else "channel"
    what = record.event.rpartition(".")[2]
    style = COLORS[lane] + (" bold" if what in BAD else " dim" if what in WAITING else "")
    where = f"#{record.connection}" + (f".{record.channel}" if record.channel is not None else "")
    line = Text()
    line.append(f"{where:<6}", style="bold")
    line.append(f"{ms:>10.2f} ms  ", style="dim")
    line.append(f"{'  ' * INDENT[lane]}{record.event:<18}", style=style)
    line.append(f" {words(record.facts)}".rstrip())
    return line


def words(facts: dict[str, Any]) -> str:
    """Facts in a line: those that say something, in the order of the table."""
    return ", ".join(
        _FORMS.get(name, f"{name} {{}}").format(_word(plain(fact)))
        for name, fact in facts.items()
        if fact not in (None, "", {}, ()) and (name, fact) not in _USUAL
    )


_USUAL = (("want_reply", True), ("echo", True), ("core", False))
"""What goes without saying."""


_FORMS = {
    **dict.fromkeys(("text", "request", "shown", "stream", "what"), "{}"),
    "bytes": "{} bytes",
    "times": "{} pieces",
    "us": "took {} µs",
    "seconds": "{} s",
}


def _word(fact: Any) -> str:
    if isinstance(fact, list):
        return " ".join(map(_word, fact))
    if isinstance(fact, dict):
        return " ".join(f"{name}={_word(value)}" for name, value in fact.items())
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return escape(str(fact))
