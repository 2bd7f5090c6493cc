"""Clients of other families, where they are installed: dropbear's dbclient and PuTTY's plink."""

from __future__ import annotations

import os
import shutil
import subprocess

import pexpect
import pytest

from .serving import Served


def dbclient(server: Served, *args: str) -> list[str]:
    """It looks in ~/.ssh/known_hosts for the bare name, so the home gets such a line."""
    if not shutil.which("dbclient"):
        pytest.skip("dbclient is missing (package dropbear-bin)")
    (server.directory / ".ssh").mkdir(exist_ok=True)
    key = server.known_hosts.read_text().split(" ", 1)[1].splitlines()[0]
    (server.directory / ".ssh" / "known_hosts").write_text(f"127.0.0.1 {key}\n")
    return ["dbclient", "-p", str(server.port), *args]


def plink(server: Served, *args: str) -> list[str]:
    if not shutil.which("plink"):
        pytest.skip("plink is missing (package putty-tools)")
    key = subprocess.run(
        ["ssh-keygen", "-lf", server.directory / "hostkeys" / "ssh_host_ed25519_key"],
        capture_output=True, text=True, check=True,
    ).stdout.split()[1]  # fmt: skip
    return [
        "plink",
        "-batch",
        "-ssh",
        "-P",
        str(server.port),
        "-hostkey",
        key,
        "-l",
        "anyuser",
        *args,
    ]


def run(server: Served, argv: list[str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "HOME": str(server.directory), "TERM": "xterm"}
    return subprocess.run(argv, input=stdin, capture_output=True, timeout=20, env=env, check=False)


@pytest.mark.parametrize("client", [dbclient, plink])
def test_another_familys_client_runs_commands(server: Served, client) -> None:
    host = "anyuser@127.0.0.1" if client is dbclient else "127.0.0.1"
    data = os.urandom(500_000)
    result = run(server, client(server, host, "cat; echo err >&2; exit 5"), data)
    assert (result.stdout, result.returncode) == (data, 5)
    assert b"err\n" in result.stderr


@pytest.mark.parametrize("client", [dbclient, plink])
def test_another_familys_client_gets_a_shell(server: Served, client) -> None:
    host = "anyuser@127.0.0.1" if client is dbclient else "127.0.0.1"
    argv = client(server, "-t", host)
    env = {**os.environ, "HOME": str(server.directory), "TERM": "xterm"}
    terminal = pexpect.spawn(argv[0], argv[1:], env=env, timeout=10, dimensions=(31, 97))
    server.terminals.append(terminal)
    terminal.expect(r"[$#] ")
    terminal.sendline("stty size; exit 3")
    terminal.expect("31 97")
    terminal.expect(pexpect.EOF)
    assert terminal.wait() == 3
