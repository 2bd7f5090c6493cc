"""The server as a process: its signals, its limit of open files, and how it reloads."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable

import structlog

from .config import Config, ConfigError
from .hostkeys import HostKeyError
from .process import raise_nofile, reset_signals
from .server import Server

log = structlog.get_logger()

NEEDS_RESTART = ("listen", "log_format", "pid_file")
"""What a reload does not change."""


async def serve(
    config: Config,
    on_ready: Callable[[Server], None] | None = None,
    reload: Callable[[], Config] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. on_ready is called once, when clients can connect.

    reload: called at SIGHUP for a new configuration; if it raises ConfigError nothing changes.
    Raises ConfigError, ListenError and HostKeyError before that.
    """
    stop = asyncio.Event()
    hangup = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    reset_signals()
    raise_nofile()
    async with Server(config) as server:
        keep_what_is_loaded()
        if on_ready is not None:
            on_ready(server)
        reloader = asyncio.create_task(_reload(server, hangup, reload or (lambda: server.config)))
        await stop.wait()
        reloader.cancel()
        log.info("shutting down", sessions=server.session_count)


def keep_what_is_loaded() -> None:
    """Let the garbage collector never look at the modules again.

    There are some hundred thousand objects in them, and looking at all takes 50 ms: the longest
    that everybody's terminal stood still.
    """
    gc.collect()
    gc.freeze()


async def _reload(server: Server, hangup: asyncio.Event, reload: Callable[[], Config]) -> None:
    """Take a new configuration at each SIGHUP."""
    started = server.config
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            config = await asyncio.to_thread(reload)
            later = [key for key in NEEDS_RESTART if getattr(config, key) != getattr(started, key)]
            await server.use(config)
        except ConfigError as exc:
            for problem in exc.problems:
                log.error("not reloaded", reason=problem)  # noqa: TRY400  # their mistake, not ours
        except HostKeyError as exc:
            log.error("not reloaded", reason=str(exc))  # noqa: TRY400
        except Exception:  # the next SIGHUP must still be heard
            log.exception("not reloaded", reason="internal error")
        else:
            log.info("reloaded", needs_restart=", ".join(later) or None)
