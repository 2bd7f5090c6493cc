"""What a request executes: the account's shell, the forced command, and whose variables win."""

from __future__ import annotations

from collections.abc import Collection

from .authentication import Login
from .lifecycle import Start
from .process import Command
from .requests import env_allowed

Ends = tuple[str, int, str, int]
"""The client's address and port, then ours."""


def command_of(login: Login, request: Start, ends: Ends, accept_env: Collection[str]) -> Command:
    """Put the command together. A forced one (authorized_keys, certificate) replaces every request.

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
    exports = dict(request.env)
    command = None if request.kind == "shell" else request.command
    if permissions.command is not None:
        exports |= {} if command is None else {"SSH_ORIGINAL_COMMAND": command}
        command = permissions.command.encode()
    for name, value in permissions.environment.items():
        if env_allowed(name.encode(), value.encode(), accept_env):
            exports[name] = value.encode()
    exports |= {name: value.encode() for name, value in account.env.items()}
    return Command(
        account.argv(command), env, exports, account.run_as, account.umask, account.rlimits.set()
    )
