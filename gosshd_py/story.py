"""A trace as a story on the terminal: one line for each event, indented by where it happens."""

from __future__ import annotations

import os
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


class _Terminal(Console):
    """A console that takes it calmly when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        """Write into nothing from here on; what the stream still holds could not be written."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.file.fileno())
        os.close(nothing)


class Story:
    """Writes records for people; an Output of a Tracer. Times are milliseconds since the accept.

    A line is cut at the width of a terminal, elsewhere it is whole.
    """

    pace = 0.1

    def __init__(self, stream: TextIO) -> None:
        self._console = _Terminal(file=stream, highlight=False)
        self._whole = not stream.isatty()
        self._began: dict[int, int] = {}

    def write(self, record: Record) -> None:
        """Write a line. Raises OSError."""
        began = self._began.setdefault(record.connection, record.us)
        if record.event == "tcp.closed":
            del self._began[record.connection]
        line = line_of(record, (record.us - began) / 1000)
        if self._whole:
            self._console.print(line, soft_wrap=True)
        else:
            self._console.print(line, no_wrap=True, overflow="ellipsis")

    def close(self) -> None:
        """Leave the stream to its owner."""


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
    line.append(f"  {meaning.gloss}", style="dim italic")
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
