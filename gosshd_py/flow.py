"""The bytes of a channel (RFC 4254 §5): held for whoever takes them, sent when the client has room.

Every kind of channel flows like this: channel.py adds the requests of a session, forward.py the
socket of a forward. Promises: output waits for the client at both levels, window and TCP; the end
of a channel is noticed, whatever is paused.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import asyncssh

from .lifecycle import SILENT, Cause, Trace

INPUT_HIGH = 64 * 1024
"""Bytes of input held before reading from the channel stops."""


class Fillable:
    """What can be full: a channel's window, or the TCP buffer below it."""

    full: asyncio.Future[None] | None = None
    """While it is: done when it takes more. (An asyncio.Event would be 700 bytes for each session.)"""

    def fill(self) -> None:
        """It takes no more for now."""
        self.full = self.full or asyncio.get_running_loop().create_future()

    def make_room(self) -> None:
        """It takes more, or whoever waits need not wait any longer."""
        if self.full is not None:
            self.full.set_result(None)
            self.full = None


class FlowHost(Protocol):
    """What the flow of a channel asks of its connection."""

    full: asyncio.Future[None] | None

    def channel_closed(self, channel: Any) -> None: ...


class ChannelInput:
    """What the client has sent and the program has not yet taken: a session.Source."""

    __slots__ = ("_channel", "_chunks", "_ended", "_size", "_waiter")

    def __init__(self, channel: Flow) -> None:
        self._channel = channel
        self._chunks: list[bytes] = []
        self._size = 0
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def feed(self, data: bytes) -> None:
        """Take data from the client; stop the channel's reading while too much is held."""
        self._chunks.append(data)
        self._size += len(data)
        if self._size >= INPUT_HIGH:
            self._channel.wire.pause_reading()
        self._wake()

    def feed_eof(self) -> None:
        """Take note that no more comes."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self) -> bytes:
        """All that is there as soon as there is any; b"" at the end."""
        while not self._chunks:
            if self._ended:
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        self._channel.wire.resume_reading()
        return data


class ChannelOutput:
    """One stream to the client, standard output or (datatype 1) standard error: a session.Sink."""

    __slots__ = ("_channel", "_datatype")

    def __init__(self, channel: Flow, datatype: int | None = None) -> None:
        self._channel = channel
        self._datatype = datatype

    async def write(self, data: bytes) -> None:
        """Send data; return when window and TCP take more. BrokenPipeError: the client has gone."""
        self._channel.active = asyncio.get_running_loop().time()
        await self._channel.wire.keys_exchanged()
        self._channel.wire.write(data, self._datatype)
        await self._channel.writable()


class Flow(Fillable):
    """A channel's bytes and its end: the part of session.Channel that all kinds have.

    active: when the last byte went in either direction (the loop's time).
    """

    wire: Any
    trace: Trace = SILENT

    def __init__(self, host: FlowHost) -> None:
        self._loop = asyncio.get_running_loop()
        self.channel_host = host
        self.active = self._loop.time()
        self.stdin = ChannelInput(self)
        self.outputs = (ChannelOutput(self), ChannelOutput(self, asyncssh.EXTENDED_DATA_STDERR))
        self.ended: asyncio.Future[Cause] = self._loop.create_future()

    @property
    def has_terminal(self) -> bool:
        """Whether a person may be reading."""
        return False

    def connection_made(self, chan: Any) -> None:
        """Wait for an empty buffer after each write: low and high water are both zero."""
        chan.set_write_buffer_limits(high=0, low=0)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Input."""
        self.active = self._loop.time()
        self.stdin.feed(data)

    def eof_received(self) -> bool:
        """Client EOF: a half-close. False would make asyncssh close our output too."""
        self.stdin.feed_eof()
        return True

    def pause_writing(self) -> None:
        """The client's window is full."""
        self.fill()
        self.trace("window.paused")

    def resume_writing(self) -> None:
        """All output fits the client's window."""
        self.make_room()
        self.trace("window.resumed")

    async def writable(self) -> None:
        """Wait until window and TCP both take more, or the connection has ended."""
        while full := self.full or self.channel_host.full:
            await asyncio.wait({full})

    def end(self, cause: Cause, text: str = "") -> None:
        """Ask for the end, for this cause; the first cause wins. text: for who can be told."""
        if not self.ended.done():
            self.ended.set_result(cause)
        if self.ended.result() is Cause.CLIENT_CLOSED and not self.has_terminal:
            self.stdin.feed_eof()  # what it sent before may still be used; but nobody types a ^D

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is gone: by the client's CLOSE, or with its connection."""
        self.end(Cause.CLIENT_CLOSED)
        self.make_room()
