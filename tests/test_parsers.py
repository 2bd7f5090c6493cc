"""What we decode ourselves, against anything that a client can send (hypothesis)."""

from __future__ import annotations

import os
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gosshd_py.lifecycle import ExitStatus, WindowSize
from gosshd_py.modes import parse_modes, set_modes
from gosshd_py.names import valid_user_name
from gosshd_py.requests import env_allowed, parse_size, parse_term

from . import fuzz

uint32 = st.integers(0, 2**32 - 1)
ACCEPTED = ("TERM", "LANG", "LC_*")


@given(st.dictionaries(st.integers(1, 159), uint32))
def test_modes_that_were_encoded_are_decoded(modes: dict[int, int]) -> None:
    encoded = b"".join(bytes([op]) + value.to_bytes(4, "big") for op, value in modes.items())
    assert parse_modes(encoded + b"\0junk") == modes
    assert parse_modes(encoded) == modes


@given(st.binary(max_size=400))
def test_any_bytes_are_modes_or_a_value_error(encoded: bytes) -> None:
    try:
        modes = parse_modes(encoded)
    except ValueError:
        return
    assert all(1 <= op < 160 and 0 <= value < 2**32 for op, value in modes.items())


@given(st.dictionaries(st.integers(1, 159), uint32))
def test_any_modes_can_be_set_on_a_terminal(modes: dict[int, int]) -> None:
    master, slave = os.openpty()
    try:
        set_modes(slave, modes)
        echo = termios.tcgetattr(slave)[3] & termios.ECHO
        assert bool(echo) == bool(modes.get(53, True))
    finally:
        os.close(master)
        os.close(slave)


@given(uint32, uint32, uint32, uint32)
def test_a_size_fits_a_terminal_or_is_refused(
    columns: int, rows: int, xpixel: int, ypixel: int
) -> None:
    old = WindowSize(81, 25)
    if max(columns, rows) > 65535:
        with pytest.raises(ValueError, match="beyond"):
            parse_size(columns, rows, xpixel, ypixel, old)
        return
    size = parse_size(columns, rows, xpixel, ypixel, old)
    assert size.columns == (columns or 81)
    assert size.rows == (rows or 25)
    assert max(size.xpixel, size.ypixel) <= 65535


@given(st.binary(max_size=100))
def test_a_term_is_a_terminfo_name_or_refused(term: bytes) -> None:
    try:
        name = parse_term(term)
    except ValueError:
        return
    assert name.isascii()
    assert name.isprintable()
    assert "/" not in name
    assert not name.startswith((".", "-"))


@given(st.text(max_size=40))
def test_a_user_name_is_harmless_or_refused(name: str) -> None:
    if valid_user_name(name):
        assert name.isascii()
        assert 1 <= len(name) <= 32
        assert not name.startswith(("-", "."))
        assert not set(name) & set("/\\ \n\0$`'\"")


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_an_env_name_is_named_or_refused(name: bytes, value: bytes) -> None:
    if env_allowed(name, value, ACCEPTED):
        assert name in (b"TERM", b"LANG") or name.startswith(b"LC_")
        assert b"=" not in name
        assert b"\0" not in name + value


@pytest.mark.parametrize(
    ("number", "name"), [(9, "KILL"), (15, "TERM"), (24, "XCPU@gosshd"), (63, "63@gosshd")]
)
def test_signals_have_the_rfcs_names_or_a_domain(number: int, name: str) -> None:
    assert ExitStatus(signal=number).signal_name == name


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_any_input_is_understood_or_refused(target: str) -> None:
    """A moment of what `make fuzz` does for a minute."""
    fuzz.run(target, 100)
