"""Two traces side by side: what happened in both, and what in one only."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import zip_longest

from ..story import words
from .lab import Record

HANDSHAKE = ("tcp.", "version.", "kex.", "auth.", "trace.")
"""Beginnings of names that are the same in every exercise."""

FLOOD = ("data.", "window.received", "window.sent", "output.read", "input.written")

SHOWN = (
    *("request", "command", "to", "cause", "why", "what", "status", "signal", "exit", "ended"),
    *("foreground", "stream", "fd"),
)
"""Facts that are shown beside a name."""

SAME = ("request", "to", "cause", "why", "what", "status", "signal", "stream")
"""Facts in which two events must agree to be one and the same."""

PAUSE = 700_000
"""Microseconds without an event from which on they are told."""

Line = tuple[str, tuple[object, ...]]
"""What is shown of an event, and what it is compared by."""

Pair = tuple[str, str, bool]
"""Left, right, and whether they are the same; "" where there is nothing."""


def side_by_side(right: list[Record], wrong: list[Record]) -> Iterator[Pair]:
    """The lines of both, those that are the same beside each other."""
    left, other = list(_lines(right)), list(_lines(wrong))
    matcher = SequenceMatcher(
        None, [key for _, key in left], [key for _, key in other], autojunk=False
    )
    for kind, a, b, c, d in matcher.get_opcodes():
        for ours, theirs in zip_longest(left[a:b], other[c:d]):
            yield ours[0] if ours else "", theirs[0] if theirs else "", kind == "equal"


def _lines(records: list[Record]) -> Iterator[Line]:
    """A line for each event; a flood of data is one, as its pieces are never the same twice."""
    flood: dict[str, int] = {}
    place = ""
    before = records[0]["us"] if records else 0
    for record in records:
        name, facts, pause = record["event"], record["facts"], record["us"] - before
        before = record["us"]
        if pause > PAUSE:
            yield from _flood(place, flood)
            place = ""
            yield f"… {pause / 1e6:.1f} s in which nothing happens", ("pause",)
        if name.startswith(HANDSHAKE) and name != "tcp.closed":
            continue
        where = f"#{record['connection']}" + (
            "" if record["channel"] is None else f".{record['channel']}"
        )
        if name.startswith(FLOOD):
            if place not in ("", where):
                yield from _flood(place, flood)
            place = where
            label = name if facts.get("foreground") != 0 else f"{name} (foreground: none)"
            flood[label] = flood.get(label, 0) + facts.get("bytes", 0)
            continue
        yield from _flood(place, flood)
        place = ""
        shown = words({key: facts[key] for key in SHOWN if key in facts})
        same = tuple(facts.get(key) for key in SAME)
        yield f"{where} {name} {shown}".rstrip(), (where, name, *same)
    yield from _flood(place, flood)


def _flood(place: str, flood: dict[str, int]) -> Iterator[Line]:
    for name, size in flood.items():
        yield f"{place} {name} {size} bytes", (place, name)
    flood.clear()
