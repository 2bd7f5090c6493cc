"""What the bytes of a channel request mean: checked values, or ValueError. Pure; terminal modes: modes.py."""

from __future__ import annotations

import re
import signal
from collections.abc import Collection
from fnmatch import fnmatchcase

from .lifecycle import WindowSize

SIGNALS = {
    name: getattr(signal, f"SIG{name}")
    for name in ("HUP", "INT", "KILL", "QUIT", "TERM", "USR1", "USR2")
}
"""What a client may send; as in OpenSSH's sshd, not the ones that only crash (SEGV, ILL, …)."""

_TERM = re.compile(rb"[A-Za-z0-9][A-Za-z0-9+._-]{0,63}")
_ENV_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]{0,127}")


def parse_size(columns: int, rows: int, xpixel: int, ypixel: int, old: WindowSize) -> WindowSize:
    """Check a size from the wire (uint32 each). ValueError beyond what a terminal can be.

    Zero means "ignore" (RFC 4254 §6.2), so it leaves the old value. Sizes in pixels are only
    informative: impossible ones count as unknown.
    """
    if columns > 0xFFFF or rows > 0xFFFF:
        raise ValueError(f"a terminal of {columns}×{rows} characters is beyond 65535×65535")
    if xpixel > 0xFFFF or ypixel > 0xFFFF:
        xpixel = ypixel = 0
    return WindowSize(columns or old.columns, rows or old.rows, xpixel, ypixel)


def parse_term(term: bytes) -> str:
    """Check TERM; no name at all is a dumb terminal. ValueError for what no terminfo name has."""
    if term and not _TERM.fullmatch(term):
        raise ValueError("TERM is not the name of a terminal")
    return term.decode("ascii") or "dumb"


def env_allowed(name: bytes, value: bytes, accepted: Collection[str]) -> bool:
    """Whether a client may set this variable: a well-formed name that the patterns accept."""
    return (
        _ENV_NAME.fullmatch(name) is not None
        and b"\0" not in value
        and len(value) <= 4096
        and any(fnmatchcase(name.decode("ascii"), pattern) for pattern in accepted)
    )
