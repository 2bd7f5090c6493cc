"""Several processes that serve one port (SO_REUSEPORT), and the one that watches over them.

The supervisor has no threads and no event loop, so it may fork. It starts again what dies, hands
signals on, and ends when all have ended.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from .config import Address
from .counts import Counted, SharedCounts, SharedTimes

log = structlog.get_logger()

QUICK = 2.0
"""Seconds in which a worker that ends has failed to start rather than died."""

MAX_FAILURES = 3
"""Workers in a row that fail to start, after which nobody tries again."""

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Worker:
    """What one process knows of the others; without others, what it counts alone."""

    number: int = 0
    count: int = 1
    counted: Counted = field(default_factory=Counted)
    addresses: Sequence[Address] = ()
    """Where all of them listen; empty: where the configuration says."""
    connections: memoryview = field(default_factory=lambda: memoryview(bytearray(8)).cast("q"))
    """How many there have been, in each worker and those that had its number before."""
    supervisor: int = -1
    """A descriptor that becomes readable when the supervisor has gone."""
    ready: Callable[[], None] = lambda: None
    """To be called when it can be connected to."""

    def next_connection(self) -> int:
        """A number that no connection of any worker has had."""
        before = self.connections[self.number]
        self.connections[self.number] = before + 1
        return 1 + self.number + before * self.count


Serve = Callable[[Worker], int]
"""Serves until a signal ends it; returns the exit status."""


class Supervisor:
    """Runs so many workers: `Supervisor(2, addresses, serve).run(when_ready)`."""

    def __init__(self, count: int, addresses: Sequence[Address], serve: Serve) -> None:
        self._count = count
        self._addresses = addresses
        self._serve = serve
        self._open, self._waiting, self._sessions = (SharedCounts(count) for _ in range(3))
        self._penalties = SharedTimes(count)
        self._connections = memoryview(mmap.mmap(-1, 8 * count)).cast("q")
        self._pids: dict[int, tuple[int, float]] = {}
        """pid → which worker, and since when."""
        self._alive, self._mine = os.pipe()  # readable to the workers when we have gone
        self._ready, self._tell_ready = os.pipe()
        self._failures = 0
        self._ending = False
        self._status = 0

    def run(self, when_ready: Callable[[], None]) -> int:
        """Serve. when_ready is called when all workers can be connected to. Returns the exit status."""
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        previous = {number: signal.signal(number, lambda *_: None) for number in (*HANDED_ON, signal.SIGCHLD)}  # fmt: skip
        signal.set_wakeup_fd(wake)
        try:
            for number in range(self._count):
                self._start(number)
            waiting = self._count
            while self._pids:
                readable, _, _ = select.select([woken, self._ready], [], [])
                if self._ready in readable:
                    before, waiting = waiting, waiting - len(os.read(self._ready, 100))
                    if before > 0 >= waiting:
                        when_ready()
                if woken in readable:
                    for number in os.read(woken, 100):
                        self._heed(number)
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in previous.items():
                signal.signal(number, handler)
            for fd in (woken, wake, self._alive, self._mine, self._ready, self._tell_ready):
                os.close(fd)
        return self._status

    def _start(self, number: int) -> None:
        # A signal that comes before the worker has its handlers waits for them: see reset_signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
            self._pids[pid] = (number, time.monotonic())
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._mine)
            status = self._serve(self._worker(number))
        except SystemExit as exc:
            status = exc.code if isinstance(exc.code, int) else 1
        except BaseException:
            log.exception("internal error", worker=number)
        finally:
            os._exit(status)  # nothing of the supervisor's is to be cleaned up here

    def _worker(self, number: int) -> Worker:
        for shared in (self._open, self._waiting, self._sessions, self._penalties):
            shared.mine(number)
        return Worker(
            number,
            self._count,
            Counted(self._open, self._waiting, self._sessions, self._penalties),
            self._addresses,
            self._connections,
            self._alive,
            self._tell_that_it_is_ready,
        )

    def _tell_that_it_is_ready(self) -> None:
        os.write(self._tell_ready, b"1")

    def _heed(self, number: int) -> None:
        """Hand a signal on, or see who has ended."""
        if number == signal.SIGCHLD:
            with suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    self._ended(*ended)
        elif number in HANDED_ON:
            self._ending |= number != signal.SIGHUP
            self._send(signal.SIGHUP if number == signal.SIGHUP else signal.SIGTERM)

    def _send(self, number: int) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _ended(self, pid: int, status: int) -> None:
        number, since = self._pids.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if self._ending:
            self._status = self._status or (1 if code else 0)
            return
        self._failures = self._failures + 1 if time.monotonic() - since < QUICK else 0
        log.error("worker ended", worker=number, pid=pid, exit=code)
        if self._failures < MAX_FAILURES:
            self._start(number)
        else:
            log.error("workers do not start", tried=self._failures)
            self._ending, self._status = True, 1
            self._send(signal.SIGTERM)
