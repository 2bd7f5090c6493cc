"""The exercises: what is promised, how it breaks, what to type, what to look for, and how to check it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..channel import Channel
from ..flow import Flow
from ..launch import launcher
from ..process import Child, Descriptor
from ..pty import PtyProgram
from ..session import _drained
from . import faults
from .lab import Lab


@dataclass(frozen=True)
class Exercise:
    """One promise that is broken on purpose."""

    name: str
    promise: str
    story: str
    type: tuple[str, ...]
    """Commands; {ssh} is the client, the host is called lab."""
    symptom: str
    look_for: str
    right: Any
    """The code that keeps the promise, to be shown."""
    wrong: Any
    probe: Callable[[Lab], str]
    """Does what is to be typed, and tells in a line what came of it."""
    good: Callable[[str], bool]
    """Whether what came of it is what is promised."""


def _lost_output(lab: Lab) -> str:
    seen = lab.run("{ssh} lab 'head -c 2260000 /dev/zero' | (sleep 1; wc -c)").stdout.strip()
    return f"{seen or 0} of 2260000 bytes"


def _leaked_master(lab: Lab) -> str:
    client = lab.start("-tt", "echo $$; exec sleep 1000")
    assert client.stdout is not None  # noqa: S101
    pid = int(client.stdout.readline())
    client.kill()
    client.communicate()
    gone = lab.wait_for(lambda: not Path(f"/proc/{pid}").exists(), 2)
    return f"the program {'ended with its client' if gone else 'lives on without its client'}"


def _no_controlling_tty(lab: Lab) -> str:
    seen = lab.run("{ssh} -tt lab 'tty > /dev/null && echo to my terminal > /dev/tty'")
    return (seen.stdout + seen.stderr).strip().rpartition(": ")[2].strip()


def _zombie(lab: Lab) -> str:
    for _ in range(3):
        lab.run("{ssh} lab true")

    def zombies() -> int:
        children = Path(f"/proc/{lab.pid}/task/{lab.pid}/children").read_text().split()
        return sum(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z" for pid in children)  # fmt: skip

    lab.wait_for(lambda: not zombies(), 1)
    return f"{zombies()} zombies after 3 commands"


def _missing_exit_status(lab: Lab) -> str:
    return f"exit status {lab.run('{ssh} lab exit 3').returncode}"


def _blocking_write(lab: Lab) -> str:
    busy = lab.start("sleep 2; cat > /dev/null")
    assert busy.stdin is not None  # noqa: S101
    os.set_blocking(busy.stdin.fileno(), False)
    lab.wait_for(lambda: any(found["event"] == "program.spawned" for found in lab.records()))
    os.write(busy.stdin.fileno(), b"x" * 65536)
    os.set_blocking(busy.stdin.fileno(), True)
    os.write(busy.stdin.fileno(), b"x" * 65536)
    began = time.monotonic()
    lab.run("{ssh} lab true")
    took = time.monotonic() - began
    busy.kill()
    busy.communicate()
    return f"another client waited {'more' if took > 1 else 'less'} than a second"


def _fd_reuse(lab: Lab) -> str:
    lab.run("{ssh} -tt lab true")
    seen = lab.run("{ssh} -tt lab 'sleep 0.6; echo survived'").stdout.strip()
    return f"the second session {'survived' if 'survived' in seen else 'was closed by the first'}"


def _eof_is_close(lab: Lab) -> str:
    seen = lab.run("echo question | {ssh} lab 'cat > /dev/null; sleep 0.5; echo answer'").stdout
    return f"the answer {'came' if 'answer' in seen else 'did not come'}"


EXERCISES = {
    exercise.name: exercise
    for exercise in (
        Exercise(
            "lost-output",
            "All that a program wrote arrives, even what it wrote right before its end.",
            "A program may write 64 KiB into a pipe, and exit, before anybody has read a byte of it. Whoever takes "
            "the program's end for the end of its output, and closes, throws that away: the logs of a build lose "
            "their last lines, and only when the network is slow.",
            ("{ssh} lab 'head -c 2260000 /dev/zero' | (sleep 1; wc -c)",),
            "Fewer bytes arrive than were written. The exit status is 0 all the same. (The client reads nothing for a "
            "second, so its window is full and the last bytes wait in the pipe when the program ends.)",
            "In the right trace output.ended (EOF: the last writer is gone) comes before the state hanging up; in the "
            "wrong one the bytes of the last output.read and data.sent are missing.",
            _drained,
            faults.EndsWithItsProgram.read,
            _lost_output,
            lambda seen: seen == "2260000 of 2260000 bytes",
        ),
        Exercise(
            "leaked-master",
            "A shell ends with its client.",
            "A shell on a terminal is told of its client's end by the kernel: when the last descriptor of the master "
            "is closed, the terminal hangs up, and the leader of the session and what runs in the foreground get SIGHUP. A server that keeps the master open, if "
            "only by forgetting it, keeps the shell, its terminal and a descriptor for ever.",
            ("{ssh} -tt lab 'echo $$; exec sleep 1000'     # then kill it by ~.", "ps -o pid,stat,tty,args -C sleep"),
            "The client has gone, and its program still runs; each such session costs a pty and a descriptor.",
            "fd.closed (master) and program.reaped are missing in the wrong trace: the state goes on to closed, and "
            "session.ended has no exit status.",
            PtyProgram.aclose,
            faults.LeaksItsMaster.aclose,
            _leaked_master,
            lambda seen: seen == "the program ended with its client",
        ),
        Exercise(
            "no-controlling-tty",
            "The terminal is the session's controlling terminal: ^C, job control and /dev/tty work.",
            "Three descriptors that lead to a terminal do not make it the terminal of a session. Only the one that a "
            "session leader without a controlling terminal opens becomes that (credentials(7)). Without it bash says "
            "'cannot set terminal process group', and ^C is just a character.",
            ("{ssh} -t lab", "echo hello > /dev/tty     # in it, and then: sleep 100, and ^C"),
            "No such device or address; ^C interrupts nothing.",
            "While the program runs, foreground is its process group in the right trace, and 0 in the wrong one: there "
            "is nobody whom the kernel could send SIGINT or SIGWINCH. (When the program has ended, it is 0 in both.)",
            launcher,
            faults.without_terminal,
            _no_controlling_tty,
            lambda seen: seen == "to my terminal",
        ),
        Exercise(
            "zombie",
            "A child that has ended is reaped at once.",
            "The kernel keeps the exit status of a process until its parent asks for it. Who never asks collects "
            "zombies: they cost no memory, but each keeps its number, and one day no process can be started.",
            ("for n in 1 2 3; do {ssh} lab true; done", "ps -o pid,stat,args --ppid SERVER     # the pid in the first line"),
            "ps shows Z, <defunct>, once for each command.",
            "program.reaped is missing in the wrong trace, and nothing else: everything seems to work.",
            Child._reap,  # noqa: SLF001  # to be shown
            faults.NeverReaps._reap,  # noqa: SLF001
            _zombie,
            lambda seen: seen == "0 zombies after 3 commands",
        ),
        Exercise(
            "missing-exit-status",
            "A client learns how its command ended.",
            "EOF says that no more output comes, CLOSE that the channel is done. How the program ended is said by "
            "neither: that is the request exit-status (RFC 4254 §6.10), and a client that does not get it must think "
            "that something broke. scp, rsync, git and every script with && rely on it.",
            ("{ssh} lab exit 3; echo $?",),
            "255, which is what ssh says when it does not know.",
            "exit.sent is missing between eof.sent and close.sent.",
            Channel._say_goodbye,  # noqa: SLF001
            faults.SaysNoStatus._say_goodbye,  # noqa: SLF001
            _missing_exit_status,
            lambda seen: seen == "exit status 3",
        ),
        Exercise(
            "blocking-write",
            "A program that does not read keeps nobody else waiting.",
            "A pipe holds 64 KiB, a terminal 4. When it is full, write(2) waits until the program reads; on an event "
            "loop everybody waits with it. A large paste into a program that is busy stops the whole classroom.",
            ("head -c 1000000 /dev/zero | {ssh} lab 'sleep 9; cat > /dev/null' &", "sleep 2; time {ssh} lab true"),
            "The second command takes as long as the first program sleeps.",
            "In the right trace input.paused tells that the program does not read, and events of other connections "
            "go on; in the wrong one nothing at all happens anywhere, until it reads.",
            Descriptor.write,
            faults.BlocksInWrite.write,
            _blocking_write,
            lambda seen: seen == "another client waited less than a second",
        ),
        Exercise(
            "fd-reuse",
            "A descriptor is closed once.",
            "The number of a closed descriptor is given to whoever opens something next. A second close of the same "
            "number, 'to be sure', closes somebody else's file: another client's terminal, and the error shows "
            "up there, later, and not every time.",
            ("{ssh} -tt lab true; {ssh} -tt lab 'sleep 0.6; echo survived'",),
            "The second session dies for no reason of its own.",
            "The second connection gets the number that the first one's master had; then its program is hung up on "
            "(or its connection ends) though nothing has closed anything: there is no fd.closed before.",
            Descriptor.close,
            faults.ClosesTwice.close,
            _fd_reuse,
            lambda seen: seen == "the second session survived",
        ),
        Exercise(
            "eof-is-close",
            "A client that has said all that it had to say can still listen.",
            "EOF on a channel is a half-close (RFC 4254 §5.3): one direction ends. `echo question | ssh host program` "
            "sends it at once, and waits for the answer. A server that takes it for the end hangs up on the program "
            "before it has answered.",
            ("echo question | {ssh} lab 'cat > /dev/null; sleep 1; echo answer'",),
            "Nothing is printed.",
            "In the right trace eof.received leads to input ended, and the program runs on; in the wrong one the "
            "cause is 'client closed', though the client has closed nothing.",
            Flow.eof_received,
            faults.TakesEofForGoodbye.eof_received,
            _eof_is_close,
            lambda seen: seen == "the answer came",
        ),
    )
}  # fmt: skip
