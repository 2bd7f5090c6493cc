"""Passwords: argon2id hashes, and a check that tells nobody whether the account exists.

Promises: the event loop never waits for a hash, and a wrong password, an account without one and
no account at all take the same time.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import argon2
from argon2.exceptions import InvalidHashError, VerificationError

LOCKED = "!"
"""In place of a hash: nothing opens the account, as sshd reads shadow(5)."""

MAX_PASSWORD = 1024
"""Characters; longer ones are wrong, whatever they are."""

_HASHES_AT_ONCE = 2
"""Each takes 64 MiB and a tenth of a second of several cores; more clients wait for their turn."""

_MAX_MEMORY = 1024 * 1024
"""KiB that a configured hash may ask for."""

_hasher = argon2.PasswordHasher()
_threads = ThreadPoolExecutor(_HASHES_AT_ONCE, thread_name_prefix="password")


def make_hash(password: str) -> str:
    """Hash a password for the configuration: argon2id with a random salt (RFC 9106)."""
    return _hasher.hash(password)


def check_hash(text: str) -> str:
    """What is wrong with a configured hash, or ""; never shows it."""
    if text == LOCKED:
        return ""
    form = _FORM.fullmatch(text)
    if form is None:
        kind = "an argon2id hash but another argon2" if _OTHER.match(text) else "an argon2id hash"
        return f"is not {kind}; make one with gosshd passwd"
    memory, passes, lanes = (int(number) for number in form.groups()[:3])
    if not (1 <= lanes <= 64 and 8 * lanes <= memory <= _MAX_MEMORY and 1 <= passes <= 64):
        return "asks for more than 1 GiB or 64 passes, or for nothing; make one with gosshd passwd"
    if any(len(part) % 4 == 1 for part in form.groups()[3:]):
        return "is cut off; copy the whole line of gosshd passwd"
    return ""


_FORM = re.compile(
    r"\$argon2id\$v=19\$m=([0-9]{1,9}),t=([0-9]{1,9}),p=([0-9]{1,9})"
    r"\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})"  # salt of 8 bytes, hash of 16, or more
)
_OTHER = re.compile(r"\$argon2(i|d)\$")


class Passwords:
    """Compares passwords with hashes. hashes: all that are configured."""

    def __init__(self, hashes: Iterable[str]) -> None:
        costs = [argon2.extract_parameters(text) for text in hashes if text not in ("", LOCKED)]
        worst = max(costs, key=lambda cost: cost.memory_cost * cost.time_cost, default=None)
        hasher = argon2.PasswordHasher.from_parameters(worst) if worst else _hasher
        began = time.monotonic()
        self._dummy = hasher.hash(secrets.token_hex()) if costs else ""
        self.seconds = time.monotonic() - began
        """What the dearest hash takes."""

    async def match(self, expected: str, password: str) -> bool:
        """Whether the password belongs to the hash; an empty or locked one takes as long."""
        known = expected not in ("", LOCKED) and len(password) <= MAX_PASSWORD
        hash_ = expected if known else self._dummy
        loop = asyncio.get_running_loop()
        return (
            await loop.run_in_executor(_threads, _verify, hash_, password[:MAX_PASSWORD]) and known
        )


def _verify(hash_: str, password: str) -> bool:
    try:
        return _hasher.verify(hash_, password)
    except (VerificationError, InvalidHashError):
        return False
