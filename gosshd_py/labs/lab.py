"""A server to break things in, and the real client to see it: what exercises are done with."""

from __future__ import annotations

import json
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY = 20.0
"""Seconds for a server to be ready."""

END = 3.0
"""Seconds for a server to end by itself."""

PATIENCE = 15.0
"""Seconds for a client to end."""

Record = dict[str, Any]


class LabError(Exception):
    """An exercise cannot be done here; the text says why."""


class Lab:
    """A running server of an exercise, in a folder of its own."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self.pid = process.pid
        self.ended = process.poll
        """The server's exit status, None while it runs."""

    def ssh(self, *options: str) -> list[str]:
        """The client's command line up to the host, which is called lab."""
        return ["ssh", "-F", str(self.folder / "config"), *options, "lab"]

    def typed(self, command: str) -> str:
        """A command of an exercise with the client spelled out."""
        return command.replace("{ssh}", f"ssh -F {shlex.quote(str(self.folder / 'config'))}")

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Do what an exercise says to type, in a shell."""
        try:
            return subprocess.run(
                ["/bin/bash", "-c", self.typed(command)], stdin=subprocess.DEVNULL,
                capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as exc:
            out = exc.stdout.decode(errors="replace") if isinstance(exc.stdout, bytes) else ""
            return subprocess.CompletedProcess(exc.args, 124, out, f"no end within {PATIENCE:g} s")

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a client that goes on, with pipes."""
        return subprocess.Popen(
            [*self.ssh(*words[:-1]), words[-1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def records(self) -> list[Record]:
        """The trace so far."""
        lines = (self.folder / "trace.ndjson").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for(self, condition: Callable[[], object], seconds: float = 5.0) -> bool:
        """Wait until it is so, but not longer. Returns whether it came."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


CONFIG = """\
Host lab
  HostName localhost
  Port {port}
  User learner
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  IdentityAgent none
  IdentitiesOnly yes
  LogLevel ERROR
"""


@contextmanager
def lab(fault: str = "") -> Iterator[Lab]:
    """A server with a fault, or without; it ends with the block. Raises LabError."""
    if shutil.which("ssh") is None:
        raise LabError("the exercises are done with the OpenSSH client; install openssh-client")
    with tempfile.TemporaryDirectory(prefix="gosshd-lab-") as name:
        folder = Path(name)
        argv = [sys.executable, "-m", "gosshd_py.labs.child", name, fault]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        ) as process:
            try:
                assert process.stdout is not None  # noqa: S101
                ready, _, _ = select.select([process.stdout], [], [], READY)
                port = process.stdout.readline().strip() if ready else b""
                if not port.isdigit():
                    log = folder / "log"
                    told = log.read_text()[-500:] if log.exists() else ""
                    raise LabError(f"the server of the exercise did not start {told}".strip())
                text = CONFIG.format(port=int(port), folder=name)
                (folder / "config").write_text(text)
                yield Lab(folder, process)
            finally:
                assert process.stdin is not None  # noqa: S101
                process.stdin.close()  # it ends its sessions, if its fault lets it
                try:
                    process.wait(END)
                except subprocess.TimeoutExpired:
                    process.kill()
