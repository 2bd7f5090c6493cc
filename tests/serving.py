"""What tests need to run a server, look into it, and talk to it with the real clients."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import asyncssh
import paramiko
import pexpect

ROOT = Path(__file__).parent.parent
MIB = 1024 * 1024
SOAK = os.environ.get("GOSSHD_SOAK") == "1"


def ptys() -> int:
    """Pseudo-terminals that exist on this machine."""
    return int(Path("/proc/sys/kernel/pty/nr").read_text())


def wait_for(what: str, condition: Callable[[], object], seconds: float = 10.0) -> float:
    """Wait for an event that can only be looked for. Returns how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.005)
    return time.monotonic() - began


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def end_client(client: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """End the real client by SIGTERM: more than one, as it misses one that comes just before poll(2)."""
    deadline = time.monotonic() + seconds
    while client.poll() is None:
        assert time.monotonic() < deadline, f"still there after {seconds} s of SIGTERM"
        client.terminate()
        with suppress(subprocess.TimeoutExpired):
            client.wait(0.2)


class Served:
    """A running server process (tests/served.py) and the ways into it."""

    # Many tests do at once what one honest client never does.
    SETTINGS: ClassVar = {
        "listen": ["127.0.0.1:0"],
        **dict.fromkeys(
            (
                "max_startups",
                "per_source_max_startups",
                "max_connections",
                "per_source_max_connections",
                "connection_max_sessions",
                "max_penalty",
            ),
            0,
        ),
    }

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.terminals: list[Any] = []
        self.log_file = directory / "log"
        self.settings = {**self.SETTINGS, "hostkeys": str(directory / "hostkeys"), **settings}
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.served"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        ready = self.ask(json.dumps(self.settings))
        self.host, self.port = ready["addresses"][0]
        self.known_hosts = directory / "known_hosts"
        self.known_hosts.write_text("\n".join(ready["known_hosts"]) + "\n")

    def ask(self, line: str, seconds: float = 20.0) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        readable, _, _ = select.select([self.process.stdout], [], [], seconds)
        answer = self.process.stdout.readline() if readable else b""
        assert answer, f"the server does not answer:\n{self.log_file.read_text()[-4000:]}"
        return json.loads(answer)

    def stats(self) -> dict[str, int]:
        return self.ask("stats")

    def log(self) -> list[dict[str, Any]]:
        """Every log event so far; the last line may just be written."""
        lines = self.log_file.read_text().rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def events(self, name: str, **facts: Any) -> list[dict[str, Any]]:
        """The log events of that name and with those facts."""
        return [
            event
            for event in self.log()
            if event["event"] == name and all(event.get(key) == facts[key] for key in facts)
        ]

    def stop(self) -> int:
        """Stop as an administrator would; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return status

    # -- clients ------------------------------------------------------------------------------

    def ssh_argv(self, *args: str, user: str = "anyuser") -> list[str]:
        """The real client, host key checked, nobody's own configuration."""
        at = args.index("HOST") if "HOST" in args else 0
        options, command = args[:at], args[at:]
        return [  # of an option given twice, ssh takes the first
            *("ssh", "-F", "none", "-p", str(self.port), *options, "-l", user),
            *("-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "StrictHostKeyChecking=yes"),
            *("-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "IdentityAgent=none"),
            *("localhost", *(word for word in command if word != "HOST")),
        ]

    def ssh(
        self,
        *args: str,
        stdin: bytes | None = b"",
        timeout: float = 20.0,
        user: str = "anyuser",
        **env: str,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the client to its end. Put options before a word HOST, the command behind it."""
        return subprocess.run(
            self.ssh_argv(*args, user=user),
            input=stdin,
            capture_output=True,
            timeout=timeout,
            check=False,
            env={"PATH": os.environ["PATH"], "HOME": str(self.directory), **env},
        )

    def terminal(
        self,
        *args: str,
        dimensions: tuple[int, int] = (24, 80),
        user: str = "anyuser",
        **kwargs: Any,
    ) -> Any:
        """An interactive client under pexpect."""
        argv = self.ssh_argv(*(args or ("-tt", "HOST")), user=user)
        env = {"PATH": os.environ["PATH"], "HOME": str(self.directory), "TERM": "xterm-256color"}
        spawned = pexpect.spawn(
            argv[0], argv[1:], env=env, dimensions=dimensions, timeout=10, **kwargs
        )
        self.terminals.append(spawned)
        return spawned

    def close_terminals(self) -> None:
        """End every client that a test has left at its terminal."""
        while self.terminals:
            self.terminals.pop().close(force=True)

    async def connect(self, **options: Any) -> asyncssh.SSHClientConnection:
        """An asyncssh client."""
        defaults = {"username": "anyuser", "client_keys": None, "config": None, "agent_path": None}
        options = {**defaults, "gss_host": None, "known_hosts": str(self.known_hosts), **options}
        return await asyncssh.connect(self.host, self.port, **options)

    @contextmanager
    def paramiko(self) -> Iterator[Any]:
        """A Paramiko transport, for requests that no client makes."""
        with self.paramiko_transport() as transport:
            transport.auth_none("anyuser")
            yield transport

    @contextmanager
    def paramiko_transport(self, **options: Any) -> Iterator[Any]:
        """The same before it has logged in."""
        transport = paramiko.Transport((self.host, self.port), **options)
        try:
            transport.start_client(timeout=10)
            yield transport
        finally:
            transport.close()
            transport.join(5)


def run(coroutine: Any, seconds: float = 120.0) -> Any:
    """Run an asyncssh client to its end, but not longer."""

    async def limited() -> Any:
        async with asyncio.timeout(seconds):
            return await coroutine

    return asyncio.run(limited())


def reset(conn: asyncssh.SSHClientConnection) -> None:
    """Cut the connection by RST, as a crashed machine's kernel does."""
    conn.get_extra_info("socket").setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    conn.abort()
