"""Login names: which there can be, and where they may stand in a setting."""

from __future__ import annotations

import re

_USER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,31}")


def valid_user_name(name: str) -> bool:
    """Whether a client may log in as name.

    Names end up in paths and in arguments, so `../x`, `-oProxyCommand=x` and `.ssh` are no names.
    """
    return _USER_NAME.fullmatch(name) is not None


def fill(template: str, name: str) -> str:
    """Put a login name where a setting says {user}."""
    return template.replace("{user}", name)
