"""Whose socket is at the other end of a loopback connection: on a shared machine it tells users apart."""

from __future__ import annotations

import ipaddress
import os
import struct
from pathlib import Path

ESTABLISHED = "01"


def socket_owner(peer: tuple[str, int], here: tuple[str, int]) -> int | None:
    """The uid that owns the client's socket of a connection on this machine, or None.

    From /proc/net/tcp and tcp6 (proc(5)). None, too, for a socket that its process has closed:
    such a one belongs to nobody, and the kernel may say root.
    """
    for family in ("tcp", "tcp6"):  # an IPv4 address may be reached from an IPv6 socket
        if ":" in peer[0] and family == "tcp":
            continue
        ends = [_hex(*peer, family), _hex(*here, family)]
        with Path(f"/proc/net/{family}").open(encoding="ascii") as table:
            for row in map(str.split, table):
                if row[1:3] == ends:
                    state, uid, inode = row[3], row[7], row[9]
                    return int(uid) if state == ESTABLISHED and inode != "0" else None
    return None


def allowed_owner(host: str, port: int, here: str, here_port: int) -> bool:
    """Whether the client, at host and port of this machine, is the server's own user, or root."""
    return socket_owner((host, port), (here, here_port)) in (0, os.geteuid())


def _hex(host: str, port: int, family: str) -> str:
    """An address as in /proc/net/tcp: words of 32 bits in this machine's byte order, then the port."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    if family == "tcp6" and ip.version == 4:
        ip = ipaddress.ip_address(f"::ffff:{ip}")
    words = struct.unpack(f"={len(ip.packed) // 4}I", ip.packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
