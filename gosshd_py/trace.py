"""Where the events of a trace go: through a bounded queue to a thread of each output's own.

Promises: whoever tells never waits, however slow a disk or a terminal is; what does not fit the
queue is counted, and the count is told in its place; what is typed unseen, and what forwards carry
(an agent's keys, somebody's cookies), is counted and not shown.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import msgspec

from .lifecycle import ask
from .logs import clean, escape

QUEUE = 10_000
"""Events that wait for an output; further ones are dropped."""

BATCH = 1000
"""Events that an output gets at once."""

LAST_WORDS = 2.0
"""Seconds that an output has at the end to write what waits."""

FLOOD = 50
"""Events that come faster than an output's pace, from which on it waits for more to tell as one."""

LIVELY = frozenset(
    ("data.received", "data.sent", "input.written", "output.read", "window.received", "window.sent")
)
"""The events of floods: those that an output gets together and that follow each other are told as one."""


@dataclass(slots=True)
class Record:
    """One event as it is written. us: microseconds of the monotonic clock, time: Unix seconds."""

    us: int
    time: float
    connection: int
    channel: int | None
    event: str
    facts: dict[str, Any] = field(default_factory=dict)


class Output(Protocol):
    """Where records are written, in a thread of its own."""

    pace: float
    """Seconds between two batches of a flood."""

    def start(self) -> None:
        """Called first, in that thread. OSError: tried again by the first write."""

    def write(self, record: Record) -> None:
        """Write it. OSError: it is lost, for the reason that this gives."""

    def close(self) -> None: ...


class Tracer:
    """Hands what is told to its outputs: `with Tracer(outputs, show=64) as tracer`.

    show: bytes of data that are shown, control characters spelled out; 0: they are only counted.
    """

    def __init__(self, outputs: Iterable[Output], show: int = 0) -> None:
        self._show = show
        self._queues = [_Queue(output) for output in outputs]

    def __enter__(self) -> Self:
        for waiting in self._queues:
            waiting.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the outputs a moment to write what waits."""
        deadline = time.monotonic() + LAST_WORDS
        for waiting in self._queues:
            waiting.end()
        for waiting in self._queues:
            waiting.join(max(deadline - time.monotonic(), 0))

    def tell(self, connection: int, channel: int | None, event: str, facts: dict[str, Any]) -> None:
        """Hear of an event: lifecycle.Tell."""
        facts = {name: ask(fact) if callable(fact) else fact for name, fact in facts.items()}
        after, data = facts.pop("after", {}), facts.pop("data", b"")
        if data and self._show and facts["what"] != "socket":
            # What is typed where nothing is echoed is a password, or a raw program's business.
            unseen = facts.get("echo") is False or ("echo" in after and not ask(after["echo"]))
            facts["shown"] = Shown(
                spell(data[: self._show], hidden=event == "input.written" and unseen)
            )
        record = Record(now(), time.time(), connection, channel, event, facts)
        for waiting in self._queues:
            waiting.put(record)


def now() -> int:
    """Microseconds of the monotonic clock."""
    return time.monotonic_ns() // 1000


class _Queue(threading.Thread):
    """What waits for one output, and the thread that hands it over."""

    def __init__(self, output: Output) -> None:
        super().__init__(name=f"trace-{type(output).__name__}", daemon=True)
        self._output = output
        self._waiting: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._dropped = 0
        self._lost, self._reason = 0, ""

    def put(self, record: Record) -> None:
        """Let it wait; if too many do, drop and count all until half of them are gone."""
        if self._waiting.qsize() >= (QUEUE // 2 if self._dropped else QUEUE):
            self._dropped += 1
            return
        self._tell_dropped()
        self._waiting.put(record)

    def end(self) -> None:
        """No more will come."""
        self._tell_dropped()
        self._waiting.put(None)

    def _tell_dropped(self) -> None:
        if self._dropped:
            self._waiting.put(_dropped(self._dropped, "who reads them is too slow"))
            self._dropped = 0

    def run(self) -> None:
        """Write until the end; then close."""
        with suppress(OSError):
            self._output.start()
        for batch in self._batches():
            flood = len(batch) > FLOOD
            for record in merged(batch) if flood else batch:
                self._write(record)
            if flood:
                time.sleep(self._output.pace)
        with suppress(OSError):
            self._output.close()

    def _write(self, record: Record) -> None:
        """Write it, and before it how many could not be written."""
        try:
            if self._lost:
                self._output.write(_dropped(self._lost, self._reason))
                self._lost = 0
            self._output.write(record)
        except (OSError, ValueError) as exc:  # ValueError: of a stream that was closed
            self._lost += 1
            self._reason = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)

    def _batches(self) -> Iterator[list[Record]]:
        """All that waits, some at a time, until the end."""
        while (record := self._waiting.get()) is not None:
            batch = [record]
            with suppress(queue.Empty):
                while len(batch) < BATCH:
                    if (record := self._waiting.get_nowait()) is None:
                        yield batch
                        return
                    batch.append(record)
            yield batch


def _dropped(events: int, reason: str) -> Record:
    return Record(
        now(), time.time(), 0, None, "trace.dropped", {"events": events, "reason": reason}
    )


def merged(records: Iterable[Record]) -> list[Record]:
    """The same with each run of data that nothing else of its channel interrupts told as one."""
    runs: dict[tuple[int, int | None], dict[tuple[str, object], Record]] = {}
    result: list[Record] = []
    for record in records:
        place = (record.connection, record.channel)
        if record.event not in LIVELY:
            runs.pop(place, None)
            result.append(record)
            continue
        kind = (record.event, record.facts.get("what") or record.facts.get("stream"))
        run = runs.setdefault(place, {})
        if kind not in run:
            run[kind] = replace(record, facts=dict(record.facts))  # another output has it, too
            result.append(run[kind])
        else:
            facts = run[kind].facts
            facts["bytes"] += record.facts["bytes"]
            facts["times"] = facts.get("times", 1) + 1
    return result


# -- what is shown ---------------------------------------------------------------------------------

_NAMES = (
    *("NUL", "SOH", "STX", "ETX", "EOT", "ENQ", "ACK", "BEL", "BS", "HT", "LF", "VT", "FF", "CR"),
    *("SO", "SI", "DLE", "DC1", "DC2", "DC3", "DC4", "NAK", "SYN", "ETB", "CAN", "EM", "SUB"),
    *("ESC", "FS", "GS", "RS", "US"),
)
"""ASCII's names of its control characters."""


class Shown(str):
    """Data in print: as long as was asked for, and without control characters."""

    __slots__ = ()


def spell(data: bytes, *, hidden: bool = False) -> str:
    """Data in print: text in quotes, control characters as ^C ETX. hidden: of text, only how much."""
    words: list[str] = []
    text = ""
    for character in [*data.decode("utf-8", "replace"), ""]:
        if character and character not in _CONTROL:
            text += character
            continue
        if text:
            words.append(f"({len(text)} hidden)" if hidden else f'"{escape(text)}"')
            text = ""
        if character:
            words.append(_CONTROL[character])
    return " ".join(words)


_CONTROL = {chr(code): f"^{chr(code + 64)} {name}" for code, name in enumerate(_NAMES)}
_CONTROL["\x7f"] = "^? DEL"


def plain(fact: Any) -> Any:
    """A fact as JSON and people take it: numbers and lists stay, all else becomes short text."""
    if isinstance(fact, Shown):
        return str(fact)
    if fact is None or isinstance(fact, bool | int | float):
        return fact
    if isinstance(fact, bytes):
        return clean(fact.decode("utf-8", "backslashreplace"))
    if isinstance(fact, dict):
        return {str(name): plain(value) for name, value in list(fact.items())[:64]}
    if isinstance(fact, list | tuple):
        return [plain(item) for item in fact[:64]]
    return clean(str(fact))


# -- the file --------------------------------------------------------------------------------------


class TraceFile:
    """Appends records to a file, a JSON object a line (NDJSON), each whole and at once.

    Several servers may append to one file. When it is renamed or removed (logrotate(8)), the next
    record goes into a new one.
    """

    pace = 0.02

    def __init__(self, path: Path, version: str) -> None:
        """Raises OSError if it cannot be written."""
        self._path = path
        self._version = version
        self._began = round(time.time(), 6)
        self._torn = self._introduced = False
        self._fd = -1
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self._path, flags | os.O_NONBLOCK, 0o600)  # not waiting for a pipe's reader
        os.set_blocking(fd, True)
        self.close()
        self._fd = fd
        self._introduced = False

    def start(self) -> None:
        """Tell who writes, in each new file. Not when it is opened: a full pipe takes its time."""
        # A line that was left unfinished, since the disk was full or its server was killed.
        self._torn = _last_byte(self._path) not in (b"", b"\n")
        facts = {"version": self._version, "pid": os.getpid(), "began": self._began}
        self._append(Record(now(), time.time(), 0, None, "trace.started", facts))
        self._introduced = True

    def write(self, record: Record) -> None:
        """Append it, by one system call. Raises OSError if that does not take all of it."""
        if not self._is_ours():
            self._open()
        if not self._introduced:
            self.start()
        self._append(record)

    def _is_ours(self) -> bool:
        try:
            there, ours = self._path.stat(), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _append(self, record: Record) -> None:
        line = (b"\n" if self._torn else b"") + encode(record) + b"\n"
        written = os.write(self._fd, line)
        self._torn = written < len(line)
        if self._torn:
            raise OSError(errno.ENOSPC, "only a part of a line could be written")

    def close(self) -> None:
        """Close it; twice is silent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def encode(record: Record) -> bytes:
    """A line of the file, without its end."""
    return msgspec.json.encode(
        {
            "us": record.us,
            "time": round(record.time, 6),
            "pid": os.getpid(),
            "connection": record.connection,
            "channel": record.channel,
            "event": record.event,
            "facts": plain(record.facts),
        }
    )


def _last_byte(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        with suppress(OSError):  # an empty one has no last byte
            file.seek(-1, os.SEEK_END)
        return file.read(1)
