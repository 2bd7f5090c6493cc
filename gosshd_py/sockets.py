"""Sockets of forwards: made with the rights of the session's user, and never by blocking the loop.

Promises: a socket's file that another one has put in our place is left alone; whoever waits for a
slow name or file system waits alone.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from .fsuser import as_user
from .threads import in_thread

log = structlog.get_logger()

CONNECT_TIMEOUT = 20.0
"""Seconds for a name to be looked up and a connection to be made."""

BACKLOG = 128

AT_ONCE = 4
"""Names, and paths, that one connection may wait for at a time; each holds a thread."""

LOOPBACK = ("127.0.0.1", "::1")


def why(exc: Exception) -> str:
    """The words for an error of a socket; asyncio's own have none of their own."""
    if isinstance(exc, TimeoutError) and exc.errno is None:
        return f"no answer within {CONNECT_TIMEOUT:g} s"
    if isinstance(exc, UnicodeError):
        return "that is no host name"
    if isinstance(exc, OSError) and exc.errno and not isinstance(exc, socket.gaierror):
        return os.strerror(exc.errno)
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__


class Threads:
    """What one connection does in threads: so much at a time, and the rest waits for its turn."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(AT_ONCE)

    async def do(self, action: Callable[[], Any]) -> Any:
        """Do it. A thread that nobody waits for any more still counts."""
        await self._room.acquire()
        try:
            work = in_thread(action, self._room.release)
        except BaseException:
            self._room.release()
            raise
        return await work


# -- connecting ------------------------------------------------------------------------------------


async def look_up(host: str, port: int, threads: Threads) -> list[tuple[Any, ...]]:
    """The addresses of a host, as getaddrinfo(3). An address itself needs no thread."""
    kind = socket.SOCK_STREAM
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        found = await threads.do(lambda: socket.getaddrinfo(host, port, type=kind))
    return list(dict.fromkeys(found))


async def connect(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    """Connect to one address. Raises OSError."""
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_path(path: str, run_as: tuple[int, int] | None) -> socket.socket:
    """Connect to a unix socket, with the user's rights, in a thread. Raises OSError.

    Waits like every client while the backlog is full: without blocking there is only EAGAIN.
    """

    def made() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _set_send_timeout(sock, CONNECT_TIMEOUT)
            sock.connect(path)
            _set_send_timeout(sock, 0)
        except BaseException:
            sock.close()
            raise
        return sock

    connected: socket.socket = as_user(run_as, made)
    return connected


def _set_send_timeout(sock: socket.socket, seconds: float) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), 0))


def cut(sock: socket.socket) -> None:
    """Let the other end see a reset when it is closed: what it got is not all."""
    with suppress(OSError):  # only TCP has it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# -- listening -------------------------------------------------------------------------------------


def bind(hosts: list[str], port: int) -> list[socket.socket]:
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


class Bound(NamedTuple):
    """A unix socket with its file: the path, which file it was when we made it, and whose it is."""

    sock: socket.socket
    path: str
    identity: tuple[int, int]
    run_as: tuple[int, int] | None
    in_own_folder: bool = False

    def remove(self) -> None:
        """Remove the file, if it is still ours: a new tunnel may have put its own there."""
        with suppress(OSError):
            as_user(self.run_as, self._remove)

    def _remove(self) -> None:
        found = Path(self.path).lstat()
        if (found.st_dev, found.st_ino) == self.identity:
            Path(self.path).unlink()
        if self.in_own_folder:
            Path(self.path).parent.rmdir()


def bind_path(path: str, run_as: tuple[int, int] | None) -> Bound:
    """Listen on a unix socket with the user's rights, in a thread. Raises OSError.

    A file that a dead server has left is replaced, so that a tunnel can come back.
    """

    def made() -> Bound:
        try:
            return _bind_path(path, run_as)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or not _is_left_over(Path(path)):
                raise
        Path(path).unlink()
        return _bind_path(path, run_as)

    bound: Bound = as_user(run_as, made)
    return bound


def bind_in_own_folder(run_as: tuple[int, int] | None) -> Bound:
    """Listen on a unix socket in a new folder that only the user can enter. Raises OSError."""

    def made() -> Bound:
        folder = tempfile.mkdtemp(prefix="gosshd-agent-")
        return _bind_path(f"{folder}/agent.sock", run_as)._replace(in_own_folder=True)

    bound: Bound = as_user(run_as, made)
    return bound


def _bind_path(path: str, run_as: tuple[int, int] | None) -> Bound:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(path)
        Path(path).chmod(0o600)  # before anybody can connect
        found = Path(path).lstat()
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return Bound(sock, path, (found.st_dev, found.st_ino), run_as)


def _is_left_over(path: Path) -> bool:
    """Whether it is a socket of the user's on which nobody listens any more."""
    found = path.lstat()
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        return sock.connect_ex(str(path)) == errno.ECONNREFUSED


class Listener:
    """Sockets that we listen on for a client. accept: takes over each connection."""

    def __init__(
        self,
        sockets: list[socket.socket],
        accept: Callable[[socket.socket, Any], Awaitable[None]],
        bound: Bound | None = None,
    ) -> None:
        self._sockets = sockets
        self._accept = accept
        self._bound = bound
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
        if sock.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        """Stop listening; twice is silent. The socket's file is removed in a thread."""
        if self._stop() and self._bound is not None:
            with suppress(OSError):
                in_thread(self._bound.remove)

    async def aclose(self) -> None:
        """Stop listening, and wait until the socket's file is removed."""
        if self._stop() and self._bound is not None:
            with suppress(OSError):
                await in_thread(self._bound.remove)

    def _stop(self) -> bool:
        if self._closed:
            return False
        self._closed = True
        for sock in self._sockets:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        return True
