"""Who a login name is: the record that says what its sessions run, as whom, where and how much."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .config import EVERYBODY_ELSE, AccountSettings, Config, Rlimits
from .names import fill, valid_user_name

_T = TypeVar("_T")

PATH = "/usr/local/bin:/usr/bin:/bin:/usr/games"
ROOT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SKELETON = Path("/etc/skel")

SFTP_SERVERS = tuple(
    f"/usr/{folder}/sftp-server"
    for folder in ("lib/openssh", "libexec/openssh", "libexec", "lib/ssh")
)
"""Where distributions put OpenSSH's sftp-server(8)."""


@dataclass(frozen=True, slots=True)
class Account:
    """A login name and its sessions: what they run, (uid, gid) to become, the home to start in."""

    name: str
    shell: tuple[str, ...]
    """argv of a shell; a command is run by it with -c COMMAND behind. Empty: forwards only."""
    login_shell: bool
    """Whether a shell gets -l, too."""
    run_as: tuple[int, int] | None
    home: str
    makes_home: bool
    """Whether the home is made if it is missing."""
    env: Mapping[str, str] = field(default_factory=dict)
    umask: str | None = None
    rlimits: Rlimits = field(default_factory=Rlimits)
    motd: str = ""
    max_sessions: int = 0
    password: str = ""
    authorized_keys: tuple[str, ...] = ()
    principals: tuple[str, ...] = ()
    sftp: bool = True
    read_only: bool = False
    permit_open: tuple[str, ...] = ()
    permit_listen: tuple[str, ...] = ()
    permit_open_sockets: tuple[str, ...] = ()
    permit_listen_sockets: tuple[str, ...] = ()
    gateway_ports: bool = False
    agent_forwarding: bool = False

    def argv(self, command: bytes | None) -> list[str | bytes]:
        """What executes a command, or for None an interactive shell."""
        if command is not None:
            return [*self.shell, "-c", command]
        return [*self.shell, "-l"] if self.login_shell else [*self.shell]

    def environment(self) -> dict[str, str]:
        """What every session gets, built from nothing, but for the server's LANG."""
        return {
            "HOME": self.home,
            "USER": self.name,
            "LOGNAME": self.name,
            "SHELL": next(iter(self.shell), "/bin/false"),
            "PATH": PATH if self.uid else ROOT_PATH,
            "LANG": os.environ.get("LANG", "C.UTF-8"),
        }

    @property
    def uid(self) -> int:
        """The user id of the sessions."""
        return os.geteuid() if self.run_as is None else self.run_as[0]

    @property
    def key_owners(self) -> frozenset[int]:
        """The uids that may own files which say who may enter (sshd_config(5), StrictModes)."""
        return frozenset((0, os.geteuid(), self.uid))

    def make_home(self) -> None:
        """Make the home of a first login from /etc/skel, with mode 0700. Raises OSError.

        It is filled under another name first: nobody ever sees half a home, and whoever is
        second in making it finds it there.
        """
        home = Path(self.home)
        if not self.makes_home or home.exists():
            return
        if self.run_as is not None:
            _check_folder(home)
        home.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
        try:
            if SKELETON.is_dir():
                shutil.copytree(SKELETON, new, symlinks=True, dirs_exist_ok=True)
            new.chmod(0o700)  # first, while it is ours: afterwards it takes CAP_FOWNER
            if self.run_as is not None:
                _give(new, *self.run_as)
            new.rename(home)
        except BaseException:
            with suppress(OSError):
                _give(new, os.geteuid(), os.getegid())
            shutil.rmtree(new, ignore_errors=True)
            if home.is_dir():
                return  # somebody else's session has made it
            raise


def _check_folder(home: Path) -> None:
    """Raise OSError unless only root can change what stands above the home.

    Root makes files there by name and gives them away: with a link put in their place, anything
    could be given away.
    """
    place = home.parent.resolve()
    for folder in (place, *place.parents):
        if folder.exists():
            found = folder.stat()
            if found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                reason = f"{folder} can be changed by others than root, so make the home yourself"
                raise PermissionError(errno.EPERM, reason)


def _give(top: Path, uid: int, gid: int) -> None:
    for folder, folders, files in os.walk(top, topdown=False):
        for name in (*folders, *files):
            os.chown(Path(folder, name), uid, gid, follow_symlinks=False)
    os.chown(top, uid, gid)


Users = Mapping[str, pwd.struct_passwd]
"""System users by name; "" is the server's own."""


def system_users(config: Config) -> Users:
    """Look up the system users of a configuration, once: a slow directory must delay no login."""
    users: dict[str, pwd.struct_passwd] = {}
    with suppress(KeyError):  # a container may run as a uid that has no name
        users[""] = pwd.getpwuid(os.geteuid())
    accounts = (config.accounts or {}).values()
    for name in {config.run_as, *(account.run_as for account in accounts)}:
        with suppress(KeyError):  # removed since the configuration was checked
            users |= {name: pwd.getpwnam(name)} if name else {}
    return users


def find_account(config: Config, name: str, users: Users) -> Account | None:
    """The account of a login name: its own, else everybody else's; in open mode everybody has one."""
    if not valid_user_name(name):
        return None
    if config.open_mode:
        return _account(config, name, AccountSettings(), users)
    accounts = config.accounts or {}
    settings = accounts.get(name) or accounts.get(EVERYBODY_ELSE)
    return _account(config, name, settings, users) if settings is not None else None


def _account(config: Config, name: str, own: AccountSettings, users: Users) -> Account | None:
    """Put together what the account has of its own and what holds for all."""
    run_as = None
    home = users[""].pw_dir if "" in users else "/"
    if user_name := _first(own.run_as, config.run_as):
        if user_name not in users:
            return None
        user = users[user_name]
        run_as, home = (user.pw_uid, user.pw_gid), user.pw_dir
    template = _first(own.home, config.home)
    shell = _first(own.shell, config.shell)
    return Account(
        name=name,
        shell=(shell,) if isinstance(shell, str) else shell if isinstance(shell, tuple) else (),
        login_shell=isinstance(shell, str),
        run_as=run_as,
        home=fill(template, name) or home,
        makes_home=bool(template),
        env={**config.env, **(own.env or {})},
        umask=own.umask or config.umask,
        rlimits=own.rlimits.over(config.rlimits) if own.rlimits else config.rlimits,
        motd=_first(own.motd, config.motd),
        max_sessions=_first(own.max_sessions, config.max_sessions),
        password=own.password,
        authorized_keys=tuple(
            fill(text, name) if text.startswith("/") else text for text in own.authorized_keys
        ),
        principals=tuple(fill(text, name) for text in own.principals),
        sftp=_first(own.sftp, config.sftp),
        read_only=_first(own.read_only, config.read_only),
        permit_open=_first(own.permit_open, config.permit_open),
        permit_listen=_first(own.permit_listen, config.permit_listen),
        permit_open_sockets=_first(own.permit_open_sockets, config.permit_open_sockets),
        permit_listen_sockets=_first(own.permit_listen_sockets, config.permit_listen_sockets),
        gateway_ports=_first(own.gateway_ports, config.gateway_ports),
        agent_forwarding=_first(own.agent_forwarding, config.agent_forwarding),
    )


def _first(own: _T | None, default: _T) -> _T:
    return default if own is None else own
