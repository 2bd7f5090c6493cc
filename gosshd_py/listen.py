"""The listening sockets: bound by us, so that an error can say which address and what to do."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from typing import Any

from .config import DEFAULT_LISTEN, Address, Config

BACKLOG = 1024
"""Connections that the kernel holds until we accept; asyncio's 100 make a burst wait for seconds."""


class ListenError(Exception):
    """An address cannot be listened on; the text says which and why."""


def open_sockets(config: Config) -> list[socket.socket]:
    """Bind the configured addresses. Raises ListenError.

    With port 0 the first address gets any free port and its siblings try for the same. The
    default ::1 may be missing, as on machines without IPv6; an address that you name may not.
    """
    sockets: list[socket.socket] = []
    chosen = 0
    try:
        for host, port in config.addresses:
            optional = config.listen == DEFAULT_LISTEN and host == "::1"
            try:
                for family, *_, address in _look_up(host, port):
                    sockets.append(_bind(family, address, 0 if port else chosen))
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


def _look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """The addresses of a name, each once: /etc/hosts may name one twice."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as exc:  # from the idna codec
        raise OSError(errno.EINVAL, "not a host name") from exc
    return list(dict.fromkeys(found))


def _bind(family: int, address: tuple[Any, ...], wish: int = 0) -> socket.socket:
    """Bind and listen. wish: a port to try first where any will do."""
    if wish:
        with suppress(OSError):
            return _bind(family, (address[0], wish, *address[2:]))
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
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
