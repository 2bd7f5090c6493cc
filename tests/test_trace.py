"""What a trace tells of a session: every event of the table, in order, whole, and no password."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import asyncssh
import pexpect
import pytest

import gosshd_py
from gosshd_py import trace
from gosshd_py.lifecycle import EVENTS, Tell, Trace
from gosshd_py.process import Descriptor
from gosshd_py.story import line_of
from gosshd_py.trace import Record, TraceFile, Tracer, merged, plain, spell
from gosshd_py.wire import MAX_PACKET, WINDOW

from .keys import PASSWORD, hashed
from .serving import ROOT, Served, end_client, run, wait_for
from .test_forward import Echo, dial, exchange, free_port, tunnel

Serve = Callable[..., Served]
PACKAGE = Path(gosshd_py.__file__).parent


class Traced:
    """A server with a trace file, and what is in it."""

    def __init__(self, serve: Serve, folder: Path, **settings: Any) -> None:
        self.file = folder / "trace.ndjson"
        self.server = serve(trace_file=str(self.file), **settings)

    def records(self) -> list[dict[str, Any]]:
        whole, _, _ = self.file.read_text().rpartition("\n")  # the last line may just be written
        return [json.loads(line) for line in whole.splitlines()]

    def of(self, *names: str) -> list[dict[str, Any]]:
        return [record for record in self.records() if record["event"] in names]

    def over(self, sessions: int = 1) -> list[dict[str, Any]]:
        """All records, when so many connections have ended."""
        wait_for("the end", lambda: len(self.of("tcp.closed")) >= sessions)
        wait_for("all", lambda: len(self.of("session.ended")) == len(self.of("program.spawned")))
        records = self.records()
        for record in records:
            assert set(record) == {"us", "time", "pid", "connection", "channel", "event", "facts"}
            assert set(record["facts"]) <= set(EVENTS[record["event"]].facts), record
        return records


@pytest.fixture
def traced(serve: Serve, tmp_path: Path) -> Traced:
    return Traced(serve, tmp_path, trace_data=64)


def names(records: Iterable[dict[str, Any]]) -> list[str]:
    return [record["event"] for record in records]


def in_order(told: list[str], *wanted: str) -> None:
    """Each of the wanted events is told, behind the one before it."""
    at = -1
    for name in wanted:
        assert name in told[at + 1 :], f"{name} is not told behind {told[: at + 1]}"
        at = told.index(name, at + 1)


# -- the table ---------------------------------------------------------------------------------------


def emissions() -> list[tuple[str, str, set[str]]]:
    """Where the code tells what: (module, event, names of facts), from its syntax tree."""
    found = []
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            of = isinstance(node.func, ast.Call) and getattr(node.func.func, "attr", "") == "of"
            if name not in ("trace", "_trace") and not of:
                continue
            facts = {word.arg for word in node.keywords if word.arg}
            event = node.args[0]
            if isinstance(event, ast.JoinedStr):
                prefix = ast.literal_eval(event.values[0])
                found += [(path.stem, prefix + way, facts) for way in ("sent", "received")]
            elif isinstance(event, ast.Constant):
                found.append((path.stem, event.value, facts))
            else:
                found += [(path.stem, f"request.{answer}", facts) for answer in ("accepted", "refused")]  # fmt: skip
    return found


def test_every_event_is_in_the_table_and_every_row_is_told() -> None:
    told = emissions()
    own = {name for name in EVENTS if name.startswith("trace.")}
    assert {event for _, event, _ in told} - set(EVENTS) <= {"banner.received"}
    assert set(EVENTS) - {event for _, event, _ in told} == own
    for module, event, facts in told:
        known = set(EVENTS[event].facts) | {"data", "after"}
        assert facts <= known, (module, event, facts - known)


def test_names_are_things_and_what_became_of_them() -> None:
    for name, meaning in EVENTS.items():
        assert re.fullmatch(r"[a-z]+\.(read|hit|[a-z]+(ed|ent|en))", name), name
        assert meaning.lane in ("tcp", "ssh", "channel", "pty", "process", "trace")
        assert meaning.gloss
        assert meaning.source


def test_the_core_tells_an_event_in_one_call() -> None:
    """And the bridge tells nothing: session.py hands its trace to the table of states, no more."""
    for module in ("session", "flow", "channel", "pty", "pipes", "process", "connection", "server"):
        source = (PACKAGE / f"{module}.py").read_text()
        assert not re.search(r"^\s*(if|elif|while) .*\b_?trace\b", source, re.MULTILINE), module
        assert ".tell" not in source, module  # who listens is asked in lifecycle.py only
    assert "trace(" not in (PACKAGE / "session.py").read_text()


# -- what is told ------------------------------------------------------------------------------------


def test_a_shell_on_a_terminal_from_accept_to_the_last_close(traced: Traced) -> None:
    terminal = traced.server.terminal(dimensions=(30, 100))
    terminal.sendline("PS1='next'\\>; echo $((6*7)).")
    terminal.expect(r"42\..*next>")
    terminal.setwinsize(40, 120)
    wait_for("the size", lambda: traced.of("pty.resized"))
    terminal.sendline("sh -c 'echo o''n; exec cat'")
    terminal.expect(r"on\r\n")
    terminal.sendcontrol("c")
    terminal.expect("next>")
    terminal.sendline("exit 3")
    terminal.expect(pexpect.EOF)
    records = traced.over()
    in_order(
        names(records),
        *("trace.started", "tcp.accepted", "version.sent", "version.received", "kex.started"),
        *("kex.completed", "auth.started", "auth.completed", "channel.asked", "channel.opened"),
        *("request.received", "request.accepted", "pty.opened", "program.spawned", "fd.closed"),
        *("state.changed", "output.read", "data.sent", "data.received", "input.written"),
        *("program.reaped", "cause.named"),
        *("fd.closed", "eof.sent", "exit.sent", "close.sent", "close.received", "cause.ignored"),
        *("session.ended", "tcp.closed"),
    )
    in_order(names(records), "program.spawned", "request.received", "pty.resized")
    in_order(names(records), "program.spawned", "output.ended", "fd.closed", "eof.sent")
    facts = {record["event"]: record["facts"] for record in records}
    assert facts["kex.completed"]["kex"] == "curve25519-sha256"
    assert facts["kex.completed"]["us"] > 0
    assert facts["pty.opened"]["size"] == "100x30"
    spawned = facts["program.spawned"]
    assert spawned["pid"] == spawned["pgid"] == spawned["sid"]
    assert spawned["terminal"] == facts["pty.opened"]["name"]
    assert facts["pty.resized"]["size"] == "120x40"
    assert facts["pty.resized"]["foreground"] == spawned["pid"]
    assert facts["program.reaped"] == {"pid": spawned["pid"], "status": 0x300, "ended": "status 3"}
    assert facts["output.ended"]["why"] == "EIO"
    assert facts["cause.named"] == {"cause": "exited"}
    assert facts["cause.ignored"] == {"cause": "client closed", "first": "exited"}
    assert facts["exit.sent"] == {"status": 3}
    typed = [record["facts"]["shown"] for record in traced.of("input.written")]
    assert any("^C ETX" in shown for shown in typed), typed
    times = [record["us"] for record in records]
    assert times == sorted(times)
    opened = [record["facts"]["master"] for record in traced.of("pty.opened")]
    closed = [r["facts"]["fd"] for r in traced.of("fd.closed") if r["facts"]["what"] == "master"]
    assert opened == closed  # once


def test_a_command_on_pipes_with_a_half_close(traced: Traced) -> None:
    result = traced.server.ssh("HOST", "cat; echo err >&2; kill -TERM $$", stdin=b"one\ntwo")
    assert result.stdout == b"one\ntwo"
    told = traced.over()
    in_order(
        names(told),
        *("pipes.opened", "program.spawned", "input.written", "fd.closed", "output.read"),
        *("output.ended", "eof.sent", "exit.sent"),
    )
    written = next(r["facts"] for r in told if r["event"] == "input.written")
    assert written["shown"] == '"one" ^J LF "two"'
    assert {r["facts"]["what"] for r in told if r["event"] == "output.read"} == {"stdout", "stderr"}
    assert next(r["facts"] for r in told if r["event"] == "exit.sent")["signal"] == "TERM"
    assert next(r["facts"] for r in told if r["event"] == "cause.named")["cause"] == "signalled"
    states = [(r["facts"]["by"], r["facts"]["to"]) for r in told if r["event"] == "state.changed"]
    assert ("client EOF", "input ended") in states


def test_a_client_that_vanishes(traced: Traced) -> None:
    terminal = traced.server.terminal()
    terminal.expect(r"\$|#")
    terminal.close(force=True)
    told = traced.over()
    in_order(
        names(told), "cause.named", "fd.closed", "program.reaped", "cause.ignored", "session.ended"
    )
    ended = next(r["facts"] for r in told if r["event"] == "session.ended")
    assert ended["cause"] in ("client closed", "connection lost")
    assert ended["exit"] == "signal HUP"


def test_backpressure_is_told_at_each_of_its_three_places(traced: Traced) -> None:
    async def window() -> None:
        conn = await traced.server.connect()
        process = await conn.create_process(
            "head -c 1000000 /dev/zero", encoding=None, window=65536
        )
        process.channel.pause_reading()
        await wait("window.paused")
        process.channel.resume_reading()
        assert len(await process.stdout.read()) == 1_000_000
        await wait("window.resumed")
        conn.close()

    async def tcp() -> None:
        conn = await traced.server.connect()
        process = await conn.create_process("yes", encoding=None, window=2**31)
        await process.stdout.read(1)
        conn._transport.pause_reading()
        await wait("tcp.paused")
        conn._transport.resume_reading()
        await wait("tcp.resumed")
        conn.abort()

    async def program() -> None:
        conn = await traced.server.connect()
        process = await conn.create_process("sleep 0.5; cat > /dev/null", encoding=None)
        process.stdin.write(b"x" * 500_000)
        process.stdin.write_eof()
        await wait("input.paused")
        await wait("input.resumed")
        await process.wait_closed()
        conn.close()

    async def wait(event: str) -> None:
        await asyncio.to_thread(wait_for, event, lambda: traced.of(event))

    for place in (window, tcp, program):
        run(place())
    told = names(traced.records())
    for where in ("window", "tcp", "input"):
        in_order(told, f"{where}.paused", f"{where}.resumed")


def test_signals_logins_and_what_is_refused(serve: Serve, tmp_path: Path) -> None:
    traced = Traced(serve, tmp_path, accounts={"alice": {"password": hashed()}})

    async def main() -> None:
        with pytest.raises(asyncssh.PermissionDenied):
            await traced.server.connect(username="alice", password="guess")
        conn = await traced.server.connect(username="alice", password=PASSWORD)
        process = await conn.create_process(
            "trap 'exit 5' USR1; echo on; while :; do sleep 0.1; done"
        )
        await process.stdout.readline()
        process.send_signal("USR1")
        await process.wait_closed()
        with pytest.raises(asyncssh.ChannelOpenError):
            await conn.open_connection("10.0.0.1", 80)
        with pytest.raises(asyncssh.ChannelOpenError):
            await conn.create_process(subsystem="nonsense")
        conn.close()

    run(main())
    records = traced.over(2)
    text = traced.file.read_text()
    assert "guess" not in text
    assert PASSWORD not in text
    facts = {record["event"]: record["facts"] for record in records}
    assert facts["auth.rejected"]["reason"] == "wrong password"
    assert facts["auth.failed"]["left"]
    assert facts["signal.sent"]["signal"] == "SIGUSR1"
    assert facts["forward.failed"]["to"] == "10.0.0.1:80"
    assert facts["channel.refused"]["reason"].startswith("gosshd: permit_open")
    assert "there is no subsystem" in facts["program.failed"]["reason"]
    assert facts["request.refused"] == {"request": "subsystem"}


def test_keys_exchanged_anew_and_forwards(serve: Serve, tmp_path: Path) -> None:
    with Echo(("127.0.0.1", 0), Echo.Handler) as echo:
        threading.Thread(target=echo.serve_forever, args=(0.01,), daemon=True).start()
        at, port = echo.server_address[1], free_port()
        traced = Traced(serve, tmp_path, permit_open=["127.0.0.1:*"], permit_listen=["127.0.0.1:*"])
        with tunnel(traced.server, "-L", f"{port}:127.0.0.1:{at}", "-o", "RekeyLimit=100K"):
            assert len(exchange(dial(port), b"x" * 500_000)) == 500_000
        back = free_port()
        with tunnel(traced.server, "-R", f"{back}:127.0.0.1:{at}"):
            assert exchange(dial(back)) == b"hello"
        echo.shutdown()
    records = traced.over(2)
    kexes = [r["facts"]["first"] for r in records if r["event"] == "kex.completed"]
    assert kexes.count(True) == 2
    assert kexes.count(False) >= 2
    completed = [r["facts"] for r in records if r["event"] == "forward.completed"]
    assert completed[0]["bytes_in"] == completed[0]["bytes_out"] == 500_000
    in_order(names(records), "request.received", "listener.opened", "request.accepted")


def test_facts_are_those_of_the_wire_and_of_the_clock(serve: Serve, tmp_path: Path) -> None:
    """What a client has seen from its side, in the numbers and words of the trace."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    alice = {"authorized_keys": [key.export_public_key().decode()]}
    traced = Traced(
        serve,
        tmp_path,
        accounts={"alice": alice},
        accept_env=["LANG"],
        max_sessions=1,
        trace_data=64,
    )
    seen: dict[str, Any] = {}
    began = time.time()

    async def main() -> None:
        conn = await traced.server.connect(username="alice", client_keys=[key])
        process = await conn.create_process(
            "stty -a; echo $LANG; ulimit -c unlimited; sleep 0.3; kill -SEGV $$",
            term_type="vt100", term_size=(90, 33), env={"LANG": "C.UTF-8"}, encoding=None,
            term_modes={asyncssh.PTY_ECHO: 0, asyncssh.PTY_VINTR: 2}, window=131072,
        )  # fmt: skip
        with pytest.raises(asyncssh.ChannelOpenError, match="1 sessions, which is the limit"):
            await conn.run("true")
        seen["output"] = await process.stdout.read()
        await process.wait_closed()
        seen["signal"] = process.exit_signal
        conn.disconnect(11, "that was all")
        await conn.wait_closed()

    run(main())
    records = traced.over()
    assert all(began - 1 < record["time"] < time.time() + 1 for record in records)
    facts = {record["event"]: record["facts"] for record in records}
    at = {record["event"]: record["us"] for record in reversed(records)}
    # Durations are those between the events round them, and no others.
    exchange_took = at["kex.completed"] - at["kex.started"]
    assert 0 < facts["kex.completed"]["us"] <= exchange_took + 1000
    assert 100 < facts["program.spawned"]["us"] < at["program.spawned"] - at["pty.opened"] + 1000
    # The key: first asked for, then signed with.
    tries = [r["facts"] for r in records if r["event"] == "auth.started"]
    keys = [fact for fact in tries if fact["method"] == "publickey"]
    assert keys[-1]["signed"] is True
    assert keys[-1]["algorithm"] == "ssh-ed25519"
    assert keys[-1]["key"] == key.get_fingerprint()
    assert facts["auth.completed"] == {"user": "alice", "method": "publickey"}
    # What was asked for, decoded, and answered in order.
    asked = [r["facts"] for r in records if r["event"] == "request.received" and r["channel"] == 0]
    pty = next(fact for fact in asked if fact["request"] == "pty-req")
    assert (pty["term"], pty["size"]) == ("vt100", "90x33")
    assert pty["modes"]["ECHO"] == 0
    assert pty["modes"]["VINTR"] == 2
    env = next(fact for fact in asked if fact["request"] == "env")
    assert (env["name"], env["value"]) == ("LANG", "C.UTF-8")
    answers = [
        r["facts"]["request"]
        for r in records
        if r["event"] in ("request.accepted", "request.refused") and r["channel"] == 0
    ]
    assert answers == [fact["request"] for fact in asked if fact["want_reply"]]
    assert b"-echo " in seen["output"]
    assert b"intr = ^B" in seen["output"]
    # Bytes and windows.
    sent = [r["facts"]["bytes"] for r in records if r["event"] == "data.sent"]
    assert sum(sent) == len(seen["output"]) == facts["session.ended"]["bytes_out"]
    opened = facts["channel.opened"]
    assert (opened["window"], opened["packet"]) == (WINDOW, MAX_PACKET)
    wanted = [r["facts"] for r in records if r["event"] == "channel.asked"]
    assert [fact["window"] for fact in wanted] == [131072, 2 * 1024 * 1024]
    # What was refused, and how it ended.
    assert facts["limit.hit"] == {"limit": "max_sessions"}
    assert facts["channel.refused"]["sender"] == wanted[1]["sender"]
    assert seen["signal"][:2] == ("SEGV", facts["exit.sent"].get("core", False))
    assert facts["exit.sent"]["signal"] == "SEGV"
    assert facts["disconnect.received"] == {"code": 11, "reason": "that was all"}


def test_a_banner_is_told_as_it_is_shown(serve: Serve, tmp_path: Path) -> None:
    """In open mode with a name that is none, for whom the reason is no secret."""
    traced = Traced(serve, tmp_path)
    shown: list[str] = []

    class Client(asyncssh.SSHClient):
        def auth_banner_received(self, msg: str, lang: str) -> None:
            shown.append(msg)

    async def main() -> None:
        with pytest.raises(asyncssh.PermissionDenied):
            await traced.server.connect(username="no~name", client_factory=Client)

    run(main())
    traced.over()
    told = [record["facts"]["text"] for record in traced.of("banner.sent")]
    assert told == [text.replace("\r", "\\r").replace("\n", "\\n") for text in shown] != []


def test_a_flood_is_told_with_all_its_bytes(traced: Traced) -> None:
    assert len(traced.server.ssh("HOST", "head -c 30000000 /dev/zero").stdout) == 30_000_000
    traced.over()
    told = [record["facts"] for record in traced.of("data.sent")]
    assert sum(fact["bytes"] for fact in told) == 30_000_000


# -- what is typed unseen ------------------------------------------------------------------------------


def test_passwords_are_never_shown(traced: Traced) -> None:
    terminal = traced.server.terminal(
        "-tt", "HOST", "read -s -p 'Password: ' x; echo got ${#x}; cat"
    )
    terminal.expect("Password: ")
    terminal.sendline("geheim")
    terminal.expect("got 6")
    terminal.sendline("to be seen")
    terminal.expect("to be seen.*to be seen")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    traced.over()
    text = traced.file.read_text()
    assert "geheim" not in text
    assert "(6 hidden) ^J LF" in text
    assert '\\"to be seen\\" ^J LF' in text


@pytest.mark.parametrize("unseen", ["before", "behind"])
def test_the_echo_is_asked_for_before_and_behind_the_write(unseen: str) -> None:
    """Who asks for a password turns the echo off at one moment and on again at another."""
    got: list[dict[str, Any]] = []
    ours, theirs = os.pipe()
    echo = [unseen != "before", unseen != "behind"]

    async def write(tell: Tell) -> None:
        descriptor = Descriptor(
            theirs, lambda: os.close(theirs), Trace(tell, 1, 0), "master", echo=lambda: echo.pop(0)
        )
        await descriptor.write(b"geheim\r")
        descriptor.close()

    with Tracer([Kept(got)], show=64) as tracer:
        run(write(tracer.tell))
    assert os.read(ours, 10) == b"geheim\r"
    os.close(ours)
    assert [fact.get("shown") for fact in got] == ["(6 hidden) ^M CR", None]


def test_what_a_forward_carries_is_counted_only() -> None:
    got: list[dict[str, Any]] = []
    with Tracer([Kept(got)], show=64) as tracer:
        Trace(tracer.tell, 1, 0)("output.read", fd=9, what="socket", bytes=6, data=b"cookie")
    assert got == [{"fd": 9, "what": "socket", "bytes": 6}]


class Kept:
    """An output that keeps the facts."""

    pace = 0.0

    def __init__(self, got: list[dict[str, Any]]) -> None:
        self.got = got

    def start(self) -> None: ...

    def write(self, record: Record) -> None:
        self.got.append(record.facts)

    def close(self) -> None: ...


def test_without_being_asked_for_no_data_is_shown(serve: Serve, tmp_path: Path) -> None:
    traced = Traced(serve, tmp_path)
    assert traced.server.ssh("HOST", "cat", stdin=b"secret").stdout == b"secret"
    traced.over()
    assert "secret" not in traced.file.read_text()
    assert all("shown" not in record["facts"] for record in traced.records())


def test_control_characters_are_spelled_out() -> None:
    assert spell(b"\x03") == "^C ETX"
    assert spell(b"ls\r") == '"ls" ^M CR'
    assert spell(b"\x1b[0m\x7f\x00") == '^[ ESC "[0m" ^? DEL ^@ NUL'
    assert spell("größe\xff".encode("latin-1")) == '"gr\ufffd\ufffde\ufffd"'
    assert spell(b"geheim\x04", hidden=True) == "(6 hidden) ^D EOT"


# -- the file ------------------------------------------------------------------------------------------


def record(event: str = "state.changed", connection: int = 1, **facts: Any) -> Record:
    return Record(trace.now(), time.time(), connection, 0, event, facts)


def test_a_file_is_appended_to_and_outlives_rotation(tmp_path: Path) -> None:
    path = tmp_path / "t.ndjson"
    path.write_bytes(b'{"half a li')
    file, other = TraceFile(path, "1"), TraceFile(path, "1")
    file.start()
    other.start()
    file.write(record())
    other.write(record())
    path.rename(tmp_path / "t.1")
    file.write(record(by="rotation"))
    path.unlink()
    file.write(record(by="removal"))
    file.close()
    other.close()
    lines = (tmp_path / "t.1").read_text().splitlines()
    assert lines[0] == '{"half a li'
    assert [json.loads(line)["event"] for line in lines[1:]] == [
        *("trace.started", "trace.started", "state.changed", "state.changed"),
    ]
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in again] == ["trace.started", "state.changed"]
    assert again[1]["facts"] == {"by": "removal"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_pipe_that_nobody_empties_keeps_no_server_from_starting(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(reader, b"x" * 65536)
    began = time.monotonic()
    with Tracer([TraceFile(path, "1")]) as tracer:
        tracer.tell(1, 0, "eof.sent", {})
        assert time.monotonic() - began < 1
    assert time.monotonic() - began < trace.LAST_WORDS + 1
    os.close(reader)


def test_a_full_disk_loses_lines_and_says_how_many(tmp_path: Path) -> None:
    class Disk:
        pace = 0.0

        def __init__(self) -> None:
            self.full = True
            self.got: list[Record] = []

        def start(self) -> None: ...

        def write(self, record: Record) -> None:
            if self.full:
                raise OSError(28, "No space left on device")
            self.got.append(record)

        def close(self) -> None: ...

    disk = Disk()
    with Tracer([disk]) as tracer:
        for _ in range(7):
            tracer.tell(1, 0, "eof.sent", {})
        wait_for("them to be lost", lambda: tracer._queues[0]._lost == 7)
        disk.full = False
        tracer.tell(1, 0, "close.sent", {})
    assert [record.event for record in disk.got] == ["trace.dropped", "close.sent"]
    assert disk.got[0].facts == {"events": 7, "reason": "No space left on device"}


def test_a_slow_reader_never_keeps_anybody_waiting_and_drops_are_told_in_their_place() -> None:
    gate = threading.Event()

    class Slow:
        pace = 0.0

        def __init__(self) -> None:
            self.got: list[Record] = []

        def write(self, record: Record) -> None:
            gate.wait()
            self.got.append(record)

        def start(self) -> None: ...

        def close(self) -> None: ...

    slow = Slow()
    with Tracer([slow]) as tracer:
        began = time.monotonic()
        for number in range(3 * trace.QUEUE):
            tracer.tell(1, 0, "eof.sent", {"number": number})
        assert time.monotonic() - began < 5  # it is not waited for; that would take for ever
        gate.set()
        wait_for("room", lambda: tracer._queues[0]._waiting.empty())
        tracer.tell(1, 0, "close.sent", {})
    events = [record.event for record in slow.got]
    told = events.count("eof.sent")
    (dropped,) = [record.facts["events"] for record in slow.got if record.event == "trace.dropped"]
    assert told + dropped == 3 * trace.QUEUE
    assert events[-2:] == ["trace.dropped", "close.sent"]


def test_floods_are_told_as_one_and_counted() -> None:
    def data(event: str, size: int, channel: int = 0) -> Record:
        return Record(0, 0.0, 1, channel, event, {"what": "stdout", "bytes": size})

    records = [
        *(data("output.read", 10) for _ in range(3)), data("data.sent", 5), data("output.read", 1, 1),
        data("data.sent", 5), Record(0, 0.0, 1, 0, "eof.sent"), data("output.read", 7),
    ]  # fmt: skip
    told = [
        (r.event, r.channel, r.facts.get("bytes"), r.facts.get("times")) for r in merged(records)
    ]
    assert told == [
        ("output.read", 0, 30, 3),
        ("data.sent", 0, 10, 2),
        ("output.read", 1, 1, None),
        ("eof.sent", 0, None, None),
        ("output.read", 0, 7, None),
    ]
    assert records[0].facts["bytes"] == 10  # the other outputs' is left as it is


def test_hostile_text_stays_on_its_line(traced: Traced) -> None:
    evil = "\x1b[2J\n\u202e" + "x" * 70_000
    traced.server.ssh("HOST", f": {evil}")
    traced.over()
    for line in traced.file.read_text().splitlines():
        assert len(line) < 4000
        assert line.isprintable()
        record = json.loads(line)
        shown = line_of(
            Record(record["us"], record["time"], record["connection"], record["channel"],
                   record["event"], record["facts"]), 0.0
        ).plain  # fmt: skip
        assert shown.isprintable()


def test_facts_become_json_whatever_they_are() -> None:
    assert plain([b"\xff\x1b", {"a": (1, None)}, "x" * 300]) == [
        "\\xff\\x1b",
        {"a": [1, None]},
        "x" * 256 + "… (300 characters)",
    ]


# -- the story -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_color", [False, True])
def test_the_story_on_a_terminal(tmp_path: Path, no_color: bool) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm-256color"}
    env |= {"NO_COLOR": "1"} if no_color else {}
    argv = ["-m", "gosshd_py", "--listen", "127.0.0.1:0", "--trace", "--hostkeys", f"{tmp_path}/k"]
    server = pexpect.spawn(sys.executable, argv, cwd=str(ROOT), env=env, timeout=10, dimensions=(50, 130))  # fmt: skip
    server.expect(r"connect with: ssh anyuser@localhost -p (\d+)")
    port = server.match[1].decode()
    ssh = ["ssh", "-F", "none", "-p", port, "-o", "StrictHostKeyChecking=no"]
    ssh += [
        "-o",
        f"UserKnownHostsFile={tmp_path}/known",
        "-o",
        "LogLevel=ERROR",
        "u@localhost",
        "true",
    ]
    subprocess.run(ssh, check=True, timeout=10, stdin=subprocess.DEVNULL)
    server.expect(r"#1 .*tcp.accepted.*peer 127.0.0.1:\d+.*a client has connected")
    server.expect(r"#1\.0 .* program.spawned")
    server.expect(r"#1 .*tcp.closed[^\r]*\r\n")
    story = server.before.decode()
    assert ("\x1b[3" in story) != no_color
    assert "connection opened" not in story  # the log would say it all again
    plain_lines = re.sub(r"\x1b\[[0-9;]*m", "", story).splitlines()
    assert all(len(line) <= 130 for line in plain_lines)
    server.terminate()
    server.expect(pexpect.EOF)
    server.close()


def test_a_reader_of_the_story_that_goes_away_disturbs_nobody(serve: Serve, tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    argv = [sys.executable, "-m", "gosshd_py", "--listen", "127.0.0.1:0", "--trace", "--hostkeys", f"{tmp_path}/k"]  # fmt: skip
    server = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        port = server.stdout.readline().decode().strip().rpartition(":")[2]
        while not server.stdout.readline().startswith(b"connect with"):
            pass
        server.stdout.close()
        ssh = ["ssh", "-F", "none", "-p", port, "-o", "StrictHostKeyChecking=no"]
        ssh += ["-o", f"UserKnownHostsFile={tmp_path}/known", "-o", "LogLevel=ERROR", "u@localhost", "echo ok"]  # fmt: skip
        for _ in range(3):
            done = subprocess.run(ssh, timeout=10, stdin=subprocess.DEVNULL, capture_output=True)
            assert done.stdout == b"ok\n"
    finally:
        end_client(server)
    assert server.returncode == 0
    errors = server.stderr.read().decode()
    server.stderr.close()
    assert "Traceback" not in errors


def test_a_terminal_that_takes_nothing_more_slows_nobody(tmp_path: Path) -> None:
    """As after ^S: the story is told to a pipe that nobody reads."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    argv = [sys.executable, "-m", "gosshd_py", "--listen", "127.0.0.1:0", "--trace", "--hostkeys", f"{tmp_path}/k"]  # fmt: skip
    server = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        port = server.stdout.readline().decode().strip().rpartition(":")[2]
        ssh = ["ssh", "-F", "none", "-p", port, "-o", "StrictHostKeyChecking=no"]
        ssh += ["-o", f"UserKnownHostsFile={tmp_path}/known", "-o", "LogLevel=ERROR", "u@localhost"]
        for _ in range(3):
            began = time.monotonic()
            done = subprocess.run([*ssh, "head -c 20000000 /dev/zero"], timeout=30, stdin=subprocess.DEVNULL, capture_output=True)  # fmt: skip
            assert len(done.stdout) == 20_000_000
            assert time.monotonic() - began < 10
        began = time.monotonic()
        server.terminate()
        assert server.wait(10) == 0  # and not SIGABRT, as of a thread that holds a stream's lock
        assert time.monotonic() - began < 5
    finally:
        server.kill()
        server.communicate()


def test_a_terminal_without_our_letters_gets_others(tmp_path: Path) -> None:
    """PYTHONIOENCODING=latin-1, a pipe: what cannot be encoded must not end the story."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONIOENCODING": "latin-1"}
    argv = [sys.executable, "-m", "gosshd_py", "--listen", "127.0.0.1:0", "--trace", "--trace-data", "80", "--hostkeys", f"{tmp_path}/k"]  # fmt: skip
    server = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        port = server.stdout.readline().decode("latin-1").strip().rpartition(":")[2]
        ssh = ["ssh", "-F", "none", "-p", port, "-o", "StrictHostKeyChecking=no"]
        ssh += ["-o", f"UserKnownHostsFile={tmp_path}/known", "-o", "LogLevel=ERROR", "u@localhost"]
        done = subprocess.run([*ssh, "echo 世 größe"], timeout=20, stdin=subprocess.DEVNULL)
        assert done.returncode == 0
        server.terminate()
        told = server.communicate(timeout=10)[0].decode("latin-1")
        assert server.returncode == 0
        assert "größe" in told
        assert "tcp.closed" in told
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize(
    ("setting", "problem"), [("/nowhere/t", "cannot be written"), ("/", "is a folder")]
)
def test_a_file_that_cannot_be_written_is_told_before_the_start(setting: str, problem: str) -> None:
    argv = [sys.executable, "-m", "gosshd_py", "check", "--trace-file", setting]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False, timeout=20)
    assert result.returncode == 2
    assert result.stderr.startswith(f"gosshd: error: --trace-file: {setting} {problem}")
