"""The event loop: libuv's where the extra `fast` is installed (uvloop), else asyncio's own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """asyncio.run, on the quickest loop that there is."""
    _fill_standard_streams()
    try:
        import uvloop  # noqa: PLC0415  # it takes its time, and only a server needs it
    except ImportError:
        make = None
    else:
        make = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=make) as runner:
        return runner.run(main)


def _fill_standard_streams() -> None:
    """Let no socket get the numbers 0, 1 and 2, as OpenSSH's sanitise_stdfd.

    If they are closed, whoever writes to standard error would write to a client. And libuv aborts
    when it has to close one of them.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
