"""The server's own keys: made once, kept private, loaded once; fingerprints and known_hosts lines.

A key that others can read is refused, for whoever has it can pretend to be this server.
"""

from __future__ import annotations

import os
import shlex
import socket
import stat
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import asyncssh

from .config import Address, is_loopback

NAMES = ("ssh_host_ed25519_key", "ssh_host_ecdsa_key", "ssh_host_rsa_key")
"""In order of preference. The first is made when it is missing, the others are used if there."""


class HostKeyError(Exception):
    """A host key cannot be used; the text says which, why, and what to do."""


def load_host_keys(directory: Path) -> list[asyncssh.SSHKey]:
    """Load the keys in directory, making the ed25519 key if it is missing. Raises HostKeyError."""
    try:
        if not (directory / NAMES[0]).exists():
            _make_key(directory / NAMES[0])
        return existing_host_keys(directory)
    except OSError as exc:
        reason = f"{exc.filename or directory}: {exc.strerror}"
        raise HostKeyError(f"{reason}; choose another directory with --hostkeys") from exc


def existing_host_keys(directory: Path) -> list[asyncssh.SSHKey]:
    """Load the keys that are there. Raises HostKeyError and OSError."""
    return _load_keys(directory / name for name in NAMES if os.path.lexists(directory / name))


def _make_key(path: Path) -> None:
    """Write a new key so that it is there whole or not at all, and never over another one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = asyncssh.generate_private_key("ssh-ed25519", comment="gosshd")
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(key.export_private_key())
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # fails where rename(2) would replace
    except FileExistsError:
        pass  # another server has just made one: use that
    finally:
        Path(temporary).unlink()


def _load_keys(paths: Iterable[Path]) -> list[asyncssh.SSHKey]:
    keys: dict[str, asyncssh.SSHKey] = {}
    for path in paths:
        key = _load_key(path)
        if key.get_algorithm() in keys:
            raise HostKeyError(f"{path} is a second {key.get_algorithm()} key; move it away")
        keys[key.get_algorithm()] = key
    return list(keys.values())


def _load_key(path: Path) -> asyncssh.SSHKey:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would let us wait for a writer
    try:
        status = os.fstat(fd)
        data = os.read(fd, 64 * 1024) if stat.S_ISREG(status.st_mode) else b""
    finally:
        os.close(fd)
    quoted = shlex.quote(str(path))
    if not stat.S_ISREG(status.st_mode):
        raise HostKeyError(f"{path} is not a regular file; move it away")
    if status.st_uid not in (os.geteuid(), 0):
        raise HostKeyError(
            f"{path} belongs to uid {status.st_uid}; run: chown {os.geteuid()} {quoted}"
        )
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise HostKeyError(
            f"{path} has mode {mode:04o}, so others can read it; run: chmod 600 {quoted}"
        )
    try:
        return asyncssh.import_private_key(data)
    except Exception as exc:  # asyncssh's parsers raise many kinds on a damaged file
        if isinstance(exc, asyncssh.KeyEncryptionError) or "Passphrase" in str(exc):
            problem = "has a passphrase, and nobody can type it"
            remedy = f"run: ssh-keygen -p -N '' -f {quoted}"
        else:
            problem, remedy = f"is not a private key: {exc}", "move it away"
        raise HostKeyError(f"{path} {problem}; {remedy}") from exc


def fingerprint(key: asyncssh.SSHKey) -> str:
    """SHA256:… as `ssh` shows it at the first connection."""
    return key.get_fingerprint("sha256")


def client_names(host: str) -> list[str]:
    """What clients call a listen address, the likeliest first.

    Loopback addresses are reached as localhost; a wildcard address by this machine's name too.
    """
    if host in ("0.0.0.0", "::"):  # noqa: S104  # compared, not bound
        return ["localhost", socket.gethostname()]
    return ["localhost", host] if is_loopback(host) else [host]


def known_hosts_lines(addresses: Iterable[Address], keys: Sequence[asyncssh.SSHKey]) -> list[str]:
    """Lines for ~/.ssh/known_hosts, one for each name that clients use and each key (sshd(8))."""
    names: dict[str, None] = {}
    for host, port in addresses:
        for name in client_names(host):
            names[name if port == 22 else f"[{name}]:{port}"] = None
    public = [" ".join(key.export_public_key().decode().split()[:2]) for key in keys]
    return [f"{name} {key}" for name in names for key in public]
