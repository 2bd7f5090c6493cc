"""The server as a process: its signals, its limit of open files, its trace, and how it reloads."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

import structlog

from .checks import warnings_of
from .config import Config, ConfigError
from .hostkeys import HostKeyError
from .launch import forbid_core_dumps, raise_nofile, reset_signals
from .lifecycle import Tell
from .server import Server
from .threads import in_thread
from .trace import Output, TraceFile, Tracer
from .workers import Worker

log = structlog.get_logger()

NEEDS_RESTART = (
    *("listen", "log_format", "pid_file", "trace", "trace_file", "trace_data", "workers"),
)
"""What a reload does not change."""


READ_TIME = 30.0
"""Seconds in which the configuration must be read at a reload."""


async def serve(
    config: Config,
    on_ready: Callable[[Server], None] | None = None,
    reload: Callable[[], Config] | None = None,
    worker: Worker | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. on_ready is called once, when clients can connect.

    reload: called at SIGHUP for a new configuration; if it raises ConfigError nothing changes.
    worker: which of several processes this is; it ends with its supervisor, too.
    Raises ConfigError, ListenError and HostKeyError before that.
    """
    stop = asyncio.Event()
    hangup = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    worker = worker or Worker()
    if worker.supervisor >= 0:
        loop.add_reader(worker.supervisor, stop.set)
    reset_signals()
    raise_nofile()
    if not config.core_dumps:
        forbid_core_dumps()
    with traced(config) as tell:
        async with Server(config, tell, worker) as server:
            keep_what_is_loaded()
            if on_ready is not None:
                on_ready(server)
            again = reload or (lambda: server.config)
            which = {"worker": worker.number} if worker.count > 1 else {}
            reloader = asyncio.create_task(_reload(server, hangup, again, which))
            await stop.wait()
            reloader.cancel()
            if worker.supervisor >= 0:
                loop.remove_reader(worker.supervisor)  # it would be readable for ever
            log.info("shutting down", sessions=len(server.sessions), **which)


@contextmanager
def traced(config: Config) -> Iterator[Tell | None]:
    """Who hears of the events of all connections, as configured; None: nobody. Raises OSError."""
    outputs: list[Output] = []
    if config.trace:
        from .story import Story, Unbuffered  # noqa: PLC0415  # it takes its time, and few need it

        outputs.append(Story(cast("TextIO", Unbuffered(sys.stdout))))
    if config.trace_file:
        from . import __version__  # noqa: PLC0415  # there once all modules are

        outputs.append(TraceFile(Path(config.trace_file), __version__))
    if outputs:
        with Tracer(outputs, config.trace_data) as tracer:
            yield tracer.tell
    else:
        yield None


def keep_what_is_loaded() -> None:
    """Let the garbage collector never look at the modules again.

    There are some hundred thousand objects in them, and looking at all takes 50 ms: the longest
    that everybody's terminal stood still.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


async def _reload(
    server: Server, hangup: asyncio.Event, reload: Callable[[], Config], which: dict[str, int]
) -> None:
    """Take a new configuration at each SIGHUP. which: the worker, for the log."""
    started = server.config
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            async with asyncio.timeout(READ_TIME):
                config = await in_thread(reload)
            later = [key for key in NEEDS_RESTART if getattr(config, key) != getattr(started, key)]
            await server.use(config)
        except ConfigError as exc:
            for problem in exc.problems:
                log.error("not reloaded", reason=problem)  # noqa: TRY400  # their mistake, not ours
        except (HostKeyError, TimeoutError) as exc:
            log.error("not reloaded", reason=str(exc) or "the file could not be read in time")  # noqa: TRY400
        except Exception:  # the next SIGHUP must still be heard
            log.exception("not reloaded", reason="internal error")
        else:
            log.info("reloaded", needs_restart=", ".join(later) or None, **which)
            for warning in warnings_of(config):
                log.warning("configuration", warning=warning)
