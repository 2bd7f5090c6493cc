"""A child process and the file descriptors that lead to it; `pty.py` and `pipes.py` build on it.

Promises: nothing here blocks the event loop, every descriptor has one owner and is closed
once, and a child is reaped the moment it ends, whatever its session is waiting for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .launch import Command, directly, nofile_of_programs, through_a_shell
from .lifecycle import SILENT, ExitStatus, SpawnError, Trace

CHUNK = 64 * 1024
"""Bytes per read at most, so that one loud session leaves the loop to the others."""

PTY_MOST = 4095
"""Bytes that one read(2) of a terminal gives, at most one more than this."""

KILL_WAIT = 1.0
"""Seconds to wait for a child after SIGKILL; only one stuck in the kernel takes longer."""


def spawn(command: Command, *, stdin: int, stdout: int, stderr: int, terminal: bool) -> Child:
    """Start command in a session (setsid(2)) of its own. Raises SpawnError with the reason.

    Popen uses vfork: no Python code runs in the child, and the loop stands still for about
    a millisecond, whatever the server's memory.
    """
    program = command.argv[0]
    if any("\0" in os.fsdecode(word) for word in command.argv):
        raise SpawnError("the command holds a NUL byte, which no argument can")
    if not os.access(program, os.X_OK):
        raise SpawnError(f"{os.fsdecode(program)}: not found or not executable on this server")
    began = time.monotonic()
    try:
        with nofile_of_programs(stdin):
            popen = _start(command, terminal=terminal, stdin=stdin, stdout=stdout, stderr=stderr)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise SpawnError(f"cannot start {os.fsdecode(program)}: {reason}") from exc
    popen.returncode = 0  # or subprocess would reap it behind our back
    try:
        child = Child(popen.pid, command.trace)
    except OSError as exc:
        os.kill(popen.pid, signal.SIGKILL)
        os.waitpid(popen.pid, 0)
        raise SpawnError(f"cannot watch {os.fsdecode(program)}: {exc.strerror}") from exc
    child.trace(
        "program.spawned",
        pid=child.pid, pgid=lambda: os.getpgid(child.pid), sid=lambda: os.getsid(child.pid),
        argv=command.argv, terminal=command.env.get("SSH_TTY") if terminal else None,
        us=int((time.monotonic() - began) * 1e6),
    )  # fmt: skip
    return child


def _start(command: Command, *, terminal: bool, **descriptors: Any) -> subprocess.Popen[bytes]:
    """One way or the other. Raises OSError and ValueError."""

    def start(argv: Any, env: Any, cwd: str | None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(argv, env=env, cwd=cwd, start_new_session=True, **descriptors)

    way = None if terminal else directly(command)
    if way is not None:
        with suppress(OSError):  # the shell knows what to do about that, or what to say
            return start(*way)
    return start(*through_a_shell(command, terminal=terminal))


class Child:
    """A running child. `ended` is done once it is reaped; until then its pid is ours to signal."""

    __slots__ = ("_loop", "_pidfd", "ended", "pid", "trace")

    def __init__(self, pid: int, trace: Trace = SILENT) -> None:
        self.trace = trace
        self._loop = asyncio.get_running_loop()
        self.pid = pid
        self.ended: asyncio.Future[ExitStatus] = self._loop.create_future()
        self._pidfd = os.pidfd_open(pid)
        try:
            self._loop.add_reader(self._pidfd, self._reap)
        except OSError:
            os.close(self._pidfd)
            raise

    def _reap(self) -> None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if os.WIFSIGNALED(status):
            ended = ExitStatus(signal=os.WTERMSIG(status), core_dumped=os.WCOREDUMP(status))
        else:
            ended = ExitStatus(code=os.WEXITSTATUS(status))
        self.trace("program.reaped", pid=pid, status=status, ended=str(ended))
        self.ended.set_result(ended)

    def signal_group(self, number: int, pgid: int | None = None) -> None:
        """Send a signal to a process group, by default the child's; never after it is reaped.

        A group that has just gone, or that became another user (sudo), is left alone.
        """
        if not self.ended.done():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pgid or self.pid, number)
                name = signal.Signals(number).name
                self.trace("signal.sent", signal=name, pgid=pgid or self.pid)

    async def ends_within(self, seconds: float) -> bool:
        """Wait for the end, but not longer. Returns whether it has come."""
        await asyncio.wait({self.ended}, timeout=seconds)
        return self.ended.done()

    async def end(self, grace: float, *groups: int) -> None:
        """Give the child `grace` seconds to end, then kill it and the named process groups."""
        if await self.ends_within(grace):
            return
        for pgid in {self.pid, *groups}:
            self.signal_group(signal.SIGKILL, pgid)
        await self.ends_within(KILL_WAIT)


class Descriptor:
    """One file descriptor: reads and writes that wait without blocking, and one close.

    After close() the number is -1, since the kernel gives it to the next session at once, and
    the event loop is told before: a reader left behind would read another session's bytes.
    """

    __slots__ = (
        *("_asked", "_close", "_loop", "_number", "_read_waiter", "_trace", "_watched", "_what"),
        *("_write_waiter", "fd"),
    )

    def __init__(
        self,
        fd: int,
        close: Callable[[], object] | None = None,
        trace: Trace = SILENT,
        what: str = "",
        **asked: Callable[[], object],
    ) -> None:
        """Own fd. For its events, what it is, and what is asked about it when data goes by.

        For input that is asked before it is written and, whether it is echoed, again behind it:
        who asks for a password turns the echo off before, and on again right after.
        """
        os.set_blocking(fd, False)
        self.fd = fd
        self._trace, self._number, self._what = trace, fd, what
        self._asked = asked
        self._close = close or (lambda: os.close(fd))
        self._loop = asyncio.get_running_loop()
        self._watched = False
        self._read_waiter: asyncio.Future[None] | None = None
        self._write_waiter: asyncio.Future[None] | None = None

    @property
    def _facts(self) -> dict[str, object]:
        """For its events, also after the close."""
        return {"fd": self._number, "what": self._what}

    def read_now(self) -> bytes | None:
        """What is there, up to CHUNK; None when nothing is; b"" at end of file or after close.

        Reads until the descriptor is empty: a pty gives 4 KiB a time at most, and one large SSH
        packet costs far less than sixteen small ones. Raises OSError (EIO: see pty.py).
        """
        if self.fd < 0:
            return b""
        parts: list[bytes] = []
        room = CHUNK
        try:
            while room > 0 and (data := os.read(self.fd, room)):
                parts.append(data)
                room = room - len(data) if len(data) >= PTY_MOST else 0  # less: it is empty now
        except BlockingIOError:
            if not parts:
                return None
        except OSError:
            if not parts:
                raise
        if data := b"".join(parts):
            self._trace("output.read", bytes=len(data), data=data, **self._facts, **self._asked)
        else:
            self._trace("output.ended", why="EOF", **self._facts)
        return data

    def readable(self) -> asyncio.Future[None]:
        """A future that is done when a read may bring something. One reader at a time."""
        self._read_waiter = self._loop.create_future()
        if self.fd < 0:
            self._read_waiter.set_result(None)
        elif not self._watched:
            self._watched = True
            self._loop.add_reader(self.fd, self.wake_reader)
        return self._read_waiter

    def wake_reader(self) -> None:
        """Let whoever waits for readable() look again."""
        if self._read_waiter is not None and not self._read_waiter.done():
            self._read_waiter.set_result(None)
        elif self._watched:
            # Nobody wants bytes now. Stop watching, or a full descriptor would spin the loop.
            self._watched = False
            self._loop.remove_reader(self.fd)

    async def read(self) -> bytes:
        """Some bytes as soon as there are any, b"" at end of file or after close.

        Waits even when there are some: that gives every session one turn of the loop for each
        chunk. Else a loud program and a quick client would keep the loop for a whole window.
        """
        while True:
            await self.readable()
            if (data := self.read_now()) is not None:
                return data

    async def write(self, data: bytes) -> None:
        """Write all of data, waiting whenever the other side is full. Raises OSError."""
        view = memoryview(data)
        before = self._trace.ask(self._asked)
        while view:
            if self.fd < 0:
                raise BrokenPipeError("closed")
            try:
                view = view[os.write(self.fd, view) :]
            except BlockingIOError:
                await self._writable()
        self._trace(
            "input.written", bytes=len(data), data=data, **self._facts, **before, after=self._asked
        )

    async def _writable(self) -> None:
        self._write_waiter = waiter = self._loop.create_future()
        self._loop.add_writer(self.fd, _wake, waiter)
        self._trace("input.paused", **self._facts)
        try:
            await waiter
        finally:
            self._trace("input.resumed", **self._facts)
            if self.fd >= 0:
                self._loop.remove_writer(self.fd)

    def close(self) -> None:
        """Close once; later calls do nothing. Whoever waits is woken and sees the end."""
        if self.fd < 0:
            return
        self._loop.remove_reader(self.fd)
        self._loop.remove_writer(self.fd)
        self.fd, self._watched = -1, False
        self._close()
        self._trace("fd.closed", **self._facts)
        for waiter in (self._read_waiter, self._write_waiter):
            if waiter is not None:
                _wake(waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
