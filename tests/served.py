"""A server process that a test can look into: `python -m tests.served` with JSON on both pipes.

Reads one line of JSON settings, writes {"addresses": …}; then answers each line "stats" with what
a leak would change, and "exit" by a clean stop. SIGUSR1 writes all stacks to standard error.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import os
import signal
import sys
from pathlib import Path

import msgspec

from gosshd_py import logs
from gosshd_py.config import Config
from gosshd_py.hostkeys import known_hosts_lines
from gosshd_py.process import reset_signals
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
        "sessions": server.session_count,
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
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with Server(config) as server:
        hosts = known_hosts_lines(server.addresses, server.host_keys)
        say({"addresses": [list(address) for address in server.addresses], "known_hosts": hosts})
        serving = asyncio.ensure_future(stop.wait())
        while not stop.is_set():
            asked = asyncio.ensure_future(lines.readline())
            await asyncio.wait({asked, serving}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                asked.cancel()
            elif asked.result() == b"stats\n":
                say(stats(server))
            else:
                break
        serving.cancel()


def say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
