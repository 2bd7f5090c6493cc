"""asyncssh's channels, with what its public callbacks cannot see or refuse.

Promises: absurd packet sizes are refused; the end of a channel is told whatever is paused, with
its cause; nothing piles up while keys are exchanged.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import asyncssh

from .lifecycle import Cause

MIN_PACKET = 256
"""Smallest maximum packet size accepted: at one byte a packet, 16 KiB stall the loop for 0.6 s."""

_OVERRIDDEN = ("process_open", "process_connection_close", "_close_send", "_cleanup")


class Watcher(Protocol):
    """Who is told of a channel's end: flow.Flow."""

    channel_host: Any

    def end(self, cause: Cause, text: str = "") -> None: ...


class Watched:
    """A mixin for asyncssh's channels of all kinds: refuses what it accepts, tells what it hides.

    asyncssh calls these methods by name, so a renamed one would silently do nothing; the check
    below refuses to run on such a version.
    """

    flow: Watcher
    _conn: Any
    _session: Any

    def process_open(
        self, send_chan: int, send_window: int, send_pktsize: int, session: Any
    ) -> None:
        """Refuse absurd packet sizes (RFC 4254 §5.1), then go on as usual."""
        if send_pktsize < MIN_PACKET:
            reason = f"a maximum packet size of {send_pktsize} bytes is too small"
            session = _refuse_open(reason)
        super().process_open(send_chan, send_window, send_pktsize, session)  # type: ignore[misc]

    def resume_reading(self) -> None:
        """Not after the channel's end: asyncssh would look for the session it has let go."""
        if self._session is not None:
            super().resume_reading()  # type: ignore[misc]

    async def keys_exchanged(self) -> None:
        """Wait while keys are exchanged: what is sent meanwhile, asyncssh holds without a bound.

        transport.py disconnects a client that does not finish one.
        """
        while self._conn is not None and not self._conn._kex_complete:  # noqa: SLF001, ASYNC110
            await asyncio.sleep(0.01)  # no event tells, and it takes milliseconds

    def _cleanup(self, exc: Exception | None = None) -> None:
        super()._cleanup(exc)  # type: ignore[misc]  # how every channel ends, also one that was never opened
        self.flow.channel_host.channel_closed(self.flow)

    def process_connection_close(self, exc: Exception | None) -> None:
        """Name the cause before the clean-up below looks like a CLOSE."""
        self.flow.end(Cause.CLIENT_CLOSED if exc is None else Cause.CONNECTION_LOST)
        super().process_connection_close(exc)  # type: ignore[misc]

    def _close_send(self) -> None:
        # Also how CLOSE arrives while input is paused, when no callback would tell us.
        super()._close_send()  # type: ignore[misc]
        self.flow.end(Cause.CLIENT_CLOSED)


for _name in _OVERRIDDEN:
    if not hasattr(asyncssh.SSHServerChannel, _name):
        raise ImportError(f"asyncssh {asyncssh.__version__} is not supported: it has no {_name}")


async def _refuse_open(reason: str) -> None:
    raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, reason)
