"""What a request executes: the account's shell, the forced command, and whose variables win."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection

import structlog

from .accounts import Account
from .authentication import Login
from .lifecycle import Start
from .process import Command
from .requests import env_allowed

log = structlog.get_logger()

Ends = tuple[str, int, str, int]
"""The client's address and port, then ours."""


async def prepare_home(account: Account) -> None:
    """Make a home that is missing; without one the session starts in / and says so."""
    try:
        if account.makes_home:
            await asyncio.to_thread(account.make_home)
    except OSError as exc:
        reason = str(exc.strerror or exc)
        log.warning("home not made", user=account.name, home=account.home, reason=reason)


def facts_of(request: Start) -> dict[str, object]:
    """What was asked for, for the log."""
    size = request.terminal.size if request.terminal else None
    return {
        "kind": request.kind,
        "command": request.command.decode("utf-8", "backslashreplace") or None,
        "pty": size is not None,
        "size": f"{size.columns}x{size.rows}" if size else None,
    }


def greeting_of(login: Login, request: Start) -> str:
    """The message of the day, for a shell on a terminal; "" for all else."""
    shell = request.kind == "shell" and login.permissions.command is None
    return login.account.motd if shell and request.terminal else ""


_OURS = re.compile(r"(HOME|USER|LOGNAME|SHELL|SSH_.*)\Z")
"""Variables on whose truth programs rely."""


def command_of(login: Login, request: Start, ends: Ends, accept: Collection[str]) -> Command:
    """Put the command together. A forced one (authorized_keys, certificate) replaces every request.

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
    command = None if request.kind == "shell" else request.command
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
