"""One SSH connection (RFC 4252): who may enter, and what a channel on it starts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import asyncssh
import structlog

from .accounts import Account, open_account, valid_user_name
from .channel import Channel, SessionChannel
from .config import Address, Config
from .lifecycle import Cause, SpawnError, Start
from .pipes import PipeProgram
from .process import Command
from .pty import PtyProgram
from .session import Program

log = structlog.get_logger()

Runner = Callable[["Connection", Channel, Start, Program], None]
"""Takes over a channel and the program started for it: runs the session and owns its task."""


class Connection(asyncssh.SSHServer):
    """What asyncssh asks about one connection. The server owns it through `connections`."""

    conn: asyncssh.SSHServerConnection

    def __init__(
        self, config: Config, connections: set[Connection], turn: asyncio.Lock, run: Runner
    ) -> None:
        self._config = config
        self._turn = turn
        self._connections = connections
        self._run = run
        self._transport_open = asyncio.Event()
        self._transport_open.set()
        self._began = time.monotonic()
        self.peer = ""
        """The client's address and port, for the log."""
        self.account: Account | None = None
        self.sessions = 0
        self._reason = "by the client"

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        """Take note of it, and hear when TCP is full: asyncssh's own handlers do nothing."""
        self.conn = conn
        self.peer = str(Address(*conn.get_extra_info("peername")[:2]))
        self._connections.add(self)
        conn.pause_writing = self._transport_open.clear  # type: ignore[method-assign]
        conn.resume_writing = self._transport_open.set  # type: ignore[method-assign]
        # asyncio reads 256 KiB at once and asyncssh handles all of it before anybody else's turn:
        # 20,000 small requests in one read stopped everything for half a second.
        conn._transport.max_size = 8 * 1024  # type: ignore[union-attr]  # noqa: SLF001

    def connection_lost(self, exc: Exception | None) -> None:
        """Write the connection's one log line."""
        self._connections.discard(self)
        self._transport_open.set()
        # UnicodeError: an identification string that is not ASCII.
        ours = not (exc is None or isinstance(exc, (asyncssh.Error, OSError, UnicodeError)))
        log.log(
            logging.ERROR if ours else logging.INFO,
            "connection closed",
            peer=self.peer,
            user=self.account.name if self.account else None,
            sessions=self.sessions,
            seconds=round(time.monotonic() - self._began, 3),
            client=str(self.conn.get_extra_info("client_version", "none")),
            reason=str(exc) if exc else self._reason,
            exc_info=exc if ours else None,
        )

    def disconnect(self) -> None:
        """Send SSH_MSG_DISCONNECT and close the connection, whatever is still open on it."""
        self._reason = "the server is shutting down"
        self.conn.disconnect(asyncssh.DISC_BY_APPLICATION, self._reason)

    # -- RFC 4252 -----------------------------------------------------------------------------

    def begin_auth(self, username: str) -> bool:
        """Open mode: a proper name is enough (method "none"). Returns whether more is needed.

        There is no more to offer (server.py turns all other methods off), so True refuses: an
        improper name, or a second one.
        """
        if self.account is not None or not valid_user_name(username):
            return True
        self.account = open_account(self._config, username)
        return False

    # -- RFC 4254 -----------------------------------------------------------------------------

    def session_requested(self) -> tuple[SessionChannel, Channel]:
        """A session channel (RFC 4254 §6.1). Every other kind is refused by asyncssh's defaults."""
        channel = Channel(self._start, self._turn, self._transport_open, self._config.accept_env)
        channel.wire = SessionChannel(self.conn, channel)
        return channel.wire, channel

    def _start(self, channel: Channel, request: Start) -> PtyProgram | PipeProgram:
        """Start what the client asks for. Raises SpawnError with words for the client."""
        try:
            program = self._spawn(request)
        except SpawnError as exc:
            log.warning(str(Cause.SPAWN_FAILED), peer=self.peer, kind=request.kind, reason=str(exc))
            raise
        self.sessions += 1
        self._run(self, channel, request, program)
        return program

    def _spawn(self, request: Start) -> PtyProgram | PipeProgram:
        assert self.account is not None  # noqa: S101  # asyncssh opens no channel before login
        if request.kind == "subsystem":
            name = request.command.decode("utf-8", "backslashreplace")
            raise SpawnError(f"there is no subsystem {name!r} on this server")
        command = self._command(self.account, request)
        grace = self._config.hangup_grace
        if request.terminal is not None:
            return PtyProgram.spawn(command, request.terminal, grace)
        return PipeProgram.spawn(command, grace)

    def _command(self, account: Account, request: Start) -> Command:
        peer, port = self.conn.get_extra_info("peername")[:2]
        here, here_port = self.conn.get_extra_info("sockname")[:2]
        argv: list[str | bytes] = [account.shell]
        argv += ["-l"] if request.kind == "shell" else ["-c", request.command]
        env = {
            **account.environment(),
            "SSH_CLIENT": f"{peer} {port} {here_port}",
            "SSH_CONNECTION": f"{peer} {port} {here} {here_port}",
        }
        return Command(argv, env, request.env, account.run_as)
