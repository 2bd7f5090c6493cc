"""Requests that no honest client makes, and those that must be refused: RFC 4254, by Paramiko."""

from __future__ import annotations

import os
import queue
import resource
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import asyncssh
import paramiko
import pytest
from paramiko import common

from .serving import Served, alive, end_client, run, wait_for


class Raw:
    """A session channel on which any request can be made and everything received is noted in order."""

    def __init__(self, transport: paramiko.Transport, **opening: int) -> None:
        self.seen: list[str] = []
        self.news: queue.Queue[str] = queue.Queue()
        names = {
            common.MSG_CHANNEL_DATA: "DATA",
            common.MSG_CHANNEL_EXTENDED_DATA: "STDERR",
            common.MSG_CHANNEL_EOF: "EOF",
            common.MSG_CHANNEL_CLOSE: "CLOSE",
            common.MSG_CHANNEL_SUCCESS: "SUCCESS",
            common.MSG_CHANNEL_FAILURE: "FAILURE",
            common.MSG_CHANNEL_REQUEST: "",
        }

        def noting(handler, name):
            def note(channel, message):
                position = message.packet.tell()
                label = name or message.get_text()  # a request starts with its name
                message.packet.seek(position)
                self.seen.append(label)
                if label != "FAILURE":  # for which Paramiko would close the channel
                    handler(channel, message)
                self.news.put(label)

            return note

        transport._channel_handler_table = {
            kind: noting(handler, names.get(kind, "?"))
            for kind, handler in transport._channel_handler_table.items()
        }
        self.transport = transport
        self.channel = transport.open_session(timeout=10, **opening)

    def request(self, name: str, *fields: bytes | int | bool | str, reply: bool = True) -> str:
        """Make a request; "SUCCESS", "FAILURE", or "" when no reply is wanted."""
        self.send(common.cMSG_CHANNEL_REQUEST, name, reply, *fields)
        return self.wait("SUCCESS", "FAILURE") if reply else ""

    def send(self, kind: bytes, *fields: bytes | int | bool | str) -> None:
        message = paramiko.Message()
        message.add_byte(kind)
        message.add_int(self.channel.remote_chanid)
        for field in fields:
            if isinstance(field, bool):
                message.add_boolean(field)
            elif isinstance(field, int):
                message.add_int(field)
            else:
                message.add_string(field)
        self.transport._send_user_message(message)

    def pty_req(
        self, term: bytes = b"xterm", columns: int = 80, rows: int = 24, modes: bytes = b"\0"
    ) -> str:
        return self.request("pty-req", term, columns, rows, 0, 0, modes)

    def wait(self, *labels: str, seconds: float = 8) -> str:
        deadline = time.monotonic() + seconds
        while True:
            label = self.news.get(timeout=max(0.01, deadline - time.monotonic()))
            if label in labels:
                return label

    def output(self) -> bytes:
        self.channel.settimeout(8)
        parts = []
        while part := self.channel.recv(65536):
            parts.append(part)
        return b"".join(parts)


@contextmanager
def raw(server: Served, **opening: int) -> Iterator[Raw]:
    with server.paramiko() as transport:
        yield Raw(transport, **opening)
        # Whatever was asked, the connection is alive and can be used.
        check = transport.open_session(timeout=10)
        check.exec_command("echo alive")
        assert check.makefile().read() == b"alive\n"


def test_the_order_on_the_wire_is_data_eof_status_close(server: Served) -> None:
    for command, end in (("echo x; exit 3", "exit-status"), ("echo x; kill -9 $$", "exit-signal")):
        for pty in (False, True):
            with raw(server) as it:
                if pty:
                    assert it.pty_req() == "SUCCESS"
                it.request("exec", command.encode())
                it.wait("CLOSE")
                assert [label for label in it.seen if label != "SUCCESS"] == [
                    "DATA",
                    "EOF",
                    end,
                    "CLOSE",
                ]


@pytest.mark.parametrize(
    ("columns", "rows", "answer", "size"),
    [
        (0, 0, "SUCCESS", "24 80"),
        (0, 50, "SUCCESS", "50 80"),
        (1, 1, "SUCCESS", "1 1"),
        (65535, 65535, "SUCCESS", "65535 65535"),
        (65536, 65536, "FAILURE", None),
        (2**32 - 1, 2**32 - 1, "FAILURE", None),
        (80, 2**32 - 1, "FAILURE", None),
    ],
)
def test_sizes(server: Served, columns: int, rows: int, answer: str, size: str | None) -> None:
    with raw(server) as it:
        assert it.pty_req(columns=columns, rows=rows) == answer
        it.request("exec", b"stty size 2>/dev/null || echo none")
        assert it.output().decode().strip() == (size or "none")


def test_an_impossible_window_change_changes_nothing(server: Served) -> None:
    with raw(server) as it:
        it.pty_req(columns=100, rows=30)
        it.request("exec", b"read x; stty size")
        for columns, rows in ((70000, 10), (2**32 - 1, 2**32 - 1), (0, 0)):
            it.request("window-change", columns, rows, 0, 0, reply=False)
        it.channel.sendall(b"\n")
        assert it.output().split()[-2:] == [b"30", b"100"]


@pytest.mark.parametrize(
    ("term", "answer"),
    [
        (b"", "SUCCESS"),
        (b"xterm-256color", "SUCCESS"),
        (b"x" * 64 * 1024, "FAILURE"),
        (b"xterm\0", "FAILURE"),
        (b"xterm\x1b[2J", "FAILURE"),
        (b"../../x", "FAILURE"),
        (b"xt\xe9rm", "FAILURE"),
        (b"x\ny", "FAILURE"),
    ],
)
def test_terms(server: Served, term: bytes, answer: str) -> None:
    with raw(server) as it:
        assert it.pty_req(term=term) == answer
        it.request("exec", b"echo $TERM")
        expected = (term.decode() or "dumb") if answer == "SUCCESS" else "dumb"
        assert it.output().decode().strip() == expected


def test_the_terminals_own_term_counts_on_a_terminal(server: Served) -> None:
    for pty, expected in ((True, b"xterm"), (False, b"vt100")):
        with raw(server) as it:
            if pty:
                it.pty_req(term=b"xterm")
            assert it.request("env", b"TERM", b"vt100") == "SUCCESS"
            it.request("exec", b"echo $TERM")
            assert it.output().strip() == expected


ECHO_OFF = bytes([53]) + struct.pack(">I", 0)


@pytest.mark.parametrize(
    ("modes", "answer", "word"),
    [
        (ECHO_OFF + b"\0", "SUCCESS", b" -echo "),
        (ECHO_OFF, "SUCCESS", b" -echo "),  # no TTY_OP_END
        (b"", "SUCCESS", b" echo "),
        (bytes([159]) + b"\0\0\0\7" + ECHO_OFF + b"\0", "SUCCESS", b" -echo "),  # unknown opcode
        (bytes([200]) + b"\0\0\0\7" + ECHO_OFF, "SUCCESS", b" echo "),  # undefined: stop
        (ECHO_OFF + bytes([53, 0, 0]), "FAILURE", None),  # cut short
        (b"".join(bytes([op]) + b"\xff\xff\xff\xff" for op in range(1, 160)), "SUCCESS", None),
        (
            bytes([128]) + struct.pack(">I", 38400) + bytes([129]) + struct.pack(">I", 12345),
            "SUCCESS",
            b"38400",
        ),
    ],
)
def test_modes(server: Served, modes: bytes, answer: str, word: bytes | None) -> None:
    with raw(server) as it:
        assert it.pty_req(modes=modes) == answer
        it.request("exec", b"stty -a 2>&1")
        output = it.output().replace(b"\n", b" ").replace(b"\r", b" ")
        assert word is None or word in output, output


def test_a_second_pty_or_program_on_a_channel_is_refused(server: Served) -> None:
    with raw(server) as it:
        assert it.pty_req(columns=90) == "SUCCESS"
        assert it.pty_req(columns=91) == "FAILURE"
        assert it.request("exec", b"read x; stty size; echo $x") == "SUCCESS"
        assert it.request("shell") == "FAILURE"
        assert it.request("exec", b"echo no") == "FAILURE"
        assert it.request("subsystem", b"sftp") == "FAILURE"
        assert it.pty_req(columns=92) == "FAILURE"
        assert it.request("env", b"LC_ALL", b"C") == "FAILURE"
        it.channel.sendall(b"go\n")
        assert it.output().split()[-3:] == [b"24", b"90", b"go"]


def test_env_is_refused_but_for_the_named_and_bounded(server: Served) -> None:
    with raw(server) as it:
        for name in (b"LANG", b"LC_TIME", b"TERM"):
            assert it.request("env", name, b"C") == "SUCCESS"
        for name in (
            b"LD_PRELOAD",
            b"BASH_ENV",
            b"PATH",
            b"LC_A=B",
            b"",
            b"lc_all",
            b"LC_\xff",
            b"LC_A\0B",
            b"HOME",
        ):
            assert it.request("env", name, b"x") == "FAILURE"
        assert it.request("env", b"LC_NUL", b"x\0y") == "FAILURE"
        assert it.request("env", b"LC_LONG", b"x" * 100_000) == "FAILURE"
        answers = [it.request("env", f"LC_{number}".encode(), b"C") for number in range(200)]
        assert answers.count("SUCCESS") == 125
        it.request("exec", b"env | grep -c ^LC_; env | grep -E '^(LD_|BASH_ENV)'")
        assert it.output() == b"126\n"


@pytest.mark.parametrize(
    ("command", "answer", "says"),
    [
        (b"", "SUCCESS", b""),
        (b"x" * 255 * 1024, "FAILURE", b"Argument list too long"),
        (b"echo a\0b", "FAILURE", b"NUL"),
    ],
)
def test_unusual_commands(server: Served, command: bytes, answer: str, says: bytes) -> None:
    with raw(server) as it:
        assert it.request("exec", command) == answer
        it.wait("CLOSE")
        assert says in it.channel.recv_stderr(1000)


def test_an_unknown_subsystem_is_refused_with_words(server: Served) -> None:
    result = server.ssh("-s", "HOST", "nonsense")
    assert b"no subsystem 'nonsense'" in result.stderr
    assert result.returncode == 255


def test_unknown_requests_and_channels_get_the_answer_of_the_rfc(server: Served) -> None:
    with raw(server) as it:
        assert it.request("nonsense@example.org") == "FAILURE"
        assert it.request("x11-req", False, b"MIT-MAGIC-COOKIE-1", b"00", 0) == "FAILURE"
        assert it.request("auth-agent-req@openssh.com") == "FAILURE"
        assert it.request("keepalive@openssh.com") in ("SUCCESS", "FAILURE")
        for kind in ("nonsense", "session@example.org"):
            with pytest.raises(paramiko.ChannelException) as refusal:
                it.transport.open_channel(kind, timeout=5)
            assert refusal.value.code == 3  # SSH_OPEN_UNKNOWN_CHANNEL_TYPE
        with pytest.raises(paramiko.ChannelException):
            it.transport.open_channel(
                "direct-tcpip", ("127.0.0.1", 22), ("127.0.0.1", 1), timeout=5
            )
        assert it.transport.global_request("nonsense@example.org") is None
        assert it.transport.global_request("tcpip-forward", ("", 0)) is None
        assert it.transport.global_request("keepalive@openssh.com") is not None


def test_absurd_packet_sizes_are_refused_at_the_opening(server: Served) -> None:
    with raw(server) as it:
        message = paramiko.Message()
        for field in (common.cMSG_CHANNEL_OPEN,):
            message.add_byte(field)
        message.add_string("session")
        for number in (777, 2**20, 1):
            message.add_int(number)
        refused = threading.Event()
        it.transport.channel_events[777] = refused
        it.transport.channels_seen[777] = True
        it.transport._channels.put(777, paramiko.Channel(777))
        it.transport._send_user_message(message)
        assert refused.wait(5)
        assert isinstance(it.transport.get_exception(), paramiko.ChannelException)


def test_eof_twice_ends_at_most_that_connection(server: Served) -> None:
    with server.paramiko() as transport:
        it = Raw(transport)
        it.request("exec", b"cat; echo done")
        it.send(common.cMSG_CHANNEL_EOF)
        it.send(common.cMSG_CHANNEL_EOF)
        wait_for("an end", lambda: "CLOSE" in it.seen or not transport.is_active())
    assert server.ssh("echo fine").stdout == b"fine\n"


@pytest.mark.parametrize("moment", ["before", "right behind", "while it runs"])
def test_close_at_any_moment_leaves_no_process(server: Served, moment: str) -> None:
    with raw(server) as it:
        if moment != "before":
            it.pty_req()
            it.request("exec", b"echo $$; exec sleep 1000", reply=False)
        pid = 0
        if moment == "while it runs":
            pid = int(it.channel.makefile().readline())
        it.channel.close()
        if pid:
            assert wait_for("the end", lambda: not alive(pid)) < 1


def test_a_client_that_never_opens_its_window_is_given_up_after_the_drain_time(serve) -> None:
    server = serve(drain_timeout=0.4)
    with raw(server, window_size=2**15, max_packet_size=2**15) as it:
        it.channel.in_window_size = 0  # Paramiko never adjusts the window unless somebody reads
        it.request("exec", b"head -c 60000 /dev/zero; exit 5")
        wait_for("the end", lambda: server.events("session over", cause="exited"))
        assert server.stats()["sessions"] == 0
        assert server.stats()["children"] == 0


def test_scanners_and_browsers_cost_two_log_lines(server: Served) -> None:
    start = len(server.log())
    with closing(socket.create_connection((server.host, server.port))):
        pass
    with closing(socket.create_connection((server.host, server.port))) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        sock.settimeout(5)
        while sock.recv(4096):
            pass
    scan = subprocess.run(
        ["ssh-keyscan", "-t", "ed25519", "-p", str(server.port), server.host],
        capture_output=True,
        check=False,
        timeout=10,
    )
    assert b"ssh-ed25519" in scan.stdout
    wait_for("six lines", lambda: len(server.log()) >= start + 6)
    events = sorted(event["event"] for event in server.log()[start:])
    assert events == ["connection closed"] * 3 + ["connection opened"] * 3


def test_ssh_without_a_session_is_kept_and_ends_cleanly(server: Served) -> None:
    client = subprocess.Popen(server.ssh_argv("-N", "HOST"))
    wait_for("the login", lambda: server.stats()["connections"] == 1)
    assert client.poll() is None
    end_client(client)
    wait_for("its line", lambda: server.events("connection closed")[-1]["sessions"] == 0)


@pytest.mark.parametrize(
    "user", ["-oProxyCommand=x", "../../etc", ".ssh", "a b", "x" * 33, "", "ä", "a\nb"]
)
def test_improper_user_names_are_refused(server: Served, user: str) -> None:
    transport = paramiko.Transport((server.host, server.port))
    with closing(transport):
        transport.start_client(timeout=10)
        with pytest.raises(paramiko.SSHException):
            transport.auth_none(user)
        assert not transport.is_authenticated()
    transport.join(5)


# -- when the machine has nothing left to give ---------------------------------------------------


def test_a_missing_shell_is_refused_with_words(serve, tmp_path) -> None:
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\nexec /bin/sh "$@"\n')
    shell.chmod(0o755)
    server = serve(shell=str(shell))
    assert server.ssh("echo fine").stdout == b"fine\n"
    shell.unlink()
    before = server.stats()
    for options in ((), ("-tt",)):
        result = server.ssh(*options, "HOST", "echo no")
        assert b"not found or not executable" in result.stderr
        assert result.returncode != 0
    assert len(server.events("spawn failed")) == 2
    wait_for("nothing left", lambda: server.stats()["fds"] == before["fds"])


def test_out_of_file_descriptors_refuses_and_recovers(serve) -> None:
    server = serve()
    server.ssh("true")
    before = server.stats()

    # The limit is inherited: idle connections lift it to what a shell needs for itself.
    idle = [socket.create_connection((server.host, server.port)) for _ in range(40)]
    wait_for("the connections", lambda: server.stats()["connections"] == 40)

    async def main() -> None:
        async with await server.connect() as conn:
            limit = server.stats()["fds"] + 4
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, 20000))
            for term_type in (None, "xterm", None):
                first = [await try_run(conn, term_type) for _ in range(3)]
                assert any("Too many open files" in text for text in first if text), first
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (1024, 20000))
            result = await conn.run("echo fine")
            assert result.stdout == "fine\n"

    async def try_run(conn, term_type) -> str:
        try:
            running = await conn.create_process("sleep 1000", term_type=term_type)
        except asyncssh.ChannelOpenError:
            return "Too many open files"  # asyncssh shows no stderr of a refused request
        open_now.append(running)
        return ""

    open_now: list = []
    run(main())
    for sock in idle:
        sock.close()
    wait_for("nothing left", lambda: server.stats()["fds"] == before["fds"])
    reasons = [event["reason"] for event in server.events("spawn failed")]
    assert reasons
    assert all("Too many open files" in reason for reason in reasons)


@pytest.fixture
def process_limit() -> Iterator[Path]:
    """A cgroup whose number of processes can be limited."""
    base = next(
        path for path in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")) if path.is_dir()
    )
    group = base / f"gosshd-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("needs root and a writable cgroup file system")
    try:
        if not (group / "pids.max").exists():
            pytest.skip("needs the pids controller of the cgroup file system")
        yield group
    finally:
        wait_for("an empty group", lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_out_of_processes_refuses_with_words_and_recovers(
    process_limit: Path, tmp_path: Path
) -> None:
    with closing_server(tmp_path) as server:
        server.ssh("true")
        (process_limit / "cgroup.procs").write_text(str(server.process.pid))
        (process_limit / "pids.max").write_text((process_limit / "pids.current").read_text())
        for options in ((), ("-tt",)):
            result = server.ssh(*options, "HOST", "echo no")
            assert b"Resource temporarily unavailable" in result.stderr
            assert result.returncode != 0
        (process_limit / "pids.max").write_text("max")
        assert server.ssh("echo fine").stdout == b"fine\n"


@contextmanager
def closing_server(directory: Path) -> Iterator[Served]:
    server = Served(directory, home="/tmp")
    try:
        yield server
    finally:
        server.stop()


def test_out_of_ptys_refuses_with_words(server: Served) -> None:
    limit = Path("/proc/sys/kernel/pty/max")
    old = limit.read_text()
    try:
        limit.write_text("0")
    except OSError:
        pytest.skip("needs root, to lower /proc/sys/kernel/pty/max")
    try:
        result = server.ssh("-tt", "HOST", "echo no")
        assert b"cannot open a pseudo-terminal" in result.stderr
        assert server.ssh("echo fine").stdout == b"fine\n"
    finally:
        limit.write_text(old)
