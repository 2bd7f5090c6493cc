"""The command line as a person meets it: real processes, what they print, and how they exit."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gosshd_py import cli, loop

from .keys import Key
from .serving import ROOT, Served, wait_for

GOSSHD = (sys.executable, "-m", "gosshd_py")
KNOWN_HOSTS_LINE = r"\[localhost\]:\d+ ssh-ed25519 \S+"

Start = Callable[..., "Gosshd"]
Result = subprocess.CompletedProcess[str]


def environment(home: Path, **more: str) -> dict[str, str]:
    """An environment without anybody's settings, in which the package is found from anywhere."""
    own = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)}
    return {**own, "LANG": "C.UTF-8", **more}


def gosshd_once(directory: Path, *args: str | Path, **env: str) -> Result:
    """Run a command that ends by itself."""
    return subprocess.run(
        [*GOSSHD, *args],
        cwd=directory,
        env=environment(directory, **env),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def besides_the_warning(stderr: str) -> list[str]:
    """What is on standard error, but for the warning that root's visitors get root's shells."""
    return [line for line in stderr.splitlines() if "warning: run_as is not set" not in line]


def errors(result: Result, code: int) -> list[str]:
    """The errors that it ended with, which are lines of one form and nothing else."""
    lines = besides_the_warning(result.stderr)
    assert lines
    assert all(line.startswith("gosshd: error: ") for line in lines), result.stderr
    assert (result.returncode, result.stdout) == (code, "")
    return [line.removeprefix("gosshd: error: ") for line in lines]


def ssh_keygen(*args: str | Path) -> str:
    return subprocess.run(
        ["ssh-keygen", *args], capture_output=True, text=True, timeout=30, check=True
    ).stdout


class Gosshd(Served):
    """`gosshd` itself, as started from a terminal or a script, with the real client to enter it."""

    def __init__(
        self, directory: Path, *args: str | Path, before: tuple[str, ...] = (), **env: str
    ) -> None:
        self.directory = directory
        self.terminals: list[Any] = []
        self.out_file = directory / "out"
        self.log_file = directory / "log"
        with self.out_file.open("wb") as out, self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*before, *GOSSHD, *args],
                cwd=directory,
                env=environment(directory, **env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
            )

    def wait_until_ready(self) -> Gosshd:
        """Read the announcement, and believe it: the host, the port, the host key."""
        wait_for(
            "the announcement",
            lambda: "connect with" in self.out or self.process.poll() is not None,
        )
        assert self.process.poll() is None, self.log_file.read_text()
        self.host, self.port = self.addresses[0]
        self.known_hosts = self.directory / "known_hosts"
        self.known_hosts.write_text(re.findall(KNOWN_HOSTS_LINE, self.out)[0] + "\n")
        return self

    @property
    def out(self) -> str:
        return self.out_file.read_text()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        found = re.findall(r"^listening on (\S+):(\d+)$", self.out, re.MULTILINE)
        return [(host.strip("[]"), int(port)) for host, port in found]

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers, each in a directory of its own: start("--listen", "127.0.0.1:0")."""
    own: list[Gosshd] = []

    def start_one(*args: str | Path, **how: Any) -> Gosshd:
        directory = tmp_path / f"gosshd{len(own)}"
        directory.mkdir()
        own.append(Gosshd(directory, *args, **how))
        return own[-1]

    yield start_one
    for it in own:
        it.close_terminals()
        it.stop()
        assert "Traceback" not in it.log_file.read_text()


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:
            return False
        return True


def works(*command: str) -> bool:
    """Whether the machine lets us do this; a container may not."""
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can")
needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="there is no ::1")
needs_network_namespaces = pytest.mark.skipif(
    not works("unshare", "--net", "ip", "link", "set", "lo", "up"),
    reason="may not make a network in which port 2222 is free",
)


# -- serving ---------------------------------------------------------------------------------------


@needs_ipv6
def test_the_announcement_is_all_that_a_client_needs(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    it = start("--listen", "127.0.0.1:0", "--listen", "[::1]:0", "--hostkeys", keys)
    port = str(it.wait_until_ready().port)
    lines = it.out.splitlines()
    assert lines[:2] == [f"listening on 127.0.0.1:{port}", f"listening on [::1]:{port}"]
    fingerprint = ssh_keygen("-lf", keys / "ssh_host_ed25519_key").split()[1]
    assert [line for line in lines if fingerprint in line] == [lines[2]]
    assert f"[localhost]:{port} ssh-ed25519 " in it.known_hosts.read_text()
    assert lines[-1].endswith(f"ssh anyuser@localhost -p {port}")
    alias = ("-o", f"HostKeyAlias=[localhost]:{port}")  # some machines' localhost has no ::1
    for way in (("-4",), ("-o", "HostName=::1", *alias)):
        result = it.ssh(*way, "HOST", "echo hello")
        assert (result.stdout, result.stderr) == (b"hello\n", b"")


def test_the_command_to_type_works_as_it_is_printed(start: Start) -> None:
    it = start("--listen", "127.0.0.1:0").wait_until_ready()
    command = it.out.splitlines()[-1].removeprefix("connect with: ").split()
    checked = ["-F", "none", "-o", f"UserKnownHostsFile={it.known_hosts}", "-o", "BatchMode=yes"]
    result = subprocess.run(
        [*command, *checked, "-o", "StrictHostKeyChecking=yes", "echo $USER"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (result.stdout, result.returncode) == ("anyuser\n", 0), result.stderr


def test_another_host_key_than_the_announced_one_is_noticed_by_the_client(start: Start) -> None:
    it = start("--listen", "127.0.0.1:0").wait_until_ready()
    other = start("--listen", "127.0.0.1:0").wait_until_ready()
    line = other.known_hosts.read_text().replace(str(other.port), str(it.port))
    it.known_hosts.write_text(line)
    assert it.ssh("true").returncode == 255


def test_the_same_address_twice_with_port_0_gets_two_ports(start: Start) -> None:
    it = start("--listen", "127.0.0.1:0", "--listen", "127.0.0.1:0").wait_until_ready()
    assert len(set(it.addresses)) == 2
    for address in it.addresses:
        with socket.create_connection(address, timeout=5) as sock:
            assert sock.recv(8) == b"SSH-2.0-"


@needs_network_namespaces
def test_without_settings_it_listens_on_loopback_port_2222(start: Start) -> None:
    alone = ("unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh")
    it = start(before=alone).wait_until_ready()
    assert it.addresses == [("127.0.0.1", 2222), ("::1", 2222)]
    inside = ("nsenter", "--net", "--target", str(it.process.pid))
    assert subprocess.run([*inside, *GOSSHD, "probe"], check=False, timeout=20).returncode == 0
    assert it.stop() == 0


@needs_network_namespaces
def test_a_machine_without_ipv6_is_served_on_ipv4(start: Start) -> None:
    without = "ip link set lo up; ip address delete ::1/128 dev lo"
    it = start(before=("unshare", "--net", "sh", "-c", f'{without}; exec "$@"', "sh"))
    assert it.wait_until_ready().addresses == [("127.0.0.1", 2222)]


@needs_network_namespaces
def test_somebody_elses_server_on_the_default_ipv6_port_is_an_error(start: Start) -> None:
    """Clients of localhost try ::1 first, so they would all go there."""
    alone = ("unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh")
    other = start("--listen", "[::1]:2222", before=alone).wait_until_ready()
    late = start(before=("nsenter", "--net", "--target", str(other.process.pid)))
    assert late.process.wait(10) == 1
    assert "cannot listen on [::1]:2222: Address already in use" in late.log_file.read_text()


def test_an_address_in_use_is_one_line_and_exit_code_1(start: Start, tmp_path: Path) -> None:
    port = start("--listen", "127.0.0.1:0").wait_until_ready().port
    (line,) = errors(gosshd_once(tmp_path, "--listen", f"127.0.0.1:{port}"), 1)
    assert line.startswith(f"cannot listen on 127.0.0.1:{port}: Address already in use; ")
    assert "--listen" in line


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("192.0.2.77:0", "Cannot assign requested address; no interface"),
        ("no..name:0", "not a host name; choose another"),
    ],
)
def test_an_address_that_this_machine_has_not_is_exit_code_1(
    tmp_path: Path, address: str, reason: str
) -> None:
    (line,) = errors(gosshd_once(tmp_path, "--open-to-network", "--listen", address), 1)
    assert line.startswith(f"cannot listen on {address}: {reason}")


def test_an_unusable_host_key_is_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "hostkeys").mkdir()
    (tmp_path / "hostkeys" / "ssh_host_ed25519_key").touch(mode=0o644)
    (line,) = errors(gosshd_once(tmp_path, "--listen", "127.0.0.1:0"), 1)
    assert line.endswith("run: chmod 600 hostkeys/ssh_host_ed25519_key")


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_output_stops_nobody(
    start: Start, tmp_path: Path, closed: str, workers: str
) -> None:
    """And what is not told there is told to no client, whose socket would get the number."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
    before = ("sh", "-c", f'exec "$@" {closed}', "sh")
    it = start("--listen", f"127.0.0.1:{address[1]}", "--workers", workers, before=before)
    wait_for("the server to listen", lambda: it.process.poll() or connects(address))
    for number in range(3):
        assert "socket:" not in os.readlink(f"/proc/{it.process.pid}/fd/{number}")
    assert gosshd_once(tmp_path, "probe", f"127.0.0.1:{address[1]}").returncode == 0
    assert it.stop() == 0


def connects(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_an_output_that_takes_nothing_is_one_line(start: Start) -> None:
    it = start("--listen", "127.0.0.1:0", before=("sh", "-c", 'exec "$@" >/dev/full', "sh"))
    assert it.process.wait(10) != 0
    assert "gosshd: error: [Errno 28] No space left on device" in it.log_file.read_text()


async def loop_now() -> str:
    return type(asyncio.get_running_loop()).__module__


def test_the_loop_is_libuvs_where_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec("uvloop") is not None
    assert loop.run(loop_now()) == ("uvloop" if there else "asyncio.unix_events")
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop.run(loop_now()) == "asyncio.unix_events"


# -- stopping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_clean_stop(start: Start, number: int) -> None:
    it = start("--listen", "127.0.0.1:0").wait_until_ready()
    assert it.stop(number) == 0
    assert "shutting down" in it.log_file.read_text()


def test_ignored_signals_bind_neither_the_server_nor_its_shells(start: Start) -> None:
    """As in the background job of a script (SIGINT and SIGQUIT), or under nohup (SIGHUP)."""
    ignoring = ("sh", "-c", 'trap "" INT QUIT HUP; exec "$@"', "sh")
    it = start("--listen", "127.0.0.1:0", before=ignoring).wait_until_ready()
    for options in ((), ("-tt",)):
        _, mask = it.ssh(*options, "HOST", "grep SigIgn /proc/self/status").stdout.split()
        # Without 32 and 33, which glibc keeps for itself: nobody can set them.
        ignored = {number for number in signal.valid_signals() if int(mask, 16) >> (number - 1) & 1}
        assert ignored == set()
    terminal = it.terminal()
    terminal.sendline("sed -u s/^/seen:/")
    terminal.sendline("hello")
    terminal.expect_exact("seen:hello")  # so it is sed that ^C will find, not a shell about to fork
    terminal.sendintr()
    terminal.sendline("echo status $?")
    terminal.expect_exact("status 130")
    terminal.close(force=True)
    assert it.stop() == 0


def test_a_live_session_is_told_and_the_port_is_free_at_once(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    it = start("--listen", "127.0.0.1:0", "--hostkeys", keys).wait_until_ready()
    terminal = it.terminal()
    terminal.sendline("trap '' HUP TERM; echo $((20+2)) ready")  # one that does not go by itself
    terminal.expect_exact("22 ready")
    with socket.create_connection((it.host, it.port)):  # and one that never closes its side
        began = time.monotonic()
        assert it.stop() == 0
        assert time.monotonic() - began < 5
        terminal.expect(r"\n[^\n]*shutting down[^\n]*\n")
        again = start("--listen", f"127.0.0.1:{it.port}", "--hostkeys", keys).wait_until_ready()
    assert again.known_hosts.read_text() == it.known_hosts.read_text()
    assert it.ssh("echo again").stdout == b"again\n"


# -- settings --------------------------------------------------------------------------------------


def test_every_flag_is_an_environment_variable_too(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file.toml").write_text('accept_env = ["GREETING"]\n')
    (tmp_path / "anyuser").mkdir()
    it = start(
        GOSSHD_CONFIG=str(tmp_path / "file.toml"),
        GOSSHD_LISTEN="127.0.0.1:0 0.0.0.0:0",
        GOSSHD_OPEN_TO_NETWORK="true",
        GOSSHD_HOSTKEYS=str(tmp_path / "keys"),
        GOSSHD_SHELL="/bin/sh",
        GOSSHD_HOME=f"{tmp_path}/{{user}}",
        GOSSHD_LOG_FORMAT="json",
    ).wait_until_ready()
    assert [host for host, _ in it.addresses] == ["127.0.0.1", "0.0.0.0"]
    assert (tmp_path / "keys" / "ssh_host_ed25519_key").exists()
    result = it.ssh("-o", "SendEnv=GREETING", "HOST", "echo $0 $GREETING; pwd", GREETING="hello")
    assert result.stdout.decode() == f"/bin/sh hello\n{tmp_path}/anyuser\n"
    wait_for("its log line", lambda: it.events("session over", command="echo $0 $GREETING; pwd"))


@needs_root
@pytest.mark.parametrize("way", ["flag", "environment", "file"])
def test_shells_can_run_as_somebody_else(start: Start, tmp_path: Path, way: str) -> None:
    (tmp_path / "file.toml").write_text('run_as = "nobody"\nlisten = ["127.0.0.1:0"]\nhome = "/"\n')
    by_flag = ("--run-as", "nobody", "--listen", "127.0.0.1:0", "--home", "/")
    by_environment = {
        "GOSSHD_RUN_AS": "nobody",
        "GOSSHD_LISTEN": "127.0.0.1:0",
        "GOSSHD_HOME": "/",
    }
    it = {
        "flag": lambda: start(*by_flag),
        "environment": lambda: start(**by_environment),
        "file": lambda: start("--config", tmp_path / "file.toml"),
    }[way]()
    assert it.wait_until_ready().ssh("id -un; pwd").stdout == b"nobody\n/\n"


def test_flags_override_the_environment_and_both_the_file(tmp_path: Path) -> None:
    (tmp_path / "file.toml").write_text('listen = ["127.0.0.1:1001"]\nhome = "nonsense"\n')

    def listens_on(*args: str, **env: str) -> str:
        result = gosshd_once(
            tmp_path, "check", "--config", "file.toml", "--home", "/", *args, **env
        )
        assert (result.returncode, besides_the_warning(result.stderr)) == (0, [])
        return result.stdout.rpartition(" ")[2]

    assert listens_on() == "127.0.0.1:1001\n"
    assert listens_on(GOSSHD_LISTEN="127.0.0.1:1002") == "127.0.0.1:1002\n"
    assert (
        listens_on("--listen", "127.0.0.1:1003", GOSSHD_LISTEN="127.0.0.1:1002")
        == "127.0.0.1:1003\n"
    )


def test_an_environment_variable_for_the_version_is_none_of_ours(tmp_path: Path) -> None:
    """Images often have GOSSHD_VERSION=1.2.3 in their environment; --version is no setting."""
    assert gosshd_once(tmp_path, "check", GOSSHD_VERSION="1.2.3").returncode == 0


def test_settings_stand_before_or_behind_the_command(tmp_path: Path) -> None:
    (tmp_path / "file.toml").write_text('listen = ["127.0.0.1:1001"]\n')
    (tmp_path / "bad.toml").write_text("listen = []\n")
    behind = gosshd_once(tmp_path, "known-hosts", "--config", "file.toml", "--hostkeys", "keys")
    before = gosshd_once(tmp_path, "--config", "file.toml", "--hostkeys", "keys", "known-hosts")
    mixed = gosshd_once(
        tmp_path,
        "--config",
        "bad.toml",
        "--hostkeys",
        "keys",
        "known-hosts",
        "--config",
        "file.toml",
    )
    assert behind.stdout.startswith("[localhost]:1001 ssh-ed25519 ")
    assert behind.stdout == before.stdout == mixed.stdout
    (line,) = errors(gosshd_once(tmp_path, "--config", "bad.toml", "check"), 2)
    assert line.startswith("bad.toml:1: listen: is empty")


def test_the_host_keys_are_here_or_in_the_users_state_folder(tmp_path: Path) -> None:
    def made_by(**env: str) -> set[str]:
        known = set(tmp_path.rglob("ssh_host_*"))
        assert gosshd_once(tmp_path, "keys", **env).returncode == 0
        return {
            str(path.parent.relative_to(tmp_path))
            for path in set(tmp_path.rglob("ssh_host_*")) - known
        }

    assert made_by() == {".local/state/gosshd/hostkeys"}
    assert made_by(XDG_STATE_HOME=str(tmp_path / "state")) == {"state/gosshd/hostkeys"}
    (tmp_path / "hostkeys").mkdir()
    assert made_by(XDG_STATE_HOME=str(tmp_path / "state")) == {"hostkeys"}
    assert made_by(GOSSHD_HOSTKEYS="mine") == {"mine"}


@needs_root
def test_a_user_without_a_name_or_a_home_is_served(start: Start, tmp_path: Path) -> None:
    """As in a container that runs as any uid. The capability is to reach Python, the tests' way."""
    reach = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--clear-groups")
    nameless = ("setpriv", "--reuid=54321", "--regid=54321", *reach, "--", "env")
    it = start("--listen", "127.0.0.1:0", before=(*nameless, "-u", "HOME"))
    assert it.process.wait(10) == 2
    (line,) = it.log_file.read_text().splitlines()
    assert (
        line == "gosshd: error: HOME: uid 54321 has no home directory; set HOME in the environment"
    )
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    os.chown(keys, 54321, 54321)
    it = start("--listen", "127.0.0.1:0", "--hostkeys", keys, before=(*nameless, "HOME=/"))
    assert it.wait_until_ready().ssh("id -u; pwd").stdout == b"54321\n/\n"


# -- the other commands ----------------------------------------------------------------------------


def test_known_hosts_has_a_line_for_each_name_and_each_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    ssh_keygen("-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", keys / "ssh_host_rsa_key")
    where = ("--listen", "127.0.0.1:2299", "--listen", "[::1]:2298", "--listen", "0.0.0.0:22")
    result = gosshd_once(tmp_path, "known-hosts", *where, "--open-to-network", "--hostkeys", keys)
    names = [
        *("[localhost]:2299", "[127.0.0.1]:2299", "[localhost]:2298", "[::1]:2298"),
        *("localhost", socket.gethostname()),
    ]
    public = [
        " ".join(ssh_keygen("-yf", keys / f"ssh_host_{kind}_key").split()[:2])
        for kind in ("ed25519", "rsa")
    ]
    assert result.stdout.splitlines() == [f"{name} {key}" for name in names for key in public]
    (tmp_path / "known_hosts").write_text(result.stdout)
    assert ssh_keygen("-F", "[localhost]:2299", "-f", tmp_path / "known_hosts").count("found") == 2


def test_known_hosts_cannot_know_port_0(tmp_path: Path) -> None:
    (line,) = errors(gosshd_once(tmp_path, "known-hosts", "--listen", "127.0.0.1:0"), 2)
    assert "--listen HOST:PORT" in line


def test_keys_lists_what_ssh_keygen_says(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    ssh_keygen("-q", "-t", "ecdsa", "-N", "", "-C", "a comment", "-f", keys / "ssh_host_ecdsa_key")
    lines = gosshd_once(tmp_path, "keys", "--hostkeys", keys).stdout.splitlines()
    said = [
        ssh_keygen("-lf", keys / f"ssh_host_{kind}_key").split()[1] for kind in ("ed25519", "ecdsa")
    ]
    assert lines == [
        f"{said[0]} ssh-ed25519 gosshd",
        f"{said[1]} ecdsa-sha2-nistp256 a comment",
    ]


def test_check_validates_and_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text('listen = ["127.0.0.1:0"]\nhostkeys = "keys"\n')
    result = gosshd_once(tmp_path, "check", "--config", "good.toml")
    assert (result.returncode, besides_the_warning(result.stderr)) == (0, [])
    assert result.stdout.startswith("good.toml: good; ")
    assert [path.name for path in tmp_path.iterdir()] == ["good.toml"]


def test_probe_knows_a_server(start: Start, tmp_path: Path) -> None:
    it = start("--listen", "127.0.0.1:0").wait_until_ready()
    result = gosshd_once(tmp_path, "probe", f"localhost:{it.port}")
    assert (result.returncode, besides_the_warning(result.stderr)) == (0, [])
    assert re.fullmatch(r"SSH-2\.0-\S+\n", result.stdout)
    it.stop()
    (line,) = errors(gosshd_once(tmp_path, "probe", f"127.0.0.1:{it.port}"), 1)
    assert line.startswith(f"127.0.0.1:{it.port}: Connection refused; ")


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n", b"\xff\x1b[2J" * 100])
def test_probe_knows_what_is_no_ssh_server(tmp_path: Path, greeting: bytes) -> None:
    def answer() -> None:
        with listener.accept()[0] as sock:
            sock.sendall(greeting)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        other = threading.Thread(target=answer)
        other.start()
        (line,) = errors(gosshd_once(tmp_path, "probe", address), 1)
        other.join()
    assert line.startswith(f"{address}: what answers there does not speak SSH")


def test_probe_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "PROBE_TIME", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SystemExit) as info:
            cli.main(["probe", address])
    assert info.value.code == 1
    assert capsys.readouterr().err.startswith(f"gosshd: error: {address}: timed out; ")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "[::1]", "a..b:1"])
def test_probe_says_what_is_no_address(tmp_path: Path, address: str) -> None:
    (line,) = errors(gosshd_once(tmp_path, "probe", address), 2)
    assert address in line


def test_help_and_version(tmp_path: Path) -> None:
    help_text = gosshd_once(tmp_path, "--help").stdout
    assert help_text.startswith("Usage: gosshd [OPTIONS]")
    for word in ("--listen", "--hostkeys", "--config", "--log-format", "--shell", "--run-as"):
        assert word in help_text
    for word in ("--home", "--open-to-network", "check", "keys", "known-hosts", "probe", "GOSSHD_"):
        assert word in help_text
    assert gosshd_once(tmp_path, "probe", "-h").stdout.startswith("Usage: gosshd probe ")
    assert re.fullmatch(
        r"gosshd, version \d+\.\d+\.\d+\n", gosshd_once(tmp_path, "--version").stdout
    )


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("bogus",), ("bogus", "gosshd --help")),
        (("--lisen", "127.0.0.1:1"), ("--lisen", "--listen")),
        (("--listen",), ("--listen",)),
        (("probe", "127.0.0.1:1", "more"), ("more",)),
        (("--listen", "127.0.0.1:99999"), ("--listen", "'127.0.0.1:99999'", "65535")),
        (("--listen", "0.0.0.0:2222"), ("--listen", "0.0.0.0:2222", "--open-to-network")),
        (("--shell", "bash"), ("--shell", "absolute", "/bin/bash")),
        (("--shell", "/no/such/shell"), ("--shell", "/no/such/shell", "install it")),
        (("--run-as", "nosuchuser"), ("--run-as", "nosuchuser")),
        (("--home", "/home/{user.__class__}"), ("--home", "{user}")),
        (("--log-format", "xml"), ("--log-format", "'xml'", "text or json")),
        (("--config", "missing.toml"), ("missing.toml", "No such file")),
        (("--config", "."), (".: Is a directory",)),
        (("--listen", "x\n\x1b[2J"), (r"--listen", r"\n\x1b[2J", "HOST:PORT")),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    tmp_path: Path, args: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (line,) = errors(gosshd_once(tmp_path, *args), 2)
    for word in words:
        assert word in line


def test_every_problem_of_a_file_gets_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(
        '# a comment\nlisten = ["127.0.0.1:99999"]\nshel = "/bin/sh"\n\nlogin_grace_time = "soon"\n'
        'shell = "bash"\nhome = "{0}"\n'
    )
    for command in ((), ("check",)):
        lines = errors(gosshd_once(tmp_path, *command, "--config", "bad.toml"), 2)
        places = sorted(": ".join(line.split(": ")[:2]) for line in lines)
        assert places == [
            *("bad.toml:2: listen", "bad.toml:3: shel", "bad.toml:5: login_grace_time"),
            *("bad.toml:6: shell", "bad.toml:7: home"),
        ]
        assert "bad.toml:3: shel: unknown key; did you mean shell?" in lines


# -- explaining -------------------------------------------------------------------------------------


def test_explain_names_the_rule_that_decides(tmp_path: Path) -> None:
    key = Key(tmp_path / "keys")
    other = Key(tmp_path / "keys", "other")
    (tmp_path / "lab.toml").write_text(
        "[accounts.alice]\n"
        f"authorized_keys = ['permitopen=\"127.0.0.1:80\" {key.public}', 'restrict {other.public}']\n"
        "permit_open = ['127.0.0.1:*', 'localhost:443', 'ip6-localhost:80']\n"
    )

    def explain(*words: str) -> tuple[int, str]:
        result = gosshd_once(tmp_path, "explain", "forward", *words, "--config", "lab.toml")
        assert result.stderr == ""
        return result.returncode, result.stdout.rstrip()

    assert explain("alice", "127.0.0.1:22") == (
        0, "allowed: permit_open of the account has 127.0.0.1:*; 127.0.0.1 is 127.0.0.1",
    )  # fmt: skip
    assert explain("alice", "10.0.0.1:22")[1] == (
        "refused: permit_open of the account does not name 10.0.0.1:22"
    )
    assert explain("bob", "127.0.0.1:22") == (1, "refused: bob has no account, so no login either")
    allowed = "allowed: permit_open of the account has 127.0.0.1:*; permitopen of the key has 127.0.0.1:80"
    with_key = ("--key", f"{key.file}.pub")
    assert explain("alice", "127.0.0.1:80", *with_key) == (0, f"{allowed}; 127.0.0.1 is 127.0.0.1")
    assert explain("alice", "127.0.0.1:81", *with_key) == (
        1, "refused: permitopen of the key does not name 127.0.0.1:81",
    )  # fmt: skip
    assert explain("alice", "127.0.0.1:80", "--key", f"{other.file}.pub")[1] == (
        "refused: the line of this key does not permit port forwarding"
    )
    assert explain("alice", "localhost:443")[1].startswith(
        "allowed: permit_open of the account has localhost:443; localhost is "
    )
    for words, why in (
        (("alice", "x"), "'x' is not HOST:PORT"),
        (("alice", "127.0.0.1:1", "--key", "/no/file"), "/no/file: No such file or directory; name a"),
    ):  # fmt: skip
        (line,) = errors(
            gosshd_once(tmp_path, "explain", "forward", *words, "--config", "lab.toml"), 2
        )
        assert line.startswith(why)
