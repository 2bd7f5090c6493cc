"""The words of a session: records, first causes, the table of its states, and all events. No I/O.

Every other module may import this one; it imports none of them. `session.py`
walks the table below while a session lives, so the diagram in the README is what runs.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any


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


Tell = Callable[[int, int | None, str, dict[str, Any]], None]
"""Hears of every event: connection, channel, name, facts. Must not raise, nor wait."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Tells what happens on one connection, and on one of its channels, to whoever listens.

    A fact that is a function is asked for only then.
    """

    tell: Tell | None = None
    connection: int = 0
    channel: int | None = None

    def __call__(self, event: str, /, **facts: Any) -> None:
        """Tell of an event of the table below, with the facts that it names."""
        if self.tell is not None:
            self.tell(self.connection, self.channel, event, facts)

    def ask(self, questions: Mapping[str, Callable[[], object]]) -> dict[str, object]:
        """Facts of now for an event that is told later; none where nobody listens."""
        return {name: ask(fact) for name, fact in questions.items()} if self.tell else {}

    def of(self, channel: int) -> Trace:
        """The same for one of the connection's channels, by our number for it (RFC 4254 §5.1)."""
        return replace(self, channel=channel)


SILENT = Trace()
"""Where nobody listens."""


def ask(fact: Callable[[], object]) -> object:
    """A fact of now; False of what is closed by now."""
    try:
        return fact()
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an event of a trace means: where it happens, which facts it has, and who says so."""

    lane: str
    """tcp, ssh, channel, pty (or pipes), process; trace: the trace itself."""
    facts: tuple[str, ...]
    gloss: str
    source: str


def _meanings(table: str) -> dict[str, Meaning]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return {name: Meaning(lane, tuple(facts.split()), *rest) for name, lane, facts, *rest in rows}


EVENTS: Mapping[str, Meaning] = _meanings("""
tcp.accepted      | tcp     | peer local fd  | a client has connected: the kernel has shaken hands, accept(2) gives a descriptor for it | accept(2)
tcp.refused       | tcp     | reason         | too much already: it is told why and cut off, and no key is exchanged for it | RFC 4253 §11.1
tcp.paused        | tcp     |                | the client reads too slowly: the kernel's send buffer is full, so programs are read no more | tcp(7)
tcp.resumed       | tcp     |                | the client has read: there is room again | tcp(7)
tcp.closed        | tcp     | fd reason      | close(2): the kernel may give the descriptor's number to whoever comes next | close(2)
version.sent      | ssh     | text           | who we say we are, in the only line that is not a packet | RFC 4253 §4.2
version.received  | ssh     | text           | who the client says it is | RFC 4253 §4.2
kex.started       | ssh     | by             | what this side offers for a key exchange; the first name that both have is taken | RFC 4253 §7.1
kex.completed     | ssh     | first us kex host_key send_cipher recv_cipher send_mac strict | both have the same secret, and the host key has signed it: from here on we encrypt | RFC 4253 §7.3
auth.started      | ssh     | user method signed algorithm key | the client wants to log in; without a signature it only asks whether a key would do | RFC 4252 §5
auth.rejected     | ssh     | method reason  | no; the reason is for the log, the client is not told it | RFC 4252 §5.1
auth.failed       | ssh     | left           | the client is told no, and which methods are left to try | RFC 4252 §5.1
auth.completed    | ssh     | user method    | the client is in: only now may it open channels | RFC 4252 §5.1
banner.sent       | ssh     | text           | words that the client shows to its user | RFC 4252 §5.4
disconnect.sent   | ssh     | code reason    | we end the connection, and say why | RFC 4253 §11.1
disconnect.received | ssh   | code reason    | the client ends the connection | RFC 4253 §11.1
limit.hit         | ssh     | limit          | a limit of the configuration is reached | README
channel.asked     | ssh     | by kind sender window packet place | a channel is wanted: a stream of its own in this connection, with a window each way | RFC 4254 §5.1
channel.refused   | ssh     | by sender code reason | the channel is not opened | RFC 4254 §5.1
channel.opened    | channel | theirs window packet | the channel is open; each side has its own number for it | RFC 4254 §5.1
request.received  | channel | request want_reply term size modes name value command signal ms place | the client asks for something; nothing starts before shell, exec or subsystem | RFC 4254 §6
request.accepted  | channel | request        | yes | RFC 4254 §5.4
request.refused   | channel | request        | no | RFC 4254 §5.4
request.sent      | channel | request want_reply | we ask the client for something, if only whether it lives | RFC 4254 §5.4
request.answered  | channel |                | the client answers; even a no says that it lives | RFC 4254 §5.4
data.received     | channel | stream bytes times | from the client; it may send as much as our window for it allows | RFC 4254 §5.2
data.sent         | channel | stream bytes times | to the client, as much as its window for us allows | RFC 4254 §5.2
window.received   | channel | bytes times | the client has taken data, and we may send so much more | RFC 4254 §5.2
window.sent       | channel | bytes times | the program has taken its input, and the client may send so much more | RFC 4254 §5.2
window.paused     | channel |                | the client's window is used up: the program is read no more, and soon it blocks in write(2) | RFC 4254 §5.2
window.resumed    | channel |                | all that waited for the client's window is sent: the program is read again | RFC 4254 §5.2
eof.received      | channel |                | the client will send no more; it still listens (a half-close) | RFC 4254 §5.3
eof.sent          | channel |                | no more output will come | RFC 4254 §5.3
exit.sent         | channel | status signal core | how the program ended, which is what `echo $?` shows; behind all output, or it could get lost | RFC 4254 §6.10
close.received    | channel |                | the client gives up the channel | RFC 4254 §5.3
close.sent        | channel |                | we give up the channel; when both have, its number is free | RFC 4254 §5.3
state.changed     | channel | by to          | a step in the table of a session's states | lifecycle.py
cause.named       | channel | cause          | the first end that is seen: this is why the session ends | session.py
cause.ignored     | channel | cause first    | came later, so it is a consequence and not the cause | session.py
session.ended     | channel | cause exit bytes_in bytes_out seconds delivered | all is closed: nothing is left of this session | server.py
listener.opened   | ssh     | kind listen rule | we listen for the client; each connection becomes a channel to it | RFC 4254 §7.1
forward.started   | channel | kind to listen origin rule | a socket is connected, and carried by this channel | RFC 4254 §7.2
forward.failed    | ssh     | kind to listen origin rule reason | no rule allows it, or nobody answers there | RFC 4254 §7
forward.completed | channel | bytes_in bytes_out | both directions have ended, and the socket is closed | RFC 4254 §7.2
pty.opened        | pty     | master slave name size | a pair: what is written to one end comes out of the other, by way of a terminal's rules | pty(7)
pipes.opened      | pty     | stdin stdout stderr | no terminal was asked for: three pipes, each in one direction | pipe(7)
pty.resized       | pty     | size foreground | if that is another size, the kernel sends SIGWINCH to the foreground process group, if there is one | ioctl_tty(2)
input.written     | pty     | fd what bytes shown echo foreground times | to the program, or into a forward's socket; a terminal also echoes it, and makes signals of ^C and ^Z | termios(3)
input.paused      | pty     | fd what        | the program does not read: its input is full, and the client's window fills up, too | pty(7)
input.resumed     | pty     | fd what        | the program reads again | pty(7)
veof.typed        | pty     | character      | a terminal has no end of file, but a character that makes one of an empty line | termios(3)
output.read       | pty     | fd what bytes shown echo foreground times | from the program, or out of a forward's socket; on a terminal with the echo of what was typed | pty(7)
output.ended      | pty     | fd what why    | every writer is gone (EIO on a terminal: the kernel hung up; EOF on a pipe or a socket), or a background job keeps the terminal and is waited for no more (quiet, late) | pty(7)
fd.closed         | pty     | fd what        | close(2), once: the next open(2) anywhere in the server may get this number | close(2)
program.spawned   | process | pid pgid sid argv terminal us | a child that leads a session and a process group; the first terminal that it opens becomes its own | credentials(7)
program.failed    | process | reason         | nothing was started, and the client is told why | execve(2)
signal.sent       | process | signal pgid    | to a whole process group: the shell's, or what runs in the foreground | kill(2)
program.reaped    | process | pid status ended | wait(2) has taken its status; until then it was a zombie, and its pid could not become anybody else's | wait(2)
trace.started     | trace   | version pid began | a process of a server writes here from now on; since it began, each connection has a number of its own | README
trace.dropped     | trace   | events reason  | these were not written, since whoever reads is too slow, or the disk is full | README
""")
"""name → meaning. Every event of a trace is here; a fact may be absent where it says nothing."""


@dataclass(slots=True)
class Life:
    """One session's walk through TRANSITIONS, its byte counts, and the first cause of its end."""

    trace: Trace
    state: State = State.OPEN
    cause: Cause | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    writes_waiting: int = 0
    """Outputs that wait for the client just now."""

    def advance(self, event: Event) -> None:
        """Take one step. Raises KeyError for a step that the table does not have."""
        self.state = TRANSITIONS[self.state, event]
        self.trace("state.changed", by=event, to=self.state)

    def blame(self, cause: Cause) -> None:
        """Name the cause of the end; only the first caller is heard."""
        if self.cause is None:
            self.cause = cause
            self.trace("cause.named", cause=cause)
        else:
            self.trace("cause.ignored", cause=cause, first=self.cause)


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

    @property
    def cause(self) -> Cause:
        """What this end is the cause of."""
        return Cause.SIGNALLED if self.signal else Cause.EXITED

    def __str__(self) -> str:
        return f"signal {self.signal_name}" if self.signal else f"status {self.code}"


_RFC_SIGNALS = {
    "ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL", "PIPE", "QUIT", "SEGV", "TERM", "USR1", "USR2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class WindowSize:
    """A terminal's size in characters and pixels, each 0–65535 as in struct winsize."""

    columns: int = 80
    rows: int = 24
    xpixel: int = 0
    ypixel: int = 0

    def __str__(self) -> str:
        return f"{self.columns}x{self.rows}"


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

    @property
    def facts(self) -> dict[str, object]:
        """For the log and for a trace."""
        counted = ("cause", "bytes_in", "bytes_out", "delivered")
        return {
            **{name: getattr(self, name) for name in counted},
            "exit": str(self.status) if self.status else None,
            "seconds": round(self.seconds, 3),
        }
