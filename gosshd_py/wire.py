"""asyncssh's channels, with what its public callbacks cannot see or refuse.

Promises: absurd packet sizes are refused; the end of a channel is told whatever is paused, with
its cause; nothing piles up while keys are exchanged; requests that asyncssh would accept unseen, or
end the connection for, reach channel.py.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, Protocol

import asyncssh
from asyncssh.constants import MSG_CHANNEL_CLOSE
from asyncssh.packet import PacketDecodeError, SSHPacket

from .lifecycle import Cause, Trace
from .packets import Packets

MIN_PACKET = 256
"""Smallest maximum packet size accepted: at one byte a packet, 16 KiB stall the loop for 0.6 s."""

_TOO_SMALL = "a maximum packet size of {} bytes is too small"

WINDOW = 1024 * 1024
"""Bytes that a client may send ahead of what takes them."""

MAX_PACKET = 32 * 1024
"""Bytes of data in a packet to us."""

_OVERRIDDEN = (
    *("process_open", "process_open_confirmation", "process_connection_close"),
    *("process_packet", "_cleanup"),
    *("log_sent_packet", "log_received_packet"),
    *(f"_process_{name}_request" for name in ("pty_req", "env", "shell", "exec", "subsystem")),
    *("_service_next_request", "_report_response"),
    "_process_auth_agent_req_at_openssh_dot_com_request",
)


class Watcher(Protocol):
    """Who is told of a channel's end: flow.Flow."""

    channel_host: Any
    trace: Trace

    def end(self, cause: Cause, text: str = "") -> None: ...


class Watched:
    """A mixin for asyncssh's channels of all kinds: refuses what it accepts, tells what it hides.

    asyncssh calls these methods by name, so a renamed one would silently do nothing; the check
    at the end of this file refuses to run on such a version.
    """

    flow: Watcher
    streams: ClassVar[dict[str, str]] = {}
    """What the data of each way, received and sent, is to a program, if there is one."""
    _conn: Any
    _recv_chan: Any
    _session: Any

    def carry(self, flow: Watcher) -> None:
        """Tell everything to flow, and the packets to those who listen."""
        self.flow = flow
        flow.trace = self._conn.trace.of(self._recv_chan)
        self._packets = Packets(flow.trace, self.streams)

    def log_sent_packet(self, pkttype: int, pktid: int | None, packet: Any, note: str = "") -> None:
        """A packet of this channel goes out."""
        self._packets.sent(packet)

    def log_received_packet(
        self, pkttype: int, pktid: int | None, packet: Any, note: str = ""
    ) -> None:
        """One has come in."""
        self._packets.received(packet.get_full_payload())

    def process_open(
        self, send_chan: int, send_window: int, send_pktsize: int, session: Any
    ) -> None:
        """Refuse absurd packet sizes (RFC 4254 §5.1), then go on as usual."""
        if send_pktsize < MIN_PACKET:
            if asyncio.iscoroutine(session):
                session.close()
            session = _refuse_open(_TOO_SMALL.format(send_pktsize))
        super().process_open(send_chan, send_window, send_pktsize, session)  # type: ignore[misc]

    def process_open_confirmation(
        self, send_chan: int, send_window: int, send_pktsize: int, packet: SSHPacket
    ) -> None:
        """The same for a channel that we open: here the client can only be cut off."""
        if send_pktsize < MIN_PACKET:
            raise asyncssh.ProtocolError(_TOO_SMALL.format(send_pktsize))
        super().process_open_confirmation(  # type: ignore[misc]
            send_chan, send_window, send_pktsize, packet
        )

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

    def process_packet(self, pkttype: int, pktid: int, packet: SSHPacket) -> Any:
        """The client's CLOSE counts even while input is paused, when no callback would tell us."""
        if pkttype == MSG_CHANNEL_CLOSE:
            self.flow.end(Cause.CLIENT_CLOSED)
        return super().process_packet(pkttype, pktid, packet)  # type: ignore[misc]


async def _refuse_open(reason: str) -> None:
    raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, reason)


class Requests(Watcher, Protocol):
    """Who answers the requests of a session channel: channel.Channel. None: the answer follows."""

    def pty_req(self, term: bytes, sizes: list[int], modes: bytes) -> bool: ...
    def env_req(self, name: bytes, value: bytes) -> bool: ...
    def agent_req(self) -> None: ...
    def start(self, kind: str, command: bytes = b"") -> bool | None: ...


class SessionWire(Watched, asyncssh.SSHServerChannel[bytes]):
    """The channel of a session: takes the bytes of its requests apart (RFC 4254 §6)."""

    streams: ClassVar = {"received": "stdin", "sent": "stdout"}

    def __init__(self, conn: asyncssh.SSHServerConnection, requests: Requests) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            conn, loop, allow_pty=True, line_editor=False, line_echo=False, line_history=0,
            max_line_length=0, encoding=None, errors="strict", window=WINDOW, max_pktsize=MAX_PACKET,
        )  # fmt: skip
        self._requests = requests
        self._servicing = False
        self.carry(requests)

    def _service_next_request(self) -> None:
        # asyncssh comes back here from within, once for each waiting request: a few hundred
        # behind one start are deeper than Python's stack, so we loop. A request without its
        # fields is refused; asyncssh would end the connection.
        if self._servicing:
            return
        self._servicing, head = True, None
        try:
            while self._request_queue and self._request_queue[0] is not head:
                head = self._request_queue[0]  # still there afterwards: its answer follows later
                try:
                    super()._service_next_request()
                except PacketDecodeError:
                    self._report_response(False)
        finally:
            self._servicing = False

    def answer(self, accepted: bool) -> None:
        """Answer the request that waits for it."""
        if not self.is_closing():
            self._report_response(accepted)

    def _process_pty_req_request(self, packet: SSHPacket) -> bool:
        term = packet.get_string()
        sizes = [packet.get_uint32() for _ in range(4)]
        modes = packet.get_string()
        packet.check_end()
        return self._requests.pty_req(term, sizes, modes)

    def _process_env_request(self, packet: SSHPacket) -> bool:
        name, value = packet.get_string(), packet.get_string()
        packet.check_end()
        return self._requests.env_req(name, value)

    def _process_auth_agent_req_at_openssh_dot_com_request(self, packet: SSHPacket) -> None:
        packet.check_end()
        self._requests.agent_req()

    # None, for asyncssh: the answer follows. Its own types lack that.
    def _process_shell_request(self, packet: SSHPacket) -> bool | None:  # type: ignore[override]
        packet.check_end()
        return self._requests.start("shell")

    def _process_exec_request(self, packet: SSHPacket) -> bool | None:  # type: ignore[override]
        command = packet.get_string()
        packet.check_end()
        return self._requests.start("exec", command)

    def _process_subsystem_request(self, packet: SSHPacket) -> bool | None:  # type: ignore[override]
        subsystem = packet.get_string()
        packet.check_end()
        return self._requests.start("subsystem", subsystem)


for _name in _OVERRIDDEN:
    if not hasattr(asyncssh.SSHServerChannel, _name):
        raise ImportError(f"asyncssh {asyncssh.__version__} is not supported: it has no {_name}")
