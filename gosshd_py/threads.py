"""Threads for what may take its time: looking up names, and file systems that may be slow.

They are not the loop's own, since with slow names one client would keep everybody from logging in,
and the end of the process does not wait for them.
"""

from __future__ import annotations

import asyncio
import errno
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

MAX_THREADS = 256
"""At a time, for the whole process."""

IDLE = 10.0
"""Seconds that a thread waits for more to do; to start one takes as long as most of what they do."""

Work = tuple[asyncio.Future[Any], Callable[[], Any], Callable[[], None]]

_work: queue.SimpleQueue[Work] = queue.SimpleQueue()
_lock = threading.Lock()
_threads = 0
_busy = 0
"""Threads that there are, and work that is waiting or being done."""


def in_thread(
    action: Callable[[], Any], over: Callable[[], None] = lambda: None
) -> asyncio.Future[Any]:
    """Do it in a thread. Returns the result's future; raises OSError if there are too many.

    over: called on the loop when it is done, even if nobody waits for it any more.
    """
    global _threads, _busy  # noqa: PLW0603  # they are the process's
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    with _lock:
        if _busy == _threads:
            if _threads >= MAX_THREADS:
                raise OSError(errno.EAGAIN, "too many names and files are being looked up")
            try:
                threading.Thread(target=_run, daemon=True).start()
            except RuntimeError as exc:  # there are too many processes
                raise OSError(errno.EAGAIN, str(exc)) from exc
            _threads += 1
        _busy += 1
    _work.put((future, action, over))
    return future


def _run() -> None:
    """Work, and end when there is none for a while."""
    global _threads, _busy  # noqa: PLW0603
    while True:
        try:
            future, action, over = _work.get(timeout=IDLE)
        except queue.Empty:
            with _lock:
                if _busy < _threads:  # else there is work that counts on us
                    _threads -= 1
                    return
            continue
        result, error = None, None
        try:
            result = action()
        except BaseException as exc:
            error = exc
        with _lock:
            _busy -= 1
        with suppress(RuntimeError):  # the loop has ended before
            future.get_loop().call_soon_threadsafe(_answer, future, over, result, error)
        del future, action, over, result, error  # not to be kept while we wait


def _answer(
    future: asyncio.Future[Any], over: Callable[[], None], result: Any, error: BaseException | None
) -> None:
    over()
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
