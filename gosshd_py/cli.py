"""The command line: arguments, exit codes, and what a person reads on the terminal.

Exit codes: 0 clean stop, 2 usage or configuration, 1 anything else (sysexits are not used).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import Any, ClassVar, NoReturn

import click
import msgspec
import structlog
from asyncssh import SSHKey
from asyncssh.saslprep import SASLPrepError, saslprep

from . import __version__, logs, loop, pidfile
from .checks import check_reload, warnings_of
from .config import Address, Config, ConfigError, parse_address
from .daemon import NEEDS_RESTART, keep_what_is_loaded, serve
from .explain import explain_forward
from .hostkeys import (
    HostKeyError,
    client_names,
    existing_host_keys,
    fingerprint,
    known_hosts_lines,
    load_host_keys,
)
from .launch import fill_standard_streams, forbid_core_dumps
from .listen import ListenError, claim, open_sockets
from .load import load_config
from .passwords import MAX_PASSWORD, make_hash
from .places import ForbiddenError
from .workers import Supervisor, Worker

log = structlog.get_logger()

PROBE_TIME = 5.0
"""Seconds that a probed server may take to accept, and again to say who it is."""

_OPTIONS = [
    click.option("--config", metavar="FILE", help="Read settings from this TOML file; flags override it."),
    click.option("--listen", multiple=True, metavar="HOST:PORT",
                 help="Where to listen; may be repeated; port 0 takes any free port.  "
                      "[default: 127.0.0.1:2222 and [::1]:2222]"),
    click.option("--hostkeys", metavar="DIR",
                 help="Where the host keys are; the ed25519 key is made if it is missing.  "
                      "[default: ./hostkeys, else the user's state folder]"),
    click.option("--shell", metavar="PATH", help="What a session runs.  [default: /bin/bash]"),
    click.option("--run-as", metavar="USER", help="Run the shells as this system user (needs root)."),
    click.option("--home", metavar="DIR",
                 help="Where a session starts; {user} is the login name.  [default: the shell user's home]"),
    click.option("--open-to-network", is_flag=True, default=None,
                 help="Without accounts: let everybody in from other machines, too."),
    click.option("--open-to-local-users", is_flag=True, default=None,
                 help="Without accounts: let the other users of this machine in, too."),
    click.option("--pid-file", metavar="FILE", help="Where `gosshd reload` finds the server."),
    click.option("--workers", metavar="N|auto", callback=lambda _, __, value: _number(value),
                 help="How many processes serve; auto: one for each processor.  [default: 1]"),
    click.option("--log-format", metavar="text|json", help="What the log on standard error looks like."),
    click.option("--trace", is_flag=True, default=None,
                 help="Tell what happens on each connection, step by step, and what it means."),
    click.option("--trace-file", metavar="FILE", help="Append the same to FILE; see gosshd timeline."),
    click.option("--trace-data", type=int, metavar="BYTES",
                 help="Show the first BYTES of all data, but not what is typed unseen.  [default: 0]"),
]  # fmt: skip


def _number(text: str | None) -> str | int | None:
    """What is written with digits becomes a number; what else is good is said by the settings."""
    return int(text) if text and text.isascii() and text.isdigit() else text


def _settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command takes, so that `gosshd CMD` sees what `gosshd` would serve."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


Ready = Callable[[Sequence[Address], Sequence[SSHKey]], None]
"""Called when clients can connect."""


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given; click says None or () for the others."""
    return {key: value for key, value in flags.items() if value not in (None, ())}


def _config(file: str | None, flags: dict[str, Any]) -> Config:
    try:
        return load_config(file, _given(flags))
    except ConfigError as exc:
        _fail(2, *exc.problems)


def _fail(code: int, *lines: str) -> NoReturn:
    for line in lines:
        click.echo(f"gosshd: error: {logs.escape(line)}", err=True)
    sys.exit(code)


class _Commands(click.Group):
    """Words and exit codes for what click and the operating system refuse, in our form.

    Some commands are imported only when they are asked for: the server starts without them.
    """

    _LATER: ClassVar = {"labs": "gosshd_py.labs.cli", "timeline": "gosshd_py.timeline.cli"}

    def list_commands(self, context: click.Context) -> list[str]:
        """All names."""
        return sorted([*super().list_commands(context), *self._LATER])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of a name."""
        if name in self._LATER:
            found: click.Command = getattr(import_module(self._LATER[name]), name)
            return found
        return super().get_command(context, name)

    def main(self, *args: Any, **options: Any) -> Any:
        options |= {"prog_name": "gosshd", "standalone_mode": False}
        try:
            return super().main(*args, **options)
        except click.UsageError as exc:
            _fail(2, f"{exc.format_message().rstrip('.')}; see gosshd --help")
        except click.ClickException as exc:
            _fail(1, exc.format_message())
        except OSError as exc:
            _fail(1, str(exc))
        except click.Abort:
            _fail(1, "interrupted")


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"auto_envvar_prefix": "GOSSHD", "help_option_names": ["-h", "--help"]},
    epilog="Every option can also be set in the environment, as GOSSHD_LISTEN, GOSSHD_HOSTKEYS, …",
)
@_settings
@click.version_option(__version__, prog_name="gosshd", allow_from_autoenv=False)
@click.pass_context
def main(context: click.Context, /, config: str | None, **flags: Any) -> None:
    """Serve shells over SSH: bash on a pseudo-terminal for everybody who connects.

    Without a command: serve until SIGTERM or ^C.
    """
    context.obj = (config, flags)
    if context.invoked_subcommand is None:
        _serve(config, flags)


def _serve(file: str | None, flags: dict[str, Any]) -> None:
    fill_standard_streams()
    config = _config(file, flags)
    # The trace tells all this and more, and on one terminal they would be mixed.
    quiet = config.trace and sys.stdout.isatty() and sys.stderr.isatty()
    logs.configure(config.log_format, level=logging.WARNING if quiet else logging.NOTSET)

    def ready(addresses: Sequence[Address], host_keys: Sequence[SSHKey]) -> None:
        _announce(addresses, host_keys)
        for warning in warnings_of(config):
            log.warning("configuration", warning=warning)
        _hold_pid_file(config, until_the_end)

    def again() -> Config:
        return load_config(file, _given(flags))

    with ExitStack() as until_the_end:
        try:
            if config.worker_count > 1:
                sys.exit(_serve_by_several(config, ready, again))
            loop.run(
                _to_the_end(serve(config, lambda it: ready(it.addresses, it.host_keys), again))
            )
        except (ListenError, HostKeyError) as exc:
            _fail(1, str(exc))


async def _to_the_end(serving: Awaitable[None]) -> None:
    """A signal that comes behind the last connection would only spoil the exit status."""
    await serving
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


def _serve_by_several(config: Config, ready: Ready, again: Callable[[], Config]) -> int:
    """Hold the ports, make the host keys, and let the workers serve. Returns the exit status."""
    if not config.core_dumps:
        forbid_core_dumps()
    host_keys = load_host_keys(config.hostkeys_dir)
    held = open_sockets(config, hold=True)
    addresses = [Address(*sock.getsockname()[:2]) for sock in held]
    held += claim(addresses)
    now = config

    def reread() -> None:
        """For the workers that will start later. The others read it for themselves, and say why not."""
        nonlocal now
        with suppress(ConfigError):
            new = again()
            check_reload(now, new, addresses)
            now = msgspec.structs.replace(
                new, **{key: getattr(config, key) for key in NEEDS_RESTART}
            )

    def work(worker: Worker) -> int:
        for sock in held:
            sock.close()
        try:
            loop.run(_to_the_end(serve(now, lambda _: worker.ready(), again, worker)))
        except (ListenError, HostKeyError, OSError) as exc:
            _fail(1, str(exc))
        except ConfigError as exc:
            _fail(2, *exc.problems)
        return 0

    keep_what_is_loaded()
    supervisor = Supervisor(config.worker_count, addresses, work, reread)
    return supervisor.run(lambda: ready(addresses, host_keys))


def _warn(config: Config) -> None:
    for warning in warnings_of(config):
        click.echo(f"gosshd: warning: {logs.escape(warning)}", err=True)


def _hold_pid_file(config: Config, until_the_end: ExitStack) -> None:
    """Let `gosshd reload` find us. Where it cannot, that is said, and SIGHUP still does it."""
    path = pidfile.pid_path(config)
    try:
        if path is not None:
            until_the_end.enter_context(pidfile.held(path))
    except OSError as exc:
        remedy = f"gosshd reload will not find this server, but kill -HUP {os.getpid()} does it"
        held = isinstance(exc, BlockingIOError)
        reason = "another server holds it; set pid_file" if held else exc.strerror
        log.warning("no pid file", file=str(path), reason=reason, remedy=remedy)


def _announce(addresses: Sequence[Address], host_keys: Sequence[SSHKey]) -> None:
    """Say that clients can connect, and give what they need to know that it is us."""
    for address in addresses:
        click.echo(f"listening on {address}")
    for key in host_keys:
        click.echo(f"host key {fingerprint(key)} ({key.get_algorithm()})")
    click.echo(known_hosts_lines(addresses, host_keys)[0])  # ready to paste
    host, port = addresses[0]
    name = client_names(host)[0]
    click.echo(f"connect with: ssh anyuser@{name}" + (f" -p {port}" if port != 22 else ""))


def _with_settings(context: click.Context, /, config: str | None, flags: dict[str, Any]) -> Config:
    """The settings given before the command's name, overridden by those behind it."""
    outer_config, outer = context.obj
    return _config(config or outer_config, {**outer, **_given(flags)})


@main.command()
@_settings
@click.pass_context
def check(context: click.Context, /, config: str | None, **flags: Any) -> None:
    """Check the configuration without serving; every problem gets a line."""
    settings = _with_settings(context, config, flags)
    _warn(settings)
    try:
        existing_host_keys(settings.hostkeys_dir)
    except (HostKeyError, OSError) as exc:
        _fail(2, f"hostkeys: {exc}")
    click.echo(
        f"{config or context.obj[0] or 'configuration'}: good; listens on {', '.join(settings.listen)}"
    )


@main.command()
@_settings
@click.pass_context
def reload(context: click.Context, /, config: str | None, **flags: Any) -> None:
    """Let the running server read its configuration again; sessions go on.

    Checks the configuration first, as it is seen from here.
    """
    settings = _with_settings(context, config, flags)
    _warn(settings)
    path = pidfile.pid_path(settings)
    if path is None:
        _fail(
            2,
            "listen: port 0 names no server; name its file with --pid-file FILE, or use kill -HUP PID",
        )
    try:
        pid = pidfile.holder(path)
    except OSError as exc:
        _fail(1, f"{path}: {exc.strerror}; name the server's file with --pid-file FILE")
    if pid is None:
        there = "no server holds this file" if path.exists() else "there is no such file"
        _fail(1, f"{path}: {there}; is the server running, and with this configuration?")
    try:
        os.kill(pid, signal.SIGHUP)
    except PermissionError:
        _fail(1, f"process {pid}: that server belongs to another user; become that user, or root")
    click.echo(f"asked process {pid} to reload; its log says what came of it")


@main.command()
def passwd() -> None:
    """Ask for a password twice and print the line for [accounts.NAME].

    Without a terminal one line of standard input is the password.
    """
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    try:
        password = saslprep(password)
    except SASLPrepError as exc:
        _fail(2, f"{exc}; no client could send this password")
    if not password:
        _fail(2, "an empty password would let everybody in; choose another")
    if len(password) > MAX_PASSWORD:
        _fail(2, f"{len(password)} characters are too many; {MAX_PASSWORD} are the most")
    click.echo(f'password = "{make_hash(password)}"')


@main.group()
def explain() -> None:
    """Say what the rules would answer, and which of them decides."""


@explain.command("forward")
@click.argument("user")
@click.argument("place", metavar="HOST:PORT")
@click.option("--key", metavar="FILE", help="The public key that USER logs in with.")
@_settings
@click.pass_context
def explain_a_forward(
    context: click.Context,
    /,
    user: str,
    place: str,
    key: str | None,
    config: str | None,
    **flags: Any,
) -> None:
    """Whether USER may connect to HOST:PORT through the server; exit 1 if not."""
    assert context.parent is not None  # noqa: S101
    context.obj = context.parent.parent.obj if context.parent.parent else context.obj
    settings = _with_settings(context, config, flags)
    try:
        click.echo(f"allowed: {logs.escape(explain_forward(settings, user, place, key))}")
    except ForbiddenError as exc:
        click.echo(f"refused: {logs.escape(str(exc))}")
        sys.exit(1)
    except ValueError as exc:
        _fail(2, str(exc))


@main.command("known-hosts")
@_settings
@click.pass_context
def known_hosts(context: click.Context, /, config: str | None, **flags: Any) -> None:
    """Print the known_hosts lines of the configured listeners."""
    settings = _with_settings(context, config, flags)
    if any(port == 0 for _, port in settings.addresses):
        _fail(2, "listen: port 0 is chosen at start; name the real port with --listen HOST:PORT")
    for line in known_hosts_lines(settings.addresses, _keys(settings)):
        click.echo(line)


@main.command()
@_settings
@click.pass_context
def keys(context: click.Context, /, config: str | None, **flags: Any) -> None:
    """List the host keys with their fingerprints."""
    settings = _with_settings(context, config, flags)
    for key in _keys(settings):
        click.echo(f"{fingerprint(key)} {key.get_algorithm()} {key.get_comment() or ''}".rstrip())


def _keys(config: Config) -> list[Any]:
    try:
        return list(load_host_keys(config.hostkeys_dir))
    except HostKeyError as exc:
        _fail(1, str(exc))


@main.command()
@click.argument("address", default="127.0.0.1:2222")
def probe(address: str) -> None:
    """Ask ADDRESS for its SSH identification string (RFC 4253 §4.2); exit 1 if there is none."""
    try:
        with (
            socket.create_connection(parse_address(address), timeout=PROBE_TIME) as sock,
            sock.makefile("rb") as file,
        ):
            line = file.readline(255)
    except OSError as exc:
        _fail(1, f"{address}: {exc.strerror or exc}; is an SSH server running there?")
    except UnicodeError:  # from the resolver: a ValueError too
        _fail(2, f"{address}: that is no host name; give HOST:PORT")
    except ValueError as exc:
        _fail(2, str(exc))
    if not line.startswith(b"SSH-2.0-"):
        _fail(1, f"{address}: what answers there does not speak SSH; name another address")
    click.echo(logs.escape(line.decode("ascii", "backslashreplace").strip()))
