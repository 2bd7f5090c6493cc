"""One SSH connection: its beginning and its end, and what its channels start (RFC 4254)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field, replace

import asyncssh
import structlog
from asyncssh.packet import PacketDecodeError

from .authentication import Authenticator, Login
from .channel import Channel
from .command import command_of, greeting_of, prepare_home
from .config import Config
from .flow import Flow
from .forward import Forwards
from .lifecycle import Cause, SpawnError, Start, Trace
from .limits import Admission, SessionCounts, Sessions
from .pipes import PipeProgram
from .pty import PtyProgram
from .session import Program
from .wire import SessionWire

log = structlog.get_logger()


@dataclass
class Shared:
    """What all connections of a server share. run: see Runner."""

    run: Runner
    admission: Admission
    counts: SessionCounts
    connections: set[Connection] = field(default_factory=set)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    stopping: str = ""
    """Why nothing starts any more."""


class Connection(Forwards):
    """What asyncssh asks about one connection. Lives by the configuration that it began with."""

    def __init__(self, config: Config, authenticator: Authenticator, shared: Shared) -> None:
        super().__init__(config, authenticator, shared.admission)
        self._shared = shared
        self.accept_env: Collection[str] = config.accept_env
        self.request_timeout = config.request_timeout
        self.turn = shared.turn
        self._began = time.monotonic()
        self.sessions = 0

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        """Take note of it."""
        super().connection_made(conn)
        self._shared.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it, and write its last log line."""
        super().connection_lost(exc)
        self.close_forwards()
        self._shared.connections.discard(self)
        self.make_room()
        # UnicodeError: an identification string that is not ASCII.
        theirs = (asyncssh.Error, OSError, UnicodeError, PacketDecodeError)
        ours = not (exc is None or isinstance(exc, theirs))
        log.log(
            logging.ERROR if ours else logging.INFO,
            "connection closed",
            peer=self.peer,
            user=self.user,
            sessions=self.sessions,
            seconds=round(time.monotonic() - self._began, 3),
            client=str(self.conn.get_extra_info("client_version", "none")),
            reason=str(exc) if exc else self._reason,
            exc_info=exc if ours else None,
        )

    def pause_writing(self) -> None:
        """TCP is full."""
        self.fill()
        self.trace("tcp.paused")

    def resume_writing(self) -> None:
        """TCP takes more."""
        self.make_room()
        self.trace("tcp.resumed")

    # -- RFC 4254 -----------------------------------------------------------------------------

    def session_requested(self) -> tuple[SessionWire, Awaitable[Channel]]:
        """A session channel (RFC 4254 §6.1). Forwards are forward.py's; other kinds are refused.

        Open only when the client knows of every listener that it has asked for: a command behind
        a refused one never runs (ExitOnForwardFailure).
        """
        account = self._permitted.account
        if self._shared.stopping:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, self._shared.stopping)
        limit, words = self._shared.counts.reason_to_refuse(
            self.config, account.name, account.max_sessions, self._places.here
        )
        if limit:
            self.limit_hit(limit)
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_RESOURCE_SHORTAGE, words)
        channel = Channel(self)
        channel.wire = SessionWire(self.conn, channel)
        self._places.opened(channel)
        self.limit_time(0)
        return channel.wire, self.when_listening(channel)

    def channel_closed(self, channel: Flow) -> None:
        """The client's CLOSE has come, or the connection has ended."""
        super().channel_closed(channel)
        self._places.closed(channel)
        self._wait_for_channels()

    def channel_done(self, channel: Channel) -> None:
        """Its program has ended, or there will be none."""
        self._places.ended(channel)
        self._wait_for_channels()

    def _wait_for_channels(self) -> None:
        """One that may forward waits for its turn, however long."""
        if not (self._places.used or self.may_forward or self.conn.is_closed()):
            self.limit_time(self.config.unused_connection_timeout, self.unused)

    def auth_completed(self) -> None:
        """Wait for the first channel."""
        super().auth_completed()
        self._places = Sessions(self._shared.counts, self._permitted.account.name)
        self._wait_for_channels()

    @property
    def _permitted(self) -> Login:
        assert self.login is not None  # noqa: S101  # asyncssh opens no channel before login
        return self.login

    @property
    def allow_pty(self) -> bool:
        """Whether the key and the certificate allow terminals."""
        return self._permitted.permissions.pty

    async def prepare(self, *, terminal: bool) -> None:
        """What is done before a program starts and may take its time."""
        self._home_at_hand = await prepare_home(self._permitted.account, terminal=terminal)

    def start(self, channel: Channel, request: Start) -> PtyProgram | PipeProgram:
        """Start what the client asks for. Raises SpawnError with words for the client."""
        try:
            if self._shared.stopping:
                raise SpawnError(self._shared.stopping)
            program = self._spawn(request, channel.trace)
        except SpawnError as exc:
            channel.trace("program.failed", reason=str(exc))
            self.log_seldom(
                logging.WARNING, str(Cause.SPAWN_FAILED), kind=request.kind, reason=str(exc)
            )
            raise
        self.sessions += 1
        self._places.started(channel)
        self._shared.run(self, channel, request, program)
        return program

    def greeting(self, request: Start) -> str:
        """The message of the day, for a shell on a terminal."""
        return greeting_of(self._permitted, request)

    def _spawn(self, request: Start, trace: Trace) -> PtyProgram | PipeProgram:
        permitted = (*self.config.accept_env, *self.config.permit_user_environment)
        command = command_of(self._permitted, request, self.ends, permitted, self.agent)
        command = replace(command, home_at_hand=self._home_at_hand, trace=trace)
        if request.terminal is not None:
            return PtyProgram.spawn(command, request.terminal, self.config.hangup_grace)
        return PipeProgram.spawn(command, self.config.hangup_grace)


Runner = Callable[[Connection, Channel, Start, Program], None]
"""Takes over a channel and the program started for it: runs the session and owns its task."""
