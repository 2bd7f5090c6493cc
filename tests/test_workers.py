"""Several processes on one port: as one server to its clients, to signals, and to its limits."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pexpect
import pytest

from gosshd_py.config import Address, Config
from gosshd_py.counts import Counts, SharedCounts, SharedTimes, Times
from gosshd_py.limits import Penalties
from gosshd_py.listen import ListenError, claim, open_sockets
from gosshd_py.workers import MAX_FAILURES, Supervisor, Worker

from .keys import PASSWORD, hashed
from .serving import ROOT, wait_for
from .test_cli import Gosshd, Start, errors, gosshd_once, start  # noqa: F401
from .test_limits import connect, guess, read_all

Several = Callable[..., Gosshd]


@pytest.fixture
def several(start: Start, tmp_path: Path) -> Iterator[Several]:
    """A server of two workers, with settings in a file."""

    def start_it(*args: str, settings: str = "", count: str = "2") -> Gosshd:
        file = tmp_path / "lab.toml"
        file.write_text(f'listen = ["127.0.0.1:0"]\nlog_format = "json"\nhome = "/tmp"\n{settings}')
        return start("--config", file, "--workers", count, *args).wait_until_ready()

    yield start_it


def workers(it: Gosshd) -> set[int]:
    """The pids of its workers."""
    children = Path(f"/proc/{it.process.pid}/task/{it.process.pid}/children").read_text()
    return {int(pid) for pid in children.split()}


def whose(it: Gosshd) -> int:
    """The pid of the worker that serves a new connection."""
    return int(it.ssh("HOST", "echo $PPID").stdout)


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_both_serve_and_a_killed_one_is_replaced(several: Several) -> None:
    it = several()
    before = workers(it)
    served: set[int] = set()
    for _ in range(40):  # the kernel chooses by the client's port
        served.add(whose(it))
        if len(served) == 2:
            break
    assert served == before
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    wait_for("another worker", lambda: len(workers(it) - {victim}) == 2)
    assert before - {victim} < workers(it)  # the other one is still the same
    (event,) = it.events("worker ended")
    assert (event["exit"], event["pid"]) == (-signal.SIGKILL, victim)
    new = (workers(it) - before).pop()
    wait_for("its service", lambda: whose(it) == new)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_of_them_and_their_sessions(several: Several, number: int) -> None:
    it = several()
    terminals = [it.terminal("-tt") for _ in range(4)]
    for terminal in terminals:
        terminal.sendline("echo rea''dy")
        terminal.expect("ready")
    pids = workers(it)
    assert it.stop(number) == 0
    for terminal in terminals:
        terminal.expect("the server is shutting down")
    assert all(gone(pid) for pid in pids)
    assert {event["worker"] for event in it.events("shutting down")} == {0, 1}


def test_a_supervisor_that_is_killed_takes_its_workers_along(several: Several) -> None:
    it = several()
    pids = workers(it)
    terminal = it.terminal("-tt")
    terminal.sendline("echo rea''dy")
    terminal.expect("ready")
    it.process.kill()
    terminal.expect("the server is shutting down")
    wait_for("their end", lambda: all(gone(pid) for pid in pids))


def test_a_reload_reaches_all_of_them(several: Several, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    it = several(settings=f'pid_file = "{pid_file}"\n')
    wait_for("its pid", pid_file.exists)
    file = tmp_path / "lab.toml"
    file.write_text(file.read_text() + "max_connections = 1\nworkers = 5\n")
    gosshd_once(tmp_path, "reload", "--config", file)
    wait_for("the reload", lambda: len(it.events("reloaded")) == 2)
    assert {event["worker"] for event in it.events("reloaded")} == {0, 1}
    assert len(workers(it)) == 2


def test_a_second_server_does_not_get_a_share_of_the_port(several: Several, tmp_path: Path) -> None:
    it = several()
    for more in ((), ("--workers", "3")):
        (line,) = errors(gosshd_once(tmp_path, "--listen", f"127.0.0.1:{it.port}", *more), 1)
        assert "Address already in use" in line


def test_limits_are_those_of_all_together(several: Several) -> None:
    it = several(settings="max_connections = 6\nmax_startups = 6\ntotal_max_sessions = 3\n")
    with ExitStack() as stack:
        for _ in range(6):
            sock = stack.enter_context(connect(it))
            assert sock.recv(100).startswith(b"SSH-2.0-")
        for _ in range(10):  # whichever it is that answers
            sock = stack.enter_context(connect(it))
            assert b"too many connections wait for a login" in read_all(sock)
    wait_for("their end", lambda: it.ssh("HOST", "true").returncode == 0)
    running = [it.terminal("-tt", "HOST", "echo rea''dy; sleep 60") for _ in range(3)]
    for terminal in running:
        terminal.expect("ready")
    for _ in range(8):
        refused = it.ssh("HOST", "true")
        assert refused.returncode != 0
    assert len(it.events("limit hit", limit="total_max_sessions")) == 8
    for terminal in running:
        terminal.close()
    wait_for("their end", lambda: it.ssh("HOST", "true").returncode == 0)


def test_what_a_dead_worker_has_counted_counts_no_more(several: Several) -> None:
    it = several(settings="max_connections = 5\n")
    with ExitStack() as stack:
        for _ in range(5):
            sock = stack.enter_context(connect(it))
            assert sock.recv(100).startswith(b"SSH-2.0-")
        with connect(it) as sock:
            assert b"too many connections" in read_all(sock)
        old = workers(it)
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        wait_for("others", lambda: len(workers(it)) == 2 and not workers(it) & old)
        wait_for("their service", lambda: it.ssh("HOST", "true").returncode == 0)


def test_a_penalty_is_everybodys(several: Several) -> None:
    account = f'[accounts.alice]\npassword = "{hashed()}"\n'
    it = several(settings=f"authfail_penalty = 20\nlogin_grace_time = 60\n{account}")
    line = it.known_hosts.read_text()
    it.known_hosts.write_text(line + line.replace("localhost", "127.0.0.1"))
    refused = "too many failed or unfinished logins from your address; try again in"
    wait_for("the penalty", lambda: refused in guess(it, "wrong"), 20)
    for _ in range(10):
        assert refused in guess(it, PASSWORD)
    assert guess(it, PASSWORD, source="127.0.0.3") == "in"


def test_connections_have_numbers_of_their_own_in_a_trace(several: Several, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    it = several("--trace-file", str(trace))
    for _ in range(6):
        it.ssh("HOST", "true")
    for pid in workers(it):
        os.kill(pid, signal.SIGKILL)
    wait_for("others", lambda: it.ssh("HOST", "true").returncode == 0)
    for _ in range(6):
        it.ssh("HOST", "true")
    it.stop()
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    accepted = [event for event in events if event["event"] == "tcp.accepted"]
    numbers = [event["connection"] for event in accepted]
    assert len(numbers) >= 13
    assert len(set(numbers)) == len(numbers)
    assert len({event["pid"] for event in accepted}) >= 3


@pytest.mark.parametrize("refused", ["nonsense", "rlimits = {core = 4096}\n"])
def test_a_worker_that_starts_later_lives_by_the_reloaded_configuration(
    several: Several, tmp_path: Path, refused: str
) -> None:
    """Or whoever was locked out could come in again behind a crash."""
    alice, bob = (f'[accounts.{name}]\npassword = "{hashed()}"\n' for name in ("alice", "bob"))
    it = several(settings=alice + bob)
    line = it.known_hosts.read_text()
    it.known_hosts.write_text(line + line.replace("localhost", "127.0.0.1"))
    assert guess(it, PASSWORD) == "in"
    file = tmp_path / "lab.toml"
    whole = file.read_text()
    file.write_text(whole.replace(alice, ""))
    it.process.send_signal(signal.SIGHUP)
    wait_for("the reload", lambda: len(it.events("reloaded")) == 2)
    # Nobody takes this, and those that start later do not, either.
    file.write_text(refused + whole)
    it.process.send_signal(signal.SIGHUP)
    wait_for("the refusal", lambda: len(it.events("not reloaded")) == 2)
    old = workers(it)
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_for("others", lambda: len(workers(it)) == 2 and not workers(it) & old)
    wait_for("their service", lambda: listening(it))
    for source in range(3, 9):
        assert "Permission denied" in guess(it, PASSWORD, source=f"127.0.0.{source}")


def listening(it: Gosshd) -> bool:
    try:
        with connect(it) as sock:
            return sock.recv(4) == b"SSH-"
    except OSError:
        return False


def test_a_worker_that_cannot_start_again_is_tried_again_and_disturbs_nobody(
    several: Several, tmp_path: Path
) -> None:
    hostkeys = tmp_path / "keys"
    it = several("--hostkeys", str(hostkeys))
    terminal = it.terminal("-tt")
    terminal.sendline("echo pid $PPID.")
    terminal.expect(r"pid (\d+)\.")
    (victim,) = workers(it) - {int(terminal.match[1])}
    hostkeys.rename(tmp_path / "away")
    hostkeys.write_text("no folder")
    os.kill(victim, signal.SIGKILL)
    wait_for("some tries", lambda: len(it.events("worker ended")) >= MAX_FAILURES + 1)
    terminal.sendline("echo still he''re")
    terminal.expect("still here")
    hostkeys.unlink()
    (tmp_path / "away").rename(hostkeys)
    wait_for("both", lambda: len({whose(it) for _ in range(8)}) == 2, 30)
    terminal.sendline("exit 7")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 7


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_child_that_is_no_worker_is_nobodys_business(tmp_path: Path, workers: str) -> None:
    """Of the shell that became the server, or an orphan where the server is process 1."""
    settings = f"--listen 127.0.0.1:0 --hostkeys {tmp_path}/k --pid-file '' --workers {workers}"
    argv = ["sh", "-c", f"sleep 0.3 & exec {sys.executable} -m gosshd_py {settings}"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=file)
    try:
        assert server.stdout.readline().startswith(b"listening")
        time.sleep(0.5)
        assert server.poll() is None, log.read_text()
        server.terminate()
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("count", ["1", "2"])
def test_signals_that_come_too_late_do_not_spoil_the_status(several: Several, count: str) -> None:
    it = several(count=count)
    assert it.ssh("HOST", "true").returncode == 0
    while it.process.poll() is None:
        it.process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    assert it.process.returncode == 0


def test_what_no_worker_can_write_is_one_line_of_each(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = gosshd_once(tmp_path, "--workers", "2", "--listen", "127.0.0.1:0", "--trace-file", f"{tmp_path}/pipe")  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No such device or address" in done.stderr


def test_two_supervisors_do_not_share_a_port_before_anybody_listens() -> None:
    config = Config(listen=("127.0.0.1:0",))
    (first,) = open_sockets(config, hold=True)
    address = Address(*first.getsockname())
    claimed = claim([address])
    with pytest.raises(ListenError, match="another server uses it"):
        claim([address])
    for sock in claimed:
        sock.close()
    for sock in (*claim([address]), first):
        sock.close()


def test_auto_is_one_for_each_processor(several: Several) -> None:
    it = several(count="auto")
    count = len(os.sched_getaffinity(0))
    assert len(workers(it)) == (count if count > 1 else 0)


@pytest.mark.parametrize("given", ["0", "two", "1.5", "-1", "257"])
def test_what_is_no_number_of_workers(given: str, tmp_path: Path) -> None:
    (line,) = errors(gosshd_once(tmp_path, f"--workers={given}"), 2)
    assert line.startswith("--workers: expected a whole number")


def test_a_port_in_use_is_one_error_and_not_one_of_each(several: Several, tmp_path: Path) -> None:
    it = several()
    (line,) = errors(gosshd_once(tmp_path, "--listen", f"127.0.0.1:{it.port}", "--workers", "4"), 1)
    assert str(it.port) in line


# -- the parts, without a server --------------------------------------------------------------------


def supervise(serve: Callable[[Worker], int], tell: Path | None = None) -> int | None:
    """Run a supervisor in a process of its own; returns its exit status."""

    def run() -> None:
        ready = (lambda: tell.write_text("ready")) if tell else (lambda: 0)
        os._exit(Supervisor(2, (Address("127.0.0.1", 1),), serve).run(lambda: (ready(), None)[1]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(20)
    return process.exitcode


def test_workers_that_never_start_are_given_up(tmp_path: Path) -> None:
    tried = tmp_path / "tried"

    def fail(_: Worker) -> int:
        with tried.open("a") as file:
            file.write("x")
        return 3

    assert supervise(fail, tmp_path / "ready") == 1
    assert MAX_FAILURES <= len(tried.read_text()) <= 2 * MAX_FAILURES
    assert not (tmp_path / "ready").exists()


def test_a_fork_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork, refusals = os.fork, iter([OSError(errno.EAGAIN, "no more processes")])

    def failing() -> int:
        for refusal in refusals:
            raise refusal
        return fork()

    def serve(worker: Worker) -> int:
        worker.ready()
        (tmp_path / f"{worker.number}").touch()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if worker.number:
            time.sleep(1)
            os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()
        return 0

    def run() -> None:
        monkeypatch.setattr(os, "fork", failing)
        os._exit(Supervisor(2, (), serve).run(lambda: None))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert (tmp_path / "0").exists()


def test_a_signal_that_comes_while_a_worker_starts_is_not_lost(tmp_path: Path) -> None:
    """It waits until the worker has handlers."""

    def slowly(worker: Worker) -> int:
        if worker.number == 0:
            time.sleep(0.2)  # both have been forked
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.5)  # as for imports: no handler yet
        ended: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        (tmp_path / f"{worker.number}").write_text(str(len(ended)))
        return 0

    assert supervise(slowly) == 0
    assert [(tmp_path / name).read_text() for name in "01"] == ["1", "1"]


def test_ready_means_all_of_them(tmp_path: Path) -> None:
    order = tmp_path / "order"

    def serve(worker: Worker) -> int:
        time.sleep(0.1 + 0.3 * worker.number)
        if worker.number:
            with order.open("a") as file:
                file.write("last ")
        worker.ready()
        time.sleep(1)
        os.kill(os.getppid(), signal.SIGTERM)
        return 0

    def run() -> None:
        def ready() -> None:
            with order.open("a") as file:
                file.write("announced ")

        os._exit(Supervisor(2, (), serve).run(ready))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(20)
    assert order.read_text() == "last announced "


def in_another(count: SharedCounts | SharedTimes, number: int, do: Callable[[], None]) -> None:
    def run() -> None:
        count.mine(number)
        do()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(10)
    assert process.exitcode == 0


@pytest.mark.parametrize("make", [Counts, lambda: SharedCounts(1)])
def test_counts_go_up_and_down(make: Callable[[], Counts]) -> None:
    count = make()
    for name in ("a", "b", "a"):
        count.add(name)
    assert (count.of("a"), count.of("b"), count.of("c"), count.total()) == (2, 1, 0, 3)
    count.remove("a")
    count.remove("b")
    assert (count.of("a"), count.of("b"), count.total()) == (1, 0, 1)


def test_shared_counts_are_sums_and_a_new_worker_begins_at_nothing() -> None:
    count = SharedCounts(2)
    count.mine(0)
    count.add("a")

    def count_two() -> None:
        count.add("a")
        count.add("b")

    in_another(count, 1, count_two)
    assert (count.of("a"), count.of("b"), count.total()) == (2, 1, 3)
    in_another(count, 1, lambda: None)
    assert (count.of("a"), count.of("b"), count.total()) == (1, 0, 1)


def test_a_penalty_outlives_the_worker_that_gave_it() -> None:
    times, config = SharedTimes(2), Config()
    times.mine(0)
    in_another(times, 1, lambda: Penalties(times).add(config, "10.0.0.1", 20))
    in_another(times, 1, lambda: None)
    assert 15 < Penalties(times).seconds_left(config, "10.0.0.1") <= 20
    Penalties(times).add(config, "10.0.0.1", 20)  # they add up, whoever counts
    assert 35 < Penalties(times).seconds_left(config, "10.0.0.1") <= 40
    assert Penalties(times).seconds_left(config, "10.0.0.2") == 0


@pytest.mark.parametrize("make", [Times, lambda: SharedTimes(2)])
def test_times_pass(make: Callable[[], Times]) -> None:
    times = make()
    times.set("a", time.monotonic() + 0.05, active=True)
    assert times.get("a")[1]
    time.sleep(0.06)
    until, active = times.get("a")
    assert not active
    assert until <= time.monotonic()


def test_a_thousand_names_hardly_share_a_cell() -> None:
    """The price of counting without locks: what is too much, and how often."""
    count = SharedCounts(1)
    names = [f"10.{number >> 8}.{number & 255}.1" for number in range(1000)]
    for name in names:
        count.add(name)
    assert sum(count.of(name) - 1 for name in names) < 60
    assert count.total() == 1000


def test_subprocesses_get_none_of_the_supervisors_descriptors(several: Several) -> None:
    it = several()
    listing = it.ssh("HOST", "ls -l /proc/self/fd").stdout.decode()
    assert listing.count("socket:") == 0
    opened = subprocess.run(
        ["ls", f"/proc/{it.process.pid}/fd"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(opened) < 15, opened
