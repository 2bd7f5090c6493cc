"""The file by which `gosshd reload` finds a running server: its lock tells the server's pid.

The server holds a POSIX record lock (fcntl(2)) as long as it lives, so that a file left behind by
a crash, or a pid that belongs to somebody else by now, mislead nobody.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import Config

_FLOCK = "hhqqi4x"  # struct flock: l_type, l_whence, l_start, l_len, l_pid


def pid_path(config: Config) -> Path | None:
    """Where the file is; None where it has no name, as for port 0."""
    if config.pid_file:
        return Path(config.pid_file)
    port = config.addresses[0].port
    runtime = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path.home() / ".local" / "state" / "gosshd"
    return folder / f"gosshd-{port}.pid" if port else None


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Write our pid and hold the lock. Raises OSError, BlockingIOError if another server holds it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o644), "r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def holder(path: Path) -> int | None:
    """The pid of the server that holds the lock, or None. Raises OSError."""
    try:
        with path.open("rb") as file:
            ask = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, ask))
    except FileNotFoundError:
        return None
    return None if kind == fcntl.F_UNLCK else pid
