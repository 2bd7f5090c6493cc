"""The listening sockets, and the door behind them.

Sockets are bound by us, so that an error can say which address and what to do. A connection is
let in or refused before anything is spent on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, cast

from .config import DEFAULT_LISTEN, Address, Config
from .lifecycle import Trace

BACKLOG = 1024
"""Connections that the kernel holds until we accept; asyncio's 100 make a burst wait for seconds."""

IDENTIFICATION = "gosshd_py"
"""The software version in our identification string (RFC 4253 §4.2)."""

TOO_MANY_CONNECTIONS = 12
"""SSH_DISCONNECT_TOO_MANY_CONNECTIONS (RFC 4253 §11.1)."""


class ListenError(Exception):
    """An address cannot be listened on; the text says which and why."""


def open_sockets(
    config: Config, held: Sequence[Address] = (), *, hold: bool = False
) -> list[socket.socket]:
    """Bind and listen. Raises ListenError.

    hold: do not listen, but let other processes of ours bind the same addresses (SO_REUSEPORT).
    held: such addresses, instead of those of the configuration.

    With port 0 the first address gets any free port and its siblings try for the same. The
    default ::1 may be missing, as on machines without IPv6; an address that you name may not.
    """
    sockets: list[socket.socket] = []
    chosen = 0
    try:
        for host, port in held or config.addresses:
            optional = config.listen == DEFAULT_LISTEN and host == "::1"
            try:
                for family, *_, address in _look_up(host, port):
                    wish = 0 if port else chosen
                    sockets.append(_bind(family, address, wish, shared=bool(held), hold=hold))
                    chosen = chosen or (sockets[-1].getsockname()[1] if port == 0 else 0)
            except OSError as exc:
                if not (optional and exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
                    raise ListenError(
                        f"cannot listen on {Address(host, port)}: {_why(exc)}"
                    ) from exc
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def claim(addresses: Sequence[Address]) -> list[socket.socket]:
    """Let no other supervisor share what we hold: until somebody listens the kernel would let it.

    It has a name in the network's own space, which goes with us (unix(7), abstract). Raises ListenError.
    """
    claims: list[socket.socket] = []
    for address in addresses:
        claims.append(socket.socket(socket.AF_UNIX))
        try:
            claims[-1].bind(f"\0gosshd {address}")
        except OSError as exc:
            for sock in claims:
                sock.close()
            raise ListenError(f"cannot listen on {address}: {_why(exc)}") from exc
    return claims


def _look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """The addresses of a name, each once: /etc/hosts may name one twice."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as exc:  # from the idna codec
        raise OSError(errno.EINVAL, "not a host name") from exc
    return list(dict.fromkeys(found))


def _bind(
    family: int, address: tuple[Any, ...], wish: int = 0, *, shared: bool, hold: bool
) -> socket.socket:
    """Bind one. wish: a port to try first where any will do."""
    if wish:
        with contextlib.suppress(OSError):
            there = (address[0], wish, *address[2:])
            return _bind(family, there, shared=shared, hold=hold)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        if hold:  # only now: with other people's servers nothing is shared
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        else:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _why(exc: OSError) -> str:
    remedies = {
        errno.EADDRINUSE: "another server uses it; stop that one, or choose a port with --listen 127.0.0.1:2223",
        errno.EADDRNOTAVAIL: "no interface of this machine has it; see `ip address`",
        errno.EACCES: "ports below 1024 need root; choose a higher one with --listen",
    }
    return f"{exc.strerror}; {remedies.get(exc.errno or 0, 'choose another with --listen')}"


# -- the door --------------------------------------------------------------------------------------

LINGER = 1.0
"""Seconds for a refused client to read why."""

MAX_LINGERING = 200
"""Refused clients that are told why at the same time; others are just cut off."""

READ_SIZE = 64 * 1024
"""Bytes read from a connection at once. asyncio would read 256 KiB; what is not yet handled is moved
for each packet, which takes long for thousands of small ones."""

Decide = Callable[[asyncio.Transport], asyncio.Protocol]
"""Says who takes a new connection over."""


class Door(asyncio.Protocol):
    """A connection just accepted: handed on before it costs anything."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask, and hand on."""
        transport = cast("asyncio.Transport", transport)
        if transport.get_extra_info("peername") is None:
            transport.abort()  # the client has gone before we came
            return
        answer = self._decide(transport)
        if hasattr(transport, "max_size"):  # not libuv's
            transport.max_size = READ_SIZE
        transport.set_protocol(answer)
        answer.connection_made(transport)


class Refused(asyncio.Protocol):
    """A connection that is told why, and cut off."""

    lingering = 0

    def __init__(self, words: str, trace: Trace) -> None:
        self._words = words
        self._trace = trace
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say it, if not too many are being told already."""
        transport = cast("asyncio.Transport", transport)
        self._trace("tcp.refused", reason=self._words)
        self._socket = transport.get_extra_info("socket")
        if Refused.lingering >= MAX_LINGERING:
            transport.abort()
            return
        Refused.lingering += 1
        transport.write(refusal(self._words))
        with contextlib.suppress(OSError):  # the client has gone
            transport.write_eof()
        self._timer = asyncio.get_running_loop().call_later(LINGER, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._trace("tcp.closed", fd=self._socket.fileno())
        if self._timer is not None:
            self._timer.cancel()
            Refused.lingering -= 1


async def listen(config: Config, held: Sequence[Address], decide: Decide) -> list[asyncio.Server]:
    """Listen as open_sockets does, and let decide say who takes a connection over."""
    make = functools.partial(asyncio.get_running_loop().create_server, lambda: Door(decide))
    with contextlib.ExitStack() as undo:
        sockets = [undo.enter_context(sock) for sock in open_sockets(config, held)]
        listeners = [await make(sock=sock, backlog=BACKLOG) for sock in sockets]
        undo.pop_all()
    return listeners


def refusal(words: str) -> bytes:
    """The identification (RFC 4253 §4.2) and SSH_MSG_DISCONNECT (§11.1): all that is said to a client."""
    text = f"gosshd: {words}".encode()
    payload = struct.pack(f">BII{len(text)}sI", 1, TOO_MANY_CONNECTIONS, len(text), text, 0)
    padding = 4 + -(5 + len(payload) + 4) % 8  # at least four, to a multiple of eight (§6)
    packet = struct.pack(">IB", 1 + len(payload) + padding, padding) + payload + bytes(padding)
    return b"SSH-2.0-" + IDENTIFICATION.encode() + b"\r\n" + packet
