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
"""How often the first workers may fail to start. Where one has served, it is tried for ever."""

MAX_PAUSE = 30.0
"""Seconds between two tries, at most; the first pause is one second, and each is twice the last."""

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

    def __init__(
        self,
        count: int,
        addresses: Sequence[Address],
        serve: Serve,
        reread: Callable[[], None] = lambda: None,
    ) -> None:
        """reread: called at SIGHUP, so that workers that are started later serve as the others do."""
        self._count = count
        self._addresses = addresses
        self._serve, self._reread = serve, reread
        self._open, self._waiting, self._sessions = (SharedCounts(count) for _ in range(3))
        self._penalties = SharedTimes(count)
        self._connections = memoryview(mmap.mmap(-1, 8 * count)).cast("q")
        self._pids: dict[int, tuple[int, float]] = {}
        """pid → which worker, and since when."""
        self._due: dict[int, float] = dict.fromkeys(range(count), 0.0)
        """Worker → when it is to be started."""
        self._failures: dict[int, int] = dict.fromkeys(range(count), 0)
        """Worker → how often in a row it has ended at once."""
        self._served: set[int] = set()
        """Those that could once be connected to."""
        self._alive, self._mine = os.pipe()  # readable to the workers when we have gone
        self._ready, self._tell_ready = os.pipe()
        self._woken, self._wake = os.pipe()
        self._ending = False
        self._status = 0

    def run(self, when_ready: Callable[[], None]) -> int:
        """Serve. when_ready is called when all workers can be connected to. Returns the exit status."""
        os.set_blocking(self._wake, False)
        previous = {number: signal.signal(number, lambda *_: None) for number in (*HANDED_ON, signal.SIGCHLD)}  # fmt: skip
        signal.set_wakeup_fd(self._wake)
        try:
            while self._due or self._pids:
                self._start_what_is_due()
                readable, _, _ = select.select([self._woken, self._ready], [], [], self._pause())
                if self._ready in readable:
                    before = len(self._served)
                    self._served |= set(os.read(self._ready, 256))
                    if before < len(self._served) == self._count:
                        when_ready()
                if self._woken in readable:
                    for number in os.read(self._woken, 256):
                        self._heed(number)
        finally:
            # What comes now would only spoil the exit status.
            signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
            signal.set_wakeup_fd(-1)
            for number, handler in previous.items():
                signal.signal(number, handler)
            for fd in (self._woken, self._wake, self._alive, self._mine, self._ready, self._tell_ready):  # fmt: skip
                os.close(fd)
        return self._status

    def _pause(self) -> float | None:
        """Seconds until a worker is to be started."""
        return max(min(self._due.values()) - time.monotonic(), 0) if self._due else None

    def _start_what_is_due(self) -> None:
        for number in [it for it, at in self._due.items() if at <= time.monotonic()]:
            del self._due[number]
            try:
                self._start(number)
            except OSError as exc:  # there are too many processes
                log.error("worker not started", worker=number, reason=exc.strerror)  # noqa: TRY400
                self._failed(number)

    def _start(self, number: int) -> None:
        # A signal that comes before the worker has its handlers waits for them: see reset_signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
        if pid:
            self._pids[pid] = (number, time.monotonic())
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for fd in (self._mine, self._woken, self._wake, self._ready):
                os.close(fd)
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
            lambda: self._tell_that_it_is_ready(number),
        )

    def _tell_that_it_is_ready(self, number: int) -> None:
        os.write(self._tell_ready, bytes([number]))

    def _heed(self, number: int) -> None:
        """Hand a signal on, or see who has ended."""
        if number == signal.SIGCHLD:
            with suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    self._ended(*ended)
        elif number == signal.SIGHUP:
            self._reread()
            self._send(number)
        elif number in HANDED_ON and not self._ending:
            self._end(0)

    def _end(self, status: int) -> None:
        self._ending, self._status = True, status
        self._due.clear()
        self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _ended(self, pid: int, status: int) -> None:
        if pid not in self._pids:
            return  # no worker: of whoever became this program, or an orphan, since we are process 1
        number, since = self._pids.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if self._ending:
            self._status = self._status or (code not in (0, -signal.SIGTERM))
            return
        log.error("worker ended", worker=number, pid=pid, exit=code)
        if time.monotonic() - since < QUICK:
            self._failed(number)
        else:
            self._failures[number], self._due[number] = 0, 0.0

    def _failed(self, number: int) -> None:
        """Try again: at first at once, then after ever longer pauses. The others go on serving."""
        self._failures[number] = tried = self._failures[number] + 1
        pause = min(2.0 ** (tried - 2), MAX_PAUSE) if tried > 1 else 0.0
        self._due[number] = time.monotonic() + pause
        if not self._served and tried >= MAX_FAILURES:
            log.error("workers do not start", tried=tried)
            self._end(1)
