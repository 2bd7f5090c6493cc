"""How much one client, one source and all together may take. Counts and timers; knows no SSH.

Promises: all tables are bounded, whatever clients do, and what is refused is said once to the
client and, for many refusals of one kind, rarely to the log.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import time
from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

import structlog

from .config import Config
from .counts import Counted, Times
from .lifecycle import Cause

log = structlog.get_logger()

WARNING = 60.0
"""Seconds before a time limit at which a terminal is warned."""

REPEAT = 10.0
"""Seconds in which a kind of refusal is logged once."""

MAX_KINDS = 4096

MAX_LINES = 50
"""Lines of one event in REPEAT seconds, whoever causes them: sources are cheap in IPv6."""


def source_of(host: str) -> str:
    """Whom to count an address for: itself, or its /64, which is what one IPv6 customer has."""
    address = _address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


class Throttle:
    """Logs an event once per REPEAT seconds for each key, and how many it has held back."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, ...], tuple[float, int]] = {}
        self._lines: dict[str, tuple[float, int]] = {}
        """Since when how many lines of an event were written."""

    def log(self, level: int, event: str, key: tuple[str, ...], **facts: object) -> None:
        """Log it, or count it for the next line."""
        now = time.monotonic()
        since, held_back = self._seen.get((event, *key), (now - REPEAT, 0))
        lines = self._lines.get(event, (now, 0))
        if now - lines[0] >= REPEAT:
            lines = (now, 0)
        if now - since < REPEAT or lines[1] >= MAX_LINES:
            self._seen[event, *key] = (since, held_back + 1)
            self._bound()
            return
        self._lines[event] = (lines[0], lines[1] + 1)
        self._seen.pop((event, *key), None)  # to its place among the latest
        self._seen[event, *key] = (now, 0)
        self._bound()
        log.log(level, event, **facts, **({"held_back": held_back} if held_back else {}))

    def _bound(self) -> None:
        if len(self._seen) > MAX_KINDS:
            del self._seen[next(iter(self._seen))]


class Penalties:
    """Sources whose logins fail, and until when they are refused (sshd's PerSourcePenalties)."""

    def __init__(self, times: Times) -> None:
        self._times = times
        """Until when, and whether enough has been added up."""

    def add(self, config: Config, host: str, seconds: float) -> None:
        """Lengthen the penalty of an address. Time takes it away again, a second per second."""
        if config.max_penalty == 0 or seconds == 0 or _exempt(host, config.penalty_exempt):
            return
        now, source = time.monotonic(), source_of(host)
        until, active = self._times.get(source)
        until = min(until + seconds, now + config.max_penalty)
        self._times.set(source, until, active or until - now >= config.min_penalty)

    def seconds_left(self, config: Config, host: str) -> float:
        """Seconds for which the address is refused; 0 if it may come in."""
        if config.max_penalty == 0 or _exempt(host, config.penalty_exempt):
            return 0.0  # by a reload, perhaps just for this source
        until, active = self._times.get(source_of(host))
        return until - time.monotonic() if active else 0.0


def _exempt(host: str, networks: tuple[str, ...]) -> bool:
    return any(_address(host) in ipaddress.ip_network(network) for network in networks)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of a peer; the IPv4 one where it is only wrapped for a socket."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


class Admission:
    """Who may connect just now, and how many have not logged in yet (sshd's MaxStartups)."""

    def __init__(self, counted: Counted) -> None:
        self.penalties = Penalties(counted.penalties)
        self.throttle = Throttle()
        self._open = counted.open
        self._waiting = counted.waiting
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def waiting(self) -> int:
        """Connections that have not logged in."""
        return self._waiting.total()

    def reason_to_refuse(self, config: Config, host: str) -> str:
        """Why a new connection from an address is refused, in words for the client; "" if not."""
        source = source_of(host)
        limits = {
            "max_startups": (
                self.waiting,
                "too many connections wait for a login; try again later",
            ),
            "per_source_max_startups": (
                self._waiting.of(source),
                "too many connections from your address wait for a login; close some",
            ),
            "max_connections": (self._open.total(), "too many connections; try again later"),
            "per_source_max_connections": (
                self._open.of(source),
                "too many connections from your address; close some",
            ),
        }
        if left := self.penalties.seconds_left(config, host):
            self._refused("penalty", source, seconds=round(left, 1))
            return (
                f"too many failed or unfinished logins from your address; try again in {left:.0f} s"
            )
        for limit, (count, words) in limits.items():
            most: int = getattr(config, limit)
            if most and count >= most:
                self._refused(limit, source, most=most)
                return words
        return ""

    def _refused(self, limit: str, source: str, **facts: object) -> None:
        self.throttle.log(
            logging.WARNING,
            "connection refused",
            (limit, source),
            limit=limit,
            source=source,
            **facts,
        )

    def penalise(self, config: Config, host: str, seconds: float) -> None:
        """Make the source of an address wait longer before it may connect again."""
        self.penalties.add(config, host, seconds)

    def turn(self, host: str) -> asyncio.Lock:
        """One password of a source at a time: many guessers leave the processors to others."""
        return self._turns.setdefault(source_of(host), asyncio.Lock())

    def entered(self, host: str) -> None:
        """Count a connection, which has not logged in yet."""
        self._open.add(source_of(host))
        self._waiting.add(source_of(host))

    def logged_in(self, host: str) -> None:
        """It waits no longer, as it has logged in, or has gone before."""
        self._waiting.remove(source_of(host))

    def gone(self, host: str) -> None:
        """It has ended."""
        self._open.remove(source_of(host))


class SessionCounts:
    """How many sessions there are: in all, and of each account."""

    def __init__(self, counted: Counted) -> None:
        self._accounts = counted.sessions

    def reason_to_refuse(
        self, config: Config, account: str, most: int, on_connection: int
    ) -> tuple[str, str]:
        """Which limit one more session would break, and words for the client; "" if none."""
        close, later = "close one first", "try again later"
        for limit, count, allowed, words, remedy in (
            ("connection_max_sessions", on_connection, config.connection_max_sessions, "this connection has", close),
            ("max_sessions", self._accounts.of(account), most, f"the account {account} has", close),
            ("total_max_sessions", self._accounts.total(), config.total_max_sessions, "the server runs", later),
        ):  # fmt: skip
            if allowed and count >= allowed:
                return limit, f"{words} {count} sessions, which is the limit; {remedy}"
        return "", ""

    def opened(self, account: str) -> None:
        """Count a session."""
        self._accounts.add(account)

    def closed(self, account: str) -> None:
        """Count it no more."""
        self._accounts.remove(account)


MAX_UNANSWERED = 64
"""Channels on which a client may owe us its CLOSE. An honest one owes it for a moment."""


class Sessions:
    """The sessions of one connection, and what of them counts for others.

    A channel takes room from its opening to the end of its program, or until it is given up. A
    client that never answers our CLOSE keeps it, but takes room only from itself.
    """

    def __init__(self, counts: SessionCounts, account: str) -> None:
        self._counts = counts
        self._account = account
        self._channels: set[object] = set()
        """Those that the client has not closed."""
        self._counted: dict[object, bool] = {}
        """Those that take room, and whether a program runs on them."""

    @property
    def here(self) -> int:
        """How many there are on this connection; of those that wait for its CLOSE, what is too much."""
        return max(len(self._counted), len(self._channels) - MAX_UNANSWERED)

    @property
    def used(self) -> bool:
        """Whether any of them counts."""
        return bool(self._counted)

    def opened(self, channel: object) -> None:
        """A channel was asked for."""
        self._channels.add(channel)
        self._counted[channel] = False
        self._counts.opened(self._account)

    def started(self, channel: object) -> None:
        """It has a program, which may outlive it for a moment."""
        if channel in self._counted:
            self._counted[channel] = True

    def closed(self, channel: object) -> None:
        """The client's CLOSE has come, or the connection has ended."""
        self._channels.discard(channel)
        if not self._counted.get(channel):
            self.ended(channel)

    def ended(self, channel: object) -> None:
        """Its program has, or there is none: it takes no room any more."""
        if self._counted.pop(channel, None) is not None:
            self._counts.closed(self._account)


class Timed(Protocol):
    """What a session's clock asks of its channel."""

    active: float
    """When the last byte went in either direction (the loop's time)."""

    @property
    def has_terminal(self) -> bool: ...
    def notice(self, text: str) -> None: ...
    def end(self, cause: Cause, text: str = "") -> None: ...


class SessionClock:
    """Ends a session that has been idle, or has lasted, for too long; warns its terminal before."""

    __slots__ = ("_began", "_channel", "_limit_hit", "_loop", "_timers")

    def __init__(self, channel: Timed, config: Config, limit_hit: Callable[..., None]) -> None:
        self._channel = channel
        self._limit_hit = limit_hit
        self._loop = asyncio.get_running_loop()
        self._timers: dict[Cause, asyncio.TimerHandle] = {}
        self._began = self._loop.time()
        for cause, seconds in (
            (Cause.IDLE, config.idle_timeout),
            (Cause.TIME_LIMIT, config.session_timeout),
        ):
            if seconds:
                self._look(cause, seconds)

    def _look(self, cause: Cause, seconds: float, warned_for: float = -1.0) -> None:
        """Warn, or end, if it is time; and look again when it would be, though it may move."""
        start = self._channel.active if cause is Cause.IDLE else self._began
        now, end = self._loop.time(), start + seconds
        if now >= end:
            self._limit_hit(_NAMES[cause], seconds=seconds)
            self._channel.end(cause, _WORDS[cause].format(f"{seconds:g}"))
            return
        due = start + max(seconds - WARNING, seconds / 2)
        if now >= due:
            if warned_for != start and self._channel.has_terminal:
                words = _WARNINGS[cause].format(f"{math.ceil(end - now)}")
                self._channel.notice(f"\r\ngosshd: {words}")
            due, warned_for = end, start
        self._timers[cause] = self._loop.call_at(due, self._look, cause, seconds, warned_for)

    def stop(self) -> None:
        """The session is over."""
        for timer in self._timers.values():
            timer.cancel()


_NAMES = {Cause.IDLE: "idle_timeout", Cause.TIME_LIMIT: "session_timeout"}
_WORDS = {
    Cause.IDLE: "this session was idle for {} s and is ended",
    Cause.TIME_LIMIT: "this session has lasted {} s, as long as one may, and is ended",
}
_WARNINGS = {
    Cause.IDLE: "this session is idle and ends in {} s; press a key to keep it",
    Cause.TIME_LIMIT: "this session ends in {} s; save your work",
}
