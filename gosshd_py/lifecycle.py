"""The words of a session: records, first causes, and the table of its states. No I/O.

Every other module may import this one; it imports none of them. `session.py`
walks the table below while a session lives, so the diagram in the README is what runs.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Cause(StrEnum):
    """Why a session ended. The first one named is kept, later ones are consequences."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    CLIENT_CLOSED = "client closed"
    CONNECTION_LOST = "connection lost"
    IDLE = "idle"
    TIME_LIMIT = "time limit"
    SHUTDOWN = "shutdown"
    SPAWN_FAILED = "spawn failed"
    ERROR = "internal error"


class State(StrEnum):
    """Where a session is between the request that starts it and CLOSE."""

    OPEN = "open"
    RUNNING = "running"
    INPUT_ENDED = "input ended"
    DRAINING = "draining"
    HANGING_UP = "hanging up"
    CLOSING = "closing"
    CLOSED = "closed"


class Event(StrEnum):
    """What moves a session from one state to the next."""

    SPAWNED = "program spawned"
    CLIENT_EOF = "client EOF"
    PROGRAM_ENDED = "program ended"
    OUTPUT_ENDED = "all output delivered"
    CUT = "client gone, stalled, time over, shutdown or error"
    REAPED = "program reaped, its fds closed"
    CHANNEL_CLOSED = "CLOSE sent, or connection gone"


TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (State.OPEN, Event.SPAWNED): State.RUNNING,
    (State.RUNNING, Event.CLIENT_EOF): State.INPUT_ENDED,
    (State.RUNNING, Event.PROGRAM_ENDED): State.DRAINING,
    (State.INPUT_ENDED, Event.PROGRAM_ENDED): State.DRAINING,
    (State.DRAINING, Event.CLIENT_EOF): State.DRAINING,
    (State.DRAINING, Event.OUTPUT_ENDED): State.HANGING_UP,
    (State.RUNNING, Event.CUT): State.HANGING_UP,
    (State.INPUT_ENDED, Event.CUT): State.HANGING_UP,
    (State.DRAINING, Event.CUT): State.HANGING_UP,
    (State.HANGING_UP, Event.REAPED): State.CLOSING,
    (State.CLOSING, Event.CHANNEL_CLOSED): State.CLOSED,
}
"""(state, event) → next state. A pair that is not here is a bug in the caller."""


def diagram() -> str:
    """The table as a Mermaid state diagram: the one that the README shows."""
    name = {state: state.value.replace(" ", "_") for state in State}
    lines = ["stateDiagram-v2", f"    [*] --> {name[State.OPEN]}: shell, exec or subsystem request"]
    lines += [
        f"    {name[old]} --> {name[new]}: {event}" for (old, event), new in TRANSITIONS.items()
    ]
    return "\n".join([*lines, f"    {name[State.CLOSED]} --> [*]"])


Listener = Callable[[Event, State], None]
"""Told of every transition: the event and the state that it led to. Must not raise."""


@dataclass(slots=True)
class Life:
    """One session's walk through TRANSITIONS, its byte counts, and the first cause of its end."""

    listener: Listener | None = None
    state: State = State.OPEN
    cause: Cause | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    writes_waiting: int = 0
    """Outputs that wait for the client just now."""

    def advance(self, event: Event) -> None:
        """Take one step. Raises KeyError for a step that the table does not have."""
        self.state = TRANSITIONS[self.state, event]
        if self.listener is not None:
            self.listener(event, self.state)

    def blame(self, cause: Cause) -> Cause:
        """Name the cause of the end; only the first caller is heard. Returns the one kept."""
        if self.cause is None:
            self.cause = cause
        return self.cause


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a program ended: `code` 0–255, or the `signal` that killed it (RFC 4254 §6.10)."""

    code: int = 0
    signal: int = 0
    core_dumped: bool = False

    @property
    def signal_name(self) -> str:
        """The RFC's name without SIG; a name that the RFC lacks gets a domain, as it asks."""
        name = (
            signal.Signals(self.signal).name.removeprefix("SIG")
            if self.signal in set(signal.Signals)
            else ""
        )
        return name if name in _RFC_SIGNALS else f"{name or self.signal}@gosshd"

    def __str__(self) -> str:
        return f"signal {self.signal_name}" if self.signal else f"status {self.code}"


_RFC_SIGNALS = frozenset(
    (
        *("ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL"),
        *("PIPE", "QUIT", "SEGV", "TERM", "USR1", "USR2"),
    )
)


@dataclass(frozen=True, slots=True)
class WindowSize:
    """A terminal's size in characters and pixels, each 0–65535 as in struct winsize."""

    columns: int = 80
    rows: int = 24
    xpixel: int = 0
    ypixel: int = 0


@dataclass(frozen=True, slots=True)
class Terminal:
    """What a pty-req asks for: TERM, a size, and modes as {opcode: value} (RFC 4254 §8)."""

    term: str = "dumb"
    size: WindowSize = WindowSize()
    modes: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Start:
    """The request that starts a program: shell (no command), exec, or subsystem (a name)."""

    kind: str
    command: bytes = b""
    env: Mapping[str, bytes] = field(default_factory=dict)
    terminal: Terminal | None = None


class SpawnError(Exception):
    """A program could not be started. The text is for the client: it says what and why."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What is recorded of a session, once. Bytes in went to the program, bytes out to the client."""

    cause: Cause
    status: ExitStatus | None
    bytes_in: int
    bytes_out: int
    seconds: float
    delivered: bool
    """Whether the client got all that the program wrote."""
    error: BaseException | None = None
