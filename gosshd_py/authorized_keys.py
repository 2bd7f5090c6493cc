"""Lines of authorized_keys files (sshd(8), AUTHORIZED_KEYS FILE FORMAT) and what they allow.

Every option is either enforced or disables its key: one that is silently ignored would give
away more than the line says. A damaged line hides no other.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

import asyncssh

from .fsuser import as_user
from .places import parse_place

MAX_FILE = 1024 * 1024
MAX_LINES = 10_000
"""Bytes and lines of one file; a longer one is not read."""

MAX_PROBLEMS = 10
"""Bad lines of one file that are told; of the others, how many."""

MIN_RSA_BITS = 2048

_KEY_TYPES = (
    *("ssh-ed25519", "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"),
    *("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa"),
)
_KEY = re.compile(r"[a-z][a-z0-9.@-]+[ \t]+AAAA[A-Za-z0-9+/]+=*(?:[ \t].*)?")


@dataclass(frozen=True, slots=True)
class Permissions:
    """What a login may do. A key's line has some, a certificate too; both together must allow."""

    command: str | None = None
    """Runs in place of whatever the client asks for."""
    environment: Mapping[str, str] = field(default_factory=dict)
    pty: bool = True
    port_forwarding: bool = True
    agent_forwarding: bool = True
    x11_forwarding: bool = True
    permit_open: tuple[str, ...] | None = None
    """HOST:PORT that may be forwarded to; None: not limited by the key."""
    permit_listen: tuple[str, ...] | None = None

    def both(self, other: Permissions) -> Permissions:
        """What these and the other's allow. Raises ValueError for two different commands."""
        if None not in (self.command, other.command) and self.command != other.command:
            raise ValueError("the key's line and the certificate force different commands")
        return replace(
            self,
            command=self.command if other.command is None else other.command,
            pty=self.pty and other.pty,
            port_forwarding=self.port_forwarding and other.port_forwarding,
            agent_forwarding=self.agent_forwarding and other.agent_forwarding,
            x11_forwarding=self.x11_forwarding and other.x11_forwarding,
        )


@dataclass(frozen=True, slots=True)
class KeyLine:
    """One line: a key and who may use it from where until when."""

    key: asyncssh.SSHKey
    permissions: Permissions = Permissions()
    sources: tuple[str, ...] = ()
    """Patterns of addresses (from=); none: any."""
    expires: float | None = None
    """Seconds since the epoch."""
    principals: tuple[str, ...] | None = None
    cert_authority: bool = False

    def has_expired(self, now: float) -> bool:
        """Whether it is past its expiry-time."""
        return self.expires is not None and now >= self.expires

    def refuses(self, source: str, now: float) -> str:
        """Why the key may not be used by this address at this time; "" if it may."""
        if self.has_expired(now):
            return "the key has expired"
        if self.sources and not match_source(source, self.sources):
            return f"the key may not be used from {source}"
        return ""


def read_keys(
    source: str,
    owners: frozenset[int] | None = None,
    run_as: tuple[int, int] | None = None,
) -> tuple[list[KeyLine], list[str]]:
    """Read the lines of a file (an absolute path), or the one line that source is.

    Returns the good ones, and what is wrong with the others: one text for each. Never raises.
    owners: the uids that may own the file and the folders above it, as StrictModes asks. With
    them, as at a login, a file that is not there is an empty one.
    run_as: whose rights are needed for a file that not only root could have put there.
    """
    if not source.startswith("/"):
        text, name = source, "the line"
    else:
        try:
            text, name = _read(source, owners, run_as), source
        except FileNotFoundError as exc:
            return [], [] if owners is not None else [f"{source}: {exc.strerror}"]
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else str(exc)
            return [], [f"{source}: {reason}"]
    good: list[KeyLine] = []
    bad: list[str] = []
    unknown = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            good.append(parse_line(line.strip()))
        except ValueError as exc:
            if len(bad) < MAX_PROBLEMS:
                bad.append(f"{name}:{number}: {exc}" if name == source else str(exc))
            else:
                unknown += 1
    return good, bad + ([f"{name}: {unknown} more lines are not used"] if unknown else [])


def check_source(source: str, *, must_exist: bool) -> str:
    """What is wrong with a setting that names a file or is a line; "" if it can be used."""
    if source.startswith("/"):
        keys, problems = read_keys(source)
        problem = next(iter(problems), f"{source}: there is no public key in it")
        if must_exist and not Path(source).is_file():
            return f"{problem}; correct the path"
        return f"{problem}; nobody can use this file" if must_exist and not keys else ""
    if not source.strip():
        return "holds an empty text; write a path that begins with /, or a key's line"
    if "\n" in source.strip():
        return "holds two lines in one text; write each line as a text of its own"
    problems = read_keys(source)[1]
    return f"{problems[0]}; write a path that begins with /, or a key's line" if problems else ""


def _read(path: str, owners: frozenset[int] | None, run_as: tuple[int, int] | None) -> str:
    """Read a file that nobody else could have written. Raises OSError, or ValueError that says why.

    Not a pipe or a device, which would keep us waiting.
    """

    def opened() -> int:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)

    # A link that a user has made must not lead root to what only root can open.
    fd = as_user(run_as, opened) if run_as and not _is_roots(Path(path)) else opened()
    with open(fd, "rb") as file:  # noqa: PTH123
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        if owners is not None:
            _check_owners(Path(path), status, owners)
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE or data.count(b"\n") > MAX_LINES:
        raise ValueError(f"is larger than {MAX_FILE} bytes, or than {MAX_LINES} lines")
    return data.decode("utf-8", "replace")


def _check_owners(path: Path, status: os.stat_result, owners: frozenset[int]) -> None:
    """Raise ValueError for a file that others could have written, or put in its place.

    In a folder with the sticky bit, such as /tmp, they can do neither to what is not theirs.
    """
    for place, found in [(path, status), *_on_the_way(path)]:
        if found.st_uid not in owners:
            raise ValueError(f"{place} belongs to uid {found.st_uid}; anybody there could add keys")
        if _is_shared(found):
            raise ValueError(f"{place} can be written by others; chmod go-w it")


def _is_roots(path: Path) -> bool:
    """Whether nobody but root could have put the file there."""
    return all(found.st_uid == 0 and not _is_shared(found) for _, found in _on_the_way(path))


def _is_shared(found: os.stat_result) -> bool:
    """Whether others can change a file, or what stands in a folder under a name."""
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return bool(others) and not sticky and not stat.S_ISLNK(found.st_mode)


def _on_the_way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The folders above a file and the links that lead to it, each with what lstat(2) says."""
    for _ in range(40):  # as many links as Linux follows
        for folder in path.parents:
            yield folder, folder.stat()
        if not path.is_symlink():
            break
        yield path, path.lstat()
        path = path.parent / path.readlink()
    for folder in path.resolve().parents:
        yield folder, folder.stat()


# -- one line -------------------------------------------------------------------------------------


def parse_line(line: str) -> KeyLine:
    """Parse `[options] type base64 [comment]`. Raises ValueError that says what is wrong."""
    if not line.replace("\t", " ").isprintable():
        # Some of them end a line for some programs: what one takes for a comment is a key to others.
        raise ValueError("there are control characters in it")
    if _KEY.fullmatch(line):
        return KeyLine(_parse_key(line))
    options, rest = _split_options(line)
    return _Options(options).line(_parse_key(rest.strip()))


def _parse_key(text: str) -> asyncssh.SSHKey:
    kind = text.split(None, 1)[0] if text.strip() else ""
    if not _KEY.fullmatch(text):
        raise ValueError("there is no public key in it")
    if kind not in _KEY_TYPES:
        raise ValueError(f"keys of type {kind} are not supported")
    try:
        key = asyncssh.import_public_key(" ".join(text.split()[:2]))
    except (asyncssh.KeyImportError, ValueError) as exc:
        raise ValueError("the public key is damaged") from exc
    if key.get_algorithm() != kind:
        raise ValueError(f"the key is of type {key.get_algorithm()}, not {kind}")
    if (reason := weakness(key)) is not None:
        raise ValueError(reason)
    return key


def weakness(key: asyncssh.SSHKey) -> str | None:
    """Why a key is not good enough, or None."""
    if key.get_algorithm() not in _KEY_TYPES:
        return f"keys of type {key.get_algorithm()} are not supported"
    bits = getattr(key.pyca_key, "key_size", MIN_RSA_BITS)
    if key.get_algorithm() == "ssh-rsa" and bits < MIN_RSA_BITS:
        return f"an RSA key of {bits} bits is too weak; {MIN_RSA_BITS} are the least"
    return None


_OPTION = re.compile(r'([A-Za-z0-9-]+)(?:="((?:[^"\\]|\\.)*)")?')


def _split_options(line: str) -> tuple[list[tuple[str, str | None]], str]:
    r"""Take `name,name="value",… rest` apart. In a value \" stands for a quote, as in sshd."""
    options: list[tuple[str, str | None]] = []
    at = 0
    while match := _OPTION.match(line, at):
        value = match[2] if match[2] is None else match[2].replace('\\"', '"')
        options.append((match[1].lower(), value))
        at = match.end()
        if line[at : at + 1] != ",":
            break
        at += 1
    if not match or line[at : at + 1] not in (" ", "\t"):
        raise ValueError("the options before the key are damaged, or there is no key")
    return options, line[at:]


class _Options:
    """The options of one line, applied from left to right, as sshd does (`restrict,pty`)."""

    _SWITCHES: Mapping[str, str] = {
        "pty": "pty",
        "port-forwarding": "port_forwarding",
        "agent-forwarding": "agent_forwarding",
        "x11-forwarding": "x11_forwarding",
    }
    _CAN_BE_ALLOWED = ("pty", "port-forwarding")

    def __init__(self, options: list[tuple[str, str | None]]) -> None:
        self.switches: dict[str, bool] = {}
        self.values: dict[str, list[str]] = {}
        self.cert_authority = False
        for name, value in options:
            self._apply(name, value)

    def _apply(self, name: str, value: str | None) -> None:
        if value is None:
            self._switch(name)
        elif name not in _VALUED:
            raise ValueError(f"the option {name}= is not supported; nobody can use this key")
        elif name in self.values and name not in _REPEATABLE:
            raise ValueError(f"the option {name}= stands there twice")
        else:
            self.values.setdefault(name, []).append(value)

    def _switch(self, name: str) -> None:
        positive = name.removeprefix("no-")
        if name == "restrict":
            self.switches = dict.fromkeys(self._SWITCHES.values(), False)
        elif name == "cert-authority":
            self.cert_authority = True
        elif name in self._CAN_BE_ALLOWED or (name != positive and positive in self._SWITCHES):
            self.switches[self._SWITCHES[positive]] = name == positive
        elif name in _VALUED:
            raise ValueError(f'the option {name} needs a value: {name}="…"')
        else:
            raise ValueError(f"the option {name} is not supported; nobody can use this key")

    def line(self, key: asyncssh.SSHKey) -> KeyLine:
        """The line with these options and this key."""
        principals = self._list("principals")
        if principals is not None and not self.cert_authority:
            raise ValueError("the option principals= means nothing without cert-authority")
        permissions = Permissions(
            command=next(iter(self.values.get("command", ())), None),
            environment=dict(map(_environment, self.values.get("environment", ()))),
            permit_open=self._places("permitopen", parse_permit_open),
            permit_listen=self._places("permitlisten", parse_permit_listen),
            **self.switches,
        )
        times = [parse_time(text) for text in self.values.get("expiry-time", ())]
        sources = self._list("from")
        if sources is not None:
            check_patterns(sources)
        return KeyLine(
            key, permissions, sources or (), min(times, default=None), principals,
            self.cert_authority,
        )  # fmt: skip

    def _list(self, name: str) -> tuple[str, ...] | None:
        """The comma-separated list in an option."""
        if name not in self.values:
            return None
        items = tuple(item.strip() for item in self.values[name][0].split(","))
        if not all(items):
            raise ValueError(f"the option {name}= has an empty entry")
        return items

    def _places(self, name: str, parse: Callable[[str], str]) -> tuple[str, ...] | None:
        return tuple(map(parse, self.values[name])) if name in self.values else None


_REPEATABLE = ("environment", "expiry-time", "permitopen", "permitlisten")
_VALUED = ("command", "from", "principals", *_REPEATABLE)


def _environment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or "\0" in value:
        raise ValueError('the option environment= needs "NAME=value"')
    return name, value


def parse_permit_open(text: str) -> str:
    """Check HOST:PORT of permitopen=; either may be *. Raises ValueError."""
    try:
        return parse_place(text).text
    except ValueError:
        raise ValueError(
            "the option permitopen= needs HOST:PORT or [IPV6]:PORT; either may be *"
        ) from None


def parse_permit_listen(text: str) -> str:
    """Check [HOST:]PORT of permitlisten=; no host means any, so *:PORT. Raises ValueError."""
    try:
        return parse_permit_open(text if ":" in text else f"*:{text}")
    except ValueError:
        raise ValueError(
            "the option permitlisten= needs PORT or HOST:PORT; either may be *"
        ) from None


def parse_time(text: str) -> float:
    """YYYYMMDD[HHMM[SS]][Z], local time without Z (sshd(8), expiry-time). Raises ValueError."""
    digits, zone = text.removesuffix("Z"), UTC if text.endswith("Z") else None
    form = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(len(digits))
    try:
        if form is None or not digits.isascii() or not digits.isdigit():
            raise ValueError
        return datetime.strptime(digits, form).replace(tzinfo=zone).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError(
            "the option expiry-time= needs YYYYMMDD or YYYYMMDDHHMM, and Z for UTC"
        ) from None


def check_patterns(patterns: tuple[str, ...]) -> None:
    """Raise ValueError for a pattern that sshd would not take."""
    if all(pattern.startswith("!") for pattern in patterns):
        raise ValueError("the option from= only excludes; add what it allows, such as *")
    for pattern in patterns:
        if "/" in pattern:
            try:
                ipaddress.ip_network(pattern.removeprefix("!"))
            except ValueError as exc:
                raise ValueError(f"the option from=: {exc}") from None


def match_source(source: str, patterns: tuple[str, ...]) -> bool:
    """Whether an address is in the list: wildcards * and ?, networks, ! excludes (ssh_config(5)).

    Host names are never looked up, so they never match, as with sshd's UseDNS no.
    """
    address = ipaddress.ip_address(source.partition("%")[0])

    def matches(pattern: str) -> bool:
        if "/" in pattern:
            return address in ipaddress.ip_network(pattern)
        try:
            return address == ipaddress.ip_address(pattern)
        except ValueError:
            return fnmatchcase(str(address), pattern.lower().replace("[", "[[]"))

    if any(matches(pattern[1:]) for pattern in patterns if pattern.startswith("!")):
        return False
    return any(matches(pattern) for pattern in patterns if not pattern.startswith("!"))
