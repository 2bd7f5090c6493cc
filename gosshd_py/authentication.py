"""RFC 4252's question, whether a client may enter as whom it says, for passwords, keys and certificates.

Fails closed: whatever is not clearly right raises RejectedError, with the reason for the log and
never for the client.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import asyncssh
import structlog
from asyncssh.packet import PacketDecodeError, SSHPacket, String
from asyncssh.public_key import (
    CERT_TYPE_USER,
    SSHOpenSSHCertificate,
    decode_ssh_certificate,
    decode_ssh_public_key,
)

from .accounts import Account, find_account, system_users
from .authorized_keys import KeyLine, Permissions, read_keys, weakness
from .config import Config
from .limits import Throttle
from .passwords import LOCKED, Passwords
from .threads import in_thread

log = structlog.get_logger()

SIGNATURES = (
    *("ssh-ed25519", "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"),
    *("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
    *("rsa-sha2-512", "rsa-sha2-256"),
)
"""Signature algorithms that are accepted from clients and from CAs; none with SHA-1."""


KEY_FILES_AT_ONCE = 4
"""Logins whose files of keys are read at the same time; to parse one may take a tenth of a second."""

KEY_FILES_TIME = 10.0
"""Seconds that the files of one login may take, should their file system hang."""


class RejectedError(Exception):
    """A login that is not allowed. The text is for the log; facts are what it was tried with."""

    def __init__(self, reason: str, facts: dict[str, object] | None = None) -> None:
        super().__init__(reason)
        self.facts = facts or {}


@dataclass(frozen=True, slots=True)
class Login:
    """Who has logged in, how, and what the key and the certificate allow."""

    account: Account
    method: str
    permissions: Permissions = field(default_factory=Permissions)
    facts: dict[str, object] = field(default_factory=dict)
    """For the log: the key's fingerprint, the certificate's id and serial."""


class Authenticator:
    """Answers for one configuration; a reload makes another. To make one may take 0.1 s."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._users = system_users(config)
        accounts = (config.accounts or {}).values()
        hashes = [account.password for account in accounts if account.password not in ("", LOCKED)]
        self.has_passwords = bool(hashes)
        self._passwords = Passwords(hashes)
        self.password_seconds = self._passwords.seconds
        self._told: dict[str, int] = {}
        self._throttle = Throttle()
        self._turns = asyncio.Semaphore(KEY_FILES_AT_ONCE)

    def account(self, name: str) -> Account | None:
        """The account of a login name."""
        return find_account(self._config, name, self._users)

    async def password(self, name: str, password: str, method: str) -> Login:
        """Compare a password. Raises RejectedError, after the same time for every wrong name and password."""
        account = self.account(name)
        expected = account.password if account else ""
        right = await self._passwords.match(expected, password)
        if account is None:
            raise RejectedError("no such account")
        if expected == LOCKED:
            raise RejectedError("the account is locked")
        if not right:
            raise RejectedError("wrong password" if expected else "the account has no password")
        return Login(account, method)

    async def public_key(
        self, name: str, key_data: bytes, source: str
    ) -> tuple[Login, asyncssh.SSHKey]:
        """Whether a key or a certificate may enter, and the key that has to sign. Raises RejectedError.

        The files are read anew, so that a key is out when its line is (but for the second in which
        a connection that has asked for it signs: userauth.SAME_KEY).
        """
        read = _Reader()
        ca_keys = self._config.auth.trusted_user_ca_keys

        def judge() -> tuple[Login, asyncssh.SSHKey] | RejectedError:
            try:
                return _judge(self.account(name), ca_keys, key_data, source, read)
            except RejectedError as exc:
                return exc

        try:
            async with self._turns, asyncio.timeout(KEY_FILES_TIME):
                answer = await in_thread(judge)
        except OSError as exc:  # also when it takes too long
            reason = str(exc) or "too slow"
            raise RejectedError(f"the files of keys cannot be read: {reason}") from exc
        self._tell(read.problems)
        if isinstance(answer, RejectedError):
            raise answer
        login, key = answer
        return login, key

    def _tell(self, problems: dict[str, list[str]]) -> None:
        """Log what is wrong with lines of keys: once, until it changes, and not too much at once."""
        for source, found in problems.items():
            if self._told.get(source) != hash(tuple(found)):
                for problem in found:
                    key = (source, problem)
                    self._throttle.log(logging.WARNING, "key line not used", key, reason=problem)
                self._told[source] = hash(tuple(found))
        if len(self._told) > 1000:
            self._told.clear()


class _Reader:
    """Reads the lines of an account and keeps what was wrong in them."""

    def __init__(self) -> None:
        self.problems: dict[str, list[str]] = {}

    def lines(
        self,
        sources: Iterable[str],
        owners: frozenset[int],
        run_as: tuple[int, int] | None = None,
    ) -> list[KeyLine]:
        lines: list[KeyLine] = []
        for source in sources:
            good, self.problems[source] = read_keys(source, owners, run_as)
            lines += good
        return lines


def _judge(
    account: Account | None, ca_keys: Iterable[str], key_data: bytes, source: str, read: _Reader
) -> tuple[Login, asyncssh.SSHKey]:
    key, certificate = _decode(key_data)
    facts: dict[str, object] = {"key": f"{key.get_fingerprint()} {key.get_algorithm()}"}
    if certificate is not None:
        ca = certificate.signing_key.get_fingerprint()
        # The id is the last, since it may be cut: it can be of any length.
        facts["certificate"] = f"serial {certificate._serial} CA {ca} id {certificate._key_id!r}"  # noqa: SLF001
    if account is None:
        raise RejectedError("no such account", facts)
    if account.password == LOCKED:
        raise RejectedError("the account is locked", facts)
    lines = read.lines(account.authorized_keys, account.key_owners, account.run_as)
    signer = certificate.signing_key if certificate else key
    lines = [line for line in lines if line.cert_authority == bool(certificate)]
    if certificate is not None:
        lines += read.lines(ca_keys, frozenset((0, os.geteuid())))
    reason = (
        "the certificate is from no CA of this account"
        if certificate
        else "not a key of this account"
    )
    for line in lines:
        if line.key.public_data != signer.public_data:
            continue
        try:
            permissions = line.permissions
            if reason := line.refuses(source, time.time()):
                continue
            if certificate is not None:
                granted = _certified(certificate, key_data, line, account, source)
                permissions = permissions.both(granted)
        except ValueError as exc:
            reason = str(exc)
            continue
        key.set_touch_required(True)  # of security keys (FIDO), as sshd does
        return Login(account, "publickey", permissions, facts), key
    raise RejectedError(reason, facts)


def _decode(key_data: bytes) -> tuple[asyncssh.SSHKey, SSHOpenSSHCertificate | None]:
    """The key that is offered, and the certificate that it is in."""
    certificate = None
    try:
        if b"-cert-" in SSHPacket(key_data).get_string():
            decoded = decode_ssh_certificate(key_data)
            if not isinstance(decoded, SSHOpenSSHCertificate):
                raise RejectedError("certificates of this type are not supported")
            certificate = decoded
            keys = [certificate.key, certificate.signing_key]
        else:
            keys = [decode_ssh_public_key(key_data)]
    except (asyncssh.KeyImportError, PacketDecodeError, ValueError, OverflowError) as exc:
        raise RejectedError(f"no usable public key: {exc}") from exc
    for key in keys:
        if reason := weakness(key):
            raise RejectedError(reason)
    return keys[0], certificate


def _certified(
    certificate: SSHOpenSSHCertificate, data: bytes, line: KeyLine, account: Account, source: str
) -> Permissions:
    """What a certificate allows, by a CA that a line trusts. Raises ValueError.

    The format is OpenSSH's PROTOCOL.certkeys.
    """
    accepted = account.principals if line.principals is None else line.principals
    if not set(certificate.principals) & set(accepted):
        raise ValueError("the certificate has none of the account's principals")
    certificate.validate(CERT_TYPE_USER, None)
    if _signed_with(certificate, data) not in SIGNATURES:
        raise ValueError("the CA has signed with an algorithm that is not accepted")
    options: dict[str, Any] = dict(certificate.options)
    networks = options.get("source-address")
    address = ipaddress.ip_address(source.partition("%")[0])
    if networks is not None and not any(address in network for network in networks):
        raise ValueError(f"the certificate may not be used from {source}")
    return Permissions(
        command=options.get("force-command"),
        pty="permit-pty" in options,
        port_forwarding="permit-port-forwarding" in options,
        agent_forwarding="permit-agent-forwarding" in options,
        x11_forwarding="permit-X11-forwarding" in options,
    )


def _signed_with(certificate: SSHOpenSSHCertificate, data: bytes) -> str:
    """The algorithm of the CA's signature: the last field, behind the CA's key."""
    behind = String(certificate.signing_key.public_data)
    packet = SSHPacket(data[data.rindex(behind) + len(behind) :])
    signature = packet.get_string()
    packet.check_end()
    return SSHPacket(signature).get_string().decode("ascii", "replace")
