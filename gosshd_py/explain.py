"""What the rules say to a forward, without a client: for `gosshd explain`."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from .accounts import Account, find_account, system_users
from .authorized_keys import Permissions, read_keys
from .config import Config, parse_address
from .places import ForbiddenError, check_asked, check_found


def explain_forward(config: Config, user: str, place: str, key_file: str | None) -> str:
    """The rules that allow user to connect to HOST:PORT, in words. Raises ForbiddenError, ValueError.

    key_file: the public key that the user logs in with. ValueError: something is not as it is said.
    """
    host, port = parse_address(place)
    account = find_account(config, user, system_users(config))
    if account is None:
        raise ForbiddenError(f"{user} has no account, so no login either")
    permissions = _permissions(account, key_file) if key_file else Permissions()
    if not permissions.port_forwarding:
        raise ForbiddenError("the line of this key does not permit port forwarding")
    rule = check_asked("permit_open", account.permit_open, permissions.permit_open, host, port)
    words = [f"permit_open of the account has {rule}"]
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
            check_found(account.permit_open, host, address, port)
            if permissions.permit_open is not None:
                check_found(permissions.permit_open, host, address, port)
            used.append(address)
        except ForbiddenError as exc:
            skipped.append(str(exc))
    if not used:
        raise ForbiddenError("; ".join(skipped))
    return "; ".join(
        [*words, f"{host} is {', '.join(used)}", *(f"not used: {why}" for why in skipped)]
    )


def _permissions(account: Account, key_file: str) -> Permissions:
    """What the account's line for this key says. Raises ValueError, ForbiddenError."""
    keys, problems = read_keys(str(Path(key_file).absolute()))
    if not keys:
        raise ValueError(f"{next(iter(problems), f'{key_file}: is empty')}; name a public key")
    for source in account.authorized_keys:
        for line in read_keys(source, account.key_owners, account.run_as)[0]:
            if line.key.public_data == keys[0].key.public_data and not line.cert_authority:
                if reason := line.refuses("127.0.0.1", time.time()) if not line.sources else "":
                    raise ForbiddenError(reason)
                return line.permissions
    raise ForbiddenError(f"{account.name} cannot log in with this key: no line has it")
