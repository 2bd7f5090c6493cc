"""A person at a terminal: the real OpenSSH client under pexpect."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from contextlib import suppress

import pexpect
import pytest

from .serving import Served, alive, run, wait_for

PROMPT = r"[$#] "


def shell(server: Served, **kwargs):
    terminal = server.terminal(**kwargs)
    terminal.expect(PROMPT)
    assert b"job control" not in terminal.before
    assert b"process group" not in terminal.before
    terminal.sendline(
        "PS1='>''>' PS2=; unset PROMPT_COMMAND; bind 'set enable-bracketed-paste off'"
    )
    terminal.expect_exact(">>")
    return terminal


def ask(terminal, command: str) -> str:
    """Type a command; what it prints, without the echo."""
    terminal.sendline(command)
    terminal.expect_exact(">>")
    return terminal.before.decode().partition("\n")[2].strip().replace("\r", "")


def pid_of(terminal) -> int:
    return int(ask(terminal, "echo $$"))


def test_a_login_is_a_login_shell_on_a_terminal_of_the_right_size(server: Served) -> None:
    terminal = shell(server, dimensions=(33, 101))
    assert (
        ask(terminal, "shopt -q login_shell && tty && stty size")
        .split("\n")[0]
        .startswith("/dev/pts/")
    )
    assert ask(terminal, "stty size; echo $TERM") == "33 101\nxterm-256color"
    terminal.sendline("exit 7")
    terminal.expect(pexpect.EOF)
    assert terminal.wait() == 7


def test_the_size_is_right_before_the_first_line_of_the_program(server: Served) -> None:
    terminal = server.terminal("-tt", "HOST", "stty size; tty", dimensions=(41, 99))
    terminal.expect(pexpect.EOF)
    assert terminal.before.startswith(b"41 99\r\n/dev/pts/")


def test_the_shell_has_job_control(server: Served) -> None:
    terminal = shell(server)
    assert "m" in ask(terminal, "echo $-")
    assert ask(terminal, "ps -o tty=,tpgid=,pgid= -p $$").split()[0].startswith("pts/")
    terminal.sendline("sleep 100")
    wait_for("sleep in the foreground", lambda: foreground("sleep"))
    terminal.sendcontrol("z")
    terminal.expect("Stopped")
    terminal.expect_exact(">>")
    terminal.sendline("fg")
    terminal.expect("sleep 100")
    terminal.sendcontrol("c")
    terminal.expect_exact(">>")
    assert ask(terminal, "echo $?") == "130"
    terminal.sendline("sleep 100")
    wait_for("sleep in the foreground", lambda: foreground("sleep"))
    terminal.sendcontrol("\\")
    terminal.expect("Quit")
    terminal.expect_exact(">>")
    terminal.sendcontrol("d")
    terminal.expect(pexpect.EOF)
    terminal.close()


def foreground(name: str) -> bool:
    """Whether a process of that name (vi may be vim.tiny) is its terminal's foreground group."""
    table = subprocess.run(
        ["ps", "-eo", "comm=,pgid=,tpgid="], capture_output=True, text=True
    ).stdout
    return any(
        row.split()[0].startswith(name) and row.split()[1] == row.split()[2]
        for row in table.splitlines()
        if len(row.split()) == 3
    )


def test_the_terminal_is_the_controlling_terminal_of_what_is_started(serve) -> None:
    """Without bash's help, which would take a terminal by itself: /dev/tty is this very one."""
    server = serve(shell="/bin/sh")
    result = server.ssh("-tt", "HOST", "echo through /dev/tty > /dev/tty; ps -o tpgid=,pgid= -p $$")
    through, groups = result.stdout.decode().splitlines()
    assert through == "through /dev/tty"
    assert len(set(groups.split())) == 1


def test_the_environment_is_built_from_nothing(server: Served) -> None:
    result = server.ssh(
        "HOST", "env -0", user="some.one-1", LANG="de_DE.UTF-8", LC_ALL="C", LD_PRELOAD="x"
    )
    env = dict(item.split("=", 1) for item in result.stdout.decode().split("\0") if item)
    assert env["USER"] == env["LOGNAME"] == "some.one-1"
    assert env["HOME"] == env["PWD"] == "/tmp"
    assert env["SHELL"] == "/bin/bash"
    assert "/usr/bin" in env["PATH"]
    assert re.fullmatch(r"127\.0\.0\.1 \d+ 127\.0\.0\.1 " + str(server.port), env["SSH_CONNECTION"])
    assert re.fullmatch(r"127\.0\.0\.1 \d+ " + str(server.port), env["SSH_CLIENT"])
    allowed = set("HOME USER LOGNAME SHELL PATH LANG PWD SHLVL _ SSH_CONNECTION SSH_CLIENT".split())
    assert set(env) - allowed == set()


def test_the_terminal_is_named_and_the_clients_language_passes(server: Served) -> None:
    result = server.ssh(
        *("-tt", "-o", "SendEnv=LANG LC_* BASH_ENV SECRET", "HOST", 'echo "$SSH_TTY $(tty) $LANG $LC_TIME $BASH_ENV$SECRET"'),
        LANG="de_DE.UTF-8", LC_TIME="C.UTF-8", BASH_ENV="/etc/passwd", SECRET="s", TERM="vt220",
    )  # fmt: skip
    tty, same, *rest = result.stdout.decode().split()
    assert tty == same
    assert rest == ["de_DE.UTF-8", "C.UTF-8"]


def test_tty_modes_of_the_request_are_honoured(server: Served) -> None:
    terminal = server.terminal("-tt", "HOST", "stty -a", dimensions=(24, 80))
    terminal.expect(pexpect.EOF)
    default = terminal.before.decode()
    argv = server.ssh_argv("-tt", "HOST", "stty -a")
    command = "stty erase ^H kill ^X eof ^E -ixon iutf8 -echok; exec " + " ".join(
        f"'{word}'" for word in argv
    )
    terminal = pexpect.spawn(
        "/bin/sh", ["-c", command], env={"PATH": "/usr/bin:/bin", "TERM": "xterm", "HOME": "/tmp"}
    )
    terminal.expect(pexpect.EOF)
    changed = terminal.before.decode()
    for word in ("erase = ^H", "kill = ^X", "eof = ^E", "-ixon", " iutf8", "-echok"):
        assert word in changed, changed
    assert "erase = ^H" not in default
    assert " ixon" in default


def test_window_changes_arrive_at_once_and_10000_leave_the_last(server: Served) -> None:
    terminal = shell(server)
    terminal.sendline("trap 'stty size' WINCH; sleep 100")
    wait_for("sleep in the foreground", lambda: foreground("sleep"))
    for number in range(10_000):
        terminal.setwinsize(20 + number % 50, 100)
    terminal.setwinsize(44, 111)
    terminal.sendcontrol("c")
    terminal.expect_exact(">>")
    wait_for("the last size", lambda: "44 111" in ask(terminal, "stty size"))
    terminal.sendline("exit")
    terminal.expect(pexpect.EOF)
    terminal.close()


def test_window_change_passes_blocked_input(server: Served) -> None:
    """The program reads nothing: 200 KB of input are stuck, the window is not."""

    async def main() -> None:
        command = "stty raw -echo; trap 'stty size' WINCH; echo ready; while :; do sleep 0.01; done"
        async with await server.connect() as conn:
            process = await conn.create_process(command, term_type="xterm", encoding=None)
            await process.stdout.readuntil(b"ready\n")
            process.stdin.write(b"x" * 200_000)
            process.change_terminal_size(77, 55)
            assert await process.stdout.readuntil(b"\n") == b"55 77\n"
            process.close()

    run(main())


def test_a_paste_of_5_mib_blocks_nobody(server: Served) -> None:
    """The program does not read; a bystander does not notice, and the end is still clean."""
    bystander = shell(server)

    async def main() -> None:
        async with await server.connect() as conn:
            command = "stty raw -echo; echo ready; sleep 1000"
            process = await conn.create_process(command, term_type="xterm", encoding=None)
            await process.stdout.readuntil(b"ready\n")
            process.stdin.write(b"x" * 5 * 1024 * 1024)
            worst = 0.0
            for _ in range(40):
                worst = max(worst, await asyncio.to_thread(echo_time, bystander))
            assert worst < 0.25, worst
            process.close()  # while its input is still stuck

    run(main())


def echo_time(terminal) -> float:
    began = time.monotonic()
    terminal.send("a")
    terminal.expect_exact("a")
    return time.monotonic() - began


@pytest.mark.parametrize("command", ["yes", "vi", "cat", "sleep 1000"])
@pytest.mark.parametrize("sign", ["kill -9", "closed terminal"])
def test_a_shell_is_gone_within_a_second_of_its_client(
    server: Served, command: str, sign: str
) -> None:
    terminal = shell(server)
    pid = pid_of(terminal)
    terminal.sendline(command)
    wait_for(f"{command} in the foreground", lambda: foreground(command.split()[0]))
    terminal.kill(9 if sign == "kill -9" else 1)
    assert wait_for("the shell's end", lambda: not alive(pid)) < 1
    terminal.close()


def test_a_shell_that_ignores_hangup_is_killed(server: Served) -> None:
    terminal = shell(server)
    pid = pid_of(terminal)
    terminal.sendline("trap '' HUP; while :; do sleep 1; done")
    wait_for("sleep in the foreground", lambda: foreground("sleep"))
    terminal.kill(9)
    assert wait_for("the shell's end", lambda: not alive(pid)) < 6
    terminal.close()


def test_a_background_job_on_the_terminal_does_not_hold_the_session(server: Served) -> None:
    for job in ("sleep 5 &", "(while :; do echo noise; sleep 0.05; done) &", "yes &"):
        terminal = server.terminal("-tt", "HOST", f"trap '' HUP; {job} echo $!; exit 3")
        began = time.monotonic()
        terminal.expect(pexpect.EOF)
        assert time.monotonic() - began < 1.5  # one second, and the client's own start
        pid = int(re.search(rb"^(\d+)\r?$", terminal.before, re.MULTILINE)[1])
        assert terminal.wait() == 3
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_end_of_input_reaches_a_program_on_a_terminal_once(server: Served) -> None:
    """By its own VEOF character, even typed ahead of a shell that switches modes."""
    result = server.ssh("-tt", "HOST", "cat; echo first eof", stdin=b"line\n")
    assert result.stdout.endswith(b"line\r\nfirst eof\r\n")
    result = server.ssh("-tt", "HOST", stdin=b"echo from-the-$((40+2))\n")
    assert b"from-the-42" in result.stdout
    assert result.returncode == 0
    result = server.ssh("-tt", "HOST", "stty eof ^E; cat; echo done", stdin=b"x\n")
    assert result.stdout.endswith(b"done\r\n")


async def raw_terminal(server: Served, conn, command: str):
    """A program on a terminal in raw mode, ready to read."""
    command = f"stty raw -echo; echo ready; {command}"
    process = await conn.create_process(command, term_type="xterm", encoding=None)
    await process.stdout.readuntil(b"ready\n")
    return process


def test_a_raw_program_gets_veof_as_one_character_behind_its_input(server: Served) -> None:
    async def main() -> bytes:
        async with await server.connect() as conn:
            process = await raw_terminal(server, conn, "timeout 0.5 od -An -c -v -w1")
            process.stdin.write(b"ab")
            process.stdin.write_eof()
            return await process.stdout.read()

    assert run(main()).split() == [b"a", b"b", b"004"]


def test_bytes_that_are_not_utf8_pass_a_terminal_both_ways(server: Served) -> None:
    data = bytes(range(256))

    async def main() -> bytes:
        async with await server.connect() as conn:
            process = await raw_terminal(
                server, conn, "head -c 256 | od -An -v -tx1; printf '\\377\\376\\001'"
            )
            process.stdin.write(data)
            return await process.stdout.read()

    echoed, _, tail = run(main()).rpartition(b"\n")
    assert bytes.fromhex(echoed.decode()) == data
    assert tail == b"\377\376\001"


def test_tmux_vim_and_less_work(server: Served) -> None:
    terminal = shell(server, dimensions=(30, 90))
    terminal.sendline("vi -u NONE /tmp/gosshd-test-vi")
    terminal.expect(r"gosshd-test-vi")
    terminal.send("ihello\x1b:wq\r")
    terminal.expect_exact(">>")
    assert ask(terminal, "cat /tmp/gosshd-test-vi; rm /tmp/gosshd-test-vi") == "hello"
    terminal.sendline("seq 500 | less")
    terminal.expect("29\r\n")
    terminal.send("G")
    terminal.expect("500")
    terminal.send("q")
    terminal.expect_exact(">>")
    terminal.sendline("tmux -L gosshd-test -f /dev/null new 'stty size; echo in''side; sleep 0.5'")
    terminal.expect("inside")
    terminal.expect_exact(">>")
    terminal.sendline("exit")
    terminal.expect(pexpect.EOF)
    terminal.close()


def test_a_client_that_leaves_types_no_end_of_file(server: Served) -> None:
    """It is a hang-up, as when a terminal's window is closed: a shell ends by it and takes its jobs along."""

    async def main() -> None:
        conn = await server.connect()
        process = await conn.create_process(term_type="xterm", encoding=None)
        process.stdin.write(b"PS1=; sleep 1234 & echo job $! .\n")
        job = int((await process.stdout.readuntil(re.compile(rb"job \d+ \."))).split()[-2])
        conn.close()
        await conn.wait_closed()
        await asyncio.to_thread(wait_for, "the job's end", lambda: not alive(job))

    run(main())
    assert server.events("session over")[-1]["exit"] == "signal HUP"
