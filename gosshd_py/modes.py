"""Terminal modes: from the wire (RFC 4254 §8) to a terminal (termios(3)). Pure, but for one call."""

from __future__ import annotations

import termios
from collections.abc import Mapping
from typing import Any

TTY_OP_END = 0
TTY_OP_RESERVED = 160
IUTF8 = 0x4000  # from Linux's headers: erase a whole UTF-8 character, not a byte


def parse_modes(encoded: bytes) -> dict[int, int]:
    """Decode terminal modes (RFC 4254 §8) to {opcode: value}. ValueError when cut short.

    Opcodes from 160 on have no defined length, so the RFC says to stop there; a missing
    TTY_OP_END at the very end is forgiven.
    """
    modes: dict[int, int] = {}
    position = 0
    while position < len(encoded) and TTY_OP_END < encoded[position] < TTY_OP_RESERVED:
        value = encoded[position + 1 : position + 5]
        if len(value) < 4:
            raise ValueError("terminal modes are cut short")
        modes[encoded[position]] = int.from_bytes(value, "big")
        position += 5
    return modes


def name_modes(modes: Mapping[int, int]) -> dict[str, int]:
    """The modes by their names in RFC 4254 §8, or by their opcodes."""
    flags = {opcode: name for opcode, (_, name) in _FLAGS.items()}
    names = _CHARACTERS | flags | {128: "TTY_OP_ISPEED", 129: "TTY_OP_OSPEED"}
    return {names.get(opcode, str(opcode)): value for opcode, value in modes.items()}


def set_modes(fd: int, modes: Mapping[int, int]) -> None:
    """Apply the modes of a pty-req: {opcode: value} (RFC 4254 §8). Unknown ones are ignored."""
    attributes = termios.tcgetattr(fd)
    for opcode, value in modes.items():
        _set_mode(attributes, opcode, value)
    termios.tcsetattr(fd, termios.TCSANOW, attributes)


def _set_mode(attributes: list[Any], opcode: int, value: int) -> None:
    if opcode in _CHARACTERS:
        index = getattr(termios, _CHARACTERS[opcode], None)
        if index is not None:  # 255 stands for "disabled" on the wire
            attributes[6][index] = bytes([0 if value >= 255 else value])
    elif opcode in _FLAGS:
        word, name = _FLAGS[opcode]
        flag = IUTF8 if name == "IUTF8" else getattr(termios, name, 0)
        attributes[word] = attributes[word] | flag if value else attributes[word] & ~flag
    elif opcode in _SPEEDS and (speed := getattr(termios, f"B{value}", 0)):
        attributes[_SPEEDS[opcode]] = speed


def _table(first: int, names: str) -> dict[int, str]:
    return {opcode: name for opcode, name in enumerate(names.split(), first) if name != "-"}


# RFC 4254 §8 and RFC 8160 (IUTF8). "-": not known to Linux. Character sizes and parity (90–93)
# are a serial line's: a pty always has eight bits and refuses the rest.
_CHARACTERS = _table(
    1,
    "VINTR VQUIT VERASE VKILL VEOF VEOL VEOL2 VSTART VSTOP VSUSP - VREPRINT VWERASE VLNEXT - - - VDISCARD",
)
_FLAGS = {
    opcode: (word, name)
    for word, table in (
        (
            0,
            _table(
                30,
                "IGNPAR PARMRK INPCK ISTRIP INLCR IGNCR ICRNL IUCLC IXON IXANY IXOFF IMAXBEL IUTF8",
            ),
        ),
        (
            3,
            _table(
                50,
                "ISIG ICANON XCASE ECHO ECHOE ECHOK ECHONL NOFLSH TOSTOP IEXTEN ECHOCTL ECHOKE PENDIN",
            ),
        ),
        (1, _table(70, "OPOST OLCUC ONLCR OCRNL ONOCR ONLRET")),
    )
    for opcode, name in table.items()
}
_SPEEDS = {128: 4, 129: 5}
