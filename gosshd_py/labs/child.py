"""The server of an exercise: `python -m gosshd_py.labs.child FOLDER [FAULT]`.

Listens on a free port of loopback, traces into FOLDER/trace.ndjson, prints its port when it is
ready, and lives as long as its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from .. import logs, loop
from ..config import Config
from ..daemon import traced
from ..hostkeys import known_hosts_lines
from ..launch import reset_signals
from ..server import Server
from .faults import fault


async def serve(folder: Path, name: str) -> None:
    """Serve until the end of standard input."""
    config = Config(  # noqa: S604  # its shell is a setting
        listen=("127.0.0.1:0",),
        hostkeys=str(folder / "hostkeys"),
        home=str(folder),
        shell=("/bin/bash", "--norc", "--noprofile"),
        env={"PS1": "lab$ "},
        trace_file=str(folder / "trace.ndjson"),
        trace_data=48,
        max_penalty=0,
        hangup_grace=0.5,
    )
    ended = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(ended)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    reset_signals()
    with fault(name), traced(config) as tell:
        async with Server(config, tell) as server:
            lines = known_hosts_lines(server.addresses, server.host_keys)
            (folder / "known_hosts").write_text("\n".join(lines) + "\n")
            print(server.addresses[0].port, flush=True)  # noqa: T201  # for run.py
            await ended.read()


if __name__ == "__main__":
    with (Path(sys.argv[1]) / "log").open("w") as log:
        logs.configure("text", log)
        loop.run(serve(Path(sys.argv[1]), *sys.argv[2:3] or [""]))
