"""What a request executes: the account's shell, the forced command, and whose variables win."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Collection

import structlog

from .accounts import SFTP_SERVERS, Account
from .authentication import Login
from .launch import Command
from .lifecycle import SpawnError, Start
from .requests import env_allowed
from .threads import in_thread

log = structlog.get_logger()

Ends = tuple[str, int, str, int]
"""The client's address and port, then ours."""


def _subsystem(account: Account, name: bytes) -> bytes:
    """The command line of a subsystem; the account's shell runs it, as sshd does."""
    if name != b"sftp":
        shown = name.decode("utf-8", "backslashreplace")
        raise SpawnError(f"there is no subsystem {shown!r} on this server")
    if not account.sftp:
        raise SpawnError("sftp is off for this account")
    found = next((path for path in SFTP_SERVERS if os.access(path, os.X_OK)), None)
    words = [found] if found else [sys.executable, "-P", "-s", "-m", "gosshd_py.sftp"]
    return shlex.join(["exec", *words, *(["-R"] if account.read_only else [])]).encode()


async def prepare_home(account: Account, *, terminal: bool) -> bool:
    """Make a home that is missing; without one the session starts in / and says so.

    Returns whether it is at hand: one that the server itself may enter, and need not wait for. Who
    cannot be started directly anyway, on a terminal or as another user, is spared the question.
    """
    if not account.makes_home and (terminal or account.run_as is not None):
        return False
    try:
        return bool(await in_thread(lambda: _make_and_see(account)))
    except OSError as exc:
        if account.makes_home:
            reason = str(exc.strerror or exc)
            log.warning("home not made", user=account.name, home=account.home, reason=reason)
        return False


def _make_and_see(account: Account) -> bool:
    """A file system on a device of this machine answers at once; one without (NFS, FUSE) may never."""
    account.make_home()
    home = f"{account.home}/."  # so a folder
    return os.access(home, os.X_OK) and os.major(os.stat(home).st_dev) != 0  # noqa: PTH116


def facts_of(request: Start) -> dict[str, object]:
    """What was asked for, for the log."""
    size = request.terminal.size if request.terminal else None
    return {
        "kind": request.kind,
        "command": request.command.decode("utf-8", "backslashreplace") or None,
        "pty": size is not None,
        "size": str(size) if size else None,
    }


def greeting_of(login: Login, request: Start) -> str:
    """The message of the day, for a shell on a terminal; "" for all else."""
    shell = request.kind == "shell" and login.permissions.command is None
    return login.account.motd if shell and request.terminal else ""


_OURS = re.compile(r"(HOME|USER|LOGNAME|SHELL|SSH_.*)\Z")
"""Variables on whose truth programs rely."""


def command_of(
    login: Login, request: Start, ends: Ends, accept: Collection[str], agent: str | None = None
) -> Command:
    """Put the command together. Raises SpawnError for what the account may not run.

    A forced one (authorized_keys, certificate) replaces every request.

    agent: the path of the socket that leads to the client's agent.

    accept: patterns of names that the line of a key may set.

    The client's variables yield to those of the key's line, and both to those of the account, as
    sshd_config(5) has it for AcceptEnv, PermitUserEnvironment and SetEnv.
    """
    account, permissions = login.account, login.permissions
    host, port, here, here_port = ends
    env = {
        **account.environment(),
        "SSH_CLIENT": f"{host} {port} {here_port}",
        "SSH_CONNECTION": f"{host} {port} {here} {here_port}",
    }
    exports = {name: value for name, value in request.env.items() if not _OURS.match(name)}
    exports |= {"SSH_AUTH_SOCK": agent.encode()} if agent else {}
    command = None if request.kind == "shell" else request.command
    if not account.shell:
        raise SpawnError("this account carries forwards only: no shell, no commands, no sftp")
    if permissions.command is None and request.kind == "subsystem":
        command = _subsystem(account, request.command)
    elif permissions.command is None and account.read_only:
        raise SpawnError("this account is for reading files by sftp: no shell, no commands")
    if permissions.command is not None:
        exports |= {} if command is None else {"SSH_ORIGINAL_COMMAND": command}
        command = permissions.command.encode()
    for name, value in permissions.environment.items():
        if env_allowed(name.encode(), value.encode(), accept):
            exports[name] = value.encode()
    exports |= {name: value.encode() for name, value in account.env.items()}
    return Command(
        account.argv(command), env, exports, account.run_as, account.umask, account.rlimits.set()
    )
