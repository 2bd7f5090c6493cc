"""Forwards with the real client: only where a rule leads, every byte, and nobody else disturbed."""

from __future__ import annotations

import hashlib
import os
import pwd
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from gosshd_py.places import ForbiddenError, check_found

from .keys import Key
from .serving import MIB, Served, end_client, run, wait_for
from .test_logs import documented_fields

Serve = Callable[..., Served]

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Echo(socketserver.ThreadingTCPServer):
    """Sends back what it gets; its end of file follows the client's."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 512

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                while data := self.request.recv(65536):
                    self.request.sendall(data)


@pytest.fixture
def echo() -> Iterator[int]:
    with Echo(("127.0.0.1", 0), Echo.Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


@contextmanager
def tunnel(
    server: Served, *options: str, user: str = "anyuser"
) -> Iterator[subprocess.Popen[bytes]]:
    """`ssh -N` with these options, until it is up."""
    before = len(server.events("authentication accepted"))
    argv = server.ssh_argv("-N", "-o", "ExitOnForwardFailure=yes", "-o", "LogLevel=INFO", *options, "HOST", user=user)  # fmt: skip
    client = subprocess.Popen(argv, stderr=subprocess.PIPE, start_new_session=True)
    wait_for("the login", lambda: len(server.events("authentication accepted")) > before)
    try:
        yield client
    finally:
        end_client(client)
        client.communicate(timeout=10)


def dial(where: int | str) -> socket.socket:
    """Connect as soon as somebody listens."""

    def attempt() -> Any:
        family = socket.AF_INET if isinstance(where, int) else socket.AF_UNIX
        sock = socket.socket(family)
        sock.settimeout(30)
        try:
            sock.connect(("127.0.0.1", where) if isinstance(where, int) else where)
        except OSError:
            sock.close()
            return None
        return sock

    found: list[socket.socket] = []

    def answers() -> bool:
        found.extend(filter(None, [attempt()]))
        return bool(found)

    wait_for("a listener", answers)
    return found[0]


def read_all(sock: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionResetError):
        while data := sock.recv(65536):
            parts.append(data)
    return b"".join(parts)


def exchange(sock: socket.socket, data: bytes = b"hello") -> bytes:
    """Send all, end, and read to the end."""

    def send() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    answer = read_all(sock)
    sender.join(30)
    sock.close()
    return answer


# -- every way there is -----------------------------------------------------------------------------


def test_local_forwarding(serve: Serve, echo: int) -> None:
    server = serve(permit_open=[f"127.0.0.1:{echo}"])
    port = free_port()
    with tunnel(server, "-L", f"{port}:127.0.0.1:{echo}"):
        assert exchange(dial(port)) == b"hello"
    wait_for("its line", lambda: server.events("forward closed"))
    (opened,) = server.events("forward opened")
    assert (opened["user"], opened["kind"], opened["to"]) == (
        "anyuser",
        "direct-tcpip",
        f"127.0.0.1:{echo}",
    )
    assert opened["rule"] == f"127.0.0.1:{echo}"
    (closed,) = server.events("forward closed")
    assert (closed["bytes_in"], closed["bytes_out"]) == (5, 5)
    known = documented_fields()
    for event in (opened, closed):
        assert set(event) - {"event", "level", "timestamp"} <= known[event["event"]]


def test_standard_input_forwarding_and_jumping(serve: Serve, echo: int, key: Key) -> None:
    server = serve(permit_open=["127.0.0.1:*", "localhost:*"])
    result = server.ssh("-W", f"127.0.0.1:{echo}", "HOST", stdin=b"through")
    assert (result.returncode, result.stdout) == (0, b"through")
    inner = serve(accounts={"alice": {"authorized_keys": [key.public]}})
    jump = " ".join(server.ssh_argv("-W", "localhost:%p", "HOST"))
    argv = ["-o", f"ProxyCommand={jump}", "-i", str(key.file), "HOST", "echo $SSH_CLIENT"]
    assert inner.ssh(*argv, user="alice").stdout.startswith(b"127.0.0.1 ")


def test_dynamic_forwarding(serve: Serve, echo: int) -> None:
    server = serve(permit_open=[f"127.0.0.1:{echo}"])
    port = free_port()
    with tunnel(server, "-D", str(port)):
        for target, allowed in ((echo, True), (echo + 1, False)):
            sock = dial(port)
            sock.sendall(b"\x05\x01\x00")
            assert sock.recv(2) == b"\x05\x00"
            sock.sendall(
                b"\x05\x01\x00\x01" + socket.inet_aton("127.0.0.1") + target.to_bytes(2, "big")
            )
            answer = sock.recv(10)
            assert (answer[:2] == b"\x05\x00") == allowed
            if allowed:
                assert exchange(sock) == b"hello"
            sock.close()


@pytest.mark.parametrize("bind", ["", "localhost:", "127.0.0.1:", "*:", "0.0.0.0:"])
def test_remote_forwarding_listens_on_loopback(serve: Serve, echo: int, bind: str) -> None:
    port = free_port()
    server = serve(permit_listen=[f"127.0.0.1:{port}"])
    with tunnel(server, "-R", f"{bind}{port}:127.0.0.1:{echo}"):
        assert exchange(dial(port)) == b"hello"
        listening = subprocess.run(
            ["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True
        ).stdout
        for line in listening.splitlines():
            assert line.split()[3].rsplit(":", 1)[0] in ("127.0.0.1", "[::1]"), listening
    wait_for("its end", lambda: free(port))


def free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def test_a_port_of_the_servers_choice_is_told(serve: Serve, echo: int) -> None:
    server = serve(permit_listen=["127.0.0.1:*"])
    with tunnel(server, "-R", f"0:127.0.0.1:{echo}") as client:
        line = client.stderr.readline().decode()
        port = int(line.split("Allocated port ")[1].split()[0])
        assert exchange(dial(port)) == b"hello"


def test_gateway_ports_listen_where_they_are_asked_to(serve: Serve, echo: int) -> None:
    port = free_port()
    server = serve(permit_listen=[f"*:{port}"], gateway_ports=True)
    with tunnel(server, "-R", f"127.0.0.9:{port}:127.0.0.1:{echo}"):

        def attempt() -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.9", port)) as sock:
                return exchange(sock) == b"hello"
            return False

        wait_for("it", attempt)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_unix_sockets_both_ways(serve: Serve, echo: int, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    server = serve(permit_listen_sockets=[str(there)], permit_open_sockets=[str(there)])
    with tunnel(server, "-R", f"{there}:127.0.0.1:{echo}"):
        assert exchange(dial(str(there))) == b"hello"
        assert there.stat().st_mode & 0o777 == 0o600
        with tunnel(server, "-L", f"{here}:{there}"):
            assert exchange(dial(str(here))) == b"hello"
    wait_for("its removal", lambda: not there.exists())


@root
def test_who_is_connected_to_sees_the_user(serve: Serve, tmp_path: Path) -> None:
    """D-Bus and PostgreSQL ask the kernel who that is (SO_PEERCRED)."""
    import struct

    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    path, here = tmp_path / "there", tmp_path / "here"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen()
        server = serve(run_as="nobody", permit_open_sockets=["*"])
        with tunnel(server, "-L", f"{here}:{path}"), dial(str(here)):
            there, _ = listener.accept()
            _, uid, gid = struct.unpack(
                "3i", there.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            nobody = pwd.getpwnam("nobody")
            assert (uid, gid) == (nobody.pw_uid, nobody.pw_gid)
            there.close()


def test_a_socket_that_was_replaced_is_left_alone(serve: Serve, tmp_path: Path) -> None:
    """By a new tunnel, perhaps, while the old one was half dead. And one path has one listener."""
    path = tmp_path / "socket"
    server = serve(permit_listen_sockets=[str(path)])
    before = server.stats()["fds"]
    with tunnel(server, "-R", f"{path}:127.0.0.1:1"):
        wait_for("it", path.exists)
        path.unlink()
        path.write_text("somebody else's")
    wait_for("its end", lambda: server.stats()["connections"] == 0)

    async def twice() -> None:
        async with await server.connect() as conn:
            path.unlink()
            for answer in (True, False, False):
                kind = asyncssh.packet.String(str(path))
                pkttype, _ = await conn._make_global_request(
                    b"streamlocal-forward@openssh.com", kind
                )
                assert (pkttype == 81) == answer
                path.unlink(missing_ok=True)
            bad = asyncssh.packet.String(b"/tmp/\xff\0x")
            pkttype, _ = await conn._make_global_request(b"streamlocal-forward@openssh.com", bad)
            assert pkttype == 82

    time.sleep(0.2)
    assert path.read_text() == "somebody else's"
    run(twice())
    wait_for("nothing left", lambda: server.stats()["fds"] <= before)


def test_slow_names_keep_nobody_from_logging_in(serve: Serve) -> None:
    server = serve(permit_open=["*:*"])
    server.ask("sabotage lookup")  # each takes five seconds

    async def ask() -> None:
        import asyncio

        async with await server.connect() as conn:
            for number in range(60):
                asyncio.create_task(conn.open_connection(f"slow{number}.example", 80))  # noqa: RUF006
            await asyncio.sleep(0.3)
            began = time.monotonic()
            assert (await asyncio.to_thread(server.ssh, "echo in")).stdout == b"in\n"
            assert time.monotonic() - began < 2
            conn.abort()

    run(ask())
    began = time.monotonic()
    assert server.stop() == 0  # nor the server from ending
    assert time.monotonic() - began < 3


def test_rules_for_listeners_are_matched_as_they_are_asked(serve: Serve) -> None:
    for rule, bind, allowed in (
        ("localhost", "localhost", True), ("localhost", "127.0.0.1", True), ("127.0.0.1", "::1", False),
        ("[::1]", "::1", True), ("[::1]", "localhost", True), ("10.0.0.1", "10.0.0.1", False),
    ):  # fmt: skip
        server = serve(permit_listen=[f"{rule}:*"])

        async def ask(server: Served = server, bind: str = bind) -> set[str]:
            async with await server.connect() as conn:
                fields = (asyncssh.packet.String(bind), asyncssh.packet.UInt32(0))
                kind, packet = await conn._make_global_request(b"tcpip-forward", *fields)
                if kind != 81:
                    return set()
                port = packet.get_uint32()
                shown = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout  # fmt: skip
                return {line.split()[3].rsplit(":", 1)[0] for line in shown.splitlines()}

        bound = run(ask())
        assert bool(bound) == allowed, (rule, bind)
        if rule != "localhost":
            assert bound <= {rule}


@root
def test_unix_sockets_are_opened_with_the_users_rights(serve: Serve, tmp_path: Path) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    closed, made = tmp_path / "closed", Path(f"/tmp/made.{os.getpid()}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(closed))
        closed.chmod(0o660)  # of root and its group
        listener.listen()
        server = serve(run_as="nobody", permit_open_sockets=["*"], permit_listen_sockets=["*"])
        here = tmp_path / "here"
        with tunnel(server, "-L", f"{here}:{closed}"):
            with dial(str(here)) as sock:
                assert read_all(sock) == b""
        wait_for("its line", lambda: server.events("forward refused"))
        assert server.events("forward refused")[0]["reason"] == "cannot connect: Permission denied"
    with tunnel(server, "-R", f"{made}:127.0.0.1:1"):
        wait_for("the socket", made.exists)
        assert made.owner() == "nobody"
        assert not serve(run_as="nobody").ssh("true").returncode
    wait_for("its removal", lambda: not made.exists())
    refused = tmp_path / "not-yours"
    failing = server.ssh(
        "-N", "-o", "ExitOnForwardFailure=yes", "-R", f"{refused}:127.0.0.1:1", "HOST"
    )
    assert failing.returncode == 255


def test_ipv6(serve: Serve, echo: int) -> None:
    class Echo6(Echo):
        address_family = socket.AF_INET6

    with Echo6(("::1", 0), Echo.Handler) as there:
        threading.Thread(target=there.serve_forever, args=(0.01,), daemon=True).start()
        target, port, other = there.server_address[1], free_port(), free_port("::1")
        server = serve(permit_open=[f"[::1]:{target}"], permit_listen=["[::1]:1024-65535"])
        with tunnel(
            server, "-L", f"{port}:[::1]:{target}", "-R", f"[::1]:{other}:127.0.0.1:{echo}"
        ):
            assert exchange(dial(port)) == b"hello"
            with socket.create_connection(("::1", other)) as sock:
                assert exchange(sock) == b"hello"
        there.shutdown()


# -- what is refused ----------------------------------------------------------------------------------


def refused_open(server: Served, host: str, port: int, **kwargs: Any) -> str | None:
    """Why a direct-tcpip channel is not opened."""

    async def attempt() -> str | None:
        async with await server.connect(**kwargs) as conn:
            try:
                _, writer = await conn.open_connection(host, port)
            except asyncssh.ChannelOpenError as exc:
                return f"{exc.code}: {exc.reason}"
            writer.close()
            return None

    return run(attempt())


def test_nothing_is_forwarded_until_it_is_named(serve: Serve, echo: int) -> None:
    server = serve()
    reason = refused_open(server, "127.0.0.1", echo)
    assert reason == f"1: gosshd: permit_open of the account does not name 127.0.0.1:{echo}"
    (event,) = server.events("forward refused")
    assert (event["user"], event["kind"], event["to"]) == (
        "anyuser",
        "direct-tcpip",
        f"127.0.0.1:{echo}",
    )
    port = free_port()
    result = server.ssh(
        "-o", "ExitOnForwardFailure=yes", "-R", f"{port}:127.0.0.1:1", "HOST", "echo ran"
    )
    assert (result.returncode, result.stdout) == (255, b"")
    assert not server.events("session started")
    for option in ("-R", "-L"):
        path = f"{server.directory}/socket"
        spec = f"{path}:127.0.0.1:1" if option == "-R" else f"{path}:/run/x"
        with suppress(subprocess.TimeoutExpired):
            server.ssh("-N", "-o", "ExitOnForwardFailure=yes", option, spec, "HOST", timeout=2)
    assert server.ssh("-X", "HOST", "echo [$DISPLAY]").stdout == b"[]\n"
    assert server.ssh("-A", "HOST", "echo [$SSH_AUTH_SOCK]").stdout == b"[]\n"
    assert server.events("forward refused", kind="streamlocal-forward")


@pytest.mark.parametrize(
    ("rules", "host", "allowed"),
    [
        (["127.0.0.1:*"], "127.0.0.1", True),
        (["127.0.0.1:*"], "127.0.0.2", False),
        (["127.0.0.1:1-65535"], "127.0.0.1", True),
        (["127.0.0.1:1-9"], "127.0.0.1", False),
        (["*:*"], "127.0.0.1", True),
        (["localhost:*"], "localhost", True),
        (["localhost:*"], "LOCALHOST", True),
        (["localhost:*"], "127.0.0.1", False),
        (["127.0.0.1:*"], "127.1", False),
        (["127.0.0.1:*"], "0x7f.1", False),
        (["127.0.0.1:*"], "::ffff:127.0.0.1", True),
        (["10.0.0.1:*", "db.lab:5432"], "127.0.0.1", False),
    ],
)
def test_a_rule_means_what_it_says(
    serve: Serve, echo: int, rules: list[str], host: str, allowed: bool
) -> None:
    server = serve(permit_open=rules)
    reason = refused_open(server, host, echo)
    assert (reason is None) == allowed, reason
    if not allowed:
        assert reason.startswith("1: gosshd: ")


@pytest.mark.parametrize(
    ("rule", "address", "allowed"),
    [
        ("db.lab:80", "10.0.0.5", True),
        ("db.lab:80", "2001:db8::5", True),
        ("db.lab:80", "127.0.0.1", False),
        ("db.lab:80", "::1", False),
        ("db.lab:80", "169.254.169.254", False),
        ("db.lab:80", "0.0.0.0", False),
        ("db.lab:80", "0.1.2.3", False),
        ("db.lab:80", "::", False),
        ("db.lab:80", "::ffff:127.0.0.1", False),
        ("db.lab:80", "2002:7f00:1::", False),
        ("db.lab:80", "2002:a9fe:a9fe::", False),
        ("db.lab:80", "64:ff9b::7f00:1", False),
        ("db.lab:80", "fe80::1", False),
        ("db.lab:80", "fd00:ec2::254", False),
        ("db.lab:80", "100.100.100.200", False),
        ("127.0.0.1:80", "127.0.0.1", True),
        ("127.0.0.1:81", "127.0.0.1", False),
        ("localhost:80", "127.0.0.1", True),
        ("*:80", "169.254.169.254", True),
    ],
)
def test_a_name_leads_to_no_special_address_that_is_not_named(
    rule: str, address: str, allowed: bool
) -> None:
    try:
        check_found([rule], None, "db.lab", address, 80)
    except ForbiddenError as exc:
        assert not allowed, exc
    else:
        assert allowed


def test_the_key_must_allow_it_too(serve: Serve, echo: int, key: Key) -> None:
    account = {"permit_open": [f"127.0.0.1:{echo}"], "permit_listen": ["127.0.0.1:*"]}
    for options, allowed in (
        ("", True),
        (f'permitopen="127.0.0.1:{echo}"', True),
        ('permitopen="127.0.0.1:*"', True),
        ('permitopen="127.0.0.1:1"', False),
        ("no-port-forwarding", False),
        ("restrict", False),
        ("restrict,port-forwarding", True),
    ):
        server = serve(accounts={"alice": {**account, "authorized_keys": [key.line(options)]}})
        login = {"username": "alice", "client_keys": [str(key.file)]}
        assert (refused_open(server, "127.0.0.1", echo, **login) is None) == allowed, options
        listens = server.ssh("-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1", "-i", str(key.file), "HOST", "true", user="alice")  # fmt: skip
        assert (listens.returncode == 0) == (allowed or "permitopen" in options)


def test_the_keys_rules_for_listeners(serve: Serve, key: Key) -> None:
    port = free_port()
    for options, allowed in (
        (f'permitlisten="{port}"', True),
        (f'permitlisten="127.0.0.1:{port}"', True),
        (f'permitlisten="localhost:{port}"', True),
        ('permitlisten="*"', True),
        ('permitlisten="1"', False),
        (f'permitlisten="10.0.0.1:{port}"', False),
        (f'permitlisten="*.lab:{port}"', False),  # not understood: the key is off
    ):
        account = {"permit_listen": ["*:*"], "authorized_keys": [key.line(options)]}
        server = serve(accounts={"alice": account})
        listens = server.ssh("-o", "ExitOnForwardFailure=yes", "-R", f"{port}:127.0.0.1:1", "-i", str(key.file), "HOST", "true", user="alice")  # fmt: skip
        assert (listens.returncode == 0) == allowed, (options, listens)


def test_what_was_sent_before_the_end_reaches_a_slow_target(serve: Serve) -> None:
    server = serve(permit_open=["127.0.0.1:*"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        target = listener.getsockname()[1]

        async def send_and_leave() -> int:
            import asyncio

            async with await server.connect() as conn:
                _, writer = await conn.open_connection("127.0.0.1", target, encoding=None)
                there, _ = listener.accept()
                writer.write(b"x" * 500_000)
                await writer.drain()
                writer.close()
                await asyncio.sleep(0.7)
                data = await asyncio.to_thread(read_all, there)
                there.close()
                return len(data)

        assert run(send_and_leave()) == 500_000


def test_cancelling(serve: Serve, echo: int) -> None:
    port = free_port()
    server = serve(permit_listen=[f"127.0.0.1:{port}"])
    with server.paramiko() as transport:
        assert transport.request_port_forward("127.0.0.1", port) == port
        dial(port).close()
        transport.cancel_port_forward("127.0.0.1", port)
        wait_for("its end", lambda: free(port))
        message = ("cancel-tcpip-forward", "127.0.0.1", port)
        assert (
            transport.global_request(message[0], message[1:], wait=True) is None
        )  # REQUEST_FAILURE
        assert transport.is_active()
        channel = transport.open_session()
        channel.exec_command("echo alive")
        assert channel.recv(10) == b"alive\n"


def test_low_ports_are_for_root(serve: Serve) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    server = serve(permit_listen=["*:*"], run_as="nobody")
    result = server.ssh("-o", "ExitOnForwardFailure=yes", "-R", "999:127.0.0.1:1", "HOST", "true")
    assert result.returncode == 255
    assert server.events("forward refused")[0]["reason"] == "port 999 is for root only"


def test_a_connection_has_only_so_many_forwards(serve: Serve, echo: int) -> None:
    server = serve(permit_open=["127.0.0.1:*"], connection_max_forwards=3)

    async def fill() -> None:
        async with await server.connect() as conn:
            held = [await conn.open_connection("127.0.0.1", echo) for _ in range(3)]
            with pytest.raises(asyncssh.ChannelOpenError, match="3 forwards, which is the limit"):
                await conn.open_connection("127.0.0.1", echo)
            held[0][1].close()
            await held[0][1].wait_closed()
            await asyncio_wait(lambda: len(server.events("forward closed")) == 1)
            await conn.open_connection("127.0.0.1", echo)

    run(fill())
    wait_for("their end", lambda: len(server.events("forward closed")) == 4)
    assert server.events("limit hit")[0]["limit"] == "connection_max_forwards"


async def asyncio_wait(condition: Callable[[], object]) -> None:
    import asyncio

    while not condition():
        await asyncio.sleep(0.01)


def test_a_target_that_is_not_there_is_a_failed_connection(serve: Serve) -> None:
    server = serve(permit_open=["*:*"])
    assert refused_open(server, "127.0.0.1", free_port()) == "2: gosshd: Connection refused"
    assert refused_open(server, "no.such.name.invalid", 80).startswith("2: gosshd: ")


# -- tunnels only -------------------------------------------------------------------------------------


def test_an_account_for_tunnels_only(serve: Serve, echo: int, key: Key) -> None:
    account = {
        "shell": False,
        "permit_open": [f"127.0.0.1:{echo}"],
        "authorized_keys": [key.public],
    }
    server = serve(accounts={"tunnel": account}, unused_connection_timeout=0.5)
    identity = ("-i", str(key.file))
    for request in (["true"], [], ["-tt"], ["-s", "sftp"]):
        options = [word for word in request if word.startswith("-")]
        command = [word for word in request if not word.startswith("-")]
        result = server.ssh(*identity, *options, "HOST", *command, user="tunnel")
        assert result.returncode != 0
        assert (
            b"gosshd: this account carries forwards only: no shell, no commands, no sftp"
            in result.stderr + result.stdout
        )
    assert not server.events("session started")
    port = free_port()
    with tunnel(server, *identity, "-L", f"{port}:127.0.0.1:{echo}", user="tunnel") as client:
        assert exchange(dial(port)) == b"hello"
        time.sleep(1)  # longer than unused connections may live
        assert client.poll() is None
        assert exchange(dial(port)) == b"hello"


# -- bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24 * MIB, pytest.param(256 * MIB, marks=pytest.mark.soak)])
@pytest.mark.parametrize("way", ["-L", "-R", "-D"])
def test_every_byte_arrives(serve: Serve, echo: int, way: str, size: int) -> None:
    port = free_port()
    server = serve(permit_open=["127.0.0.1:*"], permit_listen=["127.0.0.1:*"])
    spec = str(port) if way == "-D" else f"{port}:127.0.0.1:{echo}"
    data = os.urandom(MIB) * (size // MIB)
    with tunnel(server, way, spec):
        sock = dial(port)
        if way == "-D":
            sock.sendall(b"\x05\x01\x00")
            sock.recv(2)
            sock.sendall(
                b"\x05\x01\x00\x01" + socket.inet_aton("127.0.0.1") + echo.to_bytes(2, "big")
            )
            sock.recv(10)
        assert hashlib.sha256(exchange(sock, data)).digest() == hashlib.sha256(data).digest()


def test_200_forwards_at_once(serve: Serve, echo: int) -> None:
    port = free_port()
    server = serve(permit_open=["127.0.0.1:*"], connection_max_forwards=200)
    with tunnel(server, "-L", f"{port}:127.0.0.1:{echo}"):
        with ExitStack() as stack:
            socks = [stack.enter_context(dial(port)) for _ in range(200)]
            for number, sock in enumerate(socks):
                sock.sendall(b"%d" % number)
            for number, sock in enumerate(socks):
                assert sock.recv(10) == b"%d" % number
        wait_for("their end", lambda: len(server.events("forward closed")) == 200)
    wait_for("nothing left", lambda: server.stats()["connections"] == 0)


def test_a_stalled_forward_stalls_nobody_and_holds_little(serve: Serve) -> None:
    server = serve(permit_open=["127.0.0.1:*"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = listener.getsockname()[1]

        async def stall() -> None:
            async with await server.connect() as conn:
                before = server.stats()["rss"]
                _, writer = await conn.open_connection("127.0.0.1", target, encoding=None)
                there, _ = listener.accept()  # which never reads
                for _ in range(64):
                    writer.write(b"x" * 65536)
                _, _ = await conn.open_connection("127.0.0.1", target, encoding=None)
                flood, _ = listener.accept()
                flood.setblocking(False)
                with suppress(BlockingIOError):
                    while True:  # to a client that does not read this channel
                        flood.send(b"y" * 65536)
                began = time.monotonic()
                assert (await conn.run("echo shell")).stdout == "shell\n"
                assert time.monotonic() - began < 1
                assert server.stats()["rss"] - before < 8 * MIB
                there.close()
                flood.close()

        run(stall())
    wait_for("nothing left", lambda: server.stats()["connections"] == 0)


def test_each_end_of_file_is_passed_on_alone(serve: Serve) -> None:
    server = serve(permit_open=["127.0.0.1:*"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = listener.getsockname()[1]

        async def half_close() -> None:
            import asyncio

            async with await server.connect() as conn:
                reader, writer = await conn.open_connection("127.0.0.1", target, encoding=None)
                there, _ = listener.accept()
                there.sendall(b"bye")
                there.shutdown(socket.SHUT_WR)  # they end first, and still read
                assert await reader.read() == b"bye"
                writer.write(b"more")
                assert await asyncio.to_thread(there.recv, 10) == b"more"
                writer.write_eof()
                assert await asyncio.to_thread(there.recv, 10) == b""
                there.close()

        run(half_close())
    wait_for("its line", lambda: server.events("forward closed"))


@pytest.mark.parametrize("end", ["client", "target", "rst"])
def test_nothing_is_left_of_forwards_that_are_cut(serve: Serve, echo: int, end: str) -> None:
    server = serve(permit_open=["127.0.0.1:*"], connection_max_forwards=0)
    server.ssh("true")
    refused_open(server, "127.0.0.1", echo)
    before = server.stats()
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        target = listener.getsockname()[1]

        async def cut() -> None:
            import struct

            conn = await server.connect()
            pairs = []
            for _ in range(50):
                _, writer = await conn.open_connection("127.0.0.1", target, encoding=None)
                there, _ = listener.accept()
                writer.write(b"x" * 100_000)
                pairs.append((writer, there))
            for writer, there in pairs:
                if end == "client":
                    writer.channel.abort()
                elif end == "rst":
                    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    there.close()
            if end == "target":
                conn.abort()
            await asyncio_wait(lambda: len(server.events("forward closed")) >= 51)
            conn.abort()
            for _, there in pairs:
                there.close()

        run(cut())
    wait_for("nothing left", lambda: server.stats()["connections"] == 0)
    after = server.stats()
    assert after["fds"] <= before["fds"]
    assert after["tasks"] <= before["tasks"]


# -- the agent ---------------------------------------------------------------------------------------------


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return Key(tmp_path / "keys")


@pytest.fixture
def agent(tmp_path: Path, key: Key) -> Iterator[str]:
    path = str(tmp_path / "agent")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    wait_for("the agent", lambda: os.path.exists(path))
    subprocess.run(["ssh-add", "-q", str(key.file)], env={"SSH_AUTH_SOCK": path, "PATH": os.environ["PATH"]}, check=True, timeout=10)  # fmt: skip
    yield path
    process.terminate()
    process.wait(5)


@pytest.mark.parametrize("run_as", ["", pytest.param("nobody", marks=root)])
def test_the_agent_is_reached_if_the_account_may(
    serve: Serve, agent: str, key: Key, run_as: str
) -> None:
    server = serve(agent_forwarding=True, run_as=run_as)
    options = ("-A", "-o", f"IdentityAgent={agent}")
    result = server.ssh(*options, "HOST", "ssh-add -l; echo $SSH_AUTH_SOCK")
    assert key.fingerprint.encode() in result.stdout, result
    folder = Path(result.stdout.splitlines()[-1].decode()).parent
    wait_for("its removal", lambda: not folder.exists())
    assert server.ssh(*options, "HOST", f"ls {folder}").returncode != 0


def test_an_idle_forward_is_ended(serve: Serve, echo: int) -> None:
    server = serve(permit_open=["127.0.0.1:*"], idle_timeout=1)
    port = free_port()
    with tunnel(server, "-L", f"{port}:127.0.0.1:{echo}"), dial(port) as sock:
        for _ in range(4):
            sock.sendall(b"alive")
            assert sock.recv(10) == b"alive"
            time.sleep(0.5)
        began = time.monotonic()
        assert read_all(sock) == b""
        assert time.monotonic() - began < 3
    assert server.events("limit hit")[0]["limit"] == "idle_timeout"
