"""A server process that a test can look into: `python -m tests.served` with JSON on both pipes.

Reads one line of JSON settings, writes {"addresses": …}; then answers "stats" with what a leak would
change, "lag" with how long the loop stood still, "reload {…}" by taking these settings, "patch
MODULE.CONSTANT VALUE" by having it so, "sabotage WHERE" by putting a bug there; anything else, or
the end of input, is a clean stop. SIGUSR1 writes all stacks to standard error.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from gosshd_py import authentication, forward, logs, loop, userauth
from gosshd_py.config import Config
from gosshd_py.connection import Connection
from gosshd_py.daemon import keep_what_is_loaded, traced
from gosshd_py.flow import ChannelOutput
from gosshd_py.hostkeys import known_hosts_lines
from gosshd_py.launch import forbid_core_dumps, raise_nofile, reset_signals
from gosshd_py.process import Descriptor
from gosshd_py.pty import PtyProgram
from gosshd_py.server import Server


def stats(server: Server) -> dict[str, int]:
    gc.collect()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    status = Path("/proc/self/status").read_text()
    fds = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return {
        "fds": len(fds),
        "ptys": sum(fd.endswith("ptmx") for fd in fds),
        "tasks": len(asyncio.all_tasks()),
        "children": len(children),
        "sessions": len(server.sessions),
        "connections": len(server.connections),
        "rss": int(status.split("VmRSS:")[1].split()[0]) * 1024,
    }


async def main() -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    config = msgspec.convert(json.loads(await lines.readline()), Config)
    logs.configure("json")
    reset_signals()
    raise_nofile()
    if not config.core_dumps:
        forbid_core_dumps()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    with traced(config) as tell:
        await serve(Server(config, tell), lines, stop)


async def serve(starting: Server, lines: asyncio.StreamReader, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    async with starting as server:
        keep_what_is_loaded()
        hosts = known_hosts_lines(server.addresses, server.host_keys)
        say({"addresses": [list(address) for address in server.addresses], "known_hosts": hosts})
        lag = Lag(loop)
        serving = asyncio.ensure_future(stop.wait())
        while not stop.is_set():
            asked = asyncio.ensure_future(lines.readline())
            await asyncio.wait({asked, serving}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                asked.cancel()
            elif asked.result() == b"stats\n":
                say(stats(server))
            elif asked.result() == b"lag\n":
                say({"worst": lag.read()})
            elif asked.result().startswith(b"reload "):
                settings = json.loads(asked.result().removeprefix(b"reload "))
                await server.use(msgspec.convert(settings, Config))
                say({})
            elif asked.result().startswith(b"patch "):
                _, name, value = asked.result().decode().split()
                module, _, constant = name.partition(".")
                setattr(importlib.import_module(f"gosshd_py.{module}"), constant, json.loads(value))
                say({})
            elif asked.result().startswith(b"sabotage "):
                sabotage(asked.result().split()[1].decode())
                say({})
            else:
                break
        lag.stop()
        serving.cancel()


class Lag:
    """How long the loop has stood still at worst since the last look, in seconds.

    A timer that is late by more than its own period: what every session on this loop feels. The
    time in which the machine ran other processes in our place is none of ours (schedstat).
    """

    PERIOD = 0.002

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.worst = 0.0
        self.start(time.monotonic())

    def start(self, now: float) -> None:
        self.due = now + self.PERIOD
        self.waited = self.in_the_queue()
        self.timer = self.loop.call_later(self.PERIOD, self.tick)

    @staticmethod
    def in_the_queue() -> float:
        """Seconds that this thread has waited for a processor (Linux' sched-stats.rst)."""
        with suppress(OSError):
            return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
        return 0.0

    def late(self) -> float:
        return time.monotonic() - self.due - (self.in_the_queue() - self.waited)

    def tick(self) -> None:
        self.worst = max(self.worst, self.late())
        self.start(time.monotonic())

    def read(self) -> float:
        worst, self.worst = max(self.worst, self.late()), 0.0
        self.timer.cancel()
        self.start(time.monotonic())
        return worst

    def stop(self) -> None:
        self.timer.cancel()


NAMES = {
    "loop.test": "127.0.0.1",
    "loop6.test": "::1",
    "metadata.test": "169.254.169.254",
    "mapped.test": "::ffff:127.0.0.1",
    "here.test": "0.0.0.0",
}
"""What names lead to where a test says so."""


def sabotage(where: str) -> None:
    """Put a bug into the next call of one method, and only that one."""
    owner, name = {
        "resize": (PtyProgram, "resize"),
        "read": (Descriptor, "read_now"),
        "write": (ChannelOutput, "write"),
        "spawn": (Connection, "_spawn"),
        "lookup": (socket, "getaddrinfo"),
        "keys": (authentication, "read_keys"),
        "owner": (userauth, "allowed_owner"),
        "names": (socket, "getaddrinfo"),
        "bind": (forward, "bind_path"),
    }[where]
    real = getattr(owner, name)

    if where in ("lookup", "keys", "owner"):

        def slow(*args: Any, **options: Any) -> Any:
            if options.get("flags"):  # of an address: that is never slow
                return real(*args, **options)
            time.sleep(5)
            return [] if where == "lookup" else ([], [])

        setattr(owner, name, slow)
        return
    if where == "bind":

        def fails(*_: object) -> None:
            time.sleep(0.5)
            raise OSError(28, "No space left on device")

        setattr(owner, name, fails)
        return
    if where == "names":
        setattr(
            owner,
            name,
            lambda host, *args, **options: real(NAMES.get(host, host), *args, **options),
        )
        return

    def broken(*_: object) -> None:
        setattr(owner, name, real)
        raise ZeroDivisionError(f"sabotaged {where}")

    setattr(owner, name, broken)


def say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    loop.run(main())
