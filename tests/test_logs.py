"""The log: one line for each event, whatever clients say, readable by people or by programs."""

from __future__ import annotations

import io
import json
import logging
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncssh
import pexpect
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from gosshd_py import logs

from .keys import Key, hashed
from .serving import ROOT, Served, run, wait_for
from .test_cli import Start, environment, start

__all__ = ["start"]

ESC = "\x1b"
NASTY = (
    f"{ESC}[2J{ESC}]0;title\a\n2026-01-01T00:00:00Z [info] forged\r\x9b31m\u202e\u2028\ud800\0\t"
)


@contextmanager
def configured(log_format: str, stream: io.StringIO) -> Iterator[Any]:
    """Our log on a stream, and the library's own settings again afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure(log_format, stream)
    try:
        yield structlog.get_logger()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()


def logged(log_format: str, event: str, **values: Any) -> str:
    stream = io.StringIO()
    with configured(log_format, stream) as log:
        log.info(event, **values)
    return stream.getvalue()


# -- values ----------------------------------------------------------------------------------------


@given(st.text(max_size=2 * logs.MAX_TEXT))
def test_any_text_becomes_printable_and_short(text: str) -> None:
    cleaned = logs.clean(text)
    assert cleaned.isprintable()
    assert len(cleaned) <= len("\\U0010ffff") * logs.MAX_TEXT + len("… (512 characters)")


@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=logs.MAX_TEXT))
def test_honest_text_stays_as_it_is(text: str) -> None:
    assert logs.clean(text) == text


def test_control_characters_are_escaped_as_python_writes_them() -> None:
    assert logs.clean(NASTY) == (
        r"\x1b[2J\x1b]0;title\x07\n2026-01-01T00:00:00Z [info] forged"
        r"\r\x9b31m\u202e\u2028\ud800\x00\t"
    )


def test_a_long_value_is_cut_and_its_length_said() -> None:
    assert logs.clean("x" * 256) == "x" * 256
    assert logs.clean("x" * 257) == "x" * 256 + "… (257 characters)"
    assert logs.clean("\n" * 70_000) == r"\n" * 256 + "… (70000 characters)"


# -- lines -----------------------------------------------------------------------------------------


@given(st.text(max_size=300), st.text(max_size=300), st.integers() | st.none() | st.booleans())
def test_an_event_is_one_line_of_json(event: str, value: str, other: int | None) -> None:
    out = logged("json", event, peer=value, number=other)
    assert out.endswith("\n")
    assert out[:-1].isprintable()
    line = json.loads(out)
    assert line["event"] == logs.clean(event)
    assert line["peer"] == logs.clean(value)
    assert line["number"] == other
    assert line["level"] == "info"
    assert datetime.fromisoformat(line["timestamp"]).utcoffset() is not None


@given(st.text(max_size=300), st.text(max_size=300))
def test_an_event_is_one_line_of_text(event: str, value: str) -> None:
    out = logged("text", event, peer=value)
    assert out.endswith("\n")
    assert out[:-1].isprintable()
    assert stands_in(out, logs.clean(value))


def stands_in(line: str, value: str) -> bool:
    """Whether a line of text has the value; structlog puts quotes round it where it needs them."""
    return value in line or repr(value) in line


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    ("stream", "no_color", "colours"),
    [(Terminal, None, True), (Terminal, "1", False), (io.StringIO, None, False)],
)
def test_colours_are_for_terminals_that_want_them(
    monkeypatch: pytest.MonkeyPatch,
    log_format: str,
    stream: type[io.StringIO],
    no_color: str | None,
    colours: bool,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    out = stream()
    with configured(log_format, out) as log:
        log.warning("event", key="value")
    assert (ESC in out.getvalue()) == (colours and log_format == "text")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_is_readable_and_forges_nothing(log_format: str) -> None:
    out = io.StringIO()
    with configured(log_format, out) as log:
        try:
            raise ValueError(NASTY)
        except ValueError:
            log.exception("failed", peer="x")
    if log_format == "json":
        assert out.getvalue()[:-1].isprintable()
        lines = ["failed", *json.loads(out.getvalue())["exception"].split("\n")]
    else:
        lines = out.getvalue().splitlines()
    assert "failed" in lines[0]
    assert lines[1] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") and line.isprintable() for line in lines[1:])
    assert r"  ValueError: \x1b[2J\x1b]0;title\x07" in lines


def test_what_libraries_log_takes_the_same_way() -> None:
    out = io.StringIO()
    with configured("json", out):
        library = logging.getLogger("asyncssh")
        library.warning("a %s", NASTY)
        library.info("not this")
        logging.getLogger("asyncio").warning("socket.send() raised exception.")
        try:
            raise ValueError("reason")
        except ValueError:
            library.exception("failed")
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert (first["event"], first["level"]) == (f"a {logs.clean(NASTY)}", "warning")
    assert (second["event"], second["level"], second["logger"]) == ("failed", "error", "asyncssh")
    assert second["exception"].endswith("\n  ValueError: reason")


# -- a real server's log ---------------------------------------------------------------------------

COMMAND = f": '{ESC}[31m\n\u202e{'x' * 65536}'"
COMMAND_LOGGED = rf": '\x1b[31m\n\u202e{'x' * (256 - 10)}… ({len(COMMAND)} characters)"


def test_a_command_is_escaped_and_cut_in_json(serve: Callable[..., Served]) -> None:
    server = serve()
    assert server.ssh(COMMAND).returncode == 0
    wait_for("its log line", lambda: server.events("session over"))
    (event,) = server.events("session over")
    assert event["command"] == COMMAND_LOGGED
    lines = server.log_file.read_text().split("\n")
    assert lines.pop() == ""
    assert all(line.isprintable() and isinstance(json.loads(line), dict) for line in lines)


def test_a_command_is_escaped_and_cut_in_text(start: Start) -> None:
    it = start("--listen", "127.0.0.1:0").wait_until_ready()
    assert it.ssh(COMMAND).returncode == 0
    wait_for("its log line", lambda: "session over" in it.log_file.read_text())
    assert it.stop() == 0
    lines = it.log_file.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert all(line.isprintable() and re.match(r"\d{4}-\d\d-\d\dT", line) for line in lines)
    (line,) = [line for line in lines if "session over" in line]
    assert stands_in(line, COMMAND_LOGGED)


def test_a_clients_version_is_escaped(serve: Callable[..., Served]) -> None:
    server = serve()
    with socket.create_connection((server.host, server.port), timeout=5) as sock:
        sock.sendall(b"SSH-2.0-\x1b[2J\x07" + b"x" * 200 + b"\r\n")
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    wait_for("its log line", lambda: server.events("connection closed"))
    (event,) = server.events("connection closed")
    assert event["client"] == r"SSH-2.0-\x1b[2J\x07" + "x" * 200
    assert all(line.isprintable() for line in server.log_file.read_text().split("\n"))


@pytest.mark.parametrize("no_color", [False, True])
def test_the_log_at_a_terminal_is_coloured_unless_unwanted(tmp_path: Path, no_color: bool) -> None:
    env = environment(tmp_path, TERM="xterm", **({"NO_COLOR": "1"} if no_color else {}))
    argv = ["-m", "gosshd_py", "--listen", "127.0.0.1:0"]
    terminal = pexpect.spawn(sys.executable, argv, cwd=str(tmp_path), env=env, timeout=10)
    terminal.expect("connect with: ")
    terminal.kill(signal.SIGTERM)
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert b"shutting down" in terminal.before
    assert (b"\x1b[" in terminal.before) == (not no_color)


# -- which events there are, and that clients cannot write them ------------------------------------

HOSTILE = "\x1b[2J\nfake event \u2028\x9b\x7f" + "x" * 65536


def documented_fields() -> dict[str, set[str]]:
    """The table of the README."""
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Log") : readme.index("## Container")]
    table: dict[str, set[str]] = {}
    for row in re.findall(r"^\| `(.+?)` \| (.*) \|$", section, re.MULTILINE):
        fields = set(re.findall(r"`(\w+)`", row[1]))
        before = "forward opened" if row[0].startswith("forward") else "session started"
        same = table[before] if "the same" in row[1] else set()
        table[row[0]] = fields | same
    return table


def test_hostile_text_everywhere_stays_inside_its_value(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    """ESC, newlines and 64 KiB in every place where a client may choose; all events are as documented."""
    key = Key(tmp_path / "keys")
    keys = tmp_path / "authorized_keys"
    keys.write_bytes(f"{HOSTILE} {key.public}\n{key.public}\n".encode())
    accounts = {
        "alice": {"authorized_keys": [str(keys)], "password": hashed()},
        "*": {"password": "!"},
    }
    server = serve(
        accounts=accounts, accept_env=["*"], max_sessions=1, home=f"{tmp_path}/x/{{user}}"
    )

    async def client() -> None:
        for name in (HOSTILE[:1000], "alice\n", "\x1b]0;x\x07"):
            with suppress(asyncssh.Error, OSError, ValueError):
                await server.connect(username=name, password=HOSTILE)
        conn = await server.connect(
            username="alice", client_keys=[str(key.file)], client_version="x" * 200
        )
        async with conn:
            process = await conn.create_process(
                f"cat; true {HOSTILE}", env={"A": HOSTILE}, encoding=None
            )
            with suppress(asyncssh.Error):
                await conn.create_process("one more")
            process.stdin.write_eof()
            await process.wait()
        async with await server.connect(username="alice", client_keys=[str(key.file)]) as conn:
            for subsystem in (HOSTILE[:2000],):
                with suppress(asyncssh.Error):
                    await conn.create_process(subsystem=subsystem)
        async with await server.connect(username="alice", client_keys=[str(key.file)]) as conn:
            with suppress(asyncssh.Error):
                await conn.create_process("x", term_type="\x1b[31m")

    run(client())
    with server.paramiko_transport() as transport, suppress(Exception):
        transport.auth_password("bob", "x" * 20000, fallback=False)
    with socket.create_connection((server.host, server.port), timeout=5) as sock:
        sock.sendall(b"SSH-2.0-\x1b[2J\x9b\r\n")
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    wait_for(
        "the last line", lambda: "can't decode" in str(server.events("connection closed")[-1:])
    )
    text = server.log_file.read_text()
    assert all(line.isprintable() for line in text.split("\n"))
    assert "x" * 300 not in text
    assert "$argon2" not in text
    known = documented_fields()
    seen = set()
    for event in server.log():
        assert not event["event"].startswith("fake")
        extra = set(event) - {"event", "level", "timestamp"} - known[event["event"]]
        assert not extra, (event["event"], extra)
        seen.add(event["event"])
    assert seen >= {
        *("connection opened", "connection closed", "authentication accepted", "limit hit"),
        *("authentication rejected", "key line not used", "session started", "session over"),
        *("spawn failed", "request refused"),
    }
