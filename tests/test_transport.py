"""What we do in asyncssh's place: the same bytes on the wire, fewer packets, no waiting."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from asyncssh.encryption import ChachaEncryption, GCMEncryption, get_encryption
from hypothesis import given
from hypothesis import strategies as st

from gosshd_py import transport
from gosshd_py.ciphers import KeptChacha, KeptGCM, quicker

from .serving import MIB, Served, run
from .test_cli import Start, needs_network_namespaces, start  # noqa: F401

Serve = Callable[..., Served]

NAMES = {
    b"chacha20-poly1305@openssh.com": (64, 0, ChachaEncryption, KeptChacha),
    b"aes128-gcm@openssh.com": (16, 12, GCMEncryption, KeptGCM),
    b"aes256-gcm@openssh.com": (32, 12, GCMEncryption, KeptGCM),
}


@pytest.mark.parametrize("name", NAMES)
@given(
    packets=st.lists(st.binary(min_size=8, max_size=300), min_size=1, max_size=5),
    seq=st.integers(0, 2**32 - 1),
)
def test_the_kept_ciphers_are_asyncsshs(name: bytes, packets: list[bytes], seq: int) -> None:
    """What one encrypts the other decrypts, and both to the same bytes; a changed bit is noticed."""
    key_size, iv_size, theirs_kind, ours_kind = NAMES[name]
    key, iv = os.urandom(key_size), os.urandom(iv_size)
    theirs_out, theirs_in, ours_out, ours_in, bad = (
        get_encryption(name, key, iv) for _ in range(5)
    )
    assert type(theirs_out) is theirs_kind
    ours_out, ours_in, bad = (quicker(one) or one for one in (ours_out, ours_in, bad))
    assert type(ours_out) is type(ours_in) is ours_kind
    for number, packet in enumerate(packets, seq):
        number &= 0xFFFFFFFF
        header = len(packet).to_bytes(4, "big")
        sealed, tag = theirs_out.encrypt_packet(number, header, packet)
        mine, rest = ours_out.encrypt_packet(number, header, packet)
        assert (mine + rest) == sealed + tag
        for reader in (theirs_in, ours_in):
            first, length = reader.decrypt_header(number, sealed[:8], 4)
            assert length == header
            assert reader.decrypt_packet(number, first, sealed[8:], 4, tag) == packet
        first, _ = bad.decrypt_header(number, sealed[:8], 4)
        assert (
            bad.decrypt_packet(number, first, sealed[8:], 4, bytes([tag[0] ^ 1]) + tag[1:]) is None
        )


def test_what_it_does_not_know_is_left_as_it_is() -> None:
    ctr = get_encryption(b"aes128-ctr", bytes(16), bytes(16), b"hmac-sha2-256", bytes(32))
    assert quicker(ctr) is ctr
    assert quicker(None) is None


def test_a_cipher_of_another_version_is_left_as_it_is() -> None:
    for name, attribute in (
        ("chacha20-poly1305@openssh.com", "_adkey"),
        ("aes128-gcm@openssh.com", "_iv"),
    ):
        made: Any = get_encryption(name.encode(), bytes(64 if "chacha" in name else 16), bytes(12))
        assert quicker(made) is not made
        delattr(made._cipher, attribute)
        assert quicker(made) is made


@pytest.mark.parametrize("cipher", transport.CIPHERS)
@pytest.mark.parametrize("client", ["OpenSSH", "asyncssh"])
def test_every_cipher_carries_data_both_ways_over_new_keys(
    server: Served, cipher: str, client: str
) -> None:
    data = os.urandom(MIB) * 3
    if client == "OpenSSH":
        options = ("-c", cipher, "-o", "RekeyLimit=500K")
        assert server.ssh(*options, "HOST", "cat", stdin=data, timeout=30).stdout == data
        return

    async def main() -> bytes:
        async with await server.connect(encryption_algs=[cipher], rekey_bytes=500_000) as conn:
            return (await conn.run("cat", input=data, encoding=None)).stdout

    assert run(main()) == data


def test_no_packet_is_sent_to_be_ignored(server: Served) -> None:
    """asyncssh sends one before each; a third of the work of a download."""
    kinds: list[int] = []

    class Client(asyncssh.SSHClient):
        def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
            real = conn.log_received_packet

            def count(kind: int, *args: object) -> None:
                kinds.append(kind)
                real(kind, *args)

            setattr(conn, "log_received_packet", count)  # noqa: B010

    async def main() -> None:
        async with await server.connect(client_factory=Client) as conn:
            assert (await conn.run("seq 1000")).exit_status == 0

    run(main())
    assert 21 in kinds  # NEWKEYS was seen, so the count works
    assert 2 not in kinds  # SSH_MSG_IGNORE


def delayed_acks(pid: int) -> int:
    """How many acknowledgements the kernel has held back in a process's network (RFC 1122 §4.2.3.2)."""
    names, values = [
        line.split()
        for line in Path(f"/proc/{pid}/net/netstat").read_text().splitlines()
        if line.startswith("TcpExt:")
    ]
    return int(values[names.index("DelayedACKs")])


@needs_network_namespaces
@pytest.mark.parametrize("link", ["loopback", "veth"])
def test_a_login_waits_for_no_acknowledgement(start: Start, tmp_path: Path, link: str) -> None:
    """The client's Nagle and our delayed ACK wait for each other, twice for 40 ms, unless told not to."""
    there = ("unshare", "--net", "sh", "-c", 'ip link set lo up; echo $$ > pid; exec "$@"', "sh")
    server = start("--listen", "127.0.0.1:2222" if link == "loopback" else "0.0.0.0:2222",
                   *(() if link == "loopback" else ("--open-to-network",)), before=there).wait_until_ready()  # fmt: skip
    pid = server.process.pid
    if link == "veth":
        name = f"gosshd{os.getpid() % 10000}"
        for words in (
            f"ip link add {name} type veth peer name there netns {pid}",
            f"ip addr add 198.18.0.1/30 dev {name}", f"ip link set {name} up",
            f"nsenter -n -t {pid} ip addr add 198.18.0.2/30 dev there",
            f"nsenter -n -t {pid} ip link set there up",
        ):  # fmt: skip
            subprocess.run(words.split(), check=True, capture_output=True)
        client: tuple[str, ...] = ()
        host = "198.18.0.2"
    else:
        client, host = ("nsenter", "-n", "-t", str(pid)), "127.0.0.1"
    argv = [*client, "ssh", "-F", "none", "-p", "2222", "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/k", "-o", "LogLevel=ERROR", f"u@{host}", "true"]  # fmt: skip
    subprocess.run(argv, check=True, timeout=20, stdin=subprocess.DEVNULL)
    before = delayed_acks(pid)
    for _ in range(10):
        subprocess.run(argv, check=True, timeout=20, stdin=subprocess.DEVNULL)
    # On loopback the client's own are counted, too: one for each. Without it there are 22, and 10.
    assert delayed_acks(pid) - before <= (15 if link == "loopback" else 5)


def test_one_clients_flood_of_packets_is_handled_in_turns(serve: Serve) -> None:
    """Thousands of small ones in one read: others come in between, and none is lost."""
    server = serve(shell="/bin/sh")

    async def main() -> float:
        async with await server.connect() as conn, await server.connect() as bystander:
            process = await conn.create_process("wc -c", encoding=None)
            for _ in range(60_000):
                process.channel.write(b"x")
            process.stdin.write_eof()
            worst = 0.0
            while not process.is_closing() and process.exit_status is None:
                began = asyncio.get_running_loop().time()
                assert (await bystander.run("echo hi")).stdout == "hi\n"
                worst = max(worst, asyncio.get_running_loop().time() - began)
            assert (await process.stdout.read()).strip() == b"60000"
            return worst

    run(main())
    assert server.ask("lag")["worst"] < 0.1
