"""What the rules say to a forward, without a client: for `gosshd explain`."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from .accounts import Account, find_account, system_users
from .authorized_keys import KeyLine, Permissions, read_keys
from .config import Config, parse_address
from .passwords import LOCKED
from .places import ForbiddenError, check_asked, check_found


def explain_forward(config: Config, user: str, place: str, key_file: str | None) -> str:
    """The rules that allow user to connect to HOST:PORT, in words. Raises ForbiddenError, ValueError.

    key_file: the public key that the user logs in with. ValueError: something is not as it is said.
    """
    host, port = parse_address(place)
    account = find_account(config, user, system_users(config))
    if account is None:
        raise ForbiddenError(f"{user} has no account, so no login either")
    if account.password == LOCKED:
        raise ForbiddenError(f"the account {user} is locked")
    permissions, words = Permissions(), []
    if key_file:
        line = _line(account, key_file)
        permissions = line.permissions
        words = [f"with this key only from {','.join(line.sources)}"] if line.sources else []
    if not permissions.port_forwarding:
        raise ForbiddenError("the line of this key does not permit port forwarding")
    rule = check_asked("permit_open", account.permit_open, permissions.permit_open, host, port)
    words.append(f"permit_open of the account has {rule}")
    if permissions.permit_open is not None:
        named = check_asked("permit_open", permissions.permit_open, None, host, port)
        words.append(f"permitopen of the key has {named}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise ValueError(f"{host} cannot be looked up here: {exc}") from exc
    used, skipped = [], []
    for address in dict.fromkeys(str(address[0]) for *_, address in found):
        try:
            check_found(account.permit_open, permissions.permit_open, host, address, port)
            used.append(address)
        except ForbiddenError as exc:
            skipped.append(str(exc))
    if not used:
        raise ForbiddenError("; ".join(skipped))
    return "; ".join(
        [*words, f"{host} is {', '.join(used)}", *(f"not used: {why}" for why in skipped)]
    )


def _line(account: Account, key_file: str) -> KeyLine:
    """The account's line for this key that counts. Raises ValueError, ForbiddenError."""
    keys, problems = read_keys(str(Path(key_file).absolute()))
    if not keys:
        raise ValueError(f"{next(iter(problems), f'{key_file}: is empty')}; name a public key")
    reason = "no line has it"
    for source in account.authorized_keys:
        for line in read_keys(source, account.key_owners, account.run_as)[0]:
            if line.key.public_data == keys[0].key.public_data and not line.cert_authority:
                if not line.has_expired(time.time()):
                    return line
                reason = "it has expired"
    raise ForbiddenError(f"{account.name} cannot log in with this key: {reason}")
