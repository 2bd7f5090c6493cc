"""Who a login name is: the record that says what its sessions run, as whom, and where."""

from __future__ import annotations

import os
import pwd
import re
from contextlib import suppress
from dataclasses import dataclass

from .config import Config

_USER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,31}")

PATH = "/usr/local/bin:/usr/bin:/bin:/usr/games"
ROOT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def valid_user_name(name: str) -> bool:
    """Whether a client may log in as name.

    Names end up in paths and in arguments, so `../x`, `-oProxyCommand=x` and `.ssh` are no names.
    """
    return _USER_NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Account:
    """A login name and its sessions: the shell, (uid, gid) to become, the home to start in."""

    name: str
    shell: str
    run_as: tuple[int, int] | None
    home: str

    def environment(self) -> dict[str, str]:
        """What every session gets, built from nothing, but for the server's LANG."""
        uid = os.geteuid() if self.run_as is None else self.run_as[0]
        return {
            "HOME": self.home,
            "USER": self.name,
            "LOGNAME": self.name,
            "SHELL": self.shell,
            "PATH": PATH if uid else ROOT_PATH,
            "LANG": os.environ.get("LANG", "C.UTF-8"),
        }


def open_account(config: Config, name: str) -> Account:
    """Make the account that everybody has in open mode."""
    run_as = None
    home = "/"
    with suppress(KeyError):  # a container may run as a uid that has no name
        home = pwd.getpwuid(os.geteuid()).pw_dir
    if config.run_as:
        user = pwd.getpwnam(config.run_as)
        run_as, home = (user.pw_uid, user.pw_gid), user.pw_dir
    return Account(name, config.shell, run_as, config.home.format(user=name) or home)
