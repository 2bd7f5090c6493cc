"""Eight ways to do it wrong: wrappers round the real parts, and which part each takes the place of.

Nothing in the core knows of them. They are put in place in a server process of their own (child.py),
which ends with its exercise.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any
from unittest import mock

from .. import connection, pipes, process, pty
from ..channel import Channel
from ..launch import Command
from ..lifecycle import Cause, ExitStatus
from ..pipes import PipeInput, PipeProgram
from ..process import Child, Descriptor
from ..pty import PtyProgram
from ..session import Source


class EndsWithItsProgram:
    """lost-output: a program's output that is over as soon as the program is."""

    def __init__(self, source: Source, ended: asyncio.Future[ExitStatus]) -> None:
        self._source = source
        self._ended = ended

    async def read(self) -> bytes:
        """What there is; after the program's end nothing, though the pipe may hold 64 KiB of it."""
        reading = asyncio.ensure_future(self._source.read())
        ends: tuple[asyncio.Future[Any], ...] = (reading, self._ended)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if self._ended.done():
            reading.cancel()
            return b""
        return reading.result()

    def close(self) -> None:
        """Close the real one."""
        self._source.close()  # type: ignore[attr-defined]


class ClosesBeforeDrain(PipeProgram):
    """lost-output: a program whose outputs end with it."""

    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.outputs = tuple(EndsWithItsProgram(out, self.ended) for out in self.outputs)  # type: ignore[assignment]


class LeaksItsMaster(PtyProgram):
    """leaked-master: nobody closes the master, so the kernel hangs up on nobody."""

    __slots__ = ()

    async def aclose(self) -> None:
        """Forget about it. Only the end of the whole server will close the descriptor."""


def without_terminal(command: Command, *, terminal: bool, **descriptors: int) -> Child:  # noqa: ARG001
    """no-controlling-tty: the slave as standard input, output and error, and that is all.

    As a child of sh: bash knows this mistake, and a bash that leads its session mends it.
    """
    in_sh = ("/bin/sh", "-c", '"$@"; exit $?', "sh")
    return process.spawn(
        replace(command, argv=(*in_sh, *command.argv)), terminal=False, **descriptors
    )


class NeverReaps(Child):
    """zombie: learns how its program ended, and does not take the status away."""

    __slots__ = ()

    def _reap(self) -> None:
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # only looks
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.ended.set_result(ExitStatus(code=found.si_status if found else 0))


class SaysNoStatus(Channel):
    """missing-exit-status: EOF and CLOSE, as if that were all that a client waits for."""

    def _say_goodbye(self, status: ExitStatus | None) -> None:
        if not self.wire.is_closing():
            self.wire.write_eof()
            self.wire.close()


class BlocksInWrite(PipeInput):
    """blocking-write: the plainest way to write, on an event loop that everybody shares."""

    __slots__ = ()

    async def write(self, data: bytes) -> None:
        """Write all of it. The kernel lets us wait until the program reads."""
        os.set_blocking(self.fd, True)
        os.write(self.fd, data)


class ClosesTwice(Descriptor):
    """fd-reuse: closes a number that is somebody else's by now."""

    __slots__ = ()

    def close(self) -> None:
        """Close, and again a little later, to be sure."""
        number = self.fd
        super().close()
        if number >= 0:
            self._loop.call_later(0.3, close_quietly, number)


def close_quietly(number: int) -> None:
    """close(2), without asking whose it is."""
    with suppress(OSError):
        os.close(number)


class TakesEofForGoodbye(Channel):
    """eof-is-close: a client that will send no more is taken for one that has gone."""

    def eof_received(self) -> bool:
        """End the session."""
        self.end(Cause.CLIENT_CLOSED)
        return False


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "lost-output": (connection, "PipeProgram", ClosesBeforeDrain),
    "leaked-master": (connection, "PtyProgram", LeaksItsMaster),
    "no-controlling-tty": (pty, "spawn", without_terminal),
    "zombie": (process, "Child", NeverReaps),
    "missing-exit-status": (connection, "Channel", SaysNoStatus),
    "blocking-write": (pipes, "PipeInput", BlocksInWrite),
    "fd-reuse": (pty, "Descriptor", ClosesTwice),
    "eof-is-close": (connection, "Channel", TakesEofForGoodbye),
}
"""Exercise → the module in which a name means the fault, in place of the real part."""


@contextmanager
def fault(name: str) -> Iterator[None]:
    """Put the fault of an exercise in place; "" is none."""
    with ExitStack() as stack:
        if name:
            module, part, wrong = FAULTS[name]
            stack.enter_context(mock.patch.object(module, part, wrong))
        yield
