"""One frozen, validated Config, from a TOML file and flags. Fails closed, names the key at fault.

Every problem is found before anything is used: a file with three mistakes gets three lines.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import pwd
import re
import reprlib
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

DEFAULT_LISTEN = ("127.0.0.1:2222", "[::1]:2222")

Seconds = Annotated[float, Meta(gt=0)]


class ConfigError(Exception):
    """What is wrong with the configuration: one line per problem, each with its remedy."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Address(NamedTuple):
    """Where to listen: a host name or IP address, and a port (0: any free one)."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set. Names follow sshd_config(5) where it has one."""

    listen: tuple[str, ...] = DEFAULT_LISTEN
    """Addresses HOST:PORT or [IPV6]:PORT; port 0 takes any free one."""

    hostkeys: str = ""
    """Directory of the host keys. Empty: ./hostkeys if it exists, else the user's state folder."""

    shell: str = "/bin/bash"
    """What a session runs: `shell -l`, or `shell -c COMMAND`."""

    run_as: str = ""
    """System user of the shells (needs root). Empty: the server's own user."""

    home: str = ""
    """Where a session starts; {user} is the login name. Empty: the home of the shells' user."""

    accept_env: tuple[str, ...] = ("TERM", "LANG", "LC_*")
    """Names and patterns of the environment variables that a client may set."""

    open_to_network: bool = False
    """Allow everybody without credentials even on addresses that others can reach."""

    client_alive_interval: Annotated[float, Meta(ge=0)] = 15.0
    """Seconds of silence after which a client is asked whether it lives; 0: never."""

    client_alive_count_max: Annotated[int, Meta(ge=1)] = 3
    """Unanswered questions after which the connection is given up."""

    login_grace_time: Seconds = 20.0
    """Seconds in which a client must have logged in."""

    hangup_grace: Seconds = 2.5
    """Seconds between hanging up on a program and SIGKILL."""

    drain_timeout: Seconds = 1800.0
    """Seconds in which a client must accept some of what an ended program has left."""

    log_format: Literal["text", "json"] = "text"
    """Log lines for people or for programs."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The listen addresses, taken apart."""
        return tuple(parse_address(text) for text in self.listen)

    @property
    def hostkeys_dir(self) -> Path:
        """Where the host keys are."""
        if self.hostkeys:
            return Path(self.hostkeys)
        if os.path.isdir("hostkeys"):  # noqa: PTH112  # Path's raises where we may not look
            return Path("hostkeys")
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(state) / "gosshd" / "hostkeys"


def parse_address(text: str) -> Address:
    """Take HOST:PORT apart. Raises ValueError that says what is missing."""
    match = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^\[\]:\s]+)):([0-9]{1,5})", text)
    if match is None or int(match[3]) > 65535 or not (match[2] or _is_ipv6(match[1])):
        raise ValueError(f"{_show(text)} is not HOST:PORT or [IPV6]:PORT with a port up to 65535")
    return Address(match[1] or match[2], int(match[3]))


def _is_ipv6(host: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False


def load_config(file: str | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    """Read the file, let the flags override it, check everything. Raises ConfigError."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    places: dict[str, str] = {}
    if file is not None:
        text = _read(file)
        values = _parse(file, text)
        places = {key: _place(file, text, key) for key in values}
    for key, value in (flags or {}).items():
        values[key] = value
        places[key] = "--" + key.replace("_", "-")
    checked: dict[str, Any] = {}
    fields = {field.name: field for field in msgspec.structs.fields(Config)}
    for key, value in values.items():
        where = places[key]
        if key not in fields:
            problems.append(f"{where}: unknown key{_nearest(key, fields)}")
            continue
        try:
            checked[key] = msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as exc:
            problems.append(f"{where}: {_plain(str(exc), fields[key].type)}, not {_show(value)}")
    config = Config(**checked)
    problems += [f"{places.get(key, key)}: {problem}" for key, problem in _check(config)]
    if problems:
        raise ConfigError(problems)
    return config


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError([f"{file}: {exc.strerror}; name a readable file with --config"]) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(
            [f"{file}: byte {exc.start} is not UTF-8; save the file as UTF-8"]
        ) from exc


def _parse(file: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # also for numbers and nesting without end
        raise ConfigError([f"{file}: not valid TOML: {exc}; correct that line"]) from exc


def _place(file: str, text: str, key: str) -> str:
    """FILE:LINE: key, where the line can be found."""
    pattern = re.compile(rf"[\s\[]*([\"']?){re.escape(key)}\1\s*[=.\]]")
    for number, line in enumerate(text.split("\n"), 1):
        if pattern.match(line):
            return f"{file}:{number}: {key}"
    return f"{file}: {key}"


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def _show(value: object) -> str:
    """A value as it was given, but no book: its error has more to say behind it."""
    return _SHORT.repr(value)


_TOML = {
    "`array`": "a list",
    "`str`": "a string",
    "`bool`": "true or false",
    "`int`": "a whole number",
    "`float`": "a number",
}


def _plain(message: str, wanted: Any) -> str:
    """msgspec's words for JSON, in TOML's; what it got is shown by the caller."""
    if message.startswith("Invalid enum value"):
        return f"expected {' or '.join(get_args(wanted))}"
    expected, _, got = message.removeprefix("Expected ").partition(", got ")
    for json, toml in _TOML.items():
        expected = expected.replace(json, toml)
    return f"expected {'a list, each item ' if '$[' in got else ''}{expected}"


def _check(config: Config) -> list[tuple[str, str]]:
    """What types cannot say: (key, problem) pairs."""
    found = [
        (key, "holds a NUL character, which no name can; take it out")
        for key in _keys_with_nul(config)
    ]
    if found:
        return found  # everything below would trip over it
    found += [("listen", problem) for problem in check_listen(config)]
    if not config.shell.startswith("/"):
        absolute = shutil.which(config.shell) or "/bin/bash"
        found.append(("shell", f"{config.shell!r} is not an absolute path; try {absolute}"))
    elif shutil.which(config.shell) is None:
        problem = f"{config.shell} is not an executable file; install it, or name another shell"
        found.append(("shell", problem))
    if config.run_as:
        found += [("run_as", problem) for problem in _check_run_as(config.run_as)]
    if config.home:
        found += [("home", problem) for problem in _check_home(config.home)]
    found += [("HOME", problem) for problem in _check_own_home()]
    return found


def _keys_with_nul(config: Config) -> list[str]:
    """The keys with a character that TOML can write and the system's interfaces cannot take."""
    values = msgspec.structs.asdict(config).items()
    texts = {key: "".join(value) for key, value in values if isinstance(value, str | tuple)}
    return [key for key, text in texts.items() if "\0" in text]


def check_listen(config: Config) -> list[str]:
    """What forbids to listen where config says, a line for each problem; none if all is well."""
    problems = [] if config.listen else ["is empty; name at least one HOST:PORT"]
    for text in config.listen:
        try:
            host = parse_address(text).host
        except ValueError as exc:
            problems.append(str(exc))
            continue
        if not config.open_to_network and not is_loopback(host):
            problems.append(
                f"{text} can be reached from other machines, and nobody is asked for a password; "
                "listen on 127.0.0.1, or say --open-to-network if that is what you want"
            )
    return problems


def _check_own_home() -> list[str]:
    try:
        Path.home()  # asyncssh, too, asks for it, and both of us would trip
    except RuntimeError:
        return [f"uid {os.geteuid()} has no home directory; set HOME in the environment"]
    return []


def _check_run_as(name: str) -> list[str]:
    if os.geteuid() != 0:
        return [
            f"only root may run shells as {name}; start the server as root, or leave run_as out"
        ]
    try:
        pwd.getpwnam(name)
    except KeyError:
        return [f"there is no user {name} on this machine; create it with useradd"]
    return [] if shutil.which("setpriv") else ["needs the program setpriv (package util-linux)"]


def _check_home(template: str) -> list[str]:
    if re.fullmatch(r"([^{}]|\{user\})*", template) is None:  # str.format knows more than that
        return [f"{_show(template)} may hold {{user}} and no other braces"]
    if not template.startswith("/"):
        return [f"{_show(template)} is not an absolute path; begin it with /"]
    return []


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address: 127.0.0.0/8, ::1, or the name localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
