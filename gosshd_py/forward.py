"""Forwards (RFC 4254 §7): sockets carried over channels, to and from places that are named.

Promises: nothing is forwarded until a rule allows it; each end of file is passed on by itself, and
each error ends both directions; a forward that stalls holds two windows and stalls nobody else.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import asyncssh
import structlog
from asyncssh.channel import SSHAgentChannel

from .accounts import Account
from .authentication import Login
from .flow import Flow
from .fsuser import as_user
from .lifecycle import Cause
from .limits import SessionClock
from .places import ForbiddenError, check_asked, check_found, check_path, is_address
from .process import Descriptor
from .threads import in_thread
from .userauth import Entrance
from .wire import MAX_PACKET, WINDOW, Watched

log = structlog.get_logger()

CONNECT_TIMEOUT = 20.0
"""Seconds for a name to be looked up and a connection to be made."""

BACKLOG = 128

LOOPBACK = ("127.0.0.1", "::1")

LAST_INPUT = 5.0
"""Seconds for a target to take what the client has sent before its CLOSE."""

LOOKUPS = 4
"""Names and paths that one connection may wait for at a time; each holds a thread."""


# -- the channel ----------------------------------------------------------------------------------


class TcpWire(Watched, asyncssh.SSHTCPChannel[bytes]):
    """The channel of a TCP forward."""


class UnixWire(Watched, asyncssh.SSHUNIXChannel[bytes]):
    """The channel of a unix socket's forward."""


class AgentWire(Watched, SSHAgentChannel):
    """The channel to the client's authentication agent."""


class Forward(Flow, asyncssh.SSHTCPSession[bytes]):
    """One forward: a channel and a socket, and the copying between them."""

    def __init__(self, host: Forwards, wire: type[Any], sock: socket.socket | None = None, **facts: object) -> None:  # fmt: skip
        super().__init__(host)
        self.wire = wire(host.conn, self._loop, None, "strict", WINDOW, MAX_PACKET)
        self.wire.carry(self)
        self._forwards = host
        self._sock = sock
        self._facts = facts
        self._began = time.monotonic()
        self._bytes = {"bytes_in": 0, "bytes_out": 0}
        self._task: asyncio.Task[None] | None = None
        self.dropped = False

    def notice(self, text: str) -> None:
        """Nobody reads here."""

    async def to(self, connect: Awaitable[socket.socket]) -> Forward:
        """Wait for the socket of a channel that the client opens. Raises ChannelOpenError."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                self._sock = await connect
        except ForbiddenError as exc:
            self._forwards.forbidden(str(exc), **self._facts)
            raise _prohibited(str(exc)) from exc
        except (OSError, UnicodeError) as exc:
            reason = _why(exc)
            self._forwards.forbidden(f"cannot connect: {reason}", **self._facts)
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, f"gosshd: {reason}") from exc  # fmt: skip
        if self.ended.done():  # the client has gone meanwhile
            self._sock.close()
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "the client has gone")
        return self

    def session_started(self) -> None:
        """The channel is open."""
        self.trace("forward.started", **self._facts)
        log.info("forward opened", **self._forwards.who, **self._facts)
        self._task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        assert self._sock is not None  # noqa: S101
        self._sock.setblocking(False)
        descriptor = Descriptor(self._sock.fileno(), self._sock.close, self.trace, "socket")
        clock = SessionClock(self, self._forwards.config, self._forwards.limit_hit)
        out = self._loop.create_task(self._copy_out(descriptor))
        into = self._loop.create_task(self._copy_in(descriptor))
        both: asyncio.Future[Any] = asyncio.gather(out, into)
        both.add_done_callback(
            lambda ends: ends.cancelled() or ends.exception()
        )  # an end, no error
        try:
            await asyncio.wait((both, self.ended), return_when=asyncio.FIRST_COMPLETED)
            if not both.done() and self.ended.result() is Cause.CLIENT_CLOSED:
                await asyncio.wait((into,), timeout=LAST_INPUT)
        finally:
            clock.stop()
            for copier in (out, into):
                copier.cancel()
            await asyncio.wait((out, into))
            descriptor.close()
            await self._close()

    async def _copy_out(self, descriptor: Descriptor) -> None:
        while data := await descriptor.read():
            await self.outputs[0].write(data)
            self._bytes["bytes_out"] += len(data)
        await self.writable()
        if not self.wire.is_closing():
            self.wire.write_eof()

    async def _copy_in(self, descriptor: Descriptor) -> None:
        while data := await self.stdin.read():
            await descriptor.write(data)
            self._bytes["bytes_in"] += len(data)
        assert self._sock is not None  # noqa: S101
        self._sock.shutdown(socket.SHUT_WR)

    async def _close(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                if not self.wire.is_closing():
                    await self.writable()
                self.wire.close()
                await self.wire.wait_closed()
        self.wire.abort()
        seconds = round(time.monotonic() - self._began, 3)
        self.trace("forward.completed", **self._bytes)
        log.info(
            "forward closed", **self._forwards.who, **self._facts, **self._bytes, seconds=seconds
        )

    def drop(self) -> None:
        """The channel has ended, perhaps before it was open: then nobody else closes the socket."""
        self.dropped = True
        self.end(Cause.CONNECTION_LOST)
        if self._task is None and self._sock is not None:
            self._sock.close()


def _why(exc: Exception) -> str:
    """The words for an error of a connection; asyncio's own have none of their own."""
    if isinstance(exc, TimeoutError) and exc.errno is None:
        return f"no answer within {CONNECT_TIMEOUT:g} s"
    if isinstance(exc, socket.gaierror) or not (isinstance(exc, OSError) and exc.errno):
        return str(exc.strerror if isinstance(exc, OSError) else exc) or type(exc).__name__
    return os.strerror(exc.errno)


def _prohibited(reason: str) -> asyncssh.ChannelOpenError:
    return asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, f"gosshd: {reason}")


# -- who may ---------------------------------------------------------------------------------------


class Forwards(Entrance):
    """What asyncssh asks about forwards. A part of connection.py's Connection."""

    transport_open: asyncio.Event

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[Flow] = set()
        self._listeners: dict[tuple[str, int] | str, Listener] = {}
        self._agent: tuple[Listener, str] | None = None
        self._lookups = asyncio.Semaphore(LOOKUPS)
        self._answering: set[asyncio.Future[bool]] = set()

    async def _in_thread(self, action: Callable[[], Any]) -> Any:
        """Do what may take its time. A thread that we no longer wait for still counts."""
        await self._lookups.acquire()
        try:
            work = in_thread(action, self._lookups.release)
        except BaseException:
            self._lookups.release()
            raise
        return await work

    @property
    def who(self) -> dict[str, object]:
        """Whose forward it is, for the log."""
        return {"peer": self.peer, "user": self.user}

    @property
    def _entitled(self) -> tuple[Account, Login]:
        assert self.login is not None  # noqa: S101  # asyncssh opens nothing before login
        return self.login.account, self.login

    @property
    def may_forward(self) -> bool:
        """Whether this login could have a forward, so that it may wait for one."""
        account, login = self._entitled
        rules = (account.permit_open, account.permit_listen, account.permit_open_sockets,
                 account.permit_listen_sockets)  # fmt: skip
        return login.permissions.port_forwarding and any(rules)

    def forbidden(self, reason: str, **facts: object) -> None:
        """Log a forward that is not made; many of one kind get few lines."""
        self.trace("forward.failed", reason=reason, **facts)
        self._admission.throttle.log(
            logging.WARNING, "forward refused", (self.peer, reason), **self.who, **facts, reason=reason
        )  # fmt: skip

    def _check(self, kind: str, host: str, port: int) -> str:
        """The rule that allows it. Raises ForbiddenError."""
        account, login = self._entitled
        if not login.permissions.port_forwarding:
            raise ForbiddenError("the key or the certificate does not permit port forwarding")
        rules = {
            "permit_open": (account.permit_open, login.permissions.permit_open),
            "permit_listen": (account.permit_listen, login.permissions.permit_listen),
        }[kind]
        return check_asked(kind, *rules, host, port)

    def _check_path(self, kind: str, path: str) -> str:
        account, login = self._entitled
        if not login.permissions.port_forwarding:
            raise ForbiddenError("the key or the certificate does not permit port forwarding")
        return check_path(kind, getattr(account, kind), path)

    def _room(self) -> None:
        """Raises ForbiddenError when there are as many as there may be."""
        most = self.config.connection_max_forwards
        if most and len(self._open) + len(self._listeners) >= most:
            self.limit_hit("connection_max_forwards")
            raise ForbiddenError(f"this connection has {most} forwards, which is the limit")

    def _admit(self, forward: Forward) -> None:
        self._open.add(forward)
        self.limit_time(0)

    def channel_closed(self, channel: Flow) -> None:
        """A forward's channel has ended."""
        if isinstance(channel, Forward):
            self._open.discard(channel)
            channel.drop()

    def close_forwards(self) -> None:
        """The connection has ended."""
        for listener in [*self._listeners.values(), *([self._agent[0]] if self._agent else [])]:
            listener.close()
        self._listeners.clear()

    # -- the client connects through us: direct-tcpip, direct-streamlocal -------------------------

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> Any:  # fmt: skip
        """direct-tcpip (RFC 4254 §7.2)."""
        try:
            rule = self._check("permit_open", dest_host, dest_port)
            self._room()
        except ForbiddenError as exc:
            self.forbidden(str(exc), kind="direct-tcpip", to=f"{dest_host}:{dest_port}")
            raise _prohibited(str(exc)) from exc
        forward = Forward(
            self, TcpWire, kind="direct-tcpip", to=f"{dest_host}:{dest_port}", rule=rule
        )
        self._admit(forward)
        return forward.wire, forward.to(self._connect(dest_host, dest_port))

    async def _connect(self, host: str, port: int) -> socket.socket:
        """Connect to the first address that answers, but only to those that may be."""
        account, login = self._entitled
        loop = asyncio.get_running_loop()
        found = await self._in_thread(
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        error: Exception = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                check_found(account.permit_open, host, str(address[0]), port)
                if login.permissions.permit_open is not None:
                    check_found(login.permissions.permit_open, host, str(address[0]), port)
                sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
                try:
                    await loop.sock_connect(sock, address)
                except BaseException:
                    sock.close()
                    raise
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except (OSError, ForbiddenError) as exc:
                error = exc
        raise error

    def unix_connection_requested(self, dest_path: str) -> Any:
        """direct-streamlocal@openssh.com (OpenSSH's PROTOCOL §2.4)."""
        try:
            rule = self._check_path("permit_open_sockets", dest_path)
            self._room()
        except ForbiddenError as exc:
            self.forbidden(str(exc), kind="direct-streamlocal", to=dest_path)
            raise _prohibited(str(exc)) from exc
        forward = Forward(self, UnixWire, kind="direct-streamlocal", to=dest_path, rule=rule)
        self._admit(forward)
        return forward.wire, forward.to(self._connect_path(dest_path))

    async def _connect_path(self, path: str) -> socket.socket:
        account, _ = self._entitled

        def connect() -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                sock.connect(path)
            except BaseException:
                sock.close()
                raise
            return sock

        sock: socket.socket = await self._in_thread(lambda: as_user(account.run_as, connect))
        return sock

    # -- we listen for the client: tcpip-forward, streamlocal-forward -----------------------------

    def listen_tcp(self, host: str, port: int) -> int | None:
        """tcpip-forward (RFC 4254 §7.1). Returns the port, or None: refused.

        Done before anything else of the client is looked at: a command behind it never runs
        before the answer is known.
        """
        account, _ = self._entitled
        asked = f"{host}:{port}"
        try:
            hosts, rule = self._bind_hosts(host, port)
            if 0 < port < 1024 and account.uid != 0:
                raise ForbiddenError(f"port {port} is for root only")
            if port and (host, port) in self._listeners:
                raise ForbiddenError(f"{asked} is listened on already")
            self._room()
            sockets = _bind(hosts, port)
        except ForbiddenError as exc:
            self.forbidden(str(exc), kind="tcpip-forward", listen=asked)
            return None
        except OSError as exc:
            self.forbidden(f"cannot listen: {_why(exc)}", kind="tcpip-forward", listen=asked)
            return None
        real = int(sockets[0].getsockname()[1])

        async def accept(sock: socket.socket, peer: Any) -> None:
            await self._accept_tcp(sock, peer, host, real)

        self._listeners[host, real] = Listener(sockets, accept)
        self.limit_time(0)
        self._listening(kind="tcpip-forward", listen=f"{host}:{real}", rule=rule)
        return real

    def _bind_hosts(self, host: str, port: int) -> tuple[list[str], str]:
        """The addresses to bind, and the rule that allows them. Raises ForbiddenError.

        Without gateway_ports those of loopback, whatever is asked; of these, what is named.
        """
        account, _ = self._entitled
        if account.gateway_ports and host not in ("localhost", *LOOPBACK):
            if host in ("", "*"):
                return ["0.0.0.0", "::"], self._check("permit_listen", "0.0.0.0", port)  # noqa: S104
            if not is_address(host):
                raise ForbiddenError(f"{host} is not an address to listen on")
            return [host], self._check("permit_listen", host, port)
        allowed: dict[str, str] = {}
        error = ForbiddenError("")
        for address in (host,) if host in LOOPBACK else LOOPBACK:
            for name in (address, "localhost"):
                try:
                    allowed.setdefault(address, self._check("permit_listen", name, port))
                except ForbiddenError as exc:
                    error = exc
        if not allowed:
            raise error
        return list(allowed), next(iter(allowed.values()))

    async def _accept_tcp(self, sock: socket.socket, peer: Any, host: str, port: int) -> None:
        origin = (str(peer[0]), int(peer[1]))
        facts = {"listen": f"{host}:{port}", "origin": f"{origin[0]}:{origin[1]}"}

        def opening(forward: Forward) -> Awaitable[object]:
            opened: Awaitable[object] = forward.wire.accept(lambda: forward, host, port, *origin)
            return opened

        await self._offer(sock, TcpWire, opening, kind="forwarded-tcpip", **facts)

    async def _offer(
        self, sock: socket.socket, wire: type[Any], opening: Callable[[Forward], Awaitable[object]],
        **facts: object,
    ) -> None:  # fmt: skip
        """Open a channel to the client for a connection that we have accepted."""
        try:
            self._room()
        except ForbiddenError as exc:
            sock.close()
            self.forbidden(str(exc), **facts)
            return
        forward = Forward(self, wire, sock, **facts)
        self._admit(forward)
        try:
            await opening(forward)
        except asyncssh.Error as exc:
            forward.drop()
            self.forbidden(str(exc), **facts)
        except BaseException:
            forward.drop()
            raise
        finally:
            if forward.dropped:
                self._open.discard(forward)

    async def listen_path(self, path: str) -> bool:
        """streamlocal-forward@openssh.com."""
        answer: asyncio.Future[bool] = asyncio.ensure_future(self._listen_path(path))
        self._answering.add(answer)
        answer.add_done_callback(self._answering.discard)
        return await answer

    async def listeners_answered(self) -> None:
        """Wait until the client knows of every listener that it has asked for."""
        while self._answering:
            await asyncio.wait(self._answering)

    async def _listen_path(self, path: str) -> bool:
        account, _ = self._entitled
        try:
            rule = self._check_path("permit_listen_sockets", path)
            if path in self._listeners:
                raise ForbiddenError(f"{path} is listened on already")
            self._room()
            async with asyncio.timeout(CONNECT_TIMEOUT):
                bound = await self._in_thread(
                    lambda: as_user(account.run_as, lambda: _bind_path(path))
                )
        except ForbiddenError as exc:
            self.forbidden(str(exc), kind="streamlocal-forward", listen=path)
            return False
        except (OSError, ValueError) as exc:
            self.forbidden(f"cannot listen: {_why(exc)}", kind="streamlocal-forward", listen=path)
            return False

        async def accept(sock: socket.socket, _: Any) -> None:
            def opening(forward: Forward) -> Awaitable[object]:
                opened: Awaitable[object] = forward.wire.accept(lambda: forward, path)
                return opened

            await self._offer(sock, UnixWire, opening, kind="forwarded-streamlocal", listen=path)

        listener = Listener([bound.sock], accept, bound, account.run_as)
        if self.conn.is_closed() or path in self._listeners:
            listener.close()
            return False
        self._listeners[path] = listener
        self.limit_time(0)
        self._listening(kind="streamlocal-forward", listen=path, rule=rule)
        return True

    def _listening(self, **facts: str) -> None:
        self.trace("listener.opened", **facts)
        log.info("forward listening", **self.who, **facts)

    def cancel_listen(self, key: tuple[str, int] | str) -> bool:
        """cancel-tcpip-forward and its like. False: there is none."""
        listener = self._listeners.pop(key, None)
        if listener is not None:
            listener.close()
        return listener is not None

    # -- the client's agent ------------------------------------------------------------------------

    @property
    def agent(self) -> str | None:
        """SSH_AUTH_SOCK of sessions on this connection, if one of them has asked for it."""
        return self._agent[1] if self._agent else None

    async def forward_agent(self) -> bool:
        """auth-agent-req@openssh.com (OpenSSH's PROTOCOL.agent): make a socket for the programs."""
        account, login = self._entitled
        if not (account.agent_forwarding and login.permissions.agent_forwarding):
            self.forbidden("agent_forwarding is off for this account or key", kind="auth-agent")
            return False
        if self._agent is not None:
            return True

        def make() -> Bound:
            return _bind_path(f"{tempfile.mkdtemp(prefix='gosshd-agent-')}/agent.sock")

        try:
            bound = await self._in_thread(lambda: as_user(account.run_as, make))
        except OSError as exc:
            self.forbidden(f"cannot listen: {_why(exc)}", kind="auth-agent")
            return False

        async def accept(sock: socket.socket, _: Any) -> None:
            def opening(forward: Forward) -> Awaitable[object]:
                opened: Awaitable[object] = forward.wire.open(lambda: forward)
                return opened

            await self._offer(sock, AgentWire, opening, kind="auth-agent")

        listener = Listener([bound.sock], accept, bound, account.run_as, folder=True)
        if self.conn.is_closed() or self._agent is not None:
            listener.close()
            return self._agent is not None
        self._agent = (listener, bound.path)
        return True


class Listener:
    """Sockets that we listen on for a client. accept: takes over each connection."""

    def __init__(
        self,
        sockets: list[socket.socket],
        accept: Callable[[socket.socket, Any], Awaitable[None]],
        bound: Bound | None = None,
        run_as: tuple[int, int] | None = None,
        folder: bool = False,
    ) -> None:
        self._sockets = sockets
        self._accept = accept
        self._bound, self._run_as, self._folder = bound, run_as, folder
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        for sock in sockets:
            self._loop.add_reader(sock.fileno(), self._ready, sock)

    def _ready(self, sock: socket.socket) -> None:
        try:
            accepted, peer = sock.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._loop.remove_reader(sock.fileno())  # it would be called again at once
                self._loop.call_later(1.0, self._listen_again, sock)
            return  # else: gone again
        task = self._loop.create_task(self._hand_on(accepted, peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _listen_again(self, sock: socket.socket) -> None:
        if not self._closed:
            self._loop.add_reader(sock.fileno(), self._ready, sock)

    async def _hand_on(self, sock: socket.socket, peer: Any) -> None:
        try:
            await self._accept(sock, peer)
        except Exception:
            sock.close()
            log.exception("internal error", request="forward")

    def close(self) -> None:
        """Stop listening, and remove what is on the disk."""
        self._closed = True
        for sock in self._sockets:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        if self._bound is not None:
            with suppress(OSError):
                in_thread(lambda: as_user(self._run_as, self._remove))

    def _remove(self) -> None:
        """The socket's file, if it is still ours: a new tunnel may have put its own there."""
        assert self._bound is not None  # noqa: S101
        path = Path(self._bound.path)
        with suppress(OSError):
            found = path.lstat()
            if (found.st_dev, found.st_ino) == self._bound.identity:
                path.unlink()
            if self._folder:
                path.parent.rmdir()


class Bound(NamedTuple):
    """A unix socket with its file: the path, and which file it was when we made it."""

    sock: socket.socket
    path: str
    identity: tuple[int, int]


def _bind(hosts: list[str], port: int) -> list[socket.socket]:
    """Listen on all the addresses at one port; an address family that is missing is left out."""
    sockets: list[socket.socket] = []
    try:
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                sock = socket.create_server((host, port), family=family, backlog=BACKLOG)
            except OSError as exc:
                if sockets and exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue
                raise
            sock.setblocking(False)
            sockets.append(sock)
            port = sock.getsockname()[1]
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bind_path(path: str) -> Bound:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(path)
        Path(path).chmod(0o600)  # before anybody can connect
        found = Path(path).lstat()
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return Bound(sock, path, (found.st_dev, found.st_ino))
