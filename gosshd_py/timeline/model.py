"""From the lines of a trace to what a timeline shows: lanes, bars for states, marks, arrows for causes.

Pure: page.js and svg.py only draw what is found here. Times are microseconds since a connection's
first event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ..lifecycle import EVENTS, Meaning

Micros = Annotated[int, Meta(ge=0, le=2**53)]
Number = Annotated[int, Meta(ge=0, le=2**32)]


Scalar = str | int | float | bool | None
Facts = dict[str, str | int | float | bool | list[Scalar] | dict[str, Scalar] | None]


class Event(Struct, frozen=True):
    """A line of a trace."""

    us: Micros
    time: float
    pid: Number
    connection: Number
    channel: Number | None
    event: str
    facts: Facts


UNKNOWN = Meaning("trace", (), "This version does not know this event.", "")

_DECODER = msgspec.json.Decoder(Event)


@dataclass
class Read:
    """The events in the lines of a trace; what is none is left out and counted."""

    lines: Iterable[str]
    good: int = 0
    bad: int = 0
    """Lines cut off by a full disk or a killed server, still being written, or of something else."""

    def __iter__(self) -> Iterator[Event]:
        for line in self.lines:
            if not line.strip():
                continue
            try:
                event = _DECODER.decode(line)
            except (msgspec.MsgspecError, UnicodeError, RecursionError):
                self.bad += 1
            else:
                self.good += 1
                yield event


@dataclass
class Bar:
    """A state that lasts: from begin to end, or still going on."""

    begin: int
    end: int | None
    label: str
    state: str
    """What it looks like: a name in the stylesheet."""
    row: int = 0


@dataclass
class Lane:
    """Where things happen: the socket, the SSH connection, a channel, its terminal, its program."""

    name: str
    kind: str
    channel: int | None = None
    rows: int = 1
    bars: list[Bar] = field(default_factory=list)


@dataclass
class Mark:
    """An event in its lane."""

    us: int
    lane: int
    event: str
    facts: dict[str, Any]
    time: float


@dataclass
class Arrow:
    """From the mark that is the cause to the one that is the effect."""

    cause: int
    effect: int
    kind: str = "cause"
    """cause, or data: bytes that go the same way."""


@dataclass
class Connection:
    """One connection as it is drawn."""

    key: str
    number: int
    began: float
    """Unix seconds of its first event."""
    label: str = ""
    lanes: list[Lane] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    open: bool = True

    @property
    def end(self) -> int:
        """Microseconds of the last event."""
        return self.marks[-1].us if self.marks else 0


class Model:
    """All connections of a trace: feed it events, in the order in which they were written."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}
        self.dropped = 0
        """Events that were not written, for want of room or of time."""
        self._runs: dict[int, tuple[int, object]] = {}
        """How many servers have had a pid, since the kernel gives a number again, and when the last began."""

    def feed(self, event: Event) -> str | None:
        """Take one event. Returns the key of the connection that it belongs to, or None."""
        count, began = self._runs.get(event.pid, (1, None))
        if event.event == "trace.started" and event.facts.get("began") != began:
            self._runs[event.pid] = (count + (began is not None), event.facts.get("began"))
        elif event.event == "trace.dropped" and isinstance(
            number := event.facts.get("events"), int
        ):
            self.dropped += number
        if not event.connection:
            return None
        key = f"{event.pid}.{self._runs.get(event.pid, (1,))[0]}.{event.connection}"
        self.events.setdefault(key, []).append(event)
        return key

    def connection(self, key: str) -> Connection:
        """What is to be drawn of one connection, as far as it is known."""
        return _Builder(key, self.events[key]).build()


# -- building --------------------------------------------------------------------------------------


class _Builder:
    """Walks through the events of a connection once."""

    def __init__(self, key: str, events: list[Event]) -> None:
        self._events = events
        self._base = events[0].us
        self._result = Connection(key, events[0].connection, events[0].time)
        self._lanes: dict[tuple[str, int | None], int] = {}
        self._going_on: dict[tuple[object, ...], Bar] = {}
        self._last: dict[tuple[str, int | None], int] = {}
        """The latest mark of each event, by channel."""
        self._asked: dict[tuple[str, str], int] = {}
        """The marks of channels that are asked for, by who asks, and by his number for them."""
        self._closed = False

    def build(self) -> Connection:
        for event in self._events:
            self._take(event)
        self._result.open = not self._closed or bool(self._going_on)
        self._result.label = self._label()
        self._leave_out_what_is_empty()
        return self._result

    def _take(self, event: Event) -> None:
        name, channel, facts = event.event, event.channel, event.facts
        us = max(event.us - self._base, 0)
        meaning = EVENTS.get(name, UNKNOWN)
        of_connection, of_channel = meaning.lane in _OF_CONNECTION, meaning.lane in _OF_CHANNEL
        if channel is None:
            kind = meaning.lane if of_connection else "ssh"
        else:
            kind = meaning.lane if of_channel or meaning.lane == "tcp" else "channel"
        number = len(self._result.marks)
        lane = self._lane(kind, channel if kind in _OF_CHANNEL else None, name)
        self._result.marks.append(Mark(us, lane, name, facts, event.time))
        for change in _CHANGES.get(name, ()):
            change(self, us, lane, channel, facts)
        self._arrows(number, name, channel, facts)
        self._last[name, channel] = number

    def _lane(self, kind: str, channel: int | None, event: str) -> int:
        if (kind, channel) not in self._lanes:  # all of them, in order, whichever comes first
            for known, name in (_OF_CONNECTION if channel is None else _OF_CHANNEL).items():
                self._lanes[known, channel] = len(self._result.lanes)
                self._result.lanes.append(Lane(name.format(channel), known, channel))
        lane = self._lanes[kind, channel]
        if event in _NAMES and channel is not None:
            self._result.lanes[self._lanes["pty", channel]].name = f"{_NAMES[event]} {channel}"
        return lane

    def _leave_out_what_is_empty(self) -> None:
        """A forward has no process, and a refused channel has nothing."""
        used = sorted({mark.lane for mark in self._result.marks})
        place = {lane: number for number, lane in enumerate(used)}
        self._result.lanes = [self._result.lanes[lane] for lane in used]
        for mark in self._result.marks:
            mark.lane = place[mark.lane]

    def _label(self) -> str:
        facts = {mark.event: mark.facts for mark in reversed(self._result.marks)}
        user = facts.get("auth.completed", {}).get("user")
        peer = facts.get("tcp.accepted", {}).get("peer", "?")
        asked = [m.facts for m in self._result.marks if m.event == "request.received"]
        what = next(
            (_what(f) for f in asked if f.get("request") in ("shell", "exec", "subsystem")), ""
        )
        who = f"{user}@{peer}" if user else str(peer)
        return f"#{self._result.number} {who} {what}".rstrip()

    # -- bars ---------------------------------------------------------------------------------

    def begin(self, us: int, lane: int, key: tuple[object, ...], label: str, state: str, row: int = 0) -> None:  # fmt: skip
        """A state begins; one of the same key ends."""
        self.end(us, key)
        bar = Bar(us, None, label, state, row)
        self._result.lanes[lane].bars.append(bar)
        self._result.lanes[lane].rows = max(self._result.lanes[lane].rows, row + 1)
        self._going_on[key] = bar

    def end(self, us: int, key: tuple[object, ...]) -> None:
        """It ends, if it goes on."""
        if (bar := self._going_on.pop(key, None)) is not None:
            bar.end = us

    def close(self, us: int) -> None:
        """TCP is closed: programs may live on, but nothing else waits for a client any more."""
        for key, bar in list(self._going_on.items()):
            if key[1] is None or bar.state in ("opened", "waiting"):
                self.end(us, key)
        self._closed = True

    # -- arrows -------------------------------------------------------------------------------

    def _arrows(self, number: int, name: str, channel: int | None, facts: dict[str, Any]) -> None:
        if name == "channel.asked":
            self._asked[str(facts.get("by")), str(facts.get("sender"))] = number
        elif name in ("channel.opened", "channel.refused"):
            cause = self._request_for(name, channel, facts)
        else:
            cause = self._latest_cause(name, channel, facts)
        if name != "channel.asked" and cause is not None:
            kind = "data" if name in ("input.written", "data.sent") else "cause"
            self._result.arrows.append(Arrow(cause, number, kind))

    def _request_for(self, name: str, channel: int | None, facts: dict[str, Any]) -> int | None:
        """Each side numbers the channels that it asks for, so a number can stand for two of them."""
        if name == "channel.refused":
            return self._asked.pop((str(facts.get("by")), str(facts.get("sender"))), None)
        keys = [("client", str(facts.get("theirs"))), ("server", str(channel))]
        return self._asked.pop(max(keys, key=lambda key: self._asked.get(key, -1)), None)

    def _latest_cause(self, name: str, channel: int | None, facts: dict[str, Any]) -> int | None:
        if name == "fd.closed" and facts.get("what") not in ("stdin", "master"):
            return None
        if name == "program.reaped" and ("cause.named", channel) not in self._last:
            return None  # it ended by itself
        causes = _CAUSES.get(name, ())
        if name == "cause.named":
            causes = _BEHIND.get(str(facts.get("cause")), ())
        found = [
            self._last[cause, of]
            for cause in causes
            for of in ((channel, None) if channel is not None else (None,))
            if (cause, of) in self._last
        ]
        return max(found, default=None)


def _what(facts: dict[str, Any]) -> str:
    return str(facts.get("command") or facts.get("name") or facts.get("request"))


_OF_CONNECTION = {"tcp": "TCP", "ssh": "SSH"}
_OF_CHANNEL = {"channel": "channel {}", "pty": "pty {}", "process": "process {}"}
_NAMES = {"pipes.opened": "pipes", "forward.started": "socket"}
"""What a channel has in place of a pty."""

Change = Callable[[_Builder, int, int, int | None, dict[str, Any]], None]


def _begins(key: str, label: str, state: str, row: int = 0) -> Change:
    def change(
        to: _Builder, us: int, lane: int, channel: int | None, facts: dict[str, Any]
    ) -> None:
        to.begin(us, lane, (key, channel), label.format_map(_Known(facts)), state, row)

    return change


def _ends(key: str) -> Change:
    return lambda to, us, lane, channel, facts: to.end(us, (key, channel))


class _Known(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


def _state(to: _Builder, us: int, lane: int, channel: int | None, facts: dict[str, Any]) -> None:
    state = str(facts.get("to", "?"))
    if state == "closed":
        to.end(us, ("state", channel))
    else:
        to.begin(us, lane, ("state", channel), state, state.replace(" ", "-"))


def _fd(to: _Builder, us: int, lane: int, channel: int | None, facts: dict[str, Any]) -> None:
    to.end(us, (str(facts.get("what")), channel))


def _pipes(to: _Builder, us: int, lane: int, channel: int | None, facts: dict[str, Any]) -> None:
    for row, name in enumerate(("stdin", "stdout", "stderr")):
        to.begin(us, lane, (name, channel), f"{name}, fd {facts.get(name)}", "descriptor", row)


def _closed(to: _Builder, us: int, lane: int, channel: int | None, facts: dict[str, Any]) -> None:
    to.close(us)


_CHANGES: dict[str, tuple[Change, ...]] = {
    "tcp.accepted": (_begins("tcp", "connected, fd {fd}", "open"),),
    "tcp.paused": (_begins("tcp-waits", "full", "waiting", 1),),
    "tcp.resumed": (_ends("tcp-waits"),),
    "tcp.closed": (_closed,),
    "version.sent": (_begins("identification", "identification", "handshake"),),
    "kex.started": (_begins("kex", "key exchange", "kex", 1), _ends("identification")),
    "kex.completed": (_ends("kex"),),
    "auth.started": (_begins("ssh", "authentication", "auth"),),
    "auth.completed": (_begins("ssh", "logged in as {user}", "open"),),
    "channel.opened": (_begins("state", "open", "opened"),),
    "state.changed": (_state,),
    "window.paused": (_begins("window-waits", "window used up", "waiting", 1),),
    "window.resumed": (_ends("window-waits"),),
    "session.ended": (_ends("state"), _ends("window-waits")),
    "forward.started": (_begins("state", "forward to {to}", "running"),),
    "forward.completed": (_ends("state"), _ends("socket")),
    "pty.opened": (
        _begins("master", "master, fd {master}", "descriptor"),
        _begins("slave", "slave, fd {slave}", "slave", 1),
    ),
    "pipes.opened": (_pipes,),
    "input.paused": (_begins("input-waits", "input full", "waiting", 3),),
    "input.resumed": (_ends("input-waits"),),
    "fd.closed": (_fd,),
    "program.spawned": (_begins("process", "pid {pid}", "running"),),
    "program.reaped": (_ends("process"),),
}
"""What each event begins and ends."""

_CAUSES: dict[str, tuple[str, ...]] = {
    "kex.completed": ("kex.started",),
    "auth.rejected": ("auth.started",),
    "auth.completed": ("auth.started",),
    "pty.opened": ("request.received",),
    "pipes.opened": ("request.received",),
    "program.spawned": ("pty.opened", "pipes.opened"),
    "program.failed": ("request.received",),
    "pty.resized": ("request.received",),
    "signal.sent": ("request.received", "cause.named"),
    "input.written": ("data.received",),
    "data.sent": ("output.read",),
    "window.resumed": ("window.received",),
    "veof.typed": ("eof.received",),
    "fd.closed": ("eof.received", "cause.named"),
    "program.reaped": ("fd.closed", "signal.sent"),
    "eof.sent": ("output.ended",),
    "exit.sent": ("program.reaped",),
    "close.received": ("close.sent",),
    "disconnect.sent": ("limit.hit",),
    "tcp.closed": ("disconnect.received", "disconnect.sent"),
}
"""Effect → what can be its cause: the latest of these, on the same channel or on the connection."""

_BEHIND = {
    "exited": ("program.reaped",),
    "signalled": ("program.reaped",),
    "client closed": ("close.received", "disconnect.received"),
    "connection lost": ("tcp.closed",),
    "idle": ("limit.hit",),
    "time limit": ("limit.hit",),
}
"""The same for what a session names as the cause of its end."""
