"""What the SSH packets mean that go by: from the messages of RFC 4252–4254 to events of a trace.

asyncssh shows every packet that it sends or has received to the connection or to the channel whose
it is, so what is told here is what was on the wire, in its order, whatever our code believes.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Any

from asyncssh import constants
from asyncssh.packet import PacketDecodeError, SSHPacket

from .lifecycle import Trace
from .modes import name_modes, parse_modes

Facts = dict[str, Any]


class Packets:
    """Tells of the packets of one connection, or of one channel."""

    __slots__ = ("asked", "streams", "trace")

    def __init__(self, trace: Trace, streams: Mapping[str, str] | None = None) -> None:
        """streams: what the data of each way is to a program."""
        self.trace = trace
        self.streams = streams or {}
        self.asked: list[str] = []
        """Requests of the client that wait for our answer, which does not name them (§5.4, §4)."""

    def sent(self, payload: bytes) -> None:
        """A packet of ours. payload: from the message number on."""
        self._tell("sent", payload)

    def received(self, payload: bytes) -> None:
        """A packet of the client's."""
        self._tell("received", payload)

    def _tell(self, way: str, payload: bytes) -> None:
        if self.trace.tell is None:
            return
        packet = SSHPacket(payload)
        with suppress(PacketDecodeError, UnicodeDecodeError):  # who handles it will say so
            read = _READERS.get(packet.get_byte())
            if read is not None:
                read(self, way, packet)


# -- the transport and authentication -----------------------------------------------------


def _disconnect(to: Packets, way: str, packet: SSHPacket) -> None:
    to.trace(f"disconnect.{way}", code=packet.get_uint32(), reason=_text(packet))


def _kexinit(to: Packets, way: str, packet: SSHPacket) -> None:
    to.trace("kex.started", by="server" if way == "sent" else "client")


def _userauth_request(to: Packets, way: str, packet: SSHPacket) -> None:
    user, _, method = _text(packet), _text(packet), _text(packet)
    facts: Facts = {}
    if method == "publickey":
        facts = {"signed": packet.get_boolean(), "algorithm": _text(packet)}
        digest = b64encode(sha256(packet.get_string()).digest()).decode().rstrip("=")
        facts["key"] = f"SHA256:{digest}"
    to.trace("auth.started", user=user, method=method, **facts)


def _userauth_failure(to: Packets, way: str, packet: SSHPacket) -> None:
    to.trace("auth.failed", left=_text(packet))


def _userauth_banner(to: Packets, way: str, packet: SSHPacket) -> None:
    to.trace("banner.sent", text=_text(packet))


# -- requests, of the connection and of a channel (RFC 4254 §4, §5.4) -----------------------


def _request(to: Packets, way: str, packet: SSHPacket) -> None:
    request, want_reply = _text(packet), packet.get_boolean()
    values = _VALUES.get(request, _none)(packet)
    if way == "received":
        to.asked += [request] if want_reply else []
        to.trace("request.received", request=request, want_reply=want_reply, **values)
    elif request.startswith("exit-"):
        to.trace("exit.sent", **values)
    else:
        to.trace("request.sent", request=request, want_reply=want_reply)


def _channel_request(to: Packets, way: str, packet: SSHPacket) -> None:
    packet.get_uint32()
    _request(to, way, packet)


def _success(to: Packets, way: str, packet: SSHPacket) -> None:
    _answer(to, way, "request.accepted")


def _failure(to: Packets, way: str, packet: SSHPacket) -> None:
    _answer(to, way, "request.refused")


def _answer(to: Packets, way: str, event: str) -> None:
    if way == "received":
        to.trace("request.answered")
    else:
        to.trace(event, request=to.asked.pop(0) if to.asked else "")


# -- channels (RFC 4254 §5) -----------------------------------------------------------------


def _open(to: Packets, way: str, packet: SSHPacket) -> None:
    kind, sender = _text(packet), packet.get_uint32()
    facts = {"window": packet.get_uint32(), "packet": packet.get_uint32()}
    by = "server" if way == "sent" else "client"
    facts |= _VALUES.get(kind, _none)(packet)
    to.trace("channel.asked", by=by, kind=kind, sender=sender, **facts)


def _open_confirmation(to: Packets, way: str, packet: SSHPacket) -> None:
    recipient, sender = packet.get_uint32(), packet.get_uint32()
    ours, theirs = (sender, recipient) if way == "sent" else (recipient, sender)
    window, largest = packet.get_uint32(), packet.get_uint32()
    to.trace.of(ours)("channel.opened", theirs=theirs, window=window, packet=largest)


def _open_failure(to: Packets, way: str, packet: SSHPacket) -> None:
    by = "client" if way == "sent" else "server"  # who had asked
    sender, code = packet.get_uint32(), packet.get_uint32()
    to.trace("channel.refused", by=by, sender=sender, code=code, reason=_text(packet))


def _window_adjust(to: Packets, way: str, packet: SSHPacket) -> None:
    packet.get_uint32()
    to.trace(f"window.{way}", bytes=packet.get_uint32())


def _data(to: Packets, way: str, packet: SSHPacket, stream: str = "") -> None:
    packet.get_uint32()
    if stream:
        packet.get_uint32()
    data = packet.get_string()
    stream = stream or to.streams.get(way, "")
    to.trace(f"data.{way}", stream=stream or None, bytes=len(data))


def _extended_data(to: Packets, way: str, packet: SSHPacket) -> None:
    _data(to, way, packet, "stderr")


def _eof(to: Packets, way: str, packet: SSHPacket) -> None:
    to.trace(f"eof.{way}")


def _close(to: Packets, way: str, packet: SSHPacket) -> None:
    to.trace(f"close.{way}")


def _text(packet: SSHPacket) -> str:
    return packet.get_string().decode("utf-8", "backslashreplace")


# -- what the fields of a request, or of a channel's opening, mean -------------------------------


def _none(packet: SSHPacket) -> Facts:
    return {}


def _pty_req(packet: SSHPacket) -> Facts:
    term, (columns, rows, *_) = _text(packet), [packet.get_uint32() for _ in range(4)]
    modes: Facts = {}
    with suppress(ValueError):  # cut short
        modes = name_modes(parse_modes(packet.get_string()))
    return {"term": term, "size": f"{columns}x{rows}", "modes": modes}


def _env(packet: SSHPacket) -> Facts:
    return {"name": _text(packet), "value": _text(packet)}


def _window_change(packet: SSHPacket) -> Facts:
    return {"size": f"{packet.get_uint32()}x{packet.get_uint32()}"}


def _exit_signal(packet: SSHPacket) -> Facts:
    return {"signal": _text(packet), "core": packet.get_boolean()}


def _field(name: str) -> Callable[[SSHPacket], Facts]:
    return lambda packet: {name: _text(packet)}


def _number(name: str) -> Callable[[SSHPacket], Facts]:
    return lambda packet: {name: packet.get_uint32()}


def _place(name: str) -> Callable[[SSHPacket], Facts]:
    return lambda packet: {name: f"{_text(packet)}:{packet.get_uint32()}"}


_VALUES: dict[str, Callable[[SSHPacket], Facts]] = {
    "pty-req": _pty_req,
    "env": _env,
    "exec": _field("command"),
    "subsystem": _field("name"),
    "window-change": _window_change,
    "signal": _field("signal"),
    "break": _number("ms"),
    "exit-status": _number("status"),
    "exit-signal": _exit_signal,
    "tcpip-forward": _place("place"),
    "cancel-tcpip-forward": _place("place"),
    "streamlocal-forward@openssh.com": _field("place"),
    "cancel-streamlocal-forward@openssh.com": _field("place"),
    "direct-tcpip": _place("place"),
    "forwarded-tcpip": _place("place"),
    "direct-streamlocal@openssh.com": _field("place"),
    "forwarded-streamlocal@openssh.com": _field("place"),
}

_READERS: dict[int, Callable[[Packets, str, SSHPacket], None]] = {
    constants.MSG_DISCONNECT: _disconnect,
    constants.MSG_KEXINIT: _kexinit,
    constants.MSG_USERAUTH_REQUEST: _userauth_request,
    constants.MSG_USERAUTH_FAILURE: _userauth_failure,
    constants.MSG_USERAUTH_BANNER: _userauth_banner,
    constants.MSG_GLOBAL_REQUEST: _request,
    constants.MSG_REQUEST_SUCCESS: _success,
    constants.MSG_REQUEST_FAILURE: _failure,
    constants.MSG_CHANNEL_OPEN: _open,
    constants.MSG_CHANNEL_OPEN_CONFIRMATION: _open_confirmation,
    constants.MSG_CHANNEL_OPEN_FAILURE: _open_failure,
    constants.MSG_CHANNEL_WINDOW_ADJUST: _window_adjust,
    constants.MSG_CHANNEL_DATA: _data,
    constants.MSG_CHANNEL_EXTENDED_DATA: _extended_data,
    constants.MSG_CHANNEL_EOF: _eof,
    constants.MSG_CHANNEL_CLOSE: _close,
    constants.MSG_CHANNEL_REQUEST: _channel_request,
    constants.MSG_CHANNEL_SUCCESS: _success,
    constants.MSG_CHANNEL_FAILURE: _failure,
}
