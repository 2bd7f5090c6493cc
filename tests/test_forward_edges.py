"""Forwards at their edges: slow names, half-dead targets, hostile confirmations, every way to a place."""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from asyncssh.packet import String, UInt32

from gosshd_py import sockets, threads
from gosshd_py.places import ForbiddenError, check_found

from .keys import Key
from .serving import MIB, Served, end_client, run, wait_for
from .test_accounts import root
from .test_cli import gosshd_once
from .test_forward import (  # noqa: F401
    agent,
    dial,
    echo,
    exchange,
    free_port,
    key,
    read_all,
    refused_open,
    tunnel,
)

Serve = Callable[..., Served]


# -- where names lead ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("loop.test", "127.0.0.1"),
        ("loop6.test", "::1"),
        ("metadata.test", "169.254.169.254"),
        ("mapped.test", "::ffff:127.0.0.1"),
        ("here.test", "0.0.0.0"),
    ],
)
def test_a_named_host_leads_to_no_special_address(
    serve: Serve, key: Key, echo: int, name: str, found: str
) -> None:
    """Asked of the server, not of the rules: neither the account's nor the key's may be passed by."""
    by_key = {"authorized_keys": [key.line(f'permitopen="{name}:{echo}"')], "permit_open": ["*:*"]}
    server = serve(accounts={
        "alice": {"authorized_keys": [key.public], "permit_open": [f"{name}:{echo}"]}, "bob": by_key,
    })  # fmt: skip
    server.ask("sabotage names")
    for user in ("alice", "bob"):
        reason = refused_open(server, name, echo, username=user, client_keys=[str(key.file)])
        assert reason == f"1: gosshd: {name} leads to {found}, which no rule names"


def test_a_name_that_leads_to_a_named_address_is_good(serve: Serve, echo: int) -> None:
    server = serve(permit_open=[f"loop.test:{echo}", f"127.0.0.1:{echo}"])
    server.ask("sabotage names")
    assert refused_open(server, "loop.test", echo) is None


@pytest.mark.parametrize("address", ["168.63.129.16", "192.0.0.192", "fd20:ce::254"])
def test_metadata_services_are_special(address: str) -> None:
    with pytest.raises(ForbiddenError):
        check_found(["db.lab:80"], None, "db.lab", address, 80)


def test_a_name_that_is_none_gets_words(serve: Serve) -> None:
    server = serve(permit_open=["*:*"])
    assert refused_open(server, "a..b", 80) == "2: gosshd: that is no host name"


def test_slow_names_keep_neither_addresses_nor_the_agent_waiting(
    serve: Serve, echo: int, agent: str, key: Key
) -> None:
    server = serve(permit_open=["*:*"], agent_forwarding=True, request_timeout=1)
    server.ask("sabotage lookup")  # each takes five seconds
    control = server.directory / "control"
    port = free_port()
    with tunnel(
        server, "-A", "-o", f"IdentityAgent={agent}", "-D", str(port), "-S", str(control), "-M"
    ):
        names = [dial(port) for _ in range(4)]
        for sock in names:
            sock.sendall(b"\x05\x01\x00")
            assert sock.recv(2) == b"\x05\x00"
            sock.sendall(b"\x05\x01\x00\x03\x09slow.test\x00\x50")
        began = time.monotonic()
        with dial(port) as sock:
            sock.sendall(b"\x05\x01\x00")
            assert sock.recv(2) == b"\x05\x00"
            sock.sendall(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + echo.to_bytes(2, "big"))
            assert sock.recv(10)[:2] == b"\x05\x00"
            assert exchange(sock) == b"hello"
        command = [
            "ssh",
            "-F",
            "none",
            "-S",
            str(control),
            "-A",
            "x",
            "echo ${SSH_AUTH_SOCK:+agent}",
        ]
        assert subprocess.run(command, capture_output=True, timeout=20).stdout == b"agent\n"
        assert time.monotonic() - began < 3
        for sock in names:
            sock.close()


def test_a_connection_that_ends_takes_what_it_still_connects_along(serve: Serve) -> None:
    """A backlog that is full lets them wait for seconds."""
    server = serve(permit_open=["127.0.0.1:*"])
    server.ssh("true")
    before = server.stats()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        at = listener.getsockname()[1]
        full = [socket.socket() for _ in range(4)]
        for sock in full:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", at))

        async def pending() -> None:
            conn = await server.connect()
            tasks = [asyncio.create_task(conn.open_connection("127.0.0.1", at)) for _ in range(20)]
            await asyncio.to_thread(
                wait_for, "them", lambda: server.stats()["fds"] >= before["fds"] + 15
            )
            conn.abort()
            await asyncio.gather(*tasks, return_exceptions=True)

        run(pending())
        wait_for("their end", lambda: server.stats()["fds"] <= before["fds"], 3)
        for sock in full:
            sock.close()
    assert server.stats()["tasks"] <= before["tasks"]


def read_some(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(65536)):
        data += more
    return data


# -- lost bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_target_that_reads_no_more_is_still_listened_to(
    serve: Serve, tmp_path: Path, kind: str
) -> None:
    """An error in one direction is no end of the other."""
    data = os.urandom(MIB) * 6
    path = tmp_path / "target"
    server = serve(permit_open=["127.0.0.1:*"], permit_open_sockets=["*"])
    listener = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    with listener:
        listener.bind(str(path) if kind == "unix" else ("127.0.0.1", 0))
        listener.listen()
        port = free_port()
        target = str(path) if kind == "unix" else f"127.0.0.1:{listener.getsockname()[1]}"
        with tunnel(server, "-L", f"{port}:{target}"), dial(port) as client:
            there, _ = listener.accept()
            there.shutdown(socket.SHUT_RD)

            def answer() -> None:
                there.sendall(data)
                if kind == "unix":  # of TCP, what follows a FIN may be a reset, and that loses data
                    there.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=answer)
            sender.start()
            stop = threading.Event()

            def type_on() -> None:
                with suppress(OSError):
                    while not stop.is_set():
                        client.sendall(b"more input" * 100)
                        time.sleep(0.01)

            typist = threading.Thread(target=type_on)
            typist.start()
            got = read_all(client) if kind == "unix" else read_some(client, len(data))
            stop.set()
            typist.join(5)
            sender.join(5)
            there.close()
    assert got == data


def kernel_holds() -> int:
    """Bytes that the kernel takes for a target that does not read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with socket.create_connection(listener.getsockname()) as sock, listener.accept()[0]:
            sock.setblocking(False)
            held, until = 0, time.monotonic() + 0.5
            while time.monotonic() < until:
                with suppress(BlockingIOError):
                    held += sock.send(b"x" * 65536)
            return held


def test_a_target_that_is_too_slow_sees_that_it_has_not_all(serve: Serve) -> None:
    """A reset, and no clean end; as long as it takes something, it is waited for."""
    server = serve(permit_open=["127.0.0.1:*"])
    server.ask("patch forward.LAST_INPUT 0.4")
    size = kernel_holds() + 700_000  # less than a window more

    async def send_and_leave(at: int) -> socket.socket:
        async with await server.connect() as conn:
            _, writer = await conn.open_connection("127.0.0.1", at, encoding=None)
            there, _ = await asyncio.to_thread(listener.accept)
            writer.write(b"x" * size)
            writer.close()
            await writer.channel.wait_closed()
            await asyncio.to_thread(wait_for, "its end", lambda: server.events("forward closed"))
        return there

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        there = run(send_and_leave(listener.getsockname()[1]))
        with pytest.raises(ConnectionResetError):
            while there.recv(65536):
                pass
        there.close()
    (closed,) = server.events("forward closed")
    assert closed["bytes_in"] < size


def test_input_before_a_close_reaches_a_target_that_is_slow_for_a_while(serve: Serve) -> None:
    """More than the kernel's buffers hold."""
    size = kernel_holds() + 700_000
    server = serve(permit_open=["127.0.0.1:*"])

    async def send_and_leave(at: int) -> int:
        async with await server.connect() as conn:
            _, writer = await conn.open_connection("127.0.0.1", at, encoding=None)
            there, _ = await asyncio.to_thread(listener.accept)
            writer.write(b"x" * size)
            writer.close()
            await asyncio.sleep(1)
            data = await asyncio.to_thread(read_all, there)
            there.close()
            return len(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert run(send_and_leave(listener.getsockname()[1])) == size


def test_an_error_of_ours_in_a_forward_is_logged(serve: Serve, request: Any) -> None:
    request.node.add_marker("logs_errors")
    server = serve(permit_open=["127.0.0.1:*"])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def main() -> None:
            async with await server.connect() as conn:
                reader, _ = await conn.open_connection("127.0.0.1", listener.getsockname()[1])
                there, _ = listener.accept()
                server.ask("sabotage read")
                there.sendall(b"x")
                assert await reader.read() == b""
                there.close()

        run(main())
    wait_for("its line", lambda: server.events("forward failed"))
    assert "sabotaged read" in server.events("forward failed")[0]["exception"]


# -- hostile clients -------------------------------------------------------------------------------------


def test_a_client_that_wants_tiny_packets_for_its_listener_is_cut_off(serve: Serve) -> None:
    server = serve(permit_listen=["127.0.0.1:*"])

    async def main() -> None:
        conn = await server.connect()
        # It accepts what comes with a maximum packet size of one byte.
        listener = await conn.start_server(
            lambda *_: lambda *_: None, "127.0.0.1", 0, max_pktsize=1
        )
        with socket.create_connection(("127.0.0.1", listener.get_port())) as sock:
            sock.sendall(b"x" * 10_000)
            await conn.wait_closed()

    run(main())
    wait_for("its line", lambda: server.events("connection closed"))
    assert "packet size of 1 bytes" in server.events("connection closed")[0]["reason"]
    assert server.ask("lag")["worst"] < 0.1


def test_an_open_with_a_tiny_packet_size_leaves_no_warning(serve: Serve) -> None:
    server = serve(permit_open=["*:*"])

    async def main() -> None:
        async with await server.connect() as conn:
            with pytest.raises(asyncssh.ChannelOpenError, match="too small"):
                await conn.open_connection("127.0.0.1", 1, max_pktsize=1)

    run(main())  # the fixture looks for what is no log line


@pytest.mark.parametrize("path", ["", "relative", "../up", "@abstract", "~/home"])
def test_only_absolute_paths_are_sockets(serve: Serve, path: str) -> None:
    """An empty one once changed the mode of the server's own folder."""
    server = serve(permit_listen_sockets=["*"], permit_open_sockets=["*"])
    here = Path(f"/proc/{server.process.pid}/cwd")
    before = here.stat().st_mode

    async def main() -> None:
        async with await server.connect() as conn:
            kind, _ = await conn._make_global_request(
                b"streamlocal-forward@openssh.com", String(path)
            )
            assert kind == 82
            with pytest.raises(asyncssh.ChannelOpenError):
                await conn.open_unix_connection(path)

    run(main())
    assert here.stat().st_mode == before
    assert server.events("forward refused")[0]["reason"] == f"{path!r} is not an absolute path"


def test_a_path_that_is_too_long_gets_words(serve: Serve) -> None:
    server = serve(permit_open_sockets=["*"])

    async def main() -> None:
        async with await server.connect() as conn:
            with pytest.raises(asyncssh.ChannelOpenError, match="path too long"):
                await conn.open_unix_connection("/" + "x" * 200)

    run(main())


def test_too_many_processes_are_an_error_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        monkeypatch.setattr(threading.Thread, "start", fails)
        for _ in range(threads.MAX_THREADS + 1):  # each gives its place back
            with pytest.raises(OSError, match="can't start new thread") as caught:
                threads.in_thread(lambda: None)
            assert caught.value.errno == errno.EAGAIN

    asyncio.run(main())


# -- sockets in the file system --------------------------------------------------------------------------


def test_a_refused_socket_is_refused_before_a_command_starts(serve: Serve, tmp_path: Path) -> None:
    """However slow the file system is in saying so."""
    server = serve(permit_listen_sockets=["*"])
    server.ask("sabotage bind")  # takes half a second, and fails
    mark = tmp_path / "mark"
    result = server.ssh(
        *(
            "-o",
            "ExitOnForwardFailure=yes",
            "-R",
            f"{tmp_path}/s:127.0.0.1:1",
            "HOST",
            f"touch {mark}",
        )
    )
    assert result.returncode == 255
    assert not server.events("session started")
    assert not mark.exists()


def test_a_socket_that_a_dead_server_has_left_is_replaced(
    serve: Serve, echo: int, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    first = serve(permit_listen_sockets=[str(path)])
    argv = first.ssh_argv("-N", "-R", f"{path}:127.0.0.1:{echo}", "HOST")
    client = subprocess.Popen(argv)
    wait_for("the socket", path.exists)
    first.process.kill()
    first.process.wait()
    end_client(client)
    assert path.exists()
    second = serve(permit_listen_sockets=[str(path)])
    with tunnel(second, "-R", f"{path}:127.0.0.1:{echo}"):
        assert exchange(dial(str(path))) == b"hello"
        # One that lives is left alone, and so is what is no socket.
        third = serve(permit_listen_sockets=["*"])
        options = ("-N", "-o", "ExitOnForwardFailure=yes", "-R")
        assert third.ssh(*options, f"{path}:127.0.0.1:1", "HOST").returncode == 255
        assert exchange(dial(str(path))) == b"hello"
    plain = tmp_path / "plain"
    plain.write_text("mine")
    assert third.ssh(*options, f"{plain}:127.0.0.1:1", "HOST").returncode == 255
    assert plain.read_text() == "mine"


@root
def test_somebody_elses_left_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    os.chown(path, pwd.getpwnam("nobody").pw_uid, -1)
    with pytest.raises(OSError, match="in use"):
        sockets.bind_path(str(path), None)


def test_cancelling_and_listening_again_at_once(serve: Serve, tmp_path: Path) -> None:
    path = String(str(tmp_path / "socket"))
    server = serve(permit_listen_sockets=["*"])

    async def main() -> None:
        async with await server.connect() as conn:
            for _ in range(50):
                listen = conn._make_global_request(b"streamlocal-forward@openssh.com", path)
                cancel = conn._make_global_request(b"cancel-streamlocal-forward@openssh.com", path)
                answers = await asyncio.gather(listen, cancel)
                assert [kind for kind, _ in answers] == [81, 81]
            kind, _ = await conn._make_global_request(
                b"cancel-streamlocal-forward@openssh.com", path
            )
            assert kind == 82  # an unknown one
            assert (await conn.run("echo alive")).stdout == "alive\n"

    run(main())


def test_many_at_once_wait_for_a_full_backlog(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = serve(permit_open_sockets=["*"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(2)

        def greet() -> None:
            for _ in range(30):
                there, _ = listener.accept()
                time.sleep(0.01)
                there.sendall(b"hi")
                there.close()

        greeter = threading.Thread(target=greet)
        greeter.start()

        async def one(conn: asyncssh.SSHClientConnection) -> bytes:
            reader, writer = await conn.open_unix_connection(str(path), encoding=None)
            data = await reader.read()
            writer.close()
            return data

        async def main() -> list[bytes]:
            async with await server.connect() as conn:
                return await asyncio.gather(*(one(conn) for _ in range(30)))

        assert run(main()) == [b"hi"] * 30
        greeter.join(5)


# -- rules ---------------------------------------------------------------------------------------------


def test_sockets_are_opened_only_where_they_are_named(
    serve: Serve, tmp_path: Path, key: Key
) -> None:
    path = tmp_path / "socket"
    named = {"permit_open_sockets": [str(path)]}
    server = serve(accounts={
        "alice": {"authorized_keys": [key.public], **named},
        "none": {"authorized_keys": [key.public]},
        "restricted": {"authorized_keys": [key.line("restrict")], **named},
        "ports": {"authorized_keys": [key.line('permitopen="127.0.0.1:1"')], **named},
    })  # fmt: skip
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        async def opens(user: str, where: Path) -> str:
            async with await server.connect(username=user, client_keys=[str(key.file)]) as conn:
                try:
                    await conn.open_unix_connection(str(where))
                except asyncssh.ChannelOpenError as exc:
                    return exc.reason
                return "open"

        assert run(opens("alice", path)) == "open"
        assert "does not name" in run(opens("alice", tmp_path / "socket2"))
        assert "does not name" in run(opens("none", path))
        assert "does not permit port forwarding" in run(opens("restricted", path))
        assert "a key that names ports is for no sockets" in run(opens("ports", path))


def test_listeners_and_what_they_accept_count(serve: Serve, echo: int) -> None:
    server = serve(permit_listen=["127.0.0.1:*"], connection_max_forwards=3)

    async def main() -> None:
        async with await server.connect() as conn:
            ports = []
            for answer in (81, 81, 81, 82):
                kind, packet = await conn._make_global_request(
                    b"tcpip-forward", String("127.0.0.1"), UInt32(0)
                )
                assert kind == answer
                ports += [packet.get_uint32()] if kind == 81 else []
            with socket.create_connection(("127.0.0.1", ports[0])) as sock:
                assert await asyncio.to_thread(sock.recv, 1) == b""

    run(main())
    assert (
        "this connection has 3 forwards, which is the limit"
        in server.events("forward refused")[-1]["reason"]
    )


@pytest.mark.parametrize(
    ("rules", "bound"),
    [(["0.0.0.0:*"], {"0.0.0.0"}), (["*:*"], {"0.0.0.0", "[::]"}), (["[::]:*"], {"[::]"})],
)
def test_a_listener_everywhere_stands_where_the_rules_name(
    serve: Serve, rules: list[str], bound: set[str]
) -> None:
    server = serve(permit_listen=rules, gateway_ports=True)

    async def main() -> set[str]:
        async with await server.connect() as conn:
            _, packet = await conn._make_global_request(b"tcpip-forward", String("*"), UInt32(0))
            port = packet.get_uint32()
            shown = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout  # fmt: skip
            return {line.split()[3].rsplit(":", 1)[0] for line in shown.splitlines()}

    assert run(main()) == bound


def test_x11_and_the_agent_are_refused_to_a_client_that_asks(
    serve: Serve, agent: str, key: Key
) -> None:
    server = serve()
    xauth = {"DISPLAY": "127.0.0.1:9", "XAUTHORITY": f"{server.directory}/none"}
    assert server.ssh("-X", "HOST", "echo [$DISPLAY]", **xauth).stdout == b"[]\n"
    options = ("-A", "-o", f"IdentityAgent={agent}")
    assert server.ssh(*options, "HOST", "echo [$SSH_AUTH_SOCK]").stdout == b"[]\n"
    assert server.events("forward refused", kind="auth-agent")


def test_jumping_through_us(serve: Serve, key: Key, tmp_path: Path) -> None:
    """ssh -J itself, with its own configuration of both hops."""
    inner = serve(accounts={"alice": {"authorized_keys": [key.public]}})
    outer = serve(permit_open=[f"localhost:{inner.port}", f"127.0.0.1:{inner.port}"])
    known = tmp_path / "known"
    known.write_text(outer.known_hosts.read_text() + inner.known_hosts.read_text())
    config = tmp_path / "config"
    config.write_text(
        f"Host *\n  UserKnownHostsFile {known}\n  StrictHostKeyChecking yes\n  IdentityAgent none\n"
        f"  IdentityFile {key.file}\n  IdentitiesOnly yes\n  BatchMode yes\n"
    )
    argv = ["ssh", "-F", str(config), "-J", f"any@localhost:{outer.port}", "-p", str(inner.port), "alice@localhost", "echo through"]  # fmt: skip
    result = subprocess.run(argv, capture_output=True, timeout=20, stdin=subprocess.DEVNULL)
    assert result.stdout == b"through\n", result.stderr
    assert outer.events("forward opened")


# -- explain and the server agree ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "password", "allowed"),
    [
        ([""], "", True),
        (['expiry-time="20200101"'], "", False),
        (['expiry-time="20200101",from="127.0.0.0/8"'], "", False),
        (['expiry-time="20200101"', ""], "", True),
        (['from="127.0.0.0/8"'], "", True),
        (["restrict"], "", False),
        (['permitopen="127.0.0.1:1"'], "", False),
        ([""], "!", False),
    ],
)
def test_explain_says_what_the_server_does(
    serve: Serve,
    key: Key,
    echo: int,
    tmp_path: Path,
    lines: list[str],
    password: str,
    allowed: bool,
) -> None:
    account: dict[str, Any] = {"authorized_keys": [key.line(line) for line in lines], "permit_open": ["127.0.0.1:*"]}  # fmt: skip
    account |= {"password": password} if password else {}
    server = serve(accounts={"alice": account})
    try:
        reason = refused_open(
            server, "127.0.0.1", echo, username="alice", client_keys=[str(key.file)]
        )
    except asyncssh.PermissionDenied as exc:
        reason = str(exc)
    assert (reason is None) == allowed, reason
    text = "[accounts.alice]\n" + "".join(
        f"{name} = {value!r}\n".replace("\\'", "'") for name, value in account.items()
    )
    (tmp_path / "c.toml").write_text(text)
    argv = ("explain", "forward", "alice", f"127.0.0.1:{echo}", "--config", tmp_path / "c.toml", "--key", f"{key.file}.pub")  # fmt: skip
    said = gosshd_once(tmp_path, *argv)
    assert (said.returncode == 0, said.stdout.startswith("allowed: ")) == (allowed, allowed), said
    if allowed and lines[0].startswith("from"):
        assert "with this key only from 127.0.0.0/8" in said.stdout


def test_explain_knows_where_a_name_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gosshd_py.config import Config
    from gosshd_py.explain import explain_forward

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ForbiddenError, match="which no rule names"):
        explain_forward(Config(permit_open=("db.lab:80",)), "alice", "db.lab:80", None)
