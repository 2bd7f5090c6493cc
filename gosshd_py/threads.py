"""Threads for what may take its time: looking up names, and file systems that may be slow.

They are not the loop's own, since with slow names one client would keep everybody from logging in,
and the end of the process does not wait for them.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

MAX_THREADS = 256
"""At a time, for the whole server."""

_places = threading.BoundedSemaphore(MAX_THREADS)


def in_thread(
    action: Callable[[], Any], over: Callable[[], None] = lambda: None
) -> asyncio.Future[Any]:
    """Do it in a thread of its own. Returns the result's future; raises OSError if there are too many.

    over: called on the loop when the thread has ended, even if nobody waits for it any more.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    if not _places.acquire(blocking=False):
        raise OSError(errno.EAGAIN, "too many names and files are being looked up")

    def answer(result: Any, error: BaseException | None) -> None:
        over()
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = action()
        except BaseException as exc:
            error = exc
        _places.release()
        with suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(answer, result, error)

    try:
        threading.Thread(target=run, daemon=True).start()
    except RuntimeError as exc:  # there are too many processes
        _places.release()
        raise OSError(errno.EAGAIN, str(exc)) from exc
    return future
