"""How a command is started: what has to be done between fork and exec, and by whom.

Promises: no Python code runs in the child, and nothing there waits for a file system before exec; a
program finds the directory, limits, variables and terminal that its account says, whichever way it
is started.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from .lifecycle import SILENT, Trace

NEAR = 200
"""Files that other threads may open while a child is started; to be sure, far too many."""

_SETPRIV = shutil.which("setpriv") or "/usr/bin/setpriv"  # looked up once, in our own PATH


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute: absolute path and arguments, and the whole environment.

    client_env: what the client adds to it. It is not there before the user is changed, or a
    client could choose what root runs and loads (PATH, LD_PRELOAD).
    run_as: (uid, gid) to become, with that user's groups; None keeps the server's own.
    umask: octal digits; None keeps the server's own.
    rlimits: by their names in setrlimit(2) without RLIMIT_, small, and in its units.
    home_at_hand: whether the server itself could enter $HOME just now, and need not wait for that.
    trace: where to tell of the program's life.
    """

    argv: Sequence[str | bytes]
    env: Mapping[str, str] = field(default_factory=dict)
    client_env: Mapping[str, bytes] = field(default_factory=dict)
    run_as: tuple[int, int] | None = None
    umask: str | None = None
    rlimits: Mapping[str, int] = field(default_factory=dict)
    home_at_hand: bool = False
    trace: Trace = SILENT


Way = tuple[Sequence[str | bytes], Mapping[str, str | bytes], str | None]
"""What to execute, the environment, and the directory to start in."""


def directly(command: Command) -> Way | None:
    """Without a shell in between, if there is nothing for it to do; that takes half the time."""
    if command.run_as is not None or not command.home_at_hand or _confine(command):
        return None
    home = os.path.normpath(command.env["HOME"])  # as the shell's cd has it
    return command.argv, {"PWD": home, **command.env, **command.client_env}, home


def through_a_shell(command: Command, *, terminal: bool) -> Way:
    """By setpriv(1) and a POSIX shell, which do what else is to be done between fork and exec.

    They then become the program.
    """
    exports = [_EXPORT.format(number) for number in range(len(command.client_env))]
    script = launcher(command, exports, terminal=terminal)
    assignments = [f"{name}=".encode() + value for name, value in command.client_env.items()]
    env: dict[str, str | bytes] = {**command.env, **dict(zip(exports, assignments, strict=True))}
    return [*_become(command.run_as), "/bin/sh", "-c", script, "sh", *command.argv], env, None


# Runs in the child, so as the shell's user: a home that only that user may enter is no trouble.
_CHDIR = """cd -- "$HOME" 2>/dev/null || {
  echo "gosshd: cannot enter the home directory $HOME, starting in /" >&2; cd /; }
unset OLDPWD
"""
# The variables come as NAME=VALUE in others whose names mean nothing to setpriv; as arguments, every
# user of the machine could read them.
_EXPORT = "GOSSHD_EXPORT_{}"


def launcher(command: Command, exports: Sequence[str], *, terminal: bool) -> str:
    """What /bin/sh does in the child before it becomes the program. exports: names of NAME=VALUEs."""
    # A session leader without a controlling terminal gets the first one it opens (credentials(7),
    # tty(4)). Popen has called setsid(2); opening the pty by name does the rest.
    take_terminal = 'exec <>"$SSH_TTY" >&0 2>&0\n' if terminal else ""
    export = "".join(f'export "${name}"; unset {name}\n' for name in exports)
    return take_terminal + _confine(command) + _CHDIR + export + 'exec "$@"'


_ULIMIT = {
    "nofile": "ulimit -n {}",
    "nproc": "ulimit -u {0} 2>/dev/null || ulimit -p {0}",  # bash's letter, then dash's
    "core": "ulimit -c {}",
    "cpu": "ulimit -t {}",
    "as": "ulimit -v {}",
}
_ULIMIT_UNITS = {"core": 512, "as": 1024}
"""Bytes in a unit of the shell's ulimit, where the unit is not that of setrlimit(2)."""


def _confine(command: Command) -> str:
    """The launcher's lines for umask and limits; without its limits no program starts."""
    lines = [f"umask {command.umask}"] if command.umask else []
    if "nofile" not in command.rlimits and _inherited_nofile not in (None, limits_now("nofile")[0]):
        lines.append(f"ulimit -S -n {_inherited_nofile}")
    for name, value in command.rlimits.items():
        if limits_now(name) == (value, value):
            continue  # inherited
        ulimit = _ULIMIT[name].format(value // _ULIMIT_UNITS.get(name, 1))
        lines.append(
            f'{{ {ulimit}; }} || {{ echo "gosshd: cannot set the limit {name}" >&2; exit 1; }}'
        )
    return "".join(f"{line}\n" for line in lines)


def limits_now(rlimit: str) -> tuple[int, int]:
    """The soft and the hard limit of this process, by a name as in Command.rlimits."""
    return resource.getrlimit(getattr(resource, f"RLIMIT_{rlimit.upper()}"))


_inherited_nofile: int | None = None
"""The soft limit that we were started with, if it is another one now."""


def raise_nofile() -> None:
    """Let the server have as many open files as it may; programs get back what it was started with.

    A session takes about four, and 1,024 is a common soft limit.
    """
    global _inherited_nofile  # noqa: PLW0603  # a property of the process, as the limit is
    soft, hard = limits_now("nofile")
    if soft != hard:
        _inherited_nofile = soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def nofile_of_programs(fd: int) -> Iterator[None]:
    """Meanwhile the limit of open files is the one that we were started with: a child inherits it.

    fd: a new descriptor. If its number is near that limit the launcher has to set it, since other
    threads could not open files in this moment.
    """
    if _inherited_nofile is None or fd > _inherited_nofile - NEAR:
        yield
        return
    _, hard = limits_now("nofile")
    resource.setrlimit(resource.RLIMIT_NOFILE, (_inherited_nofile, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def forbid_core_dumps() -> None:
    """Let neither the server, which holds keys, nor its programs leave core files (setrlimit(2)).

    Where dumps go to a program that decides for itself (core(5), core_pattern) it may keep one.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _become(run_as: tuple[int, int] | None) -> list[str]:
    # Popen(user=…) would give up vfork and so fork the whole server.
    if run_as is None:
        return []
    uid, gid = run_as
    return [_SETPRIV, f"--reuid={uid}", f"--regid={gid}", "--init-groups", "--"]


def fill_standard_streams() -> None:
    """Let no socket get the numbers 0, 1 and 2 if they are closed, as OpenSSH's sanitise_stdfd.

    Whoever writes to standard error would write to a client. And libuv aborts when it has to close
    one of them.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # it was closed when Python started
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def reset_signals() -> None:
    """Make sure that no child starts with a signal ignored or blocked by how we were started.

    A server that a script starts with `&` has SIGINT and SIGQUIT ignored, under nohup SIGHUP,
    and an ignored signal stays ignored across exec: ^C would do nothing in anybody's shell. A
    handler, even an empty one, becomes the default at exec.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    restored_by_popen = {signal.SIGPIPE, signal.SIGXFSZ}
    for number in signal.valid_signals() - restored_by_popen:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
