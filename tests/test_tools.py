"""What people use over SSH, driven for real. A tool that is missing is named by its skip."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
import pytest

from gosshd_py import accounts

from .keys import Key
from .serving import MIB, ROOT, Served, run, wait_for
from .test_forward import dial, echo, exchange, free_port, tunnel

__all__ = ["echo"]

Serve = Callable[..., Served]
SIZE = 16 * MIB


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


class Tools:
    """A server, a folder for its shells, and tools that find it by the name `lab`."""

    def __init__(self, server: Served, directory: Path) -> None:
        self.server = server
        self.here = directory / "here"
        self.there = directory / "there"
        for folder in (self.here, self.there, self.here / ".ssh"):
            folder.mkdir(mode=0o700)
        self.config = self.here / "ssh_config"
        self.config.write_text(
            f"Host lab\n HostName localhost\n Port {server.port}\n User anyuser\n"
            f" UserKnownHostsFile {server.known_hosts}\n StrictHostKeyChecking yes\n BatchMode yes\n"
            " IdentityAgent none\n LogLevel ERROR\n"
        )
        self.ssh = f"ssh -F {self.config}"

    def run(self, *argv: object, status: int = 0, timeout: float = 60, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
        env = {"PATH": os.environ["PATH"], "HOME": str(self.here), "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", **kwargs.pop("env", {})}  # fmt: skip
        result = subprocess.run(
            [str(word) for word in argv], capture_output=True, timeout=timeout, check=False,
            cwd=self.here, env=env, **kwargs,
        )  # fmt: skip
        assert result.returncode == status, result
        return result


@pytest.fixture
def tools(serve: Serve, tmp_path: Path) -> Tools:
    return Tools(serve(home=str(tmp_path)), tmp_path)


@pytest.fixture(params=["OpenSSH's", "our own"])
def sftp(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Tools:
    """Both programs that the subsystem may be."""
    server = serve(home=str(tmp_path))
    if request.param == "our own":
        server.ask("patch command.SFTP_SERVERS []")
    elif not any(os.access(path, os.X_OK) for path in accounts.SFTP_SERVERS):
        pytest.skip("not installed: sftp-server")
    return Tools(server, tmp_path)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def big(file: Path, size: int = SIZE) -> Path:
    file.write_bytes(os.urandom(MIB) * (size // MIB))
    return file


# -- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16 * MIB, pytest.param(256 * MIB, marks=pytest.mark.soak)])
def test_sftp_puts_gets_and_resumes(sftp: Tools, size: int) -> None:
    file = big(sftp.here / "big", size)
    batch = f"put big {sftp.there}/big\nget {sftp.there}/big back\nchmod 640 {sftp.there}/big\nls -l {sftp.there}\n"
    out = sftp.run("sftp", "-F", sftp.config, "-b", "-", "lab", input=batch.encode()).stdout
    assert b"-rw-r-----" in out
    assert digest(file) == digest(sftp.there / "big") == digest(sftp.here / "back")
    for half, whole, line in (
        (sftp.here / "back", file, f"reget {sftp.there}/big back\n"),
        (sftp.there / "big", file, f"reput big {sftp.there}/big\n"),
    ):
        os.truncate(half, size // 2)
        sftp.run("sftp", "-F", sftp.config, "-b", "-", "lab", input=line.encode())
        assert digest(half) == digest(whole)


def test_sftp_gives_files_the_modes_that_openssh_gives(sftp: Tools) -> None:
    (sftp.here / "script").write_text("x")
    (sftp.here / "script").chmod(0o755)
    batch = f"put script {sftp.there}/plain\nput -p script {sftp.there}/kept\nmkdir {sftp.there}/folder\n"
    sftp.run("sftp", "-F", sftp.config, "-b", "-", "lab", input=batch.encode())
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in sftp.there.iterdir()}
    assert modes == {"plain": "0o755", "kept": "0o755", "folder": "0o755"}


def test_sftp_starts_at_home_and_tells_errors(sftp: Tools) -> None:
    out = sftp.run("sftp", "-F", sftp.config, "-b", "-", "lab", input=b"pwd\n").stdout
    assert out.endswith(f"Remote working directory: {sftp.there.parent}\n".encode())
    failed = sftp.run(
        "sftp", "-F", sftp.config, "-b", "-", "lab", input=b"get /no/file\n", status=1
    )
    assert b"not found" in failed.stderr


def test_sftp_makes_links_that_lead_where_they_should(sftp: Tools) -> None:
    """The draft and OpenSSH disagree about which path comes first; all clients do as OpenSSH does."""
    batch = f"put ssh_config {sftp.there}/target\nsymlink target {sftp.there}/link\n"
    batch += f"ln {sftp.there}/target {sftp.there}/hard\n"
    sftp.run("sftp", "-F", sftp.config, "-b", "-", "lab", input=batch.encode())
    assert os.readlink(sftp.there / "link") == "target"
    assert (sftp.there / "hard").samefile(sftp.there / "target")
    with sftp.server.paramiko() as transport:
        client = paramiko.SFTPClient.from_transport(transport)
        client.symlink("target", f"{sftp.there}/second")
        assert client.readlink(f"{sftp.there}/second") == "target"
    assert (sftp.there / "second").samefile(sftp.there / "target")


def test_sftp_answers_a_huge_read_in_pieces(sftp: Tools) -> None:
    """The size of a read is whatever the client has sent; one of 1 GiB took as much memory."""
    with sftp.server.paramiko() as transport:
        client = paramiko.SFTPClient.from_transport(transport)
        with client.open("/dev/zero", "rb", bufsize=0) as file:
            kind, answer = client._request(5, file.handle, paramiko.sftp.int64(0), 2**30)
            assert kind == 103  # SSH_FXP_DATA
            assert 0 < len(answer.get_binary()) <= 256 * 1024


def test_sftp_works_without_a_home(serve: Serve, tmp_path: Path) -> None:
    server = serve(env={"HOME": "/nowhere/at/all"})
    server.ask("patch command.SFTP_SERVERS []")
    tools = Tools(server, tmp_path)
    out = tools.run("sftp", "-F", tools.config, "-b", "-", "lab", input=b"pwd\n")
    assert b"Remote working directory: /" in out.stdout
    assert b"Traceback" not in out.stderr


@pytest.mark.parametrize("protocol", ["-s", "-O"])
def test_scp_by_both_protocols(sftp: Tools, protocol: str) -> None:
    file = big(sftp.here / "big")
    sftp.run("scp", "-q", protocol, "-F", sftp.config, file, f"lab:{sftp.there}/big")
    sftp.run("scp", "-q", protocol, "-F", sftp.config, f"lab:{sftp.there}/big", "back")
    assert digest(file) == digest(sftp.there / "big") == digest(sftp.here / "back")
    (sftp.here / "tree" / "deep").mkdir(parents=True)
    (sftp.here / "tree" / "deep" / "file with spaces").write_text("x")
    sftp.run("scp", "-q", "-r", protocol, "-F", sftp.config, "tree", f"lab:{sftp.there}/")
    assert (sftp.there / "tree" / "deep" / "file with spaces").read_text() == "x"
    sftp.run("scp", "-q", protocol, "-F", sftp.config, "lab:/no/file", ".", status=1)


def test_a_read_only_account_reads_and_no_more(serve: Serve, tmp_path: Path) -> None:
    for own in (False, True):
        folder = tmp_path / str(own)
        folder.mkdir()
        server = serve(home=str(folder), read_only=True)
        if own:
            server.ask("patch command.SFTP_SERVERS []")
        tools = Tools(server, folder)
        kept = tools.there / "kept"
        kept.write_text("as it was")
        (tools.here / "new").write_text("new")
        out = tools.run("sftp", "-F", tools.config, "-b", "-", "lab", input=f"get {kept} copy\nls {tools.there}\n".encode())  # fmt: skip
        assert (tools.here / "copy").read_text() == "as it was"
        assert b"kept" in out.stdout
        for attempt in (
            f"put new {kept}", f"put new {tools.there}/new", f"rm {kept}", f"mkdir {tools.there}/x",
            f"rename {kept} {kept}2", f"chmod 777 {kept}", f"symlink {kept} {kept}2",
            f"ln {kept} {kept}2", f"rmdir {tools.there}", f"reput new {kept}",
        ):  # fmt: skip
            tools.run(
                "sftp",
                "-F",
                tools.config,
                "-b",
                "-",
                "lab",
                input=f"{attempt}\n".encode(),
                status=1,
            )
        assert kept.read_text() == "as it was"
        assert os.listdir(tools.there) == ["kept"]
        for words in (["true"], [], ["scp", "-t", str(kept)]):
            refused = server.ssh("HOST", *words)
            assert refused.returncode != 0
            assert b"this account is for reading files by sftp" in refused.stderr


def test_sftp_can_be_off(serve: Serve) -> None:
    server = serve(sftp=False)
    refused = server.ssh("-s", "HOST", "sftp")
    assert refused.returncode != 0
    assert b"gosshd: sftp is off for this account" in refused.stderr
    assert server.ssh("echo in").stdout == b"in\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_sftp_is_confined_like_the_shell(serve: Serve, tmp_path: Path) -> None:
    if not any(os.access(path, os.X_OK) for path in accounts.SFTP_SERVERS):
        pytest.skip("not installed: sftp-server")  # our own needs a Python that nobody may run
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    server = serve(home="/tmp", run_as="nobody", umask="077", rlimits={"nofile": 64})
    tools = Tools(server, tmp_path)
    tools.there.chmod(0o777)
    (tools.here / "file").write_text("x")
    tools.run(
        "sftp",
        "-F",
        tools.config,
        "-b",
        "-",
        "lab",
        input=f"put file {tools.there}/file\n".encode(),
    )
    made = tools.there / "file"
    assert (made.owner(), made.stat().st_mode & 0o777) == ("nobody", 0o600)
    tools.run("sftp", "-F", tools.config, "-b", "-", "lab", input=b"get /etc/shadow x\n", status=1)


@needs("sshfs", "fusermount3")
@pytest.mark.skipif(not os.access("/dev/fuse", os.W_OK), reason="no /dev/fuse here")
def test_sshfs(sftp: Tools) -> None:
    mount = sftp.here / "mount"
    mount.mkdir()
    (sftp.there / "file").write_text("over there")
    sftp.run("sshfs", "-F", sftp.config, f"lab:{sftp.there}", mount)
    try:
        assert (mount / "file").read_text() == "over there"
        file = big(mount / "big", MIB * 4)
        assert digest(file) == digest(sftp.there / "big")
    finally:
        sftp.run("fusermount3", "-u", mount)


@needs("rsync")
def test_rsync_both_ways(tools: Tools) -> None:
    (tools.here / "tree" / "deep").mkdir(parents=True)
    big(tools.here / "tree" / "deep" / "big")
    tools.run("rsync", "-a", "-e", tools.ssh, "tree/", f"lab:{tools.there}/tree/")
    tools.run("rsync", "-a", "-e", tools.ssh, f"lab:{tools.there}/tree/", "back/")
    assert digest(tools.here / "tree/deep/big") == digest(tools.here / "back/deep/big")
    tools.run("rsync", "-a", "-e", tools.ssh, "lab:/no/such", "x", status=23)


@needs("git")
def test_git_clones_and_pushes(tools: Tools) -> None:
    env = {"GIT_SSH_COMMAND": tools.ssh, "GIT_CONFIG_NOSYSTEM": "1"}
    who = ("-c", "user.name=x", "-c", "user.email=x@y", "-c", "init.defaultBranch=main")
    tools.run("git", *who, "init", "-q", "--bare", tools.there / "repo.git", env=env)
    tools.run("git", *who, "clone", "-q", f"lab:{tools.there}/repo.git", "work", env=env)
    big(tools.here / "work" / "big", MIB * 4)
    tools.run("git", "-C", "work", *who, "checkout", "-q", "-b", "main", env=env)
    tools.run("git", "-C", "work", *who, "add", ".", env=env)
    tools.run("git", "-C", "work", *who, "commit", "-qm", "x", env=env)
    tools.run("git", "-C", "work", *who, "push", "-q", "-u", "origin", "main", env=env)
    tools.run("git", "-C", tools.here, *who, "clone", "-q", "-b", "main", f"lab:{tools.there}/repo.git", "again", env=env)  # fmt: skip
    assert digest(tools.here / "again" / "big") == digest(tools.here / "work" / "big")


# -- machines -------------------------------------------------------------------------------------------


@needs("ansible", "ansible-playbook")
def test_ansible(tools: Tools) -> None:
    inventory = tools.here / "inventory"
    inventory.write_text(
        f"lab ansible_ssh_common_args='-F {tools.config}' ansible_python_interpreter={sys.executable}\n"
    )
    env = {"ANSIBLE_HOST_KEY_CHECKING": "False", "ANSIBLE_HOME": str(tools.here / "ansible")}
    out = tools.run("ansible", "-i", inventory, "lab", "-m", "ping", env=env, timeout=80).stdout
    assert b'"ping": "pong"' in out
    playbook = tools.here / "play.yml"
    playbook.write_text(
        "- hosts: lab\n  gather_facts: false\n  tasks:\n"
        f"  - ansible.builtin.copy: {{content: made, dest: '{tools.there}/made'}}\n"
        f"  - ansible.builtin.command: touch {tools.there}/touched\n"
    )
    tools.run("ansible-playbook", "-i", inventory, playbook, env=env, timeout=80)
    assert (tools.there / "made").read_text() == "made"
    assert (tools.there / "touched").exists()


@needs("ssh-copy-id")
def test_ssh_copy_id_installs_a_key_that_then_works(serve: Serve, tmp_path: Path) -> None:
    first, second = Key(tmp_path / "keys", "first"), Key(tmp_path / "keys", "second")
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (tmp_path / "alice").write_text(first.public)
    sources = [str(tmp_path / "{user}"), str(home / ".ssh" / "authorized_keys")]
    server = serve(home=str(home), accounts={"alice": {"authorized_keys": sources}})
    tools = Tools(server, tmp_path)
    options = ["-F", tools.config, "-o", "User=alice", "-o", f"IdentityFile={first.file}", "-o", "IdentitiesOnly=yes"]  # fmt: skip
    tools.run("ssh-copy-id", "-f", "-i", f"{second.file}.pub", *options, "lab")
    assert server.ssh("-i", str(second.file), "HOST", "true", user="alice").returncode == 0


def test_control_master_shares_one_connection(tools: Tools) -> None:
    path = tools.here / "control"
    options = ["-F", tools.config, "-o", f"ControlPath={path}", "-o", "ControlMaster=auto", "-o", "ControlPersist=30"]  # fmt: skip
    for number in range(5):
        assert tools.run("ssh", *options, "lab", f"echo {number}").stdout == b"%d\n" % number
    assert len(tools.server.events("authentication accepted")) == 1
    tools.run("ssh", *options, "-O", "exit", "lab")
    wait_for("its end", lambda: tools.server.stats()["connections"] == 0)


@needs("mosh-server")
def test_moshs_server_starts(tools: Tools) -> None:
    out = tools.run("ssh", "-F", tools.config, "-tt", "lab", "mosh-server new -s -c 256 -l LANG=C.UTF-8 -i 127.0.0.1").stdout  # fmt: skip
    assert b"MOSH CONNECT" in out
    pid = int(out.split(b"pid = ")[1].split(b"]")[0])
    os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize(
    ("program", "shows", "leave"),
    [
        ("tmux -L gosshd-PID -f /dev/null new -s x 'echo in $((40+2)); sleep 100'", "in 42", ""),
        ("vim -u NONE -N", "VIM", ":q!\r"),
        ("less /etc/services", "tcpmux", "q"),
        ("top -d 1", "load average", "q"),
    ],
    ids=["tmux", "vim", "less", "top"],
)  # fmt: skip
def test_full_screen_programs(tools: Tools, program: str, shows: str, leave: str) -> None:
    if shutil.which(program.split()[0]) is None:
        pytest.skip(f"not installed: {program.split()[0]}")
    terminal = tools.server.terminal("-tt", "HOST", program.replace("PID", str(os.getpid())))
    terminal.expect(shows)
    if leave:
        terminal.send(leave)
    else:
        assert tools.server.ssh(f"tmux -L gosshd-{os.getpid()} kill-server").returncode == 0
    import pexpect

    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus in (0, 1)  # tmux's server was killed


def test_what_visual_studio_code_needs(serve: Serve, tmp_path: Path) -> None:
    """exec with a script on standard input, sftp, and forwards to itself: a port and a socket."""
    listening = tmp_path / "socket"
    server = serve(home=str(tmp_path), permit_open=["127.0.0.1:*"], permit_open_sockets=[str(listening)])  # fmt: skip
    port = free_port()
    serve_both = (
        "import socketserver, threading\n"
        "class H(socketserver.BaseRequestHandler):\n"
        "    def handle(self): self.request.sendall(b'code')\n"
        f"a = socketserver.TCPServer(('127.0.0.1', {port}), H)\n"
        f"b = socketserver.UnixStreamServer('{listening}', H)\n"
        "threading.Thread(target=b.serve_forever, daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "a.serve_forever()\n"
    )

    async def work() -> None:
        async with await server.connect() as conn:
            process = await conn.create_process(f"{sys.executable} -u -")
            process.stdin.write(serve_both)
            process.stdin.write_eof()
            assert await process.stdout.readline() == "ready\n"
            reader, _ = await conn.open_connection("127.0.0.1", port)
            assert await reader.read() == b"code"
            reader, _ = await conn.open_unix_connection(str(listening))
            assert await reader.read() == b"code"
            async with conn.start_sftp_client() as client:
                assert "socket" in await client.listdir(".")
            process.terminate()

    run(work())


@needs("autossh")
def test_a_tunnel_is_back_after_the_server_was_killed(
    serve: Serve, echo: int, tmp_path: Path
) -> None:
    port, at = free_port(), free_port()
    settings: dict[str, Any] = {"permit_open": [f"127.0.0.1:{echo}"], "shell": False, "listen": [f"127.0.0.1:{at}"], "hostkeys": str(tmp_path / "keys")}  # fmt: skip
    server = serve(**settings)
    argv = server.ssh_argv("-N", "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2", "-L", f"{port}:127.0.0.1:{echo}", "HOST")  # fmt: skip
    env = {**os.environ, "AUTOSSH_POLL": "1", "AUTOSSH_GATETIME": "0", "AUTOSSH_FIRST_POLL": "1"}
    client = subprocess.Popen(["autossh", "-M", "0", *argv[1:]], env=env, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    try:
        assert exchange(dial(port)) == b"hello"
        server.process.kill()
        server.process.wait()
        again = serve(**settings)

        def works() -> bool:
            import socket

            try:
                with socket.create_connection(("127.0.0.1", port), timeout=2) as sock:
                    return exchange(sock) == b"hello"
            except OSError:
                return False

        wait_for("the tunnel", works, 30)
        assert again.events("forward opened")
    finally:
        os.killpg(client.pid, signal.SIGKILL)  # autossh and its ssh
        client.wait(10)


def test_a_half_dead_tunnel_is_noticed(serve: Serve, echo: int) -> None:
    """The client's machine is gone without a word: its forward and its listener go, too."""
    port = free_port()
    server = serve(
        permit_listen=[f"127.0.0.1:{port}"], client_alive_interval=0.3, client_alive_count_max=2
    )
    with tunnel(server, "-R", f"{port}:127.0.0.1:{echo}") as client:
        assert exchange(dial(port)) == b"hello"
        os.kill(client.pid, signal.SIGSTOP)
        took = wait_for("its end", lambda: server.stats()["connections"] == 0)
        assert took < 5
        os.kill(client.pid, signal.SIGCONT)
        time.sleep(0.1)


@pytest.mark.parametrize("first", ["program", "client"])
def test_whoever_ends_first_success_stays_success(tools: Tools, first: str) -> None:
    if first == "program":
        data = os.urandom(MIB)
        for _ in range(5):  # the rest of the input goes nowhere, and that is no failure
            assert tools.run("ssh", "-F", tools.config, "lab", "head -c 10 | wc -c", input=data).stdout.strip() == b"10"  # fmt: skip
    else:
        for _ in range(5):
            assert tools.run("ssh", "-F", tools.config, "lab", "cat; echo done", input=b"x").stdout == b"xdone\n"  # fmt: skip


def test_our_sftp_server_says_how_it_is_used() -> None:
    result = subprocess.run([sys.executable, "-m", "gosshd_py.sftp", "-x"], capture_output=True, text=True, cwd=ROOT, check=False, timeout=20)  # fmt: skip
    assert (result.returncode, result.stderr) == (1, "usage: python -m gosshd_py.sftp [-R]\n")


def test_an_unknown_client_of_our_sftp_server_ends_it(tmp_path: Path) -> None:
    for garbage in (b"", b"\x00\x00\x00\x05\x01\x00\x00\x00\x03" + b"\xff" * 100, b"\xff" * 1000):
        result = subprocess.run([sys.executable, "-m", "gosshd_py.sftp"], input=garbage, capture_output=True, cwd=ROOT, check=False, timeout=20)  # fmt: skip
        assert b"Traceback" not in result.stderr, result.stderr


@needs("rsync")
def test_the_readmes_backup_through_a_tunnel(serve: Serve, tmp_path: Path) -> None:
    """rsync to a daemon that only the server reaches, by an account that can do nothing else."""
    vault, at, port = tmp_path / "vault", free_port(), free_port()
    vault.mkdir()
    (tmp_path / "rsyncd.conf").write_text(
        f"use chroot = no\n[backup]\npath = {vault}\nread only = no\nuid = {os.geteuid()}\ngid = {os.getegid()}\n"
    )
    (tmp_path / "home").mkdir()
    big(tmp_path / "home" / "file", 4 * MIB)
    argv = ["rsync", "--daemon", "--no-detach", f"--port={at}", "--address=127.0.0.1", f"--config={tmp_path}/rsyncd.conf"]  # fmt: skip
    daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    key = Key(tmp_path / "keys")
    account = {"shell": False, "authorized_keys": [key.public], "permit_open": [f"127.0.0.1:{at}"]}
    server = serve(accounts={"backup": account})
    try:
        dial(at).close()
        with tunnel(server, "-i", str(key.file), "-L", f"{port}:127.0.0.1:{at}", user="backup"):
            dial(port).close()
            url = f"rsync://127.0.0.1:{port}/backup/"
            subprocess.run(["rsync", "-a", f"{tmp_path}/home/", url], check=True, timeout=30)
    finally:
        daemon.terminate()
        daemon.wait(10)
    assert digest(vault / "file") == digest(tmp_path / "home" / "file")
