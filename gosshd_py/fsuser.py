"""Opening files and unix sockets with the rights of a session's user, in a server that is root.

Linux gives every thread its own credentials; libc's setuid(2) changes them for all threads alike,
so the system calls are made directly, in a thread that then ends. Whoever is connected to sees the
user, too (SO_PEERCRED, unix(7)).
"""

from __future__ import annotations

import ctypes
import os
import platform
import pwd
import threading
from collections.abc import Callable
from typing import Any

_CALLS = {  # setgroups, setresgid, setresuid
    "x86_64": (116, 119, 117),
    "aarch64": (159, 149, 147),
    "riscv64": (159, 149, 147),
}
_UNCHANGED = ctypes.c_long(-1)


def as_user(run_as: tuple[int, int] | None, action: Callable[[], Any]) -> Any:
    """Do something as (uid, gid) with that user's groups; None: as we are. Waits for it.

    Raises what the action raises, and OSError if the user cannot be become.
    """
    if run_as is None:
        return action()
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _become(*run_as)
            results.append(action())
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _become(uid: int, gid: int) -> None:
    """Take the user's effective ids in this thread.

    The real ones stay ours: with those the user could send signals to the server (kill(2)).
    """
    if platform.machine() not in _CALLS:
        raise OSError(0, f"on {platform.machine()} a socket cannot be opened as another user")
    setgroups, setresgid, setresuid = _CALLS[platform.machine()]
    try:
        groups = os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        groups = [gid]
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        (setgroups, len(groups), (ctypes.c_uint32 * len(groups))(*groups)),
        (setresgid, _UNCHANGED, gid, _UNCHANGED),
        (setresuid, _UNCHANGED, uid, _UNCHANGED),
    ):
        if libc.syscall(*call) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
