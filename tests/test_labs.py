"""The exercises: each fault shows its symptom, the real server does not, and both are told apart."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from gosshd_py.labs.cli import MAX_CODE, code_of
from gosshd_py.labs.compare import side_by_side
from gosshd_py.labs.exercises import EXERCISES
from gosshd_py.labs.faults import FAULTS, fault
from gosshd_py.lifecycle import EVENTS

from .serving import ROOT, alive, wait_for
from .test_cli import gosshd_once


def test_the_exercises_are_those_that_there_are_faults_for() -> None:
    assert set(EXERCISES) == set(FAULTS) == {
        *("lost-output", "leaked-master", "no-controlling-tty", "zombie", "missing-exit-status"),
        *("blocking-write", "fd-reuse", "eof-is-close"),
    }  # fmt: skip


MISSING = {
    "lost-output": ["- #1.0 output.ended why EOF, stdout"],
    "leaked-master": ["- #1.0 fd.closed master", "- #1.0 program.reaped"],
    "no-controlling-tty": ["(foreground: none)"],
    "zombie": ["- #1.0 program.reaped"],
    "missing-exit-status": ["- #1.0 exit.sent status 3"],
    "blocking-write": ["- #1.0 input.paused stdin", "s in which nothing happens"],
    "fd-reuse": [],
    "eof-is-close": ["cause.named cause client closed"],
}
"""What the two traces side by side must show."""


@pytest.mark.parametrize("name", EXERCISES)
def test_a_fault_shows_its_symptom_and_the_real_server_does_not(tmp_path: Path, name: str) -> None:
    result = gosshd_once(tmp_path, "labs", name, "--check", COLUMNS="200")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("as expected\n")
    assert f"{name}: {EXERCISES[name].promise}" in result.stdout
    assert "as it should be" in result.stdout
    for words in MISSING[name]:
        assert words in result.stdout
    assert re.search(r"The code that keeps the promise \(gosshd_py/\w+\.py:\d+\)", result.stdout)
    assert re.search(r"the code that does not \(gosshd_py/labs/faults\.py:\d+\)", result.stdout)
    assert "\x1b" not in result.stdout
    for event in re.findall(r"\b([a-z]+\.[a-z_]+)\b", EXERCISES[name].look_for):
        assert event in EVENTS


def test_a_check_that_sees_no_symptom_fails(tmp_path: Path) -> None:
    """It is no check that cannot fail: with the fault taken away it says so, and exits 1."""
    script = (
        "import sys; from unittest import mock; from gosshd_py import cli; from gosshd_py.labs import cli as labs\n"
        "real = labs.lab\n"
        "labs.lab = lambda fault: real('')\n"
        "sys.argv = ['gosshd', 'labs', 'missing-exit-status', '--check']; cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)  # fmt: skip
    assert result.returncode == 1
    assert result.stdout.endswith("NOT as expected\n")


@pytest.mark.parametrize("name", EXERCISES)
def test_the_code_that_makes_the_difference_is_short(name: str) -> None:
    for part in (EXERCISES[name].right, EXERCISES[name].wrong):
        _, _, source = code_of(part)
        assert len(source.splitlines()) < MAX_CODE + 1
        assert source.lstrip().startswith(("async def ", "def "))
    assert len(code_of(EXERCISES[name].wrong)[2].splitlines()) <= 14


def test_faults_stay_in_their_room() -> None:
    """Nothing else imports them, and the parts are the real ones again afterwards."""
    for path in (ROOT / "gosshd_py").glob("*.py"):
        assert "labs" not in path.read_text() or path.name == "cli.py", path
    module, part, wrong = FAULTS["zombie"]
    with fault("zombie"):
        assert getattr(module, part) is wrong
    assert getattr(module, part) is not wrong


def test_the_list(tmp_path: Path) -> None:
    out = gosshd_once(tmp_path, "labs", COLUMNS="120").stdout
    for exercise in EXERCISES.values():
        assert re.search(
            rf"^{exercise.name}\s+{re.escape(exercise.promise)}\s*$", out, re.MULTILINE
        )
    wrong = gosshd_once(tmp_path, "labs", "lost-outptu")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("gosshd: error: there is no exercise lost-outptu; there are ")
    piped = gosshd_once(tmp_path, "labs", "zombie")
    assert piped.returncode == 1
    assert (
        piped.stderr
        == "gosshd: error: the exercises want a terminal; use --check to do them unattended\n"
    )
    no_ssh = gosshd_once(tmp_path, "labs", "zombie", "--check", PATH=str(tmp_path))
    assert (
        no_ssh.stderr
        == "gosshd: error: the exercises are done with the OpenSSH client; install openssh-client\n"
    )


def test_a_guided_exercise_from_its_story_to_the_comparison(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm-256color"}
    argv = ["-m", "gosshd_py", "labs", "missing-exit-status"]
    guide = pexpect.spawn(
        sys.executable, argv, cwd=str(ROOT), env=env, timeout=20, dimensions=(50, 160)
    )
    guide.expect("A client learns how its command ended")
    guide.expect("The broken server")
    guide.expect(r"(ssh -F \S+/config lab exit 3); echo \$\?")
    command = re.sub(rb"\x1b\[[0-9;]*m", b"", guide.match[1]).decode().split()
    guide.expect("Look for: ")
    guide.expect("Enter goes on")
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=10).returncode == 255
    guide.expect("eof.sent")
    guide.expect("close.sent")
    guide.sendline()
    guide.expect("The same, as it should be")
    guide.expect(r"(ssh -F \S+/config lab exit 3); echo")
    command = re.sub(rb"\x1b\[[0-9;]*m", b"", guide.match[1]).decode().split()
    guide.expect("Enter goes on")
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=10).returncode == 3
    guide.expect("exit.sent")
    guide.expect("tcp.closed")
    guide.sendline()
    guide.expect("as it should be.*broken")
    guide.expect("- #1.0 exit.sent status 3")
    guide.expect("_say_goodbye")
    guide.expect(pexpect.EOF)
    guide.close()
    assert guide.exitstatus == 0
    assert not Path(command[2]).exists()  # its folder has gone


@pytest.mark.parametrize("by", ["^C", "SIGTERM", "SIGHUP"])
def test_an_exercise_that_is_broken_off_leaves_nothing(tmp_path: Path, by: str) -> None:
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TERM": "xterm",
        "TMPDIR": str(tmp_path),
    }
    guide = pexpect.spawn(sys.executable, ["-m", "gosshd_py", "labs", "zombie"], cwd=str(ROOT), env=env, timeout=20, dimensions=(50, 160))  # fmt: skip
    guide.expect(r"--ppid (\d+)")
    pid = int(guide.match[1])
    guide.expect("Enter goes on")
    assert alive(pid)
    if by == "^C":
        guide.sendcontrol("c")
    else:
        guide.kill(getattr(signal, by))
    guide.expect(pexpect.EOF)
    guide.close()
    wait_for("the server's end", lambda: not alive(pid))
    assert guide.exitstatus != 0
    assert not list(tmp_path.glob("gosshd-lab*"))
    assert b"Traceback" not in guide.before


def test_traces_are_compared_line_by_line() -> None:
    def record(
        event: str, us: int = 0, channel: int | None = 0, **facts: object
    ) -> dict[str, object]:
        return {"event": event, "us": us, "connection": 1, "channel": channel, "facts": facts}

    right = [record("kex.started"), record("output.read", bytes=5), record("output.read", bytes=7), record("eof.sent"), record("exit.sent", status=3), record("close.sent")]  # fmt: skip
    wrong = [record("output.read", bytes=12), record("eof.sent"), record("close.sent", 2_000_000)]
    assert list(side_by_side(right, wrong)) == [
        ("#1.0 output.read 12 bytes", "#1.0 output.read 12 bytes", True),
        ("#1.0 eof.sent", "#1.0 eof.sent", True),
        ("#1.0 exit.sent status 3", "… 2.0 s in which nothing happens", False),
        ("#1.0 close.sent", "#1.0 close.sent", True),
    ]
