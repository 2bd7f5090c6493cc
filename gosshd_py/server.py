"""The server: asyncssh's settings, who owns which task, and the order of a shutdown."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Self

import asyncssh
import structlog

from .channel import Channel
from .config import Address, Config, ConfigError, check_listen
from .connection import Connection
from .hostkeys import load_host_keys
from .lifecycle import Cause, Start
from .listen import BACKLOG, open_sockets
from .logs import log_loop_error
from .process import reset_signals
from .session import Program, run_session

log = structlog.get_logger()

SHUTDOWN_NOTICE = "the server is shutting down"

LEAVE_TIME = 0.5
"""Seconds that clients get, at shutdown, to leave by themselves after their last CLOSE."""

# The client's order decides (RFC 4253 §7.1). curve25519 stands first for dropbear, which sends a
# guess along and, as the RFC says, counts it wrong when the first names differ; asyncssh does not.
KEX = ("curve25519-sha256", "curve25519-sha256@libssh.org", "mlkem768x25519-sha256")
CIPHERS = (
    "chacha20-poly1305@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-gcm@openssh.com",
    *("aes256-ctr", "aes192-ctr", "aes128-ctr"),
)
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")


class Server:
    """The running server: `async with Server(config) as server`, then wait for what you like.

    Leaving the block stops it: the listeners first, then every session (which gets a line on
    its terminal and is hung up), then the connections. With the default hangup_grace it takes
    less than five seconds, whatever clients and programs do.
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for addresses that this configuration may not listen on."""
        if problems := check_listen(config):
            raise ConfigError([f"listen: {problem}" for problem in problems])
        self.config = config
        self.addresses: list[Address] = []
        """Where it listens, with the real ports."""
        self.host_keys: list[asyncssh.SSHKey] = []
        self.connections: set[Connection] = set()
        self._turn = asyncio.Lock()
        self._stopping = False
        self._sessions: dict[asyncio.Task[None], Channel] = {}
        self._listeners: list[asyncssh.SSHAcceptor] = []

    async def __aenter__(self) -> Self:
        """Start to listen. Raises ListenError and HostKeyError."""
        asyncio.get_running_loop().set_exception_handler(log_loop_error)
        self.host_keys = load_host_keys(self.config.hostkeys_dir)
        sockets = open_sockets(self.config)
        try:
            for sock in sockets:
                self._listeners.append(await self._listen(sock))
        except BaseException:
            for listener in self._listeners:
                listener.close()
            for sock in sockets:
                sock.close()
            raise
        self.addresses = [Address(*sock.getsockname()[:2]) for sock in sockets]
        return self

    async def _listen(self, sock: socket.socket) -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            sock=sock,
            backlog=BACKLOG,
            server_factory=functools.partial(
                Connection, self.config, self.connections, self._turn, self._run_session
            ),
            server_host_keys=self.host_keys,
            server_version="gosshd_py",
            login_timeout=self.config.login_grace_time,
            keepalive_interval=self.config.client_alive_interval,
            keepalive_count_max=self.config.client_alive_count_max,
            kex_algs=KEX,
            encryption_algs=CIPHERS,
            mac_algs=MACS,
            compression_algs=["none"],
            line_editor=False,
            encoding=None,
            agent_forwarding=False,
            x11_forwarding=False,
            allow_scp=False,
            gss_host=None,
            host_based_auth=False,
            public_key_auth=False,
            password_auth=False,
            kbdint_auth=False,
        )

    @property
    def session_count(self) -> int:
        """Sessions that run just now."""
        return len(self._sessions)

    # -- sessions -----------------------------------------------------------------------------

    def _run_session(
        self, connection: Connection, channel: Channel, start: Start, program: Program
    ) -> None:
        if self._stopping:
            channel.end(Cause.SHUTDOWN, SHUTDOWN_NOTICE)
        task = asyncio.create_task(self._session(connection, channel, start, program))
        self._sessions[task] = channel
        task.add_done_callback(self._session_over)

    async def _session(
        self, connection: Connection, channel: Channel, start: Start, program: Program
    ) -> None:
        ending = await run_session(channel, program, drain_timeout=self.config.drain_timeout)
        if ending.error is not None:
            log.error("session failed", peer=connection.peer, exc_info=ending.error)
        log.info(
            "session over",
            peer=connection.peer,
            user=connection.account.name if connection.account else None,
            kind=start.kind,
            command=start.command.decode("utf-8", "backslashreplace") or None,
            pty=start.terminal is not None,
            cause=str(ending.cause),
            exit=str(ending.status) if ending.status else None,
            bytes_in=ending.bytes_in,
            bytes_out=ending.bytes_out,
            seconds=round(ending.seconds, 3),
            delivered=ending.delivered,
        )

    def _session_over(self, task: asyncio.Task[None]) -> None:
        del self._sessions[task]
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("session failed while closing", exc_info=exc)

    # -- the end ------------------------------------------------------------------------------

    async def __aexit__(self, *_: object) -> None:
        """Stop. See the class."""
        self._stopping = True
        for listener in self._listeners:
            listener.close()
        for channel in list(self._sessions.values()):
            channel.end(Cause.SHUTDOWN, SHUTDOWN_NOTICE)
        while self._sessions:
            await asyncio.wait(self._sessions)  # each has its own deadlines
        connections = list(self.connections)
        for connection in connections:
            if connection.sessions == 0:
                connection.disconnect()
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_TIME):
                for connection in connections:
                    await connection.conn.wait_closed()
        for connection in list(self.connections):
            connection.disconnect()
            await connection.conn.wait_closed()
        while self._sessions:  # started while clients were leaving
            await asyncio.wait(self._sessions)


async def serve(config: Config, on_ready: Callable[[Server], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. on_ready is called once, when clients can connect.

    Raises ConfigError, ListenError and HostKeyError before that.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reset_signals()
    async with Server(config) as server:
        if on_ready is not None:
            on_ready(server)
        await stop.wait()
        log.info("shutting down", sessions=server.session_count)
