"""One session: bytes between a program and a channel until the first end, then close once.

This module knows neither SSH nor the operating system, only the protocols below. Whatever ends
a session (the program, the client, the network, the server, a bug of ours), it leaves through
the same two blocks of `run_session`, so nothing is closed twice and nothing is forgotten.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Protocol

from .lifecycle import SILENT, Cause, Ending, Event, ExitStatus, Life, State, Trace

INPUT_GRACE = 0.2
"""Seconds in which a program may take what a client sent just before its CLOSE."""


class Source(Protocol):
    """Where bytes come from."""

    async def read(self) -> bytes:
        """Return bytes as soon as there are any; b"" at the end, and ever after."""


class Sink(Protocol):
    """Where bytes go."""

    async def write(self, data: bytes) -> None:
        """Deliver all of data; return when more is welcome. OSError: nobody reads any more."""


class InputSink(Sink, Protocol):
    """A sink that can be told that no more will come."""

    async def write_eof(self) -> None:
        """Let the reader see end of file, behind all that was written. OSError: as write."""


class Program(Protocol):
    """Something that runs: on a pseudo-terminal, on pipes, or far away."""

    @property
    def stdin(self) -> InputSink: ...

    @property
    def outputs(self) -> Sequence[Source]:
        """Standard output and, where it is apart, standard error."""

    ended: asyncio.Future[ExitStatus]
    """Done when the program has ended; output may still be on its way."""

    async def aclose(self) -> None:
        """Hang up, grace, kill, reap. May fail to be graceful, never to close; twice is silent."""


class Channel(Protocol):
    """The client's side of a session."""

    @property
    def stdin(self) -> Source: ...

    @property
    def outputs(self) -> Sequence[Sink]: ...

    ended: asyncio.Future[Cause]
    """Done when the client has gone, or when somebody wants the session to end."""

    async def aclose(self, status: ExitStatus | None) -> None:
        """EOF, exit-status, CLOSE, each with a deadline. Never fails to close; twice is silent."""


async def run_session(
    channel: Channel,
    program: Program,
    *,
    trace: Trace = SILENT,
    drain_timeout: float = 1800.0,
) -> Ending:
    """Carry bytes between channel and program to the first end, close both, tell how it went.

    drain_timeout: seconds in which a client must accept some of what an ended program has left.
    An error in our own code ends the session like everything else and is in the result.
    """
    life = Life(trace)
    # Whichever end comes first names the cause; the other one is then a consequence of it.
    program.ended.add_done_callback(lambda end: life.blame(end.result().cause))
    channel.ended.add_done_callback(lambda end: life.blame(end.result()))
    error: Exception | None = None
    delivered = False
    began = time.monotonic()
    life.advance(Event.SPAWNED)
    try:
        async with aclosing(program):
            try:
                delivered = await _carry(channel, program, life, drain_timeout)
            except Exception as exc:
                error = exc
                life.blame(Cause.ERROR)
                life.advance(Event.CUT)
        life.advance(Event.REAPED)
    finally:
        # The program goes first: only then is its exit status known, and no byte can follow EOF.
        status = program.ended.result() if program.ended.done() else None
        await channel.aclose(status)
    life.advance(Event.CHANNEL_CLOSED)
    seconds = time.monotonic() - began
    return Ending(
        life.cause or Cause.ERROR, status, life.bytes_in, life.bytes_out, seconds, delivered, error
    )


async def _carry(channel: Channel, program: Program, life: Life, drain_timeout: float) -> bool:
    """Wait for the first end, and leave no copier running. Returns whether all arrived."""
    bridge = asyncio.create_task(_bridge(channel, program, life))
    try:
        await _first(bridge, program.ended, channel.ended)
        if program.ended.done():
            life.advance(Event.PROGRAM_ENDED)
            await _drained(bridge, channel, life, drain_timeout)
        elif life.cause is Cause.CLIENT_CLOSED:
            await _first(bridge, within=INPUT_GRACE)
    finally:
        delivered = bridge.done()
        bridge.cancel()
        await asyncio.wait({bridge})
    if delivered:
        bridge.result()  # raises what went wrong in it
    delivered = delivered and life.state is State.DRAINING
    life.advance(Event.OUTPUT_ENDED if delivered else Event.CUT)
    return delivered


async def _drained(
    bridge: asyncio.Task[None], channel: Channel, life: Life, drain_timeout: float
) -> None:
    """Wait until all output is delivered, the client has gone, or takes nothing of what waits."""
    while not (bridge.done() or channel.ended.done()):
        before = life.bytes_out
        await _first(bridge, channel.ended, within=drain_timeout)
        if life.writes_waiting and life.bytes_out == before:
            return


async def _first(*ends: asyncio.Future[Any], within: float | None = None) -> None:
    await asyncio.wait(ends, timeout=within, return_when=asyncio.FIRST_COMPLETED)


async def _bridge(channel: Channel, program: Program, life: Life) -> None:
    """Do all the copying. Returns when the program has ended and its outputs are delivered."""
    async with asyncio.TaskGroup() as copiers:
        feeder = copiers.create_task(_copy_input(channel.stdin, program.stdin, life))
        # A terminal has one output, the channel always two.
        pairs = zip(program.outputs, channel.outputs, strict=False)
        outputs = [copiers.create_task(_copy_output(source, sink, life)) for source, sink in pairs]
        await asyncio.wait(outputs)
        await asyncio.wait({program.ended})  # not `await ended`: cancelling us must not cancel it
        feeder.cancel()


async def _copy_output(source: Source, sink: Sink, life: Life) -> None:
    while data := await source.read():
        life.writes_waiting += 1
        try:
            await sink.write(data)
        except BrokenPipeError:
            return  # the client has gone: channel.ended says why
        finally:
            life.writes_waiting -= 1
        life.bytes_out += len(data)


async def _copy_input(source: Source, sink: InputSink, life: Life) -> None:
    """Client EOF is a half-close: input ends, output keeps flowing (RFC 4254 §5.3)."""
    try:
        while data := await source.read():
            await sink.write(data)
            life.bytes_in += len(data)
        await sink.write_eof()
    except OSError:
        # The program has closed its input. Its output still matters (`ssh host head -1`), and
        # the client must be able to send the rest, or both would wait for each other.
        while await source.read():
            pass
    life.advance(Event.CLIENT_EOF)
