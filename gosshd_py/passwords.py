"""Passwords: argon2id hashes, and a check that tells nobody whether the account exists.

Promises: the event loop never waits for a hash, and a wrong password, an account without one and
no account at all take the same time.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import argon2
from argon2.exceptions import InvalidHashError, VerificationError

LOCKED = "!"
"""In place of a hash: no password opens the account, as in shadow(5)."""

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
    try:
        parameters = argon2.extract_parameters(text)
    except InvalidHashError:
        return "is no argon2id hash; make one with gosshd passwd"
    if parameters.type is not argon2.Type.ID:
        return "is not an argon2id hash but another argon2; make one with gosshd passwd"
    if parameters.memory_cost > _MAX_MEMORY:
        return "would take more than 1 GiB for each login; make one with gosshd passwd"
    return ""


class Passwords:
    """Compares passwords with hashes. hashes: all that are configured."""

    def __init__(self, hashes: Iterable[str]) -> None:
        costs = [argon2.extract_parameters(text) for text in hashes if text not in ("", LOCKED)]
        worst = max(costs, key=lambda cost: cost.memory_cost * cost.time_cost, default=None)
        hasher = argon2.PasswordHasher.from_parameters(worst) if worst else _hasher
        self._dummy = hasher.hash(secrets.token_hex()) if costs else ""

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
