"""What the types of config.py cannot say: whether the values of a Config can be used here and now.

Every problem is one line that ends with its remedy. Looks at the machine, changes nothing.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
import resource
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from .accounts import SFTP_SERVERS, find_account, system_users
from .authorized_keys import check_source, read_keys
from .config import (
    EVERYBODY_ELSE,
    AccountSettings,
    Address,
    Config,
    ConfigError,
    Rlimits,
    is_loopback,
    parse_address,
    show,
)
from .launch import limits_now
from .names import valid_user_name
from .passwords import LOCKED, check_hash
from .places import parse_place

Problem = tuple[tuple[str, ...], str]
"""A key, with the tables that it is in, and what is wrong with its value."""

MAX_MOTD = 16 * 1024


def problems_of(config: Config) -> list[Problem]:
    """Everything that is wrong with the values; none if all is well."""
    with_nul = list(_keys_with_nul(config))
    found: list[Problem] = [(key, _NUL) for key in with_nul]
    config = _without(config, with_nul)  # everything below would trip over it
    found += [(("listen",), problem) for problem in check_listen(config)]
    found += _settings(config, (), config.run_as)
    found += [(("HOME",), problem) for problem in _own_home()]
    if config.trace_file:
        found += [(("trace_file",), problem) for problem in _trace_file(Path(config.trace_file))]
    for text in config.penalty_exempt:
        try:
            ipaddress.ip_network(text)
        except ValueError as exc:
            found.append((("penalty_exempt",), f"{exc}; write a network as 10.0.0.0/8"))
    if 0 < config.max_penalty < config.min_penalty:
        problem = f"is less than min_penalty ({config.min_penalty:g}), so nobody is ever refused; raise it"
        found.append((("max_penalty",), problem))
    for text in config.auth.trusted_user_ca_keys:
        problem = check_source(text, must_exist=True)
        found += [(("auth", "trusted_user_ca_keys"), problem)] if problem else []
    if config.accounts is None and config.auth.trusted_user_ca_keys:
        found.append((("auth",), 'nobody has an account; add [accounts."*"] for all certificates'))
    if config.accounts is not None:
        found += _accounts(config, config.accounts)
    return found


def warnings_of(config: Config) -> list[str]:
    """What is allowed, and perhaps not meant."""
    found = []
    if os.geteuid() == 0:
        accounts = (config.accounts or {"": AccountSettings()}).items()
        roots = [name for name, account in accounts if _gets_a_shell_as_root(config, account)]
        who = "every visitor" if config.open_mode else ", ".join(roots)
        if roots:
            found.append(
                f"run_as is not set: {who} gets a shell as root; set run_as to another user"
            )
    users = system_users(config)
    if config.sftp and any(name and user.pw_uid for name, user in users.items()):
        found += _sftp_for_others()
    for name, account in (config.accounts or {}).items():
        known = find_account(config, name, users)
        owners, run_as = (known.key_owners, known.run_as) if known else (None, None)
        for source in account.authorized_keys:
            if "{user}" not in source:
                problems = read_keys(source, owners, run_as)[1]
                found += [f"accounts.{name}: {problem}" for problem in problems]
    for source in config.auth.trusted_user_ca_keys:
        problems = read_keys(source, frozenset((0, os.geteuid())))[1]
        found += [f"auth.trusted_user_ca_keys: {problem}" for problem in problems]
    return found


def _sftp_for_others() -> list[str]:
    """Whether the shells' users can run an SFTP server."""
    if any(os.access(path, os.X_OK) for path in SFTP_SERVERS):
        return []
    python = Path(sys.executable).resolve()
    closed = [
        place for place in (python, *python.parents) if not place.stat().st_mode & stat.S_IXOTH
    ]
    return [
        f"sftp will not work: other users may not enter {place}, so they cannot run our own server; "
        "install openssh-sftp-server"
        for place in closed[-1:]
    ]


def _gets_a_shell_as_root(config: Config, account: AccountSettings) -> bool:
    shell = config.shell if account.shell is None else account.shell
    run_as = config.run_as if account.run_as is None else account.run_as
    return shell is not False and account.password != LOCKED and run_as in ("", "root")


def check_listen(config: Config) -> list[str]:
    """What forbids to listen where config says, a line for each problem; none if all is well."""
    problems = [] if config.listen else ["is empty; name at least one HOST:PORT"]
    for text in config.listen:
        try:
            host = parse_address(text).host
        except ValueError as exc:
            problems.append(str(exc))
            continue
        if config.open_mode and not config.open_to_network and not is_loopback(host):
            problems.append(
                f"{text} can be reached from other machines, and nobody is asked for a password; "
                "listen on 127.0.0.1, add accounts, or say --open-to-network if that is what you want"
            )
    return problems


def check_reload(old: Config, new: Config, bound: Iterable[Address]) -> None:
    """Refuse what a reload cannot do, and what it must not. Raises ConfigError.

    It never opens what had accounts, or what others can reach: a file that was truncated, or is
    just being written, has no accounts, either. bound: where the server listens, which a reload
    does not change.
    """
    reachable = any(not is_loopback(address.host) for address in bound)
    if new.open_mode and (not old.open_mode or (reachable and not new.open_to_network)):
        problem = "there are none, which would let everybody in; restart the server if you mean it"
        raise ConfigError([f"accounts: {problem}"])
    if new.core_dumps and not old.core_dumps:
        problem = "a server that has given up core dumps cannot allow them again; restart it"
        raise ConfigError([f"rlimits: {problem}"])


_NUL = "holds a NUL character, which no name can; take it out"


def _keys_with_nul(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys with a character that TOML can write and the system's interfaces cannot take."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from [(*key, name)] if "\0" in name else _keys_with_nul(inner, (*key, name))
    elif isinstance(value, str | tuple) and "\0" in "".join(value):
        yield key


def _without(config: Config, keys: Iterable[tuple[str, ...]]) -> Config:
    """The configuration without these keys, so as if they were not set."""
    values = msgspec.to_builtins(config)
    for key in keys:
        inner = values
        for word in key[:-1]:
            inner = inner.get(word, {})
        inner.pop(key[-1], None)
    return msgspec.convert(values, Config)


# -- what can stand at the top level and in an account --------------------------------------------


def _settings(
    settings: Config | AccountSettings, at: tuple[str, ...], run_as: str
) -> list[Problem]:
    """run_as: whose shells they are, set here or at the top level."""
    found: list[Problem] = []

    def note(key: str, *problems: str) -> None:
        found.extend(((*at, key), problem) for problem in problems)

    note("shell", *_shell(settings.shell))
    found += [((*at, key), problem) for key, problem in _forwards(settings)]
    if settings.run_as:
        note("run_as", *_run_as(settings.run_as))
    if settings.home:
        note("home", *_home(settings.home))
    for name in settings.env or {}:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            note("env", f"{show(name)} is no name of a variable; use letters, digits and _")
    if len(settings.motd or "") > MAX_MOTD:
        note("motd", f"is longer than {MAX_MOTD} characters; shorten it")
    if settings.rlimits is not None:
        note("rlimits", *_rlimits(settings.rlimits, run_as))
    return found


def _forwards(settings: Config | AccountSettings) -> Iterator[tuple[str, str]]:
    for key in ("permit_open", "permit_listen"):
        for text in getattr(settings, key) or ():
            try:
                parse_place(text)
            except ValueError as exc:
                yield key, str(exc)
    for key in ("permit_open_sockets", "permit_listen_sockets"):
        for text in getattr(settings, key) or ():
            if text != "*" and not text.startswith("/"):
                yield key, f"{show(text)} is not an absolute path; begin it with /, or say *"


def _shell(shell: bool | str | tuple[str, ...] | None) -> list[str]:
    if shell is None or shell is False:
        return []
    if shell is True:
        return ["true is no program; name one, or say false for forwards only"]
    program = shell if isinstance(shell, str) else next(iter(shell), "")
    if not program.startswith("/"):
        absolute = shutil.which(program) or "/bin/bash"
        return [f"{show(program)} is not an absolute path; try {absolute}"]
    if shutil.which(program) is None:
        return [f"{program} is not an executable file; install it, or name another shell"]
    return []


def _run_as(name: str) -> list[str]:
    if os.geteuid() != 0:
        return [
            f"only root may run shells as {name}; start the server as root, or leave run_as out"
        ]
    try:
        pwd.getpwnam(name)
    except KeyError:
        return [f"there is no user {name} on this machine; create it with useradd"]
    return [] if shutil.which("setpriv") else ["needs the program setpriv (package util-linux)"]


def _home(template: str) -> list[str]:
    return _template(template) or (
        [] if template.startswith("/") else [f"{show(template)} is not an absolute path; begin it with /"]
    )  # fmt: skip


def _template(text: str) -> list[str]:
    if re.fullmatch(r"([^{}]|\{user\})*", text) is None:  # str.format knows more than that
        return [f"{show(text)} may hold {{user}} and no other braces"]
    return []


def _rlimits(limits: Rlimits, run_as: str) -> list[str]:
    """Limits that only root could raise; they are set by the user of the shells."""
    as_root = os.geteuid() == 0 and run_as in ("", "root")
    found = []
    for name, value in limits.set().items():
        _, hard = limits_now(name)
        if not as_root and hard != resource.RLIM_INFINITY and value > hard:
            found.append(f"{name} = {value} is more than this server may give; {hard} is the most")
    return found


def _trace_file(path: Path) -> list[str]:
    if path.is_dir():
        return [f"{path} is a folder; name a file in it"]
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return [f"{path} cannot be written; name a file in a folder that is there and ours"]
    return []


def _own_home() -> list[str]:
    try:
        Path.home()  # asyncssh, too, asks for it, and both of us would trip
    except RuntimeError:
        return [f"uid {os.geteuid()} has no home directory; set HOME in the environment"]
    return []


# -- accounts -------------------------------------------------------------------------------------


def _accounts(config: Config, accounts: dict[str, AccountSettings]) -> list[Problem]:
    found: list[Problem] = []
    if not accounts:
        found.append((("accounts",), "names nobody; add [accounts.NAME], or take it out"))
    for name, account in accounts.items():
        at = ("accounts", name)
        if name != EVERYBODY_ELSE and not valid_user_name(name):
            problem = (
                "is no login name: up to 32 of A-Z a-z 0-9 . _ - and no . or - first; rename it"
            )
            found.append((at, problem))
        run_as = config.run_as if account.run_as is None else account.run_as
        found += _settings(account, at, run_as)
        if account.rlimits is None and run_as != config.run_as:
            problems = _rlimits(config.rlimits, run_as)
            found += [(at, f"rlimits of the top level: {problem}") for problem in problems]
        if not (account.password or account.authorized_keys or config.auth.trusted_user_ca_keys):
            problem = f'nobody can log in; add password or authorized_keys, or lock it by password = "{LOCKED}"'
            found.append((at, problem))
        if account.password and (problem := check_hash(account.password)):
            found.append(((*at, "password"), problem))
        for text in account.authorized_keys:
            problem = next(iter(_template(text) if text.startswith("/") else []), "")
            problem = problem or check_source(text, must_exist="{user}" not in text)
            found += [((*at, "authorized_keys"), problem)] if problem else []
        for text in account.principals:
            found += [((*at, "principals"), problem) for problem in _template(text)]
    return found
