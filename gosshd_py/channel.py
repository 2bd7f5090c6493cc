"""The client's side of a session: RFC 4254 §6, one method per channel request. Knows asyncssh.

Requests are collected and checked; nothing starts before shell, exec or subsystem arrives.
Promises: output waits for the client at both levels, window and TCP; window-change, signal and
break act at once; a mistake in here or from the client ends this channel, not the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import asyncssh
import structlog

from .flow import Flow, FlowHost
from .lifecycle import Cause, ExitStatus, SpawnError, Start, Terminal, WindowSize
from .modes import parse_modes
from .requests import SIGNALS, env_allowed, parse_size, parse_term
from .wire import SessionWire

log = structlog.get_logger()

MAX_ENV = 128
"""Environment variables kept for one channel."""

CLOSE_TIMEOUT = 1.0
"""Seconds for closing a channel, from the last output to the client's CLOSE."""

REFUSAL_DELAY = 0.05
"""Seconds from a refusal's words to the refusal. The OpenSSH client exits when it reads the latter
and forgets what it has not yet shown, so they must not come in one piece."""


class RunningProgram(Protocol):
    """What a channel asks of the program beside its bytes."""

    def resize(self, size: WindowSize) -> None: ...
    def send_signal(self, number: int) -> None: ...
    def send_break(self) -> bool: ...


class Host(FlowHost, Protocol):
    """What a channel asks of its connection."""

    accept_env: Collection[str]
    """Patterns of the variable names that a client may set."""
    request_timeout: float
    """Seconds in which a program must be asked for; 0: no limit."""
    turn: asyncio.Lock
    """Held while a program is started; all channels of a server share it."""

    @property
    def allow_pty(self) -> bool: ...
    async def prepare(self, *, terminal: bool) -> None: ...
    def start(self, channel: Channel, request: Start) -> RunningProgram:
        """Start a program and its session. Raises SpawnError with words for the client."""

    def greeting(self, request: Start) -> str: ...
    def limit_hit(self, limit: str, **facts: object) -> None: ...
    def request_refused(self, request: str, reason: str) -> None: ...
    async def forward_agent(self) -> bool: ...
    def channel_done(self, channel: Channel) -> None: ...


class Channel(Flow, asyncssh.SSHServerSession[bytes]):
    """One session channel. See session.Channel for what its parts promise.

    What asyncssh calls a session (it gets the callbacks) is our Channel; what asyncssh calls the
    channel (it sends the packets) is `wire`.
    """

    wire: SessionWire

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.host = host
        self._launch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._env: dict[str, bytes] = {}
        self._terminal: Terminal | None = None
        self._started = False
        self._program: RunningProgram | None = None

    @contextmanager
    def _contained(self, request: str) -> Iterator[None]:
        """Keep an error of ours in this channel: asyncssh would end the whole connection for it."""
        try:
            yield
        except Exception:
            log.exception("internal error", request=request)
            self.end(Cause.ERROR)

    # -- before the start ---------------------------------------------------------------------

    def pty_req(self, term: bytes, sizes: list[int], modes: bytes) -> bool:
        """pty-req (RFC 4254 §6.2): once, before the start, with usable values."""
        if not self.host.allow_pty:
            return self._refuse("pty-req", "the key does not permit terminals")
        if self._terminal is not None or self._started:
            return self._refuse("pty-req", "only one, and before the program starts")
        columns, rows, xpixel, ypixel = sizes
        try:
            size = parse_size(columns, rows, xpixel, ypixel, WindowSize())
            self._terminal = Terminal(parse_term(term), size, parse_modes(modes))
        except ValueError as exc:
            return self._refuse("pty-req", str(exc))
        return True

    def env_req(self, name: bytes, value: bytes) -> bool:
        """env (RFC 4254 §6.4): before the start, and only what the configuration names."""
        full = len(self._env) >= MAX_ENV and name.decode("latin-1") not in self._env
        if self._started or full or not env_allowed(name, value, self.host.accept_env):
            return False
        self._env[name.decode("ascii")] = value
        return True

    def agent_req(self) -> None:
        """auth-agent-req@openssh.com. The answer follows, and what was sent behind waits for it."""
        self._launch = asyncio.create_task(self._agent_req())

    async def _agent_req(self) -> None:
        self._stop_timer()  # it is our answer that is waited for
        answer = False
        with self._contained("auth-agent-req"):
            answer = await self.host.forward_agent()
        self.wire.answer(answer)
        self._start_timer()

    def start(self, kind: str, command: bytes = b"") -> bool | None:
        """shell, exec, subsystem (RFC 4254 §6.5): start the program, once. The answer follows."""
        if self._started:
            return self._refuse(kind, "a program has been started on this channel")
        self._started = True
        self._stop_timer()
        self._launch = asyncio.create_task(self._start_in_turn(kind, command))
        return None

    async def _start_in_turn(self, kind: str, command: bytes) -> None:
        """Start one program of the server per turn of the loop; each takes about a millisecond.

        What cannot be started is told on the client's standard error, and refused right after.
        """
        with self._contained(kind):
            try:
                await self.host.prepare(terminal=self.has_terminal)
                async with self.host.turn:
                    await asyncio.sleep(0)
                    if self.ended.done():
                        self._give_up()
                        return
                    request = Start(kind, command, self._env, self._terminal)
                    self._program = self.host.start(self, request)
                self.wire.answer(accepted=True)
                self._greet(self.host.greeting(request))
                return
            except SpawnError as exc:
                self.notice(f"gosshd: {exc}")
        await asyncio.sleep(REFUSAL_DELAY)
        try:
            self.wire.answer(accepted=False)
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Nothing can follow on this channel; close() would wait for a full window."""
        self.wire.abort()
        self.host.channel_done(self)
        self.end(Cause.CLIENT_CLOSED)

    def _refuse(self, request: str, reason: str) -> bool:
        self.host.request_refused(request, reason)
        return False

    def _greet(self, text: str) -> None:
        if text and not self.wire.is_closing():
            self.wire.write(text.rstrip("\n").replace("\n", "\r\n").encode() + b"\r\n")

    def notice(self, text: str) -> None:
        """Put a line on the client's standard error, if there is room for it now."""
        if self.full is None and not self.wire.is_closing():
            self.wire.write(f"{text}\r\n".encode(), asyncssh.EXTENDED_DATA_STDERR)

    # -- while it runs ------------------------------------------------------------------------

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        """Give it time for its request."""
        super().connection_made(chan)
        self._start_timer()

    def _start_timer(self) -> None:
        if (seconds := self.host.request_timeout) and not self._started:
            self._timer = self._loop.call_later(seconds, self._no_request, seconds)

    def _no_request(self, seconds: float) -> None:
        self.host.limit_hit("request_timeout")
        self.notice(f"gosshd: no program was asked for within {seconds:g} s")
        self._give_up()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        """window-change (RFC 4254 §6.7). An impossible size changes nothing."""
        if self._terminal is None:
            return
        with self._contained("window-change"), suppress(ValueError):
            size = parse_size(width, height, pixwidth, pixheight, self._terminal.size)
            self._terminal = Terminal(self._terminal.term, size, self._terminal.modes)
            if self._program is not None:
                self._program.resize(size)

    def signal_received(self, signal: str) -> None:
        """signal (RFC 4254 §6.9). Unknown and forbidden names change nothing."""
        with self._contained("signal"):
            if self._program is not None and signal in SIGNALS:
                self._program.send_signal(SIGNALS[signal])

    def break_received(self, msec: int) -> bool:
        """break (RFC 4335)."""
        with self._contained("break"):
            return self._program is not None and self._program.send_break()
        return False

    @property
    def has_terminal(self) -> bool:
        """Whether a person may be reading."""
        return self._terminal is not None

    # -- the end ------------------------------------------------------------------------------

    def end(self, cause: Cause, text: str = "") -> None:
        """Ask for the end of the session, for this cause; the first cause wins.

        text: a line for the person at the other end.
        """
        if text and not self.ended.done():
            self.notice(f"\r\ngosshd: {text}" if self._terminal else f"gosshd: {text}")
        super().end(cause)

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is gone: by the client's CLOSE, or with its connection."""
        self._stop_timer()
        super().connection_lost(exc)

    async def aclose(self, status: ExitStatus | None) -> None:
        """EOF, exit-status or exit-signal, CLOSE, in this order; then wait for the client's CLOSE.

        A client that does not take what is left within CLOSE_TIMEOUT loses it.
        """
        self.host.channel_done(self)  # before the client can see the end and ask for the next one
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                if not self.wire.is_closing():
                    await self.writable()
                self._say_goodbye(status)
                await self.wire.wait_closed()
        except TimeoutError:
            self.wire.abort()
        self.end(Cause.CLIENT_CLOSED)

    def _say_goodbye(self, status: ExitStatus | None) -> None:
        if self.wire.is_closing():
            return
        self.wire.write_eof()
        if status is None:
            self.wire.close()
        elif status.signal:
            name, core = status.signal_name, status.core_dumped
            self.wire.exit_with_signal(name, core, f"killed by signal {status.signal}")
        else:
            self.wire.exit(status.code)
