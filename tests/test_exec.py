"""Commands without a terminal: statuses, half-closes, and bytes that all arrive."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from gosshd_py import launch, process
from gosshd_py.accounts import find_account
from gosshd_py.command import prepare_home
from gosshd_py.config import Config
from gosshd_py.launch import Command

from .serving import Served, alive, run, wait_for


def test_stdout_and_stderr_are_apart_and_the_status_is_exact(server: Served) -> None:
    result = server.ssh("echo out; echo err >&2; test -t 0 || exit 201")
    assert (result.stdout, result.stderr, result.returncode) == (b"out\n", b"err\n", 201)


@pytest.mark.parametrize(
    ("number", "name"),
    [(9, "KILL"), (15, "TERM"), (11, "SEGV"), (13, "PIPE"), (24, "XCPU@gosshd"), (34, "34@gosshd")],
)
def test_a_killed_program_is_reported_by_the_rfcs_signal_name(
    server: Served, number: int, name: str
) -> None:
    async def main() -> asyncssh.SSHCompletedProcess:
        async with await server.connect() as conn:
            return await conn.run(f"ulimit -c 0; kill -{number} $$; sleep 5")

    if number == 34:
        number = signal.SIGRTMIN
        name = "RTMIN@gosshd"
    result = run(main())
    assert result.exit_signal[0] == name


def test_a_shell_without_a_terminal_reads_commands_to_their_end(server: Served) -> None:
    result = server.ssh(
        "-T", "HOST", stdin=b"echo one; tty; shopt -q login_shell && echo login\nexit 5\necho no\n"
    )
    assert (result.stdout, result.returncode) == (b"one\nnot a tty\nlogin\n", 5)
    assert server.ssh(stdin=b"false").returncode == 1


def test_client_eof_is_a_half_close(server: Served) -> None:
    data = os.urandom(3_000_000)
    result = server.ssh("cat; sleep 0.2; echo end; echo err >&2", stdin=data)
    assert result.stdout == data + b"end\n"
    assert result.stderr == b"err\n"


def test_a_program_that_closes_its_input_stops_nothing(server: Served) -> None:
    """The client sends 8 MB that nobody reads; the program's answer still arrives."""
    result = server.ssh("exec <&-; sleep 0.3; echo answer", stdin=b"x" * 8_000_000)
    assert (result.stdout, result.returncode) == (b"answer\n", 0)
    assert server.ssh("head -c 3", stdin=b"y" * 8_000_000).stdout == b"yyy"


def test_stderr_after_the_end_of_stdout_arrives(server: Served) -> None:
    result = server.ssh("exec >&-; sleep 0.2; echo late >&2; exit 4")
    assert (result.stderr, result.returncode) == (b"late\n", 4)


def test_output_that_comes_after_the_program_has_ended_arrives(server: Served) -> None:
    assert server.ssh("(sleep 0.5; echo late) & exit 6").stdout == b"late\n"
    assert (
        b"late" in server.ssh("-tt", "HOST", "trap '' HUP; (sleep 0.1; echo late) & exit 6").stdout
    )


def test_a_command_that_is_not_utf8_arrives_as_it_is(server: Served) -> None:
    argv: list[str | bytes] = [*server.ssh_argv("HOST")]
    result = subprocess.run(
        [*argv, b"printf %s '\xff\xe9' | od -An -tx1"], capture_output=True, check=False, timeout=10
    )
    assert result.stdout.split() == [b"ff", b"e9"]


def test_yes_into_head_ends_silently(server: Served) -> None:
    """SIGPIPE must not be ignored in what we start, though Python ignores it."""
    result = server.ssh("yes | head -1; echo ${PIPESTATUS[0]}")
    assert (result.stdout, result.stderr) == (b"y\n141\n", b"")


@pytest.mark.parametrize("command", ["yes", "sleep 1000", "cat"])
@pytest.mark.parametrize("options", [(), ("-tt",)], ids=["pipes", "pty"])
def test_a_command_is_gone_within_a_second_of_its_client(
    server: Served, command: str, options: tuple[str, ...]
) -> None:
    argv = server.ssh_argv(*options, "HOST", f"echo $$; exec {command}")
    client = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert client.stdout is not None
    pid = int(client.stdout.readline())
    client.kill()
    client.communicate()
    assert wait_for("the command's end", lambda: not alive(pid)) < 1


def test_a_client_that_sends_and_closes_at_once_has_sent_it_all(server: Served, tmp_path) -> None:
    """Fire and forget: what came before CLOSE reaches the program, and its end of file too."""
    target = tmp_path / "target"
    data = os.urandom(300_000)
    with server.paramiko() as transport:
        channel = transport.open_session()
        channel.exec_command(f"cat > {target}")
        channel.sendall(data)
        channel.close()
        wait_for("the upload", lambda: target.exists() and target.stat().st_size == len(data))
    assert target.read_bytes() == data


def test_signals_reach_the_foreground_and_others_change_nothing(server: Served) -> None:
    async def main(term_type: str | None) -> tuple[str, ...]:
        async with await server.connect() as conn:
            process = await conn.create_process(
                "trap 'echo usr1' USR1; echo ready; while :; do sleep 0.05; done",
                term_type=term_type,
            )
            await process.stdout.readuntil("ready" + ("\r\n" if term_type else "\n"))
            for name in ("STOP", "CHLD", "NOPE", "KILL9", "SEGV"):
                process.send_signal(name)
            process.send_signal("USR1")
            await process.stdout.readuntil("usr1")
            process.send_signal("TERM")
            await process.wait()
            assert process.exit_signal is not None
            return process.exit_signal

    for term_type in (None, "xterm"):
        assert run(main(term_type))[0] == "TERM"


def test_a_break_interrupts_on_a_terminal_and_is_refused_without(server: Served) -> None:
    async def main() -> str:
        async with await server.connect() as conn:
            process = await conn.create_process(
                "trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 0.05; done",
                term_type="xterm",
            )
            await process.stdout.readuntil("ready\r\n")
            process.send_break(100)
            return await process.stdout.read()

    assert "interrupted" in run(main())


def test_100_sessions_on_one_connection_are_independent(server: Served) -> None:
    """Some flood unread, some fail, some are killed; the others do not notice."""

    async def one(conn: asyncssh.SSHClientConnection, number: int) -> None:
        data = bytes([number]) * 20_000
        result = await conn.run(f"cat; exit {number}", input=data, encoding=None)
        assert result.stdout == data
        assert result.exit_status == number

    async def main() -> None:
        async with await server.connect() as conn:
            flooding = [await conn.create_process("yes", encoding=None) for _ in range(5)]
            for process in flooding:
                process.channel.pause_reading()
            dying = [conn.run("kill -9 $$") for _ in range(5)]
            await asyncio.gather(*(one(conn, number) for number in range(90)), *dying)
            for process in flooding:
                process.close()

    run(main())


def test_control_master_multiplexes(server: Served, tmp_path) -> None:
    options = (
        "-o",
        f"ControlPath={tmp_path}/mux",
        "-o",
        "ControlMaster=auto",
        "-o",
        "ControlPersist=5",
    )
    try:
        for number in range(5):
            assert server.ssh(*options, "HOST", f"exit {number}").returncode == number
        clients = [
            subprocess.Popen(server.ssh_argv(*options, "HOST", f"cat; exit {n}"), stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE) for n in range(30)
        ]  # fmt: skip
        for number, client in enumerate(clients):
            out, _ = client.communicate(f"{number}".encode(), 20)
            assert (out, client.returncode) == (f"{number}".encode(), number)
    finally:
        server.ssh("-o", f"ControlPath={tmp_path}/mux", "-O", "exit", "HOST")


def digest(server: Served, argv: list[str], data: bytes, command: str) -> str:
    return server.ssh(*argv, "HOST", command, stdin=data, timeout=80).stdout.decode().split()[0]


def test_bulk_over_exec_is_whole_both_ways(server: Served) -> None:
    size = 64 * 1024 * 1024
    data = os.urandom(1024 * 1024) * 64
    expected = hashlib.sha256(data).hexdigest()
    assert digest(server, [], data, "sha256sum") == expected
    result = server.ssh(f"head -c {size} /dev/zero; echo x >&2", timeout=80)
    assert (len(result.stdout), result.stderr) == (size, b"x\n")
    assert hashlib.sha256(server.ssh("cat", stdin=data, timeout=80).stdout).hexdigest() == expected


def test_bulk_over_a_raw_terminal_is_whole_both_ways(server: Served) -> None:
    size = 16 * 1024 * 1024
    data = os.urandom(1024 * 1024) * 16

    async def main() -> None:
        async with await server.connect() as conn:
            command = f"stty raw -echo; echo ready; head -c {size} | sha256sum"
            process = await conn.create_process(command, term_type="xterm", encoding=None)
            await process.stdout.readuntil(b"ready\n")
            process.stdin.write(data)
            assert (await process.stdout.read()).split()[0].decode() == hashlib.sha256(
                data
            ).hexdigest()
            result = await conn.run(
                f"stty raw; head -c {size} /dev/zero | tr '\\0' z", term_type="xterm", encoding=None
            )
            assert result.stdout == b"z" * size

    run(main())


def test_a_long_output_to_a_slow_reader_is_whole(server: Served) -> None:
    """The program has long ended when the client reads on."""

    async def main() -> None:
        async with await server.connect() as conn:
            process = await conn.create_process("seq 600000; exit 3", encoding=None)
            process.channel.pause_reading()
            began = time.monotonic()
            while time.monotonic() - began < 1.5:
                await asyncio.sleep(0.1)
            process.channel.resume_reading()
            output = await process.stdout.read()
            assert output.split()[-1] == b"600000"
            await process.wait()
            assert process.exit_status == 3

    run(main())


# -- with a shell between fork and exec, and without --------------------------------------------------

WHAT_IT_FINDS = """
import json, os, resource, signal, sys
print(json.dumps({
    "environment": dict(os.environ),
    "directory": os.getcwd(),
    "umask": os.umask(0),
    "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")},
    "leads": [os.getpid() == os.getsid(0), os.getpid() == os.getpgid(0)],
    "signals": [line.split() for line in open("/proc/self/status") if line.startswith("Sig") and "Sigq" not in line],
    "descriptors": sorted(os.listdir("/proc/self/fd")),
    "arguments": sys.argv,
}))
"""


def found(command: Command) -> dict[str, Any]:
    """What a program finds that is started so, beside its pid."""
    into, out_of = os.pipe()
    try:

        async def main() -> int:
            with open(os.devnull) as nothing:
                child = process.spawn(
                    command, stdin=nothing.fileno(), stdout=out_of, stderr=2, terminal=False
                )
            return (await child.ended).code

        assert run(main()) == 0
    finally:
        os.close(out_of)
    with open(into) as output:
        things: dict[str, Any] = json.load(output)
    return things


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """One that needs nothing between fork and exec."""
    monkeypatch.setattr(launch, "_inherited_nofile", None)
    home = tmp_path / "a home"
    home.mkdir()
    argv = ["/usr/bin/env", sys.executable, "-I", "-c", WHAT_IT_FINDS, "an argument", "$HOME"]
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    client_env = {"LC_ALL": b"C", "BYTES": b"\xff $(false) 'x'\n", "PATH": b"/bin", "OLDPWD": b"/"}
    return Command(argv, env, client_env, home_at_hand=True)


def test_a_program_finds_the_same_with_a_shell_in_between_and_without(plain: Command) -> None:
    through_a_shell = replace(plain, home_at_hand=False)
    assert launch.directly(plain) is not None
    assert launch.directly(through_a_shell) is None
    things = found(plain)
    assert things == found(through_a_shell)
    assert things["directory"] == things["environment"]["PWD"] == plain.env["HOME"]
    assert things["environment"]["PATH"] == "/bin"
    assert things["leads"] == [True, True]


@pytest.mark.parametrize(
    "needs",
    [
        lambda _: {"run_as": (0, 0)},
        lambda _: {"umask": "027"},
        lambda limit: {"rlimits": {"core": 0, "nofile": limit - 1}},
    ],
)
def test_what_only_a_shell_in_between_can_do_is_done(
    plain: Command, needs: Callable[[int], dict[str, Any]]
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert launch.directly(replace(plain, **needs(hard))) is None


def test_limits_that_are_in_force_already_need_no_shell(
    plain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_force = {resource.RLIMIT_CORE: (0, 0), resource.RLIMIT_NOFILE: (100, 200)}
    monkeypatch.setattr(resource, "getrlimit", in_force.__getitem__)
    assert launch.directly(replace(plain, rlimits={"core": 0})) is not None
    assert launch.directly(replace(plain, rlimits={"core": 0, "nofile": 200})) is None
    monkeypatch.setattr(launch, "_inherited_nofile", 100)
    assert launch.directly(plain) is not None
    monkeypatch.setattr(launch, "_inherited_nofile", 50)
    assert launch.directly(plain) is None


@pytest.mark.parametrize("near", [0, 1_000_000])
def test_programs_get_the_limit_of_open_files_that_the_server_was_started_with(
    plain: Command, monkeypatch: pytest.MonkeyPatch, near: int
) -> None:
    """Inherited for a moment, or set by the launcher where the server could need more in this moment."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(launch, "NEAR", near)
    shells = []
    through_a_shell = launch.through_a_shell

    def notes(*args: Any, **options: Any) -> launch.Way:
        shells.append(args)
        return through_a_shell(*args, **options)

    monkeypatch.setattr(process, "through_a_shell", notes)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
        launch.raise_nofile()
        assert found(plain)["limits"]["RLIMIT_NOFILE"] == [min(512, hard), hard]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert bool(shells) == bool(near)


def test_what_is_no_home_is_told_of(serve: Callable[..., Served], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(0o755)
    result = serve(home=str(file)).ssh("pwd")
    words = f"gosshd: cannot enter the home directory {file}, starting in /\n"
    assert result.stderr.decode().startswith(words)  # and bash, too, has something to say of it
    assert result.stdout == b"/\n"


def test_a_home_in_a_file_system_that_may_be_slow_is_entered_behind_exec(tmp_path: Path) -> None:
    """A vforked child that waits for one would keep the whole server waiting."""
    memory = Path("/dev/shm")
    if os.major(tmp_path.stat().st_dev) == 0 or not memory.is_dir():
        pytest.skip("needs a folder on a device, and one in memory")
    account = find_account(Config(), "somebody", {})
    assert account is not None
    assert run(prepare_home(replace(account, home=str(tmp_path)), terminal=False))
    assert not run(prepare_home(replace(account, home=str(tmp_path)), terminal=True))
    assert not run(prepare_home(replace(account, home=str(memory)), terminal=False))
    assert not run(prepare_home(replace(account, home=str(tmp_path / "gone")), terminal=False))
    assert not run(
        prepare_home(replace(account, home=str(tmp_path), run_as=(0, 0)), terminal=False)
    )


@pytest.mark.parametrize("shell", ["#!/bin/sh\n", "", "#!/gone\n"])
def test_a_shell_starts_with_and_without_a_terminal_or_not_at_all(
    serve: Callable[..., Served], tmp_path: Path, shell: str
) -> None:
    """A script without a first line is one for sh."""
    script = tmp_path / "shell"
    script.write_text(f"{shell}echo I am $0; exit 3\n")
    script.chmod(0o755)
    server = serve(shell=str(script), home=str(tmp_path))
    told = [server.ssh(*options, "HOST", "x") for options in ((), ("-tt",))]
    codes = {result.returncode for result in told}
    assert codes == ({127} if "gone" in shell else {3})
    assert all(b"I am" in result.stdout for result in told) == (codes == {3})


def test_a_home_that_vanishes_in_between_is_told_of_as_any_other(
    plain: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = replace(plain, env={**plain.env, "HOME": plain.env["HOME"] + "/gone"})
    assert launch.directly(gone) is not None
    assert found(gone)["directory"] == "/"
    assert "cannot enter the home directory" in capfd.readouterr().err


@pytest.mark.parametrize("written", ["{}/", "{}/x/../", "//{}", "{}/./y/../x/.."])
def test_a_home_is_entered_as_a_shell_would(plain: Command, written: str) -> None:
    home = plain.env["HOME"]
    Path(home, "x").mkdir()
    Path(home, "y").symlink_to("/usr/lib")
    odd = replace(plain, env={**plain.env, "HOME": written.format(home)})
    assert found(odd) == found(replace(odd, home_at_hand=False))
