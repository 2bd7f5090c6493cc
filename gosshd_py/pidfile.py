"""The file by which `gosshd reload` finds a running server: its lock tells the server's pid.

The server holds a POSIX record lock (fcntl(2)) as long as it lives, so that a file left behind by
a crash, or a pid that belongs to somebody else by now, mislead nobody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
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
    with os.fdopen(_open(path, os.O_RDWR | os.O_CREAT), "r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not re.fullmatch(r"\s*\d{0,10}\s*", file.read(100), re.ASCII):
            raise FileExistsError(errno.EEXIST, "it holds something else than a pid", str(path))
        file.seek(0)
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
        with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
            ask = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, ask))
    except FileNotFoundError:
        return None
    # -1: a lock of another kind; 0: of a process that is not to be seen from here.
    return None if kind == fcntl.F_UNLCK or pid <= 0 else int(pid)


def _open(path: Path, flags: int) -> int:
    """Open the file if nobody but us or root could have put it there. Raises OSError.

    To one who could, we would lend our right to send signals.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path, flags, 0o644)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
        os.close(fd)
        raise PermissionError(errno.EPERM, "not a regular file of ours", str(path))
    return fd
