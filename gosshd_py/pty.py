"""A program on a pseudo-terminal. Owns the master and the child; the only module with ptyprocess.

Promises: the terminal has its size and modes before the program runs; the output is complete
when the program has ended, even while a background job keeps the terminal open; end of input
reaches the program as the terminal's own VEOF character.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import os
import select
import signal
import struct
import termios
from contextlib import suppress
from dataclasses import replace
from grp import getgrnam
from typing import Any

from ptyprocess import PtyProcess

from .launch import Command
from .lifecycle import ExitStatus, SpawnError, Terminal, WindowSize
from .modes import set_modes
from .process import Child, Descriptor, spawn

QUIET = 0.25
"""Seconds without output after which an ended program's terminal counts as read to the end."""

LATE_SECONDS = 0.75
LATE_BYTES = 128 * 1024
"""How long is waited, and how much is read, after the program's end while a background job writes.
The kernel holds about 22 KiB of a pty's output, so nothing that the program wrote is cut."""

REOPEN_WAIT = 0.1
"""Seconds between looks at a terminal that no process has open just now."""

_PEER_FLAGS = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
TIOCGPTPEER = 0x5441  # from Linux's headers: the slave of a master, opened without its name


class PtyHandle(PtyProcess):  # type: ignore[misc]  # no types
    """ptyprocess's pair of pid and master fd, without the methods that sleep or block.

    Its `fileobj` is what closes the descriptor: os.close() besides it would close the number
    twice, and by then it may belong to another session.
    """

    def __init__(self, pid: int, fd: int) -> None:
        # Not PtyProcess's own: it adds two buffers of 8 KiB that nobody here reads by, which was
        # a quarter of what an idle session needs.
        self.pid, self.fd = pid, fd
        self.fileobj = io.FileIO(fd, "r+")

    def __del__(self) -> None:
        """Do nothing: PtyProcess closes here, with a sleep, on the event loop."""


class PtyProgram:
    """A running program on a pty. See session.Program for what its parts promise."""

    __slots__ = (
        *("_child", "_grace", "_handle", "_late_bytes", "_late_seconds", "_line_open", "_master"),
        "ended",
    )

    def __init__(self, handle: PtyHandle, child: Child, grace: float) -> None:
        self._handle = handle
        self._child = child
        self._grace = grace
        asked = {"foreground": self._group, "echo": self._echo}
        self._master = Descriptor(handle.fd, handle.fileobj.close, child.trace, "master", **asked)
        self._late_bytes, self._late_seconds = LATE_BYTES, LATE_SECONDS
        self._line_open = False
        self.ended: asyncio.Future[ExitStatus] = child.ended
        self.ended.add_done_callback(lambda _: self._master.wake_reader())

    @classmethod
    def spawn(cls, command: Command, terminal: Terminal, grace: float = 2.5) -> PtyProgram:
        """Start command on a new pty. grace: seconds between hang-up and SIGKILL.

        Adds TERM and SSH_TTY to the environment. Raises SpawnError.
        """
        try:
            master, slave = os.openpty()
        except OSError as exc:
            raise SpawnError(
                f"cannot open a pseudo-terminal on this server: {exc.strerror}"
            ) from exc
        try:
            set_modes(slave, terminal.modes)
            set_size(slave, terminal.size)
            name = _give(slave, command)
            env = {**command.env, "TERM": terminal.term, "SSH_TTY": name}
            # The pty-req's TERM counts, not one from an env request.
            client_env = {key: value for key, value in command.client_env.items() if key != "TERM"}
            started = replace(command, env=env, client_env=client_env)
            size = str(terminal.size)
            command.trace("pty.opened", master=master, slave=slave, name=name, size=size)
            child = spawn(started, stdin=slave, stdout=slave, stderr=slave, terminal=True)
        except BaseException as exc:
            os.close(master)
            command.trace("fd.closed", fd=master, what="master")
            if isinstance(exc, (OSError, termios.error)):
                raise SpawnError(f"cannot set up the terminal: {exc.args[1]}") from exc
            raise
        finally:
            os.close(slave)
            command.trace("fd.closed", fd=slave, what="slave")
        return cls(PtyHandle(child.pid, master), child, grace)

    @property
    def pid(self) -> int:
        """The process ID of the program, which leads the terminal's session."""
        return self._child.pid

    @property
    def stdin(self) -> PtyProgram:
        """The terminal is both ends at once."""
        return self

    @property
    def outputs(self) -> tuple[PtyProgram]:
        """Standard output and standard error are one stream on a terminal."""
        return (self,)

    # -- output -----------------------------------------------------------------------------

    async def read(self) -> bytes:
        """Output as soon as there is any; b"" when the program has ended and all is read."""
        while await self._more_output():
            try:
                data = self._master.read_now()
            except OSError as exc:
                if exc.errno != errno.EIO:
                    raise
                if not await self._reopened():
                    return self._output_ended("EIO")
                continue
            if data is not None:
                return data if self._in_time(len(data)) else self._output_ended("late")
        return self._output_ended("quiet")

    def _output_ended(self, why: str) -> bytes:
        self._child.trace("output.ended", why=why, fd=self._master.fd, what="master")
        return b""

    def _in_time(self, size: int) -> bool:
        """Count what comes after the end: past the limit it is a background job's, not ours."""
        if self.ended.done():
            self._late_bytes -= size
        return self._late_bytes > 0

    async def _reopened(self) -> bool:
        """EIO: no process has the slave open (Linux's end of file for a master, pty(7)).

        While the program lives it may open /dev/tty again, so only its end makes this the end.
        """
        if self.ended.done():
            return False
        await self._child.ends_within(REOPEN_WAIT)
        return True  # and one more look after its end: it may have opened, written and ended

    async def _more_output(self) -> bool:
        """Wait for output, at least one turn of the loop. False: ended, and quiet since then."""
        readable = self._master.readable()
        if not self.ended.done():
            await readable
            return True
        if self._late_seconds <= 0:
            return False
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.wait({readable}, timeout=min(QUIET, self._late_seconds))
        self._late_seconds -= loop.time() - began
        return readable.done()

    # -- input ------------------------------------------------------------------------------

    async def write(self, data: bytes) -> None:
        """Type data at the terminal, as fast as it takes it. Raises OSError once closed."""
        await self._master.write(data)
        self._line_open = data[-1:] not in (b"\r", b"\n")

    async def write_eof(self) -> None:
        """Type the terminal's VEOF character so that a program sees end of file (termios(3)).

        Once, but for two cases. Behind an unfinished line the first one only hands over the
        line. And typed ahead it can get lost: the kernel drops a waiting end of file when a
        program leaves canonical mode, as bash does before each prompt. So it is typed when all
        other input is taken, and again if a change of mode has swallowed it.
        """
        needed = 2 if self._line_open else 1
        while needed:
            await self._input_taken()
            mode = self._attributes()
            veof = mode[6][termios.VEOF]
            if veof == b"\0":
                return  # the user has turned the character off (_POSIX_VDISABLE)
            await self.write(veof)
            self._child.trace("veof.typed", character=veof)
            if not mode[3] & termios.ICANON:
                return  # a raw program reads the character itself
            await self._input_taken()
            if self._attributes()[3] & termios.ICANON:
                needed -= 1

    def _attributes(self) -> list[Any]:
        """The terminal's modes (termios(3)). Raises OSError, which termios.error is not."""
        if self._master.fd < 0:
            raise BrokenPipeError("closed")
        try:
            return termios.tcgetattr(self._master.fd)
        except termios.error as exc:
            raise OSError(*exc.args) from exc

    async def _input_taken(self) -> None:
        """Wait until the terminal holds no unread input, not even a waiting end of file."""
        pause = 0.001
        while True:
            await asyncio.sleep(pause)  # no event tells of this: look, ever more rarely
            pause = min(2 * pause, 0.05)
            try:
                slave = fcntl.ioctl(self._master.fd, TIOCGPTPEER, _PEER_FLAGS)
            except (OSError, ValueError):
                return  # closed, or no descriptor to look through: better typed early than never
            try:
                poll = select.poll()
                poll.register(slave, select.POLLIN)
                if not poll.poll(0):
                    return
            finally:
                os.close(slave)

    # -- everything beside the data: acts at once, never queued behind unread input ----------

    def resize(self, size: WindowSize) -> None:
        """Set the size; the kernel tells the foreground group by SIGWINCH (RFC 4254 §6.7)."""
        if self._master.fd >= 0:
            set_size(self._master.fd, size)
            self._child.trace("pty.resized", size=str(size), foreground=self._group)

    def send_signal(self, number: int) -> None:
        """Deliver a signal to the terminal's foreground process group (RFC 4254 §6.9)."""
        self._child.signal_group(number, self._foreground())

    def send_break(self) -> bool:
        """A break interrupts, as on a line with BRKINT (termios(3), RFC 4335); IGNBRK ignores it."""
        if self._master.fd < 0:
            return False
        if not self._attributes()[0] & termios.IGNBRK:
            self.send_signal(signal.SIGINT)
        return True

    def _group(self) -> int:
        """The foreground process group; 0: none. Raises OSError."""
        return os.tcgetpgrp(self._master.fd)

    def _echo(self) -> bool:
        return bool(self._attributes()[3] & termios.ECHO)

    def _foreground(self) -> int:
        """The same, or the program's own where the terminal has none."""
        with suppress(OSError):
            return self._group() or self.pid
        return self.pid

    async def aclose(self) -> None:
        """Hang up, grace, kill, reap. Twice is silent.

        Closing the master is the hang-up: the kernel sends SIGHUP and SIGCONT to the session
        leader and to the foreground group (tty_ioctl(4)). Background jobs live on, as they do
        when somebody closes a terminal window.
        """
        foreground = self._foreground()
        self._master.close()
        await self._child.end(self._grace, foreground)


def _give(slave: int, command: Command) -> str:
    """Make the slave the shell user's own, group tty, mode 620, as sshd does. Returns its name."""
    if command.run_as is not None:
        uid, gid = command.run_as
        with suppress(KeyError):
            gid = getgrnam("tty").gr_gid
        os.fchmod(slave, 0o620)  # first, while it is ours: afterwards it takes CAP_FOWNER
        os.fchown(slave, uid, gid)
    return os.ttyname(slave)


def set_size(fd: int, size: WindowSize) -> None:
    """TIOCSWINSZ. ptyprocess's setwinsize() would lose the size in pixels."""
    winsize = struct.pack("HHHH", size.rows, size.columns, size.xpixel, size.ypixel)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, winsize)
