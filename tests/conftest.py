"""Fixtures: a server to talk to, a watchdog, and the check that nothing is left behind."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .serving import SOAK, Served

for number in (signal.SIGINT, signal.SIGHUP):
    # As at a terminal, also under nohup(1) and behind a shell's &: what is ignored is inherited.
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(
            number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler
        )

WATCHDOG = 900 if SOAK else 90
"""Seconds after which a test that hangs becomes a failure, with everybody's stacks."""

_running: list[Served] = []


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    def bark(*_: object) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        for served in _running:
            os.kill(served.process.pid, signal.SIGUSR1)
        time.sleep(0.2)  # for the server's stacks to reach its log
        stacks = "\n".join(served.log_file.read_text()[-6000:] for served in _running)
        pytest.fail(f"hung for {WATCHDOG} s; the servers' logs and stacks:\n{stacks}")

    signal.signal(signal.SIGALRM, bark)
    signal.alarm(WATCHDOG)
    yield
    signal.alarm(0)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves an fd, a zombie, a task, a pty or a logged exception behind."""
    shared: Served | None = None
    if "server" in request.fixturenames:
        shared = request.getfixturevalue("server")
    before = shared.stats() if shared else {}
    logged = shared.log_file.stat().st_size if shared else 0
    yield
    for served in _running:
        served.close_terminals()
    deadline = time.monotonic() + 8
    while True:
        after = shared.stats() if shared else {}
        keys = ("fds", "ptys", "tasks", "children", "sessions", "connections")
        left = {
            key: (before[key], after[key]) for key in keys if shared and after[key] > before[key]
        }
        if not left:
            break
        assert time.monotonic() < deadline, f"left behind (before, after): {left}"
        time.sleep(0.02)
    if shared and not request.node.get_closest_marker("logs_errors"):
        check_log(shared, logged)


def check_log(served: Served, start: int = 0) -> None:
    """Behind byte `start`: only log lines, and none that tells of an error of ours."""
    lines = served.log_file.read_bytes()[start:].decode().splitlines()
    plain = [line for line in lines if not line.startswith("{")]
    assert not plain, f"the server wrote something that is no log line: {plain[:20]}"
    bad = [line for line in lines if json.loads(line)["level"] in ("error", "critical")]
    assert not bad, f"the server logged: {bad}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server that most tests share, as one server has many clients."""
    served = Served(tmp_path_factory.mktemp("server"), home="/tmp")
    _running.append(served)
    served.ssh("true")  # the first login makes threads and caches
    yield served
    _running.remove(served)
    assert served.stop() == 0


@pytest.fixture
def serve(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Served]]:
    """Start servers with settings of their own: serve(shell="/bin/sh")."""
    own: list[Served] = []

    def start(**settings: Any) -> Served:
        directory = tmp_path / f"server{len(own)}"
        directory.mkdir()
        own.append(Served(directory, **{"home": "/tmp", **settings}))
        _running.append(own[-1])
        return own[-1]

    yield start
    for served in own:
        _running.remove(served)
        served.stop()
        if not request.node.get_closest_marker("logs_errors"):
            check_log(served)
