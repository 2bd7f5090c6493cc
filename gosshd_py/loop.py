"""The event loop: libuv's where the extra `fast` is installed (uvloop), else asyncio's own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """asyncio.run, on the quickest loop that there is."""
    try:
        import uvloop  # noqa: PLC0415  # it takes its time, and only a server needs it
    except ImportError:
        make = None
    else:
        make = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=make) as runner:
        return runner.run(main)
