"""What can be set: one frozen Config, and the accounts in it. Read from a file and flags by load.py.

Types say what a value may be; what types cannot say, checks.py does.
"""

from __future__ import annotations

import ipaddress
import os
import re
import reprlib
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

DEFAULT_LISTEN = ("127.0.0.1:2222", "[::1]:2222")

EVERYBODY_ELSE = "*"
"""The account of every login name that has none of its own."""

Seconds = Annotated[float, Meta(gt=0)]
SecondsOrOff = Annotated[float, Meta(ge=0)]
CountOrOff = Annotated[int, Meta(ge=0)]
Limit = Annotated[int, Meta(ge=0, le=2**62)]
Workers = Annotated[int, Meta(ge=1, le=256)] | Literal["auto"]
Umask = Annotated[str, Meta(pattern="^0?[0-7]{3}$")]


class ConfigError(Exception):
    """What is wrong with the configuration: one line per problem, each with its remedy."""

    def __init__(self, problems: list[str]) -> None:
        # A hash that stands where it should not is nobody's business, either.
        self.problems = [re.sub(r"\$argon2[^'\"\s]*", "$argon2…", text) for text in problems]
        super().__init__("\n".join(self.problems))


class Address(NamedTuple):
    """Where to listen: a host name or IP address, and a port (0: any free one)."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Rlimits(msgspec.Struct, frozen=True, kw_only=True, rename={"as_": "as"}):
    """Limits of every process of a session, soft and hard, in the units of setrlimit(2).

    What is not set stays as it was when the server was started.
    """

    nofile: Limit | None = None
    """Open files."""

    nproc: Limit | None = None
    """Processes and threads of the system user, in all sessions together."""

    core: Limit | None = None
    """Bytes of a core dump; 0 where no table sets it."""

    cpu: Limit | None = None
    """Seconds of CPU time of one process."""

    as_: Limit | None = None
    """Bytes of address space of one process."""

    def set(self) -> dict[str, int]:
        """The limits that are set, by their names in setrlimit(2) without RLIMIT_, small."""
        values = {name.rstrip("_"): value for name, value in msgspec.structs.asdict(self).items()}
        return {"core": 0} | {name: value for name, value in values.items() if value is not None}

    def over(self, others: Rlimits) -> Rlimits:
        """These limits, and of the others those that are not set here."""
        mine = msgspec.structs.asdict(self)
        return msgspec.structs.replace(others, **{k: v for k, v in mine.items() if v is not None})


class AccountSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[accounts.NAME]: who may log in by that name, and what is different for them.

    What is not set here is as at the top level of the file.
    """

    password: str = ""
    """An argon2id hash, made by `gosshd passwd`; "!" locks the account, for keys too. Empty: no password."""

    authorized_keys: tuple[str, ...] = ()
    """Files with lines as in sshd's authorized_keys, and such lines; {user} is the login name."""

    principals: tuple[str, ...] = ("{user}",)
    """The names of which a certificate by a CA of [auth] must have one."""

    shell: bool | str | tuple[str, ...] | None = None
    run_as: str | None = None
    home: str | None = None
    env: dict[str, str] | None = None
    umask: Umask | None = None
    rlimits: Rlimits | None = None
    motd: str | None = None
    max_sessions: CountOrOff | None = None
    sftp: bool | None = None
    read_only: bool | None = None
    permit_open: tuple[str, ...] | None = None
    permit_listen: tuple[str, ...] | None = None
    permit_open_sockets: tuple[str, ...] | None = None
    permit_listen_sockets: tuple[str, ...] | None = None
    gateway_ports: bool | None = None
    agent_forwarding: bool | None = None


class AuthSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[auth]: what holds for the logins of all accounts."""

    trusted_user_ca_keys: tuple[str, ...] = ()
    """Files with the public keys of CAs whose user certificates are accepted, and such lines."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set. Names follow sshd_config(5) where it has one."""

    listen: tuple[str, ...] = DEFAULT_LISTEN
    """Addresses HOST:PORT or [IPV6]:PORT; port 0 takes any free one."""

    hostkeys: str = ""
    """Directory of the host keys. Empty: ./hostkeys if it exists, else the user's state folder."""

    pid_file: str = ""
    """Where `gosshd reload` finds the server. Empty: gosshd-PORT.pid in the user's runtime folder."""

    open_to_network: bool = False
    """Open mode: allow everybody even on addresses that others can reach."""

    open_to_local_users: bool = False
    """Open mode: allow the other users of this machine, too."""

    shell: bool | str | tuple[str, ...] = "/bin/bash"
    """What a session runs: `shell -l`, or `shell -c COMMAND`. A list is run without -l. false: forwards only."""

    run_as: str = ""
    """System user of the shells (needs root). Empty: the server's own user."""

    home: str = ""
    """Where a session starts, made from /etc/skel if missing; {user} is the login name. Empty: the home of the shells' user."""

    env: dict[str, str] = {}
    """Environment variables of every session; they win over the client's."""

    umask: Umask | None = None
    """File mode creation mask in octal digits, such as "027". Not set: the server's own."""

    rlimits: Rlimits = Rlimits()
    """Limits of every process: a table of nofile, nproc, core (default 0), cpu and as, as in setrlimit(2)."""

    motd: str = ""
    """Message of the day, shown on the terminal before a shell starts."""

    sftp: bool = True
    """The subsystem sftp: OpenSSH's sftp-server if it is installed, else our own, run by the shell."""

    read_only: bool = False
    """Files can be read by sftp; they cannot be written, and there is no shell and no command."""

    permit_open: tuple[str, ...] = ()
    """Where the client may connect to through us: HOST:PORT, HOST:LOW-HIGH, HOST:* or *:*."""

    permit_listen: tuple[str, ...] = ()
    """Where we may listen for the client, in the same form, such as 127.0.0.1:8080."""

    permit_open_sockets: tuple[str, ...] = ()
    """Paths of unix sockets that the client may connect to; * is any."""

    permit_listen_sockets: tuple[str, ...] = ()
    """Paths of unix sockets that we may make for the client; * is any."""

    gateway_ports: bool = False
    """Listen for the client on the addresses it asks for; otherwise only on loopback."""

    agent_forwarding: bool = False
    """Let programs reach the client's authentication agent, if it offers that."""

    connection_max_forwards: CountOrOff = 64
    """Forwards and forwarding listeners that one connection may have at a time."""

    accept_env: tuple[str, ...] = ("TERM", "LANG", "LC_*")
    """Names and patterns of the environment variables that a client may set; never HOME, USER, LOGNAME, SHELL, SSH_*."""

    permit_user_environment: tuple[str, ...] = ()
    """More names and patterns, for environment= in the lines of keys."""

    max_connections: CountOrOff = 2000
    """Connections from everywhere, whether they have logged in or not."""

    per_source_max_connections: CountOrOff = 500
    """The same from one address (IPv6: one /64)."""

    login_grace_time: SecondsOrOff = 20.0
    """Seconds in which a client must have logged in."""

    max_auth_tries: CountOrOff = 6
    """Tries to log in per connection; the next one disconnects."""

    max_startups: CountOrOff = 100
    """Connections that have not logged in, from everywhere."""

    per_source_max_startups: CountOrOff = 20
    """Connections that have not logged in, from one address (IPv6: one /64)."""

    authfail_penalty: SecondsOrOff = 5.0
    """Seconds of refusal that a failed login adds for its source."""

    grace_exceeded_penalty: SecondsOrOff = 10.0
    """Seconds of refusal that a connection adds which did not log in in time (not in open mode)."""

    min_penalty: SecondsOrOff = 15.0
    """Seconds that must have been added up before a source is refused."""

    max_penalty: SecondsOrOff = 600.0
    """Seconds that a source can add up; 0: nobody is ever refused."""

    penalty_exempt: tuple[str, ...] = ()
    """Addresses and networks that get no penalties, such as 10.0.0.0/8."""

    max_sessions: CountOrOff = 0
    """Sessions that one account (in open mode: one name) may have at a time; 0: as many as fit below."""

    connection_max_sessions: CountOrOff = 64
    """Sessions that one connection may have at a time."""

    total_max_sessions: CountOrOff = 1000
    """Sessions that the server runs at a time."""

    idle_timeout: SecondsOrOff = 1800.0
    """Seconds without a byte in either direction after which a session or a forward is ended; a terminal is warned a minute before."""

    session_timeout: SecondsOrOff = 0.0
    """Seconds that a session or a forward may last; a terminal is warned a minute before."""

    unused_connection_timeout: SecondsOrOff = 300.0
    """Seconds that a connection may have no channel. One that may forward may wait for its turn longer."""

    request_timeout: SecondsOrOff = 20.0
    """Seconds in which a new channel must ask for a shell, a command or a subsystem."""

    client_alive_interval: SecondsOrOff = 15.0
    """Seconds of silence after which a client is asked whether it lives; 0: never."""

    client_alive_count_max: Annotated[int, Meta(ge=1)] = 3
    """Unanswered questions after which the connection is given up."""

    hangup_grace: Seconds = 2.5
    """Seconds between hanging up on a program and SIGKILL."""

    drain_timeout: Seconds = 1800.0
    """Seconds in which a client must accept some of what an ended program has left."""

    log_format: Literal["text", "json"] = "text"
    """Log lines for people or for programs."""

    workers: Workers = 1
    """Processes that serve; "auto": one for each processor."""

    trace: bool = False
    """Tell on standard output what happens on each connection, with what it means."""

    trace_file: str = ""
    """Append the same to this file, a JSON object a line; for `gosshd timeline`."""

    trace_data: CountOrOff = 0
    """Bytes of data that a trace shows of each read and write; what is typed unseen is not shown."""

    auth: AuthSettings = AuthSettings()
    """The table [auth], see Accounts."""

    accounts: dict[str, AccountSettings] | None = None
    """The tables [accounts.NAME], see Accounts. Without one everybody may enter: open mode."""

    @property
    def open_mode(self) -> bool:
        """Whether a name is enough to enter."""
        return self.accounts is None and not self.auth.trusted_user_ca_keys

    @property
    def core_dumps(self) -> bool:
        """Whether somebody's programs may leave core dumps."""
        own = [account.rlimits for account in (self.accounts or {}).values()]
        return any(rlimits is not None and rlimits.core for rlimits in (self.rlimits, *own))

    @property
    def worker_count(self) -> int:
        """How many processes serve."""
        return len(os.sched_getaffinity(0)) if self.workers == "auto" else self.workers

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
        raise ValueError(
            f"{show(text)} is not HOST:PORT or [IPV6]:PORT with a port up to 65535; try 127.0.0.1:2222"
        )
    return Address(match[1] or match[2], int(match[3]))


def _is_ipv6(host: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address: 127.0.0.0/8, ::1, or the name localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def show(value: object) -> str:
    """A value as it was given, but no book: its error has more to say behind it."""
    return _SHORT.repr(value)
