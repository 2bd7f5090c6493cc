"""A program on three pipes: exec or shell without a pty. Owns the three descriptors and the child.

Standard output and standard error stay apart, and the output ends when the last writer has
closed it, be it a background job (as with OpenSSH's sshd).
"""

from __future__ import annotations

import asyncio
import os
import signal

from .launch import Command
from .lifecycle import ExitStatus, SpawnError, WindowSize
from .process import Child, Descriptor, spawn

EOF_GRACE = 0.3
"""Seconds between closing the pipes and SIGHUP: most programs end at EOF or SIGPIPE by themselves."""


class PipeInput(Descriptor):
    """A program's standard input; its end of file is the close of the pipe."""

    __slots__ = ()

    async def write_eof(self) -> None:
        """Close the pipe: the reader sees end of file behind the last byte."""
        self.close()


class PipeProgram:
    """A running program on pipes. See session.Program for what its parts promise."""

    __slots__ = ("_child", "_grace", "ended", "outputs", "stdin")

    def __init__(self, child: Child, stdin: int, stdout: int, stderr: int, grace: float) -> None:
        self._child = child
        self._grace = grace
        self.ended: asyncio.Future[ExitStatus] = child.ended
        self.stdin = PipeInput(stdin, trace=child.trace, what="stdin")
        self.outputs = (
            Descriptor(stdout, trace=child.trace, what="stdout"),
            Descriptor(stderr, trace=child.trace, what="stderr"),
        )

    @classmethod
    def spawn(cls, command: Command, grace: float = 2.5) -> PipeProgram:
        """Start command. grace: seconds between SIGHUP and SIGKILL. Raises SpawnError."""
        fds: list[int] = []
        try:
            for _ in range(3):
                fds += os.pipe()
            in_read, in_write, out_read, out_write, err_read, err_write = fds
            command.trace("pipes.opened", stdin=in_write, stdout=out_read, stderr=err_read)
            child = spawn(
                command, stdin=in_read, stdout=out_write, stderr=err_write, terminal=False
            )
        except (OSError, SpawnError) as exc:
            for fd in fds:
                os.close(fd)
            if isinstance(exc, SpawnError):
                for what, fd in (("stdin", in_write), ("stdout", out_read), ("stderr", err_read)):
                    command.trace("fd.closed", fd=fd, what=what)
                raise
            raise SpawnError(f"cannot open a pipe: {exc.strerror}") from exc
        for fd in (in_read, out_write, err_write):
            os.close(fd)
        return cls(child, in_write, out_read, err_read, grace)

    def resize(self, size: WindowSize) -> None:
        """Do nothing: there is no terminal (RFC 4254 §6.7 asks for no answer)."""

    def send_signal(self, number: int) -> None:
        """Deliver a signal to the program's process group (RFC 4254 §6.9)."""
        self._child.signal_group(number)

    def send_break(self) -> bool:
        """Refuse: only a terminal has a break (RFC 4335)."""
        return False

    async def aclose(self) -> None:
        """Close the pipes; EOF, then SIGHUP, grace, SIGKILL; reap. Twice is silent."""
        for end in (self.stdin, *self.outputs):
            end.close()
        if not await self._child.ends_within(EOF_GRACE):
            self._child.signal_group(signal.SIGHUP)
            self._child.signal_group(signal.SIGCONT)
            await self._child.end(self._grace)
