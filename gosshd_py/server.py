"""The server: who is let in, who owns which task, and the order of a shutdown."""

from __future__ import annotations

import asyncio
import functools
from contextlib import suppress
from typing import Self

import asyncssh
import structlog

from .authentication import Authenticator
from .channel import Channel
from .checks import check_listen, check_reload
from .command import facts_of
from .config import Address, Config, ConfigError
from .connection import Connection, Shared
from .hostkeys import load_host_keys
from .lifecycle import Cause, Start, Tell, Trace
from .limits import Admission, SessionClock, SessionCounts
from .listen import Refused, listen
from .logs import log_loop_error
from .session import Program, run_session
from .transport import Transport, make_options
from .workers import Worker

log = structlog.get_logger()

SHUTDOWN_NOTICE = "the server is shutting down"

LEAVE_TIME = 0.5
"""Seconds that clients get, at shutdown, to leave by themselves after their last CLOSE."""


class Server:
    """The running server: `async with Server(config) as server`, then wait for what you like.

    Leaving the block stops it: the listeners first, then every session (which gets a line on
    its terminal and is hung up), then the connections. With the default hangup_grace it takes
    less than five seconds, whatever clients and programs do.
    """

    def __init__(
        self, config: Config, tell: Tell | None = None, worker: Worker | None = None
    ) -> None:
        """Raises ConfigError for addresses that this configuration may not listen on.

        tell: hears of every event of every connection. worker: which of several processes this is.
        """
        if problems := check_listen(config):
            raise ConfigError([f"listen: {problem}" for problem in problems])
        self.config = config
        self.addresses: list[Address] = []
        """Where it listens, with the real ports."""
        self.host_keys: list[asyncssh.SSHKey] = []
        self._tell = tell
        self._worker = worker or Worker()
        counted = self._worker.counted
        self._shared = Shared(self._run_session, Admission(counted), SessionCounts(counted))
        self.sessions: dict[asyncio.Task[None], Channel] = {}
        """Those that run just now."""
        self._listeners: list[asyncio.Server] = []

    async def __aenter__(self) -> Self:
        """Start to listen. Raises ListenError and HostKeyError."""
        asyncio.get_running_loop().set_exception_handler(log_loop_error)
        await self.use(self.config)
        self._listeners = await listen(self.config, self._worker.addresses, self._enter)
        sockets = [sock for listener in self._listeners for sock in listener.sockets]
        self.addresses = [Address(*sock.getsockname()[:2]) for sock in sockets]
        return self

    async def use(self, config: Config) -> None:
        """Let new connections live by this configuration, and by the host keys that are there now.

        The old ones, and their sessions, go on by the old one. Raises HostKeyError and ConfigError,
        and then nothing has changed. The listeners stay as they are.
        """
        if self.addresses:
            check_reload(self.config, config, self.addresses)
        host_keys = load_host_keys(config.hostkeys_dir)
        # In a thread, since this takes the time of hashing a password.
        authenticator = await asyncio.to_thread(Authenticator, config)
        make = functools.partial(Connection, config, authenticator, self._shared)
        self._options = make_options(config, host_keys, make)
        self.config, self.host_keys = config, host_keys

    def _enter(self, transport: asyncio.Transport) -> asyncio.Protocol:
        """Who takes a new connection over."""
        trace = Trace(self._tell, self._worker.next_connection())
        peer = Address(*transport.get_extra_info("peername")[:2])
        local = Address(*transport.get_extra_info("sockname")[:2])
        fd = transport.get_extra_info("socket").fileno
        trace("tcp.accepted", peer=str(peer), local=str(local), fd=fd)
        refuse = self._shared.admission.reason_to_refuse
        words = self._shared.stopping or refuse(self.config, peer.host)
        return Refused(words, trace) if words else Transport(self._options, trace)

    @property
    def connections(self) -> set[Connection]:
        """Connections that are open just now."""
        return self._shared.connections

    # -- sessions -----------------------------------------------------------------------------

    def _run_session(
        self, connection: Connection, channel: Channel, start: Start, program: Program
    ) -> None:
        if self._shared.stopping:
            channel.end(Cause.SHUTDOWN, SHUTDOWN_NOTICE)
        task = asyncio.create_task(self._session(connection, channel, start, program))
        self.sessions[task] = channel
        task.add_done_callback(self._session_over)

    async def _session(
        self, connection: Connection, channel: Channel, start: Start, program: Program
    ) -> None:
        config = connection.config
        log.info("session started", **connection.who, **facts_of(start))
        clock = SessionClock(channel, config, connection.limit_hit)
        try:
            ending = await run_session(
                channel, program, trace=channel.trace, drain_timeout=config.drain_timeout
            )
        finally:
            clock.stop()
            connection.channel_done(channel)
        if ending.error is not None:
            log.error("session failed", peer=connection.peer, exc_info=ending.error)
        channel.trace("session.ended", **ending.facts)
        log.info("session over", **connection.who, **facts_of(start), **ending.facts)

    def _session_over(self, task: asyncio.Task[None]) -> None:
        del self.sessions[task]
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("session failed while closing", exc_info=exc)

    # -- the end ------------------------------------------------------------------------------

    async def __aexit__(self, *_: object) -> None:
        """Stop. See the class."""
        self._shared.stopping = SHUTDOWN_NOTICE
        for listener in self._listeners:
            listener.close()
        for channel in list(self.sessions.values()):
            channel.end(Cause.SHUTDOWN, SHUTDOWN_NOTICE)
        while self.sessions:
            await asyncio.wait(self.sessions)  # each has its own deadlines
        connections = list(self.connections)
        for connection in connections:
            if connection.sessions == 0:
                connection.disconnect(SHUTDOWN_NOTICE)
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_TIME):
                for connection in connections:
                    await connection.conn.wait_closed()
        for connection in list(self.connections):
            connection.disconnect(SHUTDOWN_NOTICE)
            await connection.conn.wait_closed()
        while self.sessions:  # started while clients were leaving
            await asyncio.wait(self.sessions)
