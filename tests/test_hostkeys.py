"""Host keys: made once and whole, kept private, the same for ever, and refused with a remedy."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncssh
import pexpect
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gosshd_py import hostkeys
from gosshd_py.config import Address
from gosshd_py.hostkeys import HostKeyError, fingerprint, known_hosts_lines, load_host_keys

from .serving import ROOT, Served

NAME = "ssh_host_ed25519_key"
GOOD_KEY = asyncssh.generate_private_key("ssh-ed25519").export_private_key()
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can chown")


def make_with_ssh_keygen(file: Path, *options: str) -> None:
    file.parent.mkdir(exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-N", "", *options, "-f", file], check=True, timeout=30)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusal(directory: Path) -> str:
    """Why the keys in it cannot be used: one line."""
    with pytest.raises(HostKeyError) as info:
        load_host_keys(directory)
    assert len(str(info.value).splitlines()) == 1
    return str(info.value)


@contextmanager
def umask(value: int) -> Iterator[None]:
    old = os.umask(value)
    try:
        yield
    finally:
        os.umask(old)


# -- made once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_the_key_is_made_private_in_a_private_directory(tmp_path: Path, mask: int) -> None:
    directory = tmp_path / "state" / "gosshd" / "hostkeys"
    with umask(mask):
        (key,) = load_host_keys(directory)
    assert mode(directory) == 0o700
    assert mode(directory / NAME) == 0o600
    assert [path.name for path in directory.iterdir()] == [NAME]
    assert key.get_algorithm() == "ssh-ed25519"
    said = subprocess.run(
        ["ssh-keygen", "-lf", directory / NAME], capture_output=True, text=True, check=True
    ).stdout
    assert said.split()[1:] == [fingerprint(key), "gosshd", "(ED25519)"]


def test_the_key_stays_the_same_and_its_file_untouched(tmp_path: Path) -> None:
    (first,) = load_host_keys(tmp_path)
    before = (tmp_path / NAME).stat()
    (second,) = load_host_keys(tmp_path)
    after = (tmp_path / NAME).stat()
    assert fingerprint(first) == fingerprint(second)
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_a_key_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("my notes")
    (tmp_path / NAME).chmod(0o600)
    refusal(tmp_path)
    assert (tmp_path / NAME).read_text() == "my notes"


def test_the_first_of_two_servers_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one finds no key, and the first one puts its own there before the second can."""
    real = asyncssh.generate_private_key
    won: list[str] = []

    def overtaken(*args: Any, **options: Any) -> asyncssh.SSHKey:
        monkeypatch.undo()
        won.append(fingerprint(load_host_keys(tmp_path)[0]))
        return real(*args, **options)

    monkeypatch.setattr(asyncssh, "generate_private_key", overtaken)
    assert [fingerprint(key) for key in load_host_keys(tmp_path)] == won
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_servers_that_start_at_the_same_moment_have_the_same_key(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from gosshd_py.hostkeys import *\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"print(fingerprint(load_host_keys(Path({str(tmp_path / 'keys')!r}))[0]))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=20)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 6
    assert set(said) == {fingerprint(load_host_keys(tmp_path / "keys")[0]) + "\n"}
    assert [path.name for path in (tmp_path / "keys").iterdir()] == [NAME]


def test_nobody_ever_sees_a_part_of_a_key(tmp_path: Path) -> None:
    """Watchers read the file as soon and as often as they can, while eight servers want to make it."""

    def make(directory: Path, together: threading.Barrier) -> str:
        together.wait(10)
        return fingerprint(load_host_keys(directory)[0])

    def watch(directory: Path, together: threading.Barrier) -> str:
        together.wait(10)
        while not (directory / NAME).exists():
            pass
        data = (directory / NAME).read_bytes()
        return fingerprint(asyncssh.import_private_key(data))

    with ThreadPoolExecutor(10) as pool:
        for attempt in range(20):
            together = threading.Barrier(10)
            directory = tmp_path / str(attempt)
            jobs = [pool.submit(make, directory, together) for _ in range(8)]
            jobs += [pool.submit(watch, directory, together) for _ in range(2)]
            assert len({job.result(20) for job in jobs}) == 1


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    assert refusal(tmp_path) == (
        f"{tmp_path}: No space left on device; choose another directory with --hostkeys"
    )
    assert list(tmp_path.iterdir()) == []


# -- used as they are ------------------------------------------------------------------------------


def test_the_key_of_another_tool_is_used_and_the_missing_one_made(tmp_path: Path) -> None:
    make_with_ssh_keygen(tmp_path / "ssh_host_rsa_key", "-t", "rsa", "-b", "2048")
    make_with_ssh_keygen(tmp_path / "ssh_host_ecdsa_key", "-t", "ecdsa", "-m", "PEM")
    algorithms = [key.get_algorithm() for key in load_host_keys(tmp_path)]
    assert algorithms == ["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"]


def test_the_real_client_logs_in_by_each_kind_of_key(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    make_with_ssh_keygen(keys / "ssh_host_rsa_key", "-t", "rsa", "-b", "2048")
    make_with_ssh_keygen(keys / "ssh_host_ecdsa_key", "-t", "ecdsa")
    server = serve(hostkeys=str(keys))
    for algorithm in ("ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512", "rsa-sha2-256"):
        result = server.ssh("-o", f"HostKeyAlgorithms={algorithm}", "HOST", "echo in")
        assert (result.stdout, result.stderr) == (b"in\n", b""), algorithm


def test_a_restarted_server_is_the_same_to_its_clients(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    first = serve(hostkeys=str(tmp_path / "keys"))
    assert first.stop() == 0
    second = serve(hostkeys=str(tmp_path / "keys"), listen=[f"127.0.0.1:{first.port}"])
    assert first.ssh("echo known").stdout == b"known\n"
    assert second.known_hosts.read_text() == first.known_hosts.read_text()


def test_clients_reach_loopback_as_localhost_and_a_wildcard_by_our_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "lab1")
    key = asyncssh.import_private_key(GOOD_KEY)
    public = " ".join(key.export_public_key().decode().split()[:2])

    def names(*addresses: Address) -> list[str]:
        lines = [line.split(" ", 1) for line in known_hosts_lines(addresses, [key])]
        assert all(line[1] == public for line in lines)
        return [line[0] for line in lines]

    assert names(Address("127.0.0.1", 22)) == ["localhost", "127.0.0.1"]
    assert names(Address("127.0.0.1", 5), Address("::1", 5)) == [
        *("[localhost]:5", "[127.0.0.1]:5", "[::1]:5")
    ]
    assert names(Address("::", 5)) == ["[localhost]:5", "[lab1]:5"]
    assert names(Address("10.0.0.1", 5)) == ["[10.0.0.1]:5"]


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o620, 0o610, 0o644, 0o777])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, bits: int) -> None:
    load_host_keys(tmp_path)
    (tmp_path / NAME).chmod(bits)
    assert refusal(tmp_path) == (
        f"{tmp_path}/{NAME} has mode {bits:04o}, so others can read it; "
        f"run: chmod 600 {tmp_path}/{NAME}"
    )
    (tmp_path / NAME).chmod(0o400)
    assert load_host_keys(tmp_path)


@needs_root
def test_somebody_elses_key_is_refused(tmp_path: Path) -> None:
    load_host_keys(tmp_path)
    os.chown(tmp_path / NAME, 12345, 0)
    assert refusal(tmp_path) == (
        f"{tmp_path}/{NAME} belongs to uid 12345; run: chown {os.geteuid()} {tmp_path}/{NAME}"
    )


def test_the_remedy_can_be_pasted_whatever_the_folders_name(tmp_path: Path) -> None:
    directory = tmp_path / "it's $HOME; here"
    load_host_keys(directory)
    (directory / NAME).chmod(0o644)
    remedy = refusal(directory).partition("run: ")[2]
    subprocess.run(["/bin/sh", "-c", remedy], check=True)
    assert load_host_keys(directory)


@pytest.mark.parametrize(
    "options", [("-t", "ed25519"), ("-t", "rsa", "-m", "PEM"), ("-t", "ecdsa", "-m", "PKCS8")]
)
def test_a_key_with_a_passphrase_is_refused_until_the_remedy_is_run(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    make_with_ssh_keygen(tmp_path / NAME, *options, "-N", "secret")
    problem, _, remedy = refusal(tmp_path).partition("; run: ")
    assert problem == f"{tmp_path}/{NAME} has a passphrase, and nobody can type it"
    typed = pexpect.spawn("/bin/sh", ["-c", remedy], timeout=10)
    typed.expect("old passphrase")
    typed.sendline("secret")
    typed.expect(pexpect.EOF)
    typed.close()
    assert load_host_keys(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"hello\n",
        GOOD_KEY[:-60],
        GOOD_KEY.replace(b"OPENSSH", b"("),
        asyncssh.import_private_key(GOOD_KEY).export_public_key(),
    ],
)
def test_what_is_no_private_key_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / NAME).write_bytes(data)
    (tmp_path / NAME).chmod(0o600)
    assert re.fullmatch(
        rf"{tmp_path}/{NAME} is not a private key: .+; move it away", refusal(tmp_path)
    )


@given(st.data())
@settings(deadline=None)
def test_a_damaged_key_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """asyncssh's parsers raise many kinds of errors; all of them have to be ours."""
    directory = tmp_path_factory.getbasetemp() / "damaged"
    directory.mkdir(exist_ok=True)
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(GOOD_KEY))] * 2)))
    damage = data.draw(st.binary(max_size=20))
    (directory / NAME).write_bytes(GOOD_KEY[:begin] + damage + GOOD_KEY[end:])
    (directory / NAME).chmod(0o600)
    try:
        (key,) = load_host_keys(directory)
    except HostKeyError as exc:
        assert str(directory / NAME) in str(exc)
    else:
        assert key.get_algorithm() == "ssh-ed25519"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(mode=0o700), "is not a regular file; move it away"),
        (lambda path: os.mkfifo(path, 0o600), "is not a regular file; move it away"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file; move it away"),
        (lambda path: path.symlink_to("nowhere"), ": No such file or directory; choose another"),
    ],
    ids=["directory", "fifo", "device", "dangling link"],
)
@pytest.mark.parametrize("name", hostkeys.NAMES)
def test_what_is_no_file_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path / name)
    assert refusal(tmp_path).startswith(
        f"{tmp_path}/{name}{'' if reason[0] == ':' else ' '}{reason}"
    )


def test_a_second_key_of_one_kind_is_refused(tmp_path: Path) -> None:
    load_host_keys(tmp_path)
    (tmp_path / "ssh_host_rsa_key").write_bytes((tmp_path / NAME).read_bytes())
    (tmp_path / "ssh_host_rsa_key").chmod(0o600)
    assert refusal(tmp_path) == (
        f"{tmp_path}/ssh_host_rsa_key is a second ssh-ed25519 key; move it away"
    )


@pytest.mark.parametrize(
    ("directory", "reason"),
    [
        ("/proc/hostkeys", "No such file or directory"),
        ("/dev/null/hostkeys", "Not a directory"),
        ("/etc/passwd", "File exists"),
    ],
)
def test_a_directory_that_cannot_be_made_is_named(directory: str, reason: str) -> None:
    assert refusal(Path(directory)) == (
        f"{directory}: {reason}; choose another directory with --hostkeys"
    )


@needs_root
def test_a_directory_that_cannot_be_written_or_read_is_named() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name)
        for bits in (0o755, 0o700):
            directory.chmod(bits)
            with effective_user(12345):
                problem = refusal(directory)
            assert problem.startswith(f"{directory}/")
            assert problem.endswith(": Permission denied; choose another directory with --hostkeys")
        assert list(directory.iterdir()) == []


@contextmanager
def effective_user(uid: int) -> Iterator[None]:
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
