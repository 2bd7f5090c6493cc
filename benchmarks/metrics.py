"""What is measured. Each measurement starts a server of its own, so that none pays for the one before."""

from __future__ import annotations

import filecmp
import json
import os
import select
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pexpect

from .servers import (
    CLIENT_CPU,
    OURS,
    PEERS,
    SERVER_CPU,
    USUAL,
    BenchmarkError,
    Running,
    Site,
    Special,
    pin,
    run,
    serving,
)

MIB = 1024 * 1024
CIPHERS = {"chacha20": "chacha20-poly1305@openssh.com", "aes128-gcm": "aes128-gcm@openssh.com"}


@dataclass(frozen=True)
class Sizes:
    """How much of each."""

    trues: int = 15
    prompts: int = 5
    logins: int = 200
    echo_seconds: int = 3
    bulk: int = 256
    """MiB over pipes and sftp; a terminal gets a quarter."""
    idle: tuple[int, ...] = (400, 1000, 2000)
    """Sessions; of the middle number the CPU is measured."""
    idle_seconds: int = 20
    spawns: int = 200
    ballast: int = 500
    """MiB that the server is larger, to see what that does to a spawn."""


QUICK = Sizes(
    trues=5, prompts=2, logins=80, echo_seconds=1, bulk=48, idle=(40, 80, 120), idle_seconds=2, spawns=30
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """Some rows of the table. measure: takes the server's name, and gives a number for each row."""

    name: str
    rows: Mapping[str, tuple[str, str, bool]]
    """Of each row: what it is, its unit, and whether more is better."""
    measure: Callable[[str, Site, Sizes], dict[str, float]]
    ours_only: bool = False
    rounds: int = 100
    """At most so many: a few take long, and differ little."""

    def suits(self, server: str) -> bool:
        """Whether this server can be measured by it."""
        ours = server not in USUAL or server == OURS
        return (ours or not self.ours_only) and self.name not in PEERS[server].lacks

    def what(self, row: str, sizes: Sizes) -> str:
        """What a row is, with its numbers."""
        few, some, many = sizes.idle
        return self.rows[row][0].format(few=few, some=some, many=many, ballast=sizes.ballast)


# -- the OpenSSH client ------------------------------------------------------------------------------


def ssh(server: Running, *options: str, program: str = "ssh") -> list[str]:
    """The command, but for what is to be done, on the client's processor."""
    settings = {
        "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR",
        "IdentityAgent": "none", "IdentitiesOnly": "yes", "IdentityFile": server.site.key,
        "Port": server.port, "User": server.site.user,
        # All have this one. Each would take another by its own choice, and some cost milliseconds.
        "KexAlgorithms": "curve25519-sha256",
    }  # fmt: skip
    given = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    return [*pin(CLIENT_CPU), program, "-F", "none", *given, *options]


def _true(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    with serving(name, site) as server:
        argv = [*ssh(server), "127.0.0.1", "true"]
        took = []
        for _ in range(sizes.trues + 1):
            began = time.monotonic()
            subprocess.run(argv, stdin=subprocess.DEVNULL, check=True, timeout=60)
            took.append(time.monotonic() - began)
        return {"true": statistics.median(took[1:]) * 1000}


def _prompt(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    with serving(name, site) as server:
        took = []
        for _ in range(sizes.prompts + 1):
            began = time.monotonic()
            client = pexpect.spawn(
                "env", ["TERM=vt100", *ssh(server, "-tt"), "127.0.0.1"], timeout=30
            )
            client.expect(r"[#$] ")
            took.append(time.monotonic() - began)
            client.sendline("exit")
            client.expect(pexpect.EOF)
            client.close()
        return {"prompt": statistics.median(took[1:]) * 1000}


# -- the load generator ------------------------------------------------------------------------------


def load(server: Running, what: str, *numbers: int, pinned: bool = True) -> list[str]:
    """The command of the load generator."""
    where = [f"127.0.0.1:{server.port}", server.site.user, str(server.site.key)]
    return [*pin(CLIENT_CPU, pinned=pinned), *server.site.load, what, *where, *map(str, numbers)]


def loaded(server: Running, what: str, *numbers: int, pinned: bool = True) -> dict[str, float]:
    """What the load generator has seen. Raises BenchmarkError."""
    result: dict[str, float] = json.loads(run(*load(server, what, *numbers, pinned=pinned), timeout=120))  # fmt: skip
    return result


def _logins(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    with serving(name, site) as server:
        loaded(server, "logins", 16, 8)
        server.settle()
        before = server.cpu()
        seen = loaded(server, "logins", sizes.logins, 8)
        server.settle()
        cpu = (server.cpu() - before) / sizes.logins * 1000
        if server.peer.forks:
            cpu -= _shell(server.site) * 1000  # which is counted with the processes that start it
        return {"logins": seen["per_second"], "login_p99": seen["p99_us"] / 1000, "login_cpu": cpu}


def _shell(site: Site) -> float:
    """Seconds of processor time that the shell of a login takes."""
    times, before = 50, os.times()
    for _ in range(times):
        subprocess.run([*pin(SERVER_CPU), "/bin/bash", "-c", "true"], env={"HOME": str(site.home)}, check=True)  # fmt: skip
    after = os.times()
    spent = sum(after[2:4]) - sum(before[2:4])
    return spent / times


def _logins_everywhere(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    """Nobody is pinned; ours has two workers."""
    with serving(name, site, Special(workers=2), pinned=False) as server:
        loaded(server, "logins", 16, 8, pinned=False)
        seen = loaded(server, "logins", sizes.logins, 8, pinned=False)
        return {"logins_2": seen["per_second"]}


def _echo(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    with serving(name, site) as server:
        loaded(server, "echo", 1, 1, 0)
        server.settle()
        before = server.cpu()
        seen = loaded(server, "echo", 1, sizes.echo_seconds, 0)
        server.settle()
        cpu = (server.cpu() - before) / seen["count"] * 1e6
        return {"echo": seen["p50_us"], "echo_p99": seen["p99_us"], "echo_cpu": cpu}


def _echo_100(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    with serving(name, site) as server:
        seen = loaded(server, "echo", 100, sizes.echo_seconds + 1, 100)
        return {"echo100": seen["p50_us"], "echo100_p99": seen["p99_us"]}


def _channels(name: str, site: Site, _: Sizes) -> dict[str, float]:
    with serving(name, site) as server:
        loaded(server, "channels", 10)
        return {"channels": loaded(server, "channels", 100)["ms"]}


HOLD_TIME = 60
"""Seconds in which so many sessions must be there."""


@contextmanager
def holding(server: Running, sessions: int) -> Iterator[None]:
    """Idle terminals, while the block runs. Raises BenchmarkError if the server does not let them in."""
    process = subprocess.Popen(load(server, "hold", sessions), stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert process.stdout is not None  # noqa: S101
        ready, _, _ = select.select([process.stdout], [], [], HOLD_TIME)
        if not ready or process.stdout.readline() != b"ready\n":
            raise BenchmarkError(f"does not let {sessions} more sessions in within {HOLD_TIME} s")
        time.sleep(0.5)
        yield
    finally:
        process.kill()  # and not closed by hand: nobody measures how it ends
        process.communicate()


def _idle(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    few, some, many = sizes.idle
    seen: dict[str, float] = {}
    with serving(name, site) as server, ExitStack() as held:
        loaded(server, "logins", 8, 1)
        server.settle()
        rest = server.memory()
        try:
            held.enter_context(holding(server, few))
            seen["session_few"] = (server.memory() - rest) / few
            held.enter_context(holding(server, some - few))
            before, began = server.cpu(), time.monotonic()
            time.sleep(sizes.idle_seconds)
            seen["idle_cpu"] = (server.cpu() - before) / (time.monotonic() - began) * 100
            held.enter_context(holding(server, many - some))
            seen["session_many"] = (server.memory() - rest) / many
        except BenchmarkError as exc:
            if name == OURS:
                raise
            site.notes[name].append(f"with {few}, {some} and {many} sessions: {exc}")
    return seen


def _start(name: str, site: Site, _: Sizes) -> dict[str, float]:
    special = Special(at_home=True)
    with serving(name, site, special):
        pass  # the first start makes host keys
    with serving(name, site, special) as server:
        return {"start": server.started * 1000, "rest": server.memory() / 1024}


# -- bulk --------------------------------------------------------------------------------------------


def _bulk(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    seen: dict[str, float] = {}
    with serving(name, site) as server, _files(sizes.bulk) as files:
        for short, cipher in CIPHERS.items():
            if short in server.peer.lacks:
                continue
            pipes = [*ssh(server, "-c", cipher), "127.0.0.1"]
            terminal = [*ssh(server, "-tt", "-c", cipher), "127.0.0.1"]
            down, up, log = f"cat {files.data}", f"cat > {files.copy}", f"cat {files.log}"
            seen |= {
                f"down_{short}": _timed([*pipes, down], NOTHING, files.copy, files, files.data),
                f"up_{short}": _timed([*pipes, up], files.data, NOTHING, files, files.data),
                f"pty_{short}": _timed([*terminal, log], NOTHING, files.copy, files, files.shown),
            }
    return seen


def _sftp(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    seen = {}
    with serving(name, site) as server, _files(sizes.bulk) as files:
        cipher = CIPHERS["chacha20" if "aes128-gcm" in server.peer.lacks else "aes128-gcm"]
        for verb in ("get", "put"):
            batch = site.folder / f"sftp-{verb}"
            batch.write_text(f"{verb} {files.data} {files.copy}\n")
            argv = [*ssh(server, "-c", cipher, "-q", "-b", str(batch), program="sftp"), "127.0.0.1"]
            seen[f"sftp_{verb}"] = _timed(argv, NOTHING, NOTHING, files, files.data)
    return seen


@dataclass(frozen=True)
class _Files:
    """In memory: what is sent, and where it arrives."""

    data: Path
    log: Path
    shown: Path
    """The log as a terminal shows it: a return before each new line."""
    copy: Path


@contextmanager
def _files(mib: int) -> Iterator[_Files]:
    memory = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp")  # noqa: S108
    mib = min(mib, shutil.disk_usage(memory).free // MIB // 4)
    if not mib:
        raise BenchmarkError(f"there is no room in {memory}")
    folder = memory / f"benchmark-{os.getpid()}"
    folder.mkdir(mode=0o700)
    files = _Files(*(folder / name for name in ("data", "big.log", "shown.log", "copy")))
    try:
        block = os.urandom(MIB)
        with files.data.open("wb") as data:
            for number in range(mib):
                data.write(number.to_bytes(8, "big") + block[8:])
        lines = "".join(
            f"2026-01-01T00:00:{n % 60:02} host program[{n}]: {block[n : n + 20].hex()}\n" for n in range(10_000)
        ).encode()  # fmt: skip
        many = mib * MIB // 4 // len(lines)
        files.log.write_bytes(lines * many)
        files.shown.write_bytes(lines.replace(b"\n", b"\r\n") * many)
        yield files
    finally:
        shutil.rmtree(folder)


NOTHING = Path(os.devnull)


def _timed(argv: list[str], given: Path, output: Path, files: _Files, wanted: Path) -> float:
    """MB/s of a transfer into files.copy, whose bytes are compared. Raises BenchmarkError."""
    files.copy.unlink(missing_ok=True)
    with given.open("rb") as source, output.open("wb") as sink:
        began = time.monotonic()
        done = subprocess.run(
            argv, stdin=source, stdout=sink, stderr=subprocess.PIPE, check=False, timeout=300
        )
        took = time.monotonic() - began
    if done.returncode:
        raise BenchmarkError(f"{argv[-1]}: {done.stderr.decode(errors='replace').strip()}")
    if not filecmp.cmp(files.copy, wanted, shallow=False):
        raise BenchmarkError(f"{argv[-1]}: other bytes have arrived than were sent")
    return wanted.stat().st_size / took / 1e6


# -- ours alone --------------------------------------------------------------------------------------


def _spawn(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    """How long a spawn takes while 100 others type: so long they wait.

    From the vfork to the exec; what is done before, mostly openpty(3), takes a tenth of it.
    """
    seen: dict[str, float] = {}
    for row, ballast in (("spawn", 0), ("spawn_large", sizes.ballast)):
        file = site.folder / f"{row}.seconds"
        file.unlink(missing_ok=True)
        with serving(name, site, Special(ballast=ballast, spawns=str(file))) as server, _typing(server, file):  # fmt: skip
            before = len(file.read_text().split())
            argv = [*ssh(server, "-tt"), "127.0.0.1", "true"]
            for _ in range(sizes.spawns):  # one after the other: none is hindered by another
                subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60)  # fmt: skip
        took = sorted(float(line) * 1000 for line in file.read_text().split()[before:])
        seen |= {f"{row}_p50": took[len(took) // 2], row: took[len(took) * 99 // 100]}
    return seen


@contextmanager
def _typing(server: Running, spawns: Path, sessions: int = 100) -> Iterator[None]:
    """So many who type ten keys a second, while the block runs. Raises BenchmarkError."""
    process = subprocess.Popen(load(server, "echo", sessions, 600, 100), stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + HOLD_TIME
        while not spawns.exists() or len(spawns.read_text().split()) < sessions:
            if process.poll() is not None or time.monotonic() > end:
                raise BenchmarkError(f"does not let {sessions} sessions in within {HOLD_TIME} s")
            time.sleep(0.1)
        time.sleep(1)
        yield
    finally:
        process.kill()
        process.wait()


def _trace_cost(name: str, site: Site, sizes: Sizes) -> dict[str, float]:
    """Logins with a trace file, as a share of those without; each goes first once."""
    file = site.folder / "cost.ndjson"
    rates = {"": 0.0, str(file): 0.0}
    for trace in ("", str(file), str(file), ""):
        file.unlink(missing_ok=True)
        with serving(name, site, Special(trace=trace)) as server:
            loaded(server, "logins", 16, 8)
            rates[trace] += loaded(server, "logins", sizes.logins // 2, 8)["per_second"]
    return {"traced": rates[str(file)] / rates[""] * 100}


METRICS = {metric.name: metric for metric in (
    Metric("true", {"true": ("ssh host true", "ms", False)}, _true),
    Metric("prompt", {"prompt": ("login to the prompt", "ms", False)}, _prompt),
    Metric("logins", {
        "logins": ("logins, 8 at a time", "/s", True),
        "login_p99": ("… p99 of one", "ms", False),
        "login_cpu": ("… server CPU of one", "ms", False),
    }, _logins),
    Metric("logins_2", {"logins_2": ("logins, all processors (ours: --workers 2)", "/s", True)}, _logins_everywhere),
    Metric("echo", {
        "echo": ("echo of a key, 1 session, p50", "µs", False),
        "echo_p99": ("… p99", "µs", False),
        "echo_cpu": ("… server CPU", "µs", False),
    }, _echo),
    Metric("echo_100", {
        "echo100": ("echo, 100 sessions, p50", "µs", False),
        "echo100_p99": ("… p99", "µs", False),
    }, _echo_100),
    Metric("bulk", {
        f"{way}_{short}": (f"{what}, {short}", "MB/s", True)
        for way, what in (("pty", "pty download"), ("down", "exec download"), ("up", "exec upload"))
        for short in CIPHERS
    }, _bulk),
    Metric("sftp", {"sftp_get": ("sftp get", "MB/s", True), "sftp_put": ("sftp put", "MB/s", True)}, _sftp),
    Metric("channels", {"channels": ("100 channels on one connection", "ms", False)}, _channels),
    Metric("start", {
        "start": ("start to the first words", "ms", False),
        "rest": ("memory at rest (PSS)", "MiB", False),
    }, _start),
    Metric("idle", {
        "session_few": ("memory (PSS) of each of {few:,} idle sessions", "KiB", False),
        "session_many": ("… of {many:,}", "KiB", False),
        "idle_cpu": ("CPU of {some:,} idle sessions", "% of one", False),
    }, _idle, rounds=2),
    Metric("spawn", {
        "spawn_p50": ("a spawn stops the loop for, while 100 type", "ms", False),
        "spawn": ("… p99", "ms", False),
        "spawn_large_p50": ("… with {ballast} MiB more in the server", "ms", False),
        "spawn_large": ("… p99", "ms", False),
    }, _spawn, ours_only=True),
    Metric("trace", {"traced": ("logins with --trace-file, of those without", "%", True)}, _trace_cost, ours_only=True),
)}  # fmt: skip
