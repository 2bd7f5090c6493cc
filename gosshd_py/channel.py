"""The client's side of a session: RFC 4254 §6, one method per channel request. Knows asyncssh.

Requests are collected and checked; nothing starts before shell, exec or subsystem arrives.
Promises: output waits for the client at both levels, window and TCP; window-change, signal and
break act at once; a mistake in here or from the client ends this channel, not the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import asyncssh
import structlog
from asyncssh.packet import PacketDecodeError, SSHPacket

from .lifecycle import Cause, ExitStatus, SpawnError, Start, Terminal, WindowSize
from .modes import parse_modes
from .requests import SIGNALS, env_allowed, parse_size, parse_term

log = structlog.get_logger()

WINDOW = 1024 * 1024
"""Bytes that a client may send ahead of its program."""

INPUT_HIGH = 64 * 1024
"""Bytes of input held for a program before reading from the channel stops."""

MAX_ENV = 128
"""Environment variables kept for one channel."""

MIN_PACKET = 256
"""Smallest maximum packet size accepted: at one byte a packet, 16 KiB stall the loop for 0.6 s."""

CLOSE_TIMEOUT = 1.0
"""Seconds for closing a channel, from the last output to the client's CLOSE."""

REFUSAL_DELAY = 0.05
"""Seconds from a refusal's words to the refusal. The OpenSSH client exits when it reads the latter
and forgets what it has not yet shown, so they must not come in one piece."""

_OVERRIDDEN = (
    *(f"_process_{name}_request" for name in ("pty_req", "env", "shell", "exec", "subsystem")),
    *("_service_next_request", "_report_response", "_close_send", "process_connection_close"),
    *("process_open", "_cleanup"),
)


class RunningProgram(Protocol):
    """What a channel asks of the program beside its bytes."""

    def resize(self, size: WindowSize) -> None: ...
    def send_signal(self, number: int) -> None: ...
    def send_break(self) -> bool: ...


class Host(Protocol):
    """What a channel asks of its connection."""

    accept_env: Collection[str]
    """Patterns of the variable names that a client may set."""
    request_timeout: float
    """Seconds in which a program must be asked for; 0: no limit."""
    turn: asyncio.Lock
    """Held while a program is started; all channels of a server share it."""
    transport_open: asyncio.Event
    """Set while the connection's TCP buffer takes more."""

    @property
    def allow_pty(self) -> bool: ...
    async def prepare(self) -> None: ...
    def start(self, channel: Channel, request: Start) -> RunningProgram:
        """Start a program and its session. Raises SpawnError with words for the client."""

    def greeting(self, request: Start) -> str: ...
    def limit_hit(self, limit: str, **facts: object) -> None: ...
    def request_refused(self, request: str, reason: str) -> None: ...
    def channel_closed(self, channel: Channel) -> None: ...
    def channel_done(self, channel: Channel) -> None: ...


# -- the wire: what asyncssh's public callbacks cannot see or refuse ---------------------------


class SessionChannel(asyncssh.SSHServerChannel[bytes]):
    """asyncssh's channel with the requests answered that it accepts unseen or disconnects for.

    asyncssh calls these methods by name, so a renamed one would silently open what is closed
    here; the check below refuses to run on such a version.
    """

    def __init__(self, conn: asyncssh.SSHServerConnection, channel: Channel) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            conn, loop, allow_pty=True, line_editor=False, line_echo=False, line_history=0,
            max_line_length=0, encoding=None, errors="strict", window=WINDOW, max_pktsize=32768,
        )  # fmt: skip
        self.channel = channel
        self._servicing = False

    def process_open(
        self, send_chan: int, send_window: int, send_pktsize: int, session: Any
    ) -> None:
        """Refuse absurd packet sizes (RFC 4254 §5.1), then go on as usual."""
        if send_pktsize < MIN_PACKET:
            reason = f"a maximum packet size of {send_pktsize} bytes is too small"
            session = _refuse_open(reason)
        super().process_open(send_chan, send_window, send_pktsize, session)

    def _process_pty_req_request(self, packet: SSHPacket) -> bool:
        term = packet.get_string()
        sizes = [packet.get_uint32() for _ in range(4)]
        modes = packet.get_string()
        packet.check_end()
        return self.channel.pty_req(term, sizes, modes)

    def _process_env_request(self, packet: SSHPacket) -> bool:
        name, value = packet.get_string(), packet.get_string()
        packet.check_end()
        return self.channel.env_req(name, value)

    def _service_next_request(self) -> None:
        # asyncssh comes back here from within, once for each waiting request: a few hundred
        # behind one start are deeper than Python's stack, so we loop. A request without its
        # fields is refused; asyncssh would end the connection.
        if self._servicing:
            return
        self._servicing, head = True, None
        try:
            while self._request_queue and self._request_queue[0] is not head:
                head = self._request_queue[0]  # still there afterwards: its answer follows later
                try:
                    super()._service_next_request()
                except PacketDecodeError:
                    self._report_response(False)
        finally:
            self._servicing = False

    # None, for asyncssh: the answer follows. Its own types lack that.
    def _process_shell_request(self, packet: SSHPacket) -> bool | None:  # type: ignore[override]
        packet.check_end()
        return self.channel.start("shell")

    def _process_exec_request(self, packet: SSHPacket) -> bool | None:  # type: ignore[override]
        command = packet.get_string()
        packet.check_end()
        return self.channel.start("exec", command)

    def _process_subsystem_request(self, packet: SSHPacket) -> bool | None:  # type: ignore[override]
        subsystem = packet.get_string()
        packet.check_end()
        return self.channel.start("subsystem", subsystem)

    def answer(self, accepted: bool) -> None:
        """Answer the request that waits for it."""
        if not self.is_closing():
            self._report_response(accepted)

    def resume_reading(self) -> None:
        """Not after the channel's end: asyncssh would look for the session it has let go."""
        if self._session is not None:
            super().resume_reading()

    async def keys_exchanged(self) -> None:
        """Wait while keys are exchanged: what is sent meanwhile, asyncssh holds without a bound.

        transport.py disconnects a client that does not finish one.
        """
        while self._conn is not None and not self._conn._kex_complete:  # noqa: SLF001, ASYNC110
            await asyncio.sleep(0.01)  # no event tells, and it takes milliseconds

    def _cleanup(self, exc: Exception | None = None) -> None:
        super()._cleanup(exc)  # how every channel ends, also one that was never opened
        self.channel.host.channel_closed(self.channel)

    def process_connection_close(self, exc: Exception | None) -> None:
        """Name the cause before the clean-up below looks like a CLOSE."""
        self.channel.end(Cause.CLIENT_CLOSED if exc is None else Cause.CONNECTION_LOST)
        super().process_connection_close(exc)

    def _close_send(self) -> None:
        # Also how CLOSE arrives while input is paused, when no callback would tell us.
        super()._close_send()
        self.channel.end(Cause.CLIENT_CLOSED)


for _name in _OVERRIDDEN:
    if not hasattr(asyncssh.SSHServerChannel, _name):
        raise ImportError(f"asyncssh {asyncssh.__version__} is not supported: it has no {_name}")


async def _refuse_open(reason: str) -> asyncssh.SSHServerSession[bytes]:
    raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, reason)


class ChannelInput:
    """What the client has sent and the program has not yet taken: a session.Source."""

    __slots__ = ("_channel", "_chunks", "_ended", "_size", "_waiter")

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._chunks: list[bytes] = []
        self._size = 0
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def feed(self, data: bytes) -> None:
        """Take data from the client; stop the channel's reading while too much is held."""
        self._chunks.append(data)
        self._size += len(data)
        if self._size >= INPUT_HIGH:
            self._channel.wire.pause_reading()
        self._wake()

    def feed_eof(self) -> None:
        """Take note that no more comes."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self) -> bytes:
        """All that is there as soon as there is any; b"" at the end."""
        while not self._chunks:
            if self._ended:
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        self._channel.wire.resume_reading()
        return data


class ChannelOutput:
    """One stream to the client, standard output or (datatype 1) standard error: a session.Sink."""

    __slots__ = ("_channel", "_datatype")

    def __init__(self, channel: Channel, datatype: int | None = None) -> None:
        self._channel = channel
        self._datatype = datatype

    async def write(self, data: bytes) -> None:
        """Send data; return when window and TCP take more. BrokenPipeError: the client has gone."""
        self._channel.active = asyncio.get_running_loop().time()
        await self._channel.wire.keys_exchanged()
        self._channel.wire.write(data, self._datatype)
        await self._channel.writable()


class Channel(asyncssh.SSHServerSession[bytes]):
    """One session channel. See session.Channel for what its parts promise.

    What asyncssh calls a session (it gets the callbacks) is our Channel; what asyncssh calls the
    channel (it sends the packets) is `wire`.

    active: when the last byte went in either direction (the loop's time).
    """

    wire: SessionChannel

    def __init__(self, host: Host) -> None:
        self.host = host
        self._launch: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.active = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._window_open = asyncio.Event()
        self._window_open.set()
        self._env: dict[str, bytes] = {}
        self._terminal: Terminal | None = None
        self._started = False
        self._program: RunningProgram | None = None
        self.stdin = ChannelInput(self)
        self.outputs = (ChannelOutput(self), ChannelOutput(self, asyncssh.EXTENDED_DATA_STDERR))
        self.ended: asyncio.Future[Cause] = self._loop.create_future()

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
                await self.host.prepare()
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

    def _refuse(self, request: str, reason: str) -> bool:
        self.host.request_refused(request, reason)
        return False

    def _greet(self, text: str) -> None:
        if text and not self.wire.is_closing():
            self.wire.write(text.rstrip("\n").replace("\n", "\r\n").encode() + b"\r\n")

    def notice(self, text: str) -> None:
        """Put a line on the client's standard error, if there is room for it now."""
        if self._window_open.is_set() and not self.wire.is_closing():
            self.wire.write(f"{text}\r\n".encode(), asyncssh.EXTENDED_DATA_STDERR)

    # -- while it runs ------------------------------------------------------------------------

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        """Wait for an empty buffer after each write: low and high water are both zero."""
        chan.set_write_buffer_limits(high=0, low=0)
        if seconds := self.host.request_timeout:
            self._timer = self._loop.call_later(seconds, self._no_request, seconds)

    def _no_request(self, seconds: float) -> None:
        self.host.limit_hit("request_timeout")
        self.notice(f"gosshd: no program was asked for within {seconds:g} s")
        self._give_up()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Input for the program."""
        self.active = self._loop.time()
        self.stdin.feed(data)

    def eof_received(self) -> bool:
        """Client EOF: a half-close. False would make asyncssh close our output too."""
        self.stdin.feed_eof()
        return True

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

    def pause_writing(self) -> None:
        """The client's window is full."""
        self._window_open.clear()

    def resume_writing(self) -> None:
        """All output fits the client's window."""
        self._window_open.set()

    @property
    def has_terminal(self) -> bool:
        """Whether a person may be reading."""
        return self._terminal is not None

    async def writable(self) -> None:
        """Wait until window and TCP both take more, or the connection has ended."""
        while not (self._window_open.is_set() and self.host.transport_open.is_set()):
            await self._window_open.wait()
            await self.host.transport_open.wait()

    # -- the end ------------------------------------------------------------------------------

    def end(self, cause: Cause, text: str = "") -> None:
        """Ask for the end of the session, for this cause; the first cause wins.

        text: a line for the person at the other end.
        """
        if not self.ended.done():
            if text:
                self.notice(f"\r\ngosshd: {text}" if self._terminal else f"gosshd: {text}")
            self.ended.set_result(cause)
        if self.ended.result() is Cause.CLIENT_CLOSED:
            self.stdin.feed_eof()  # what it sent before may still be used

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is gone: by the client's CLOSE, or with its connection."""
        self._stop_timer()
        self.end(Cause.CLIENT_CLOSED)
        self._window_open.set()

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
