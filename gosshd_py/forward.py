"""Forwards (RFC 4254 §7): sockets carried over channels, to and from places that are named.

Promises: nothing is forwarded until a rule allows it; each end of file is passed on by itself, and
an end that nobody told is seen as one: what the target got is then not all; a forward that stalls
holds two windows and stalls nobody else.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import asyncssh
import structlog
from asyncssh.channel import SSHAgentChannel

from .accounts import Account
from .authentication import Login
from .flow import Fillable, Flow
from .lifecycle import Cause
from .limits import SessionClock
from .places import ForbiddenError, check_asked, check_found, check_path, is_address
from .process import Descriptor
from .sockets import (
    CONNECT_TIMEOUT,
    LOOPBACK,
    Listener,
    Threads,
    bind,
    bind_in_own_folder,
    bind_path,
    connect,
    connect_path,
    cut,
    look_up,
    why,
)
from .userauth import Entrance
from .wire import MAX_PACKET, WINDOW, Watched

log = structlog.get_logger()

_Channel = TypeVar("_Channel")

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  # bound only where a rule names it

LAST_INPUT = 5.0
"""Seconds for a target to take some of what the client has sent before its CLOSE."""

PIECE = 64 * 1024
"""Bytes written to a target at once."""


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
        self._refused: asyncio.Future[None] = self._loop.create_future()
        """Done when the target takes no more input."""
        self.dropped = False

    def notice(self, text: str) -> None:
        """Nobody reads here."""

    async def to(self, connecting: Callable[[], Coroutine[Any, Any, socket.socket]]) -> Forward:
        """Get the socket of a channel that the client opens. Raises ChannelOpenError."""
        task = self._loop.create_task(connecting())
        ends = (task, self.ended)
        try:
            await asyncio.wait(ends, timeout=CONNECT_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            if self.ended.done():
                task.cancel()
            elif not task.done():
                raise TimeoutError
            self._sock = await task
        except asyncio.CancelledError:
            if not self.ended.done():
                raise  # it is us who are cancelled
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "the client has gone") from None  # fmt: skip
        except ForbiddenError as exc:
            self._forwards.forbidden(str(exc), **self._facts)
            raise _prohibited(str(exc)) from exc
        except (OSError, UnicodeError) as exc:
            reason = why(exc)
            self._forwards.forbidden(f"cannot connect: {reason}", **self._facts)
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, f"gosshd: {reason}") from exc  # fmt: skip
        finally:
            task.cancel()
        if self.ended.done():
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
        try:
            # Where the output has ended, and nobody takes input, there is nothing left to carry.
            await self._first(out)
            if not self.ended.done() and out.exception() is None:
                await self._first(into, self._refused)
            if self.ended.done() and self.ended.result() is Cause.CLIENT_CLOSED:
                await self._last_input(into)
        finally:
            clock.stop()
            if not into.done():
                cut(self._sock)
            for copier in (out, into):
                copier.cancel()
            await asyncio.wait((out, into))
            descriptor.close()
            await self._close()
        for copier in (out, into):
            exc = None if copier.cancelled() else copier.exception()
            if exc is not None and not isinstance(exc, OSError):
                log.error("forward failed", **self._forwards.who, **self._facts, exc_info=exc)

    async def _first(self, *ends: asyncio.Future[Any]) -> None:
        await asyncio.wait((*ends, self.ended), return_when=asyncio.FIRST_COMPLETED)

    async def _last_input(self, into: asyncio.Task[None]) -> None:
        """Let the target take what the client has sent before it closed, as long as it takes any."""
        before = -1
        while not (into.done() or self._refused.done()) and before != self._bytes["bytes_in"]:
            before = self._bytes["bytes_in"]
            await asyncio.wait((into, self._refused), timeout=LAST_INPUT, return_when=asyncio.FIRST_COMPLETED)  # fmt: skip

    async def _copy_out(self, descriptor: Descriptor) -> None:
        while data := await descriptor.read():
            await self.outputs[0].write(data)
            self._bytes["bytes_out"] += len(data)
        await self.writable()
        if not self.wire.is_closing():
            self.wire.write_eof()

    async def _copy_in(self, descriptor: Descriptor) -> None:
        assert self._sock is not None  # noqa: S101
        try:
            while data := await self.stdin.read():
                await self._write(descriptor, data)
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            # The target reads no more. Its output may still flow, so the client must be able to
            # send the rest.
            self._refused.set_result(None)
            while await self.stdin.read():
                pass

    async def _write(self, descriptor: Descriptor, data: bytes) -> None:
        """Write in pieces, each counted: a slow target is one that takes some."""
        view = memoryview(data)
        while view:
            piece, view = view[:PIECE], view[PIECE:]
            await descriptor.write(bytes(piece))
            self.active = self._loop.time()
            self._bytes["bytes_in"] += len(piece)

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


def _prohibited(reason: str) -> asyncssh.ChannelOpenError:
    return asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, f"gosshd: {reason}")


# -- who may ---------------------------------------------------------------------------------------


class Forwards(Entrance, Fillable):
    """What asyncssh asks about forwards. A part of connection.py's Connection."""

    __slots__ = ("_agent", "_answering", "_files", "_listeners", "_names", "_open")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: list[Flow] = []
        self._listeners: dict[tuple[str, int] | str, Listener] = {}
        self._agent: tuple[Listener, str] | None = None
        self._names, self._files = Threads(), Threads()
        self._answering: list[asyncio.Future[bool]] = []

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
        self._check_permission()
        rules = {
            "permit_open": (account.permit_open, login.permissions.permit_open),
            "permit_listen": (account.permit_listen, login.permissions.permit_listen),
        }[kind]
        return check_asked(kind, *rules, host, port)

    def _check_path(self, kind: str, path: str) -> str:
        account, login = self._entitled
        self._check_permission()
        of_key = {
            "permit_open_sockets": login.permissions.permit_open,
            "permit_listen_sockets": login.permissions.permit_listen,
        }[kind]
        if of_key is not None:
            raise ForbiddenError("a key that names ports is for no sockets")
        return check_path(kind, getattr(account, kind), path)

    def _check_permission(self) -> None:
        _, login = self._entitled
        if not login.permissions.port_forwarding:
            raise ForbiddenError("the key or the certificate does not permit port forwarding")

    def _room(self) -> None:
        """Raises ForbiddenError when there are as many as there may be."""
        most = self.config.connection_max_forwards
        if most and len(self._open) + len(self._listeners) >= most:
            self.limit_hit("connection_max_forwards")
            raise ForbiddenError(f"this connection has {most} forwards, which is the limit")

    def _admit(self, forward: Forward) -> None:
        self._open.append(forward)
        self.limit_time(0)

    def channel_closed(self, channel: Flow) -> None:
        """A forward's channel has ended."""
        if isinstance(channel, Forward):
            self._forget(channel)
            channel.drop()

    def _forget(self, forward: Forward) -> None:
        if forward in self._open:
            self._open.remove(forward)

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
        return forward.wire, forward.to(lambda: self._connect(dest_host, dest_port))

    async def _connect(self, host: str, port: int) -> socket.socket:
        """Connect to the first address that answers, but only to those that may be."""
        account, login = self._entitled
        error: Exception = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        for family, kind, protocol, _, address in await look_up(host, port, self._names):
            try:
                rules = (account.permit_open, login.permissions.permit_open)
                check_found(*rules, host, str(address[0]), port)
                return await connect(family, kind, protocol, address)
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
        return forward.wire, forward.to(lambda: self._connect_path(dest_path))

    async def _connect_path(self, path: str) -> socket.socket:
        account, _ = self._entitled
        sock: socket.socket = await self._files.do(lambda: connect_path(path, account.run_as))
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
            sockets = bind(hosts, port)
        except ForbiddenError as exc:
            self.forbidden(str(exc), kind="tcpip-forward", listen=asked)
            return None
        except OSError as exc:
            self.forbidden(f"cannot listen: {why(exc)}", kind="tcpip-forward", listen=asked)
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
            wanted = {"": EVERYWHERE, "*": EVERYWHERE}.get(host, (host,))
            if not is_address(wanted[0]):
                raise ForbiddenError(f"{host} is not an address to listen on")
            names: tuple[str, ...] = ()
        else:
            wanted, names = (host,) if host in LOOPBACK else LOOPBACK, ("localhost",)
        allowed: dict[str, str] = {}
        error = ForbiddenError("")
        for address in wanted:
            for name in (address, *names):
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
                self._forget(forward)

    async def listen_path(self, path: str) -> bool:
        """streamlocal-forward@openssh.com."""
        answer: asyncio.Future[bool] = asyncio.ensure_future(self._listen_path(path))
        self._answering.append(answer)
        answer.add_done_callback(self._answering.remove)
        return await answer

    async def when_listening(self, channel: _Channel) -> _Channel:
        """The channel, as soon as the client knows of every listener that it has asked for."""
        while self._answering:
            await asyncio.wait(self._answering)
        return channel

    async def _listen_path(self, path: str) -> bool:
        account, _ = self._entitled
        try:
            rule = self._check_path("permit_listen_sockets", path)
            if path in self._listeners:
                raise ForbiddenError(f"{path} is listened on already")
            self._room()
            async with asyncio.timeout(CONNECT_TIMEOUT):
                bound = await self._files.do(lambda: bind_path(path, account.run_as))
        except ForbiddenError as exc:
            self.forbidden(str(exc), kind="streamlocal-forward", listen=path)
            return False
        except (OSError, ValueError) as exc:
            self.forbidden(f"cannot listen: {why(exc)}", kind="streamlocal-forward", listen=path)
            return False

        async def accept(sock: socket.socket, _: Any) -> None:
            def opening(forward: Forward) -> Awaitable[object]:
                opened: Awaitable[object] = forward.wire.accept(lambda: forward, path)
                return opened

            await self._offer(sock, UnixWire, opening, kind="forwarded-streamlocal", listen=path)

        listener = Listener([bound.sock], accept, bound)
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

    def cancel_listen(self, host: str, port: int) -> bool:
        """cancel-tcpip-forward (RFC 4254 §7.1). False: there is none."""
        listener = self._listeners.pop((host, port), None)
        if listener is not None:
            listener.close()
        return listener is not None

    async def cancel_listen_path(self, path: str) -> bool:
        """cancel-streamlocal-forward@openssh.com: answered when the path is free again."""
        listener = self._listeners.pop(path, None)
        if listener is not None:
            await listener.aclose()
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

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                bound = await self._files.do(lambda: bind_in_own_folder(account.run_as))
        except OSError as exc:
            self.forbidden(f"cannot listen: {why(exc)}", kind="auth-agent")
            return False

        async def accept(sock: socket.socket, _: Any) -> None:
            def opening(forward: Forward) -> Awaitable[object]:
                opened: Awaitable[object] = forward.wire.open(lambda: forward)
                return opened

            await self._offer(sock, AgentWire, opening, kind="auth-agent")

        listener = Listener([bound.sock], accept, bound)
        if self.conn.is_closed() or self._agent is not None:
            listener.close()
            return self._agent is not None
        self._agent = (listener, bound.path)
        return True
