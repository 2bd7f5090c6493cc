"""Keys, certificates and passwords for tests, made by ssh-keygen and the argon2 library."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import argon2

PASSWORD = "correct horse"
FAST = argon2.PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1)


@cache
def hashed(password: str = PASSWORD) -> str:
    """A cheap hash, so that tests need not wait for it."""
    return FAST.hash(password)


class Key:
    """A key pair in files of its own, and certificates for it."""

    def __init__(self, directory: Path, name: str = "key", *options: str) -> None:
        directory.mkdir(exist_ok=True)
        self.file = directory / name
        keygen("-q", "-t", "ed25519", *options, "-N", "", "-C", name, "-f", self.file)
        self.public = Path(f"{self.file}.pub").read_text().strip()

    def line(self, options: str = "") -> str:
        return f"{options} {self.public}".strip()

    @property
    def fingerprint(self) -> str:
        return keygen("-l", "-f", f"{self.file}.pub").split()[1]

    def certify(self, ca: Key, *options: str, principals: str | None = "alice") -> Key:
        """Sign it by a CA, as ssh-keygen does: with all permissions unless options say otherwise."""
        Path(f"{self.file}-cert.pub").unlink(missing_ok=True)
        names = ["-n", principals] if principals is not None else []
        keygen("-q", "-s", ca.file, "-I", "the id", "-z", "7", *names, *options, f"{self.file}.pub")
        return self


def keygen(*args: object) -> str:
    return subprocess.run(
        ["ssh-keygen", *map(str, args)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
