"""The transport under a connection (RFC 4253): its algorithms, and where asyncssh needs a limit.

Promises: a client that does not read, exchanges keys without end or never finishes to, or tries
to log in again and again, costs bounded memory and is disconnected with the reason.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import asyncssh
from asyncssh.constants import MSG_IGNORE, MSG_USERAUTH_REQUEST
from asyncssh.packet import PacketDecodeError, SSHPacket, String, UInt32

from .authentication import SIGNATURES
from .ciphers import quicker
from .config import Config
from .lifecycle import SILENT, Trace
from .listen import IDENTIFICATION
from .packets import Packets

# The client's order decides (RFC 4253 §7.1). curve25519 stands first for dropbear, which sends a
# guess along and, as the RFC says, counts it wrong when the first names differ; asyncssh does not.
KEX = ("curve25519-sha256", "curve25519-sha256@libssh.org", "mlkem768x25519-sha256")
CIPHERS = (
    "chacha20-poly1305@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-gcm@openssh.com",
    *("aes256-ctr", "aes192-ctr", "aes128-ctr"),
)
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")

MAX_UNREAD = 16 * 1024 * 1024
MAX_UNREAD_BEFORE = 256 * 1024
"""Bytes of answers held for a client that does not read, and before it has logged in. Sessions stop
far below. Not more either is held of what a client sends while its login is judged."""

TURN = 0.005
"""Seconds for which the packets of one client are handled before it is the others' turn."""

MAX_DEFERRED = 4096
"""Packets held back while keys are exchanged."""

MAX_GLOBAL_REQUESTS = 128
"""Global requests that may wait for an answer; asyncssh answers them recursively."""

REKEY_TIMEOUT = 30.0
"""Seconds in which a client must finish a key exchange."""

REKEY_BURST = 100
"""Key exchanges that a client may ask for at once …"""

REKEY_RATE = 2.0
"""… and per second in the long run. Each costs us a few milliseconds."""

_OVERRIDDEN = (
    *("_finish_userauth", "_send_kexinit", "validate_public_key", "reload_config"),
    *("process_packet", "send_newkeys", "_send_version", "log_sent_packet", "log_received_packet"),
    *("send_packet", "_recv_pkthdr", "_recv_data"),
    *("_process_tcpip_forward_global_request", "_process_cancel_tcpip_forward_global_request"),
    "_process_streamlocal_forward_at_openssh_dot_com_global_request",
    "_process_cancel_streamlocal_forward_at_openssh_dot_com_global_request",
)


_NONE: set[Any] = set()


class Owner(Protocol):  # connection.py
    """What the transport asks of connection.py beside asyncssh's callbacks."""

    def asks_as(self, name: bytes) -> None: ...
    def count_try(self, method: str) -> None: ...
    async def validate_key(self, key_data: bytes, signed: bool, verify: Verify) -> bool: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def listen_tcp(self, host: str, port: int) -> int | None: ...
    async def listen_path(self, path: str) -> bool: ...
    def cancel_listen(self, host: str, port: int) -> bool: ...
    async def cancel_listen_path(self, path: str) -> bool: ...


Verify = Callable[[asyncssh.SSHKey], bool]
"""Whether this key has signed the request."""


class Transport(asyncssh.SSHServerConnection):
    """asyncssh's connection, with the limits that it lacks and keys judged by our own rules."""

    _owner: Owner  # type: ignore[assignment]

    def __init__(self, options: asyncssh.SSHServerConnectionOptions, trace: Trace = SILENT) -> None:
        self.trace = trace
        self._packets = Packets(trace)
        super().__init__(asyncio.get_running_loop(), options)
        self._trusted_host_keys = self._trusted_ca_keys = None  # a client's, as are the next two:
        self._revoked_host_keys = self._x509_revoked_certs = _NONE  # a kilobyte of empty sets
        self._rekeys_left, self._rekeyed = float(REKEY_BURST), time.monotonic()
        self._rekey_timer: asyncio.TimerHandle | None = None
        self._turn_ends, self._turned_over = 0.0, False
        self._kex_began = 0.0
        self._lost: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TCP is open."""
        self._tcp = transport
        self._tcp_socket = transport.get_extra_info("socket")
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None = None) -> None:
        """TCP is closed, or, when asyncssh calls this itself, is to be closed."""
        self._lost = self._lost or exc
        if self._tcp.is_closing():
            reason = {"reason": str(self._lost)} if self._lost else {}
            self.trace("tcp.closed", fd=self._tcp_socket.fileno(), **reason)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """TCP is full: asyncssh's own handlers do nothing."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """TCP takes more."""
        self._owner.resume_writing()

    def data_received(self, data: bytes, datatype: int | None = None) -> None:
        """Handle what has come, for a while, unless the answers to it pile up."""
        self._turn_ends = time.monotonic() + TURN
        super().data_received(data, datatype)
        self._after_receiving()

    def _recv_pkthdr(self) -> bool:
        """Begin with the next packet, or leave the loop to others first: there may be thousands."""
        if time.monotonic() < self._turn_ends:
            return super()._recv_pkthdr()
        if self._transport is not None and not self._turned_over:
            self._turned_over = True
            self._transport.pause_reading()
            self._loop.call_soon(self._next_turn)
        return False

    def _next_turn(self) -> None:
        self._turned_over = False
        if self._transport is None:
            return  # it has ended meanwhile
        self._turn_ends = time.monotonic() + TURN
        self._recv_data()
        if self._transport is not None and not self._turned_over:
            self._transport.resume_reading()
        self._after_receiving()

    def _after_receiving(self) -> None:
        if self._transport is None:
            return
        if not self._auth_complete:
            # Its Nagle waits for our acknowledgement, which would wait for more: 40 ms, and twice.
            # The kernel forgets this option with each answer (tcp(7)).
            self._tcp_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        most = MAX_UNREAD if self._auth_complete else MAX_UNREAD_BEFORE
        if self._transport.get_write_buffer_size() > most:
            self.connection_lost(asyncssh.ConnectionLost("the client does not read"))
        elif not self._auth_complete and len(self._inpbuf) > MAX_UNREAD_BEFORE:
            self._give_up("too much is sent before the login is answered")
        elif len(self._global_request_queue) > MAX_GLOBAL_REQUESTS:
            self._give_up("too many global requests")
        elif len(self._deferred_packets) > MAX_DEFERRED:
            self._give_up("too many requests during a key exchange")

    def _give_up(self, reason: str) -> None:
        self._send_disconnect(asyncssh.DISC_PROTOCOL_ERROR, reason, "")
        self.connection_lost(asyncssh.ProtocolError(reason))

    async def reload_config(self) -> None:
        """Nothing: asyncssh would read OpenSSH's configuration files at each login."""

    # -- what a trace shows ----------------------------------------------------------------------

    def log_sent_packet(self, pkttype: int, pktid: int | None, packet: Any, note: str = "") -> None:
        """A packet goes out that belongs to no channel."""
        self._packets.sent(packet)

    def log_received_packet(
        self, pkttype: int, pktid: int | None, packet: Any, note: str = ""
    ) -> None:
        """One has come in."""
        self._packets.received(packet.get_full_payload())

    def _send_version(self) -> None:
        super()._send_version()
        self.trace("version.sent", text=self.get_extra_info("server_version"))

    def send_newkeys(self, k: bytes, h: bytes) -> None:
        """Our keys are known; what we send from here on is encrypted by them."""
        kex, first = self._kex, not self._session_id
        self._client_kexinit = self._server_kexinit = b""  # a kilobyte that nobody needs any more
        super().send_newkeys(k, h)
        self._send_encryption = quicker(self._send_encryption)
        self._next_recv_encryption = quicker(self._next_recv_encryption)
        assert kex is not None  # noqa: S101  # it calls us
        assert self._server_host_key is not None  # noqa: S101  # it has signed
        names = ("send_cipher", "recv_cipher", "send_mac")
        us = int((time.monotonic() - self._kex_began) * 1e6)
        self.trace(
            "kex.completed", first=first, us=us, kex=kex.algorithm.decode(), strict=self._strict_kex,
            host_key=self._server_host_key.algorithm.decode(),
            **{name: self.get_extra_info(name) for name in names},
        )  # fmt: skip

    def send_packet(self, pkttype: int, *args: bytes, handler: Any = None) -> None:
        """Send a packet, but none to be ignored: asyncssh puts one before every other.

        That hides where packets of CBC ciphers begin, and we offer none of those.
        """
        if pkttype != MSG_IGNORE:
            super().send_packet(pkttype, *args, handler=handler)

    # -- key exchange (RFC 4253 §9) -----------------------------------------------------------

    def _send_kexinit(self) -> None:
        now = time.monotonic()
        left = self._rekeys_left + (now - self._rekeyed) * REKEY_RATE
        self._rekeys_left, self._rekeyed = min(left, REKEY_BURST) - 1, now
        if self._rekeys_left < 0:
            raise asyncssh.ProtocolError("too many key exchanges")
        if not self._session_id:
            self.trace("version.received", text=self.get_extra_info("client_version"))
        self._kex_began = now
        super()._send_kexinit()
        if self._rekey_timer is not None:
            self._rekey_timer.cancel()
        self._rekey_timer = self._loop.call_later(REKEY_TIMEOUT, self._check_kex)

    def stop_timers(self) -> None:
        """The connection has ended."""
        if self._rekey_timer is not None:
            self._rekey_timer.cancel()

    def _check_kex(self) -> None:
        if not self._kex_complete:
            self._give_up("the client did not finish a key exchange")

    # -- global requests (RFC 4254 §4, §7.1) ----------------------------------------------------
    # asyncssh makes a task of each, so that a command could start before its forward is confirmed,
    # and it disconnects for cancelling what is not there. Here a listener is answered at once, but
    # for sockets in a file system, which may be slow: connection.py lets programs wait for those.

    def _process_tcpip_forward_global_request(self, packet: SSHPacket) -> None:
        host, port = _text(packet), packet.get_uint32()
        packet.check_end()
        real = self._owner.listen_tcp(host, port) if host is not None and port <= 65535 else None
        success = UInt32(real) if real is not None and port == 0 else real is not None
        self._report_global_response(success)

    def _process_cancel_tcpip_forward_global_request(self, packet: SSHPacket) -> None:
        host, port = _text(packet), packet.get_uint32()
        packet.check_end()
        self._report_global_response(self._owner.cancel_listen(host or "", port))

    def _process_streamlocal_forward_at_openssh_dot_com_global_request(
        self, packet: SSHPacket
    ) -> None:
        path = _text(packet)
        packet.check_end()
        self.create_task(self._answer_later(path, self._owner.listen_path))

    async def _answer_later(
        self, path: str | None, action: Callable[[str], Awaitable[bool]]
    ) -> None:
        answer = path is not None and await action(path)
        if not self.is_closed():
            self._report_global_response(answer)

    def _process_cancel_streamlocal_forward_at_openssh_dot_com_global_request(
        self, packet: SSHPacket
    ) -> None:
        path = _text(packet)
        packet.check_end()
        self.create_task(self._answer_later(path, self._owner.cancel_listen_path))

    # -- authentication (RFC 4252) ------------------------------------------------------------

    def process_packet(self, pkttype: int, pktid: int, packet: SSHPacket) -> Any:
        """The name that the client logs in by counts as it is sent, not as asyncssh folds it."""
        if pkttype == MSG_USERAUTH_REQUEST and self._owner is not None:
            self._owner.asks_as(SSHPacket(packet.get_full_payload()[1:]).get_string())
        return super().process_packet(pkttype, pktid, packet)

    async def _finish_userauth(self, begin_auth: bool, method: bytes, packet: SSHPacket) -> None:
        """The way of every request to log in."""
        if self._owner is not None:
            self._owner.count_try(method.decode("ascii", "backslashreplace"))
        await super()._finish_userauth(begin_auth, method, packet)

    async def validate_public_key(
        self, username: str, key_data: bytes, msg: bytes, signature: bytes
    ) -> bool:
        """Ask for a key, or (with a message) log in by it. See RFC 4252 §7 for what is signed."""

        def verify(key: asyncssh.SSHKey) -> bool:
            try:
                algorithm = SSHPacket(signature).get_string().decode("ascii", "replace")
            except PacketDecodeError:
                return False
            return algorithm in SIGNATURES and key.verify(String(self._session_id) + msg, signature)

        return await self._owner.validate_key(key_data, bool(msg), verify)


def _text(packet: SSHPacket) -> str | None:
    """A name or a path; None for what is neither."""
    try:
        text = packet.get_string().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def make_options(
    config: Config, host_keys: list[asyncssh.SSHKey], make_owner: Callable[[], asyncssh.SSHServer]
) -> asyncssh.SSHServerConnectionOptions:
    """asyncssh's settings. Everything that is on by default and not ours to offer is off."""
    return asyncssh.SSHServerConnectionOptions(
        server_factory=make_owner,
        server_host_keys=host_keys,
        server_version=IDENTIFICATION,
        login_timeout=0,  # connection.py's, which says so to the client
        keepalive_interval=config.client_alive_interval,
        keepalive_count_max=config.client_alive_count_max,
        kex_algs=KEX,
        encryption_algs=CIPHERS,
        mac_algs=MACS,
        compression_algs=["none"],
        signature_algs=SIGNATURES,
        line_editor=False,
        encoding=None,
        agent_forwarding=False,
        x11_forwarding=False,
        allow_scp=False,
        gss_host=None,
        host_based_auth=False,
        public_key_auth=not config.open_mode,
        password_auth=not config.open_mode,
        kbdint_auth=not config.open_mode,
    )


for _name in _OVERRIDDEN:
    if not hasattr(asyncssh.SSHServerConnection, _name):
        raise ImportError(f"asyncssh {asyncssh.__version__} is not supported: it has no {_name}")
