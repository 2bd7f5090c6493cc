"""The README is true: its diagram, its settings, and every command in it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from gosshd_py.config import AccountSettings, AuthSettings, Config, ConfigError, Rlimits
from gosshd_py.lifecycle import EVENTS, Cause
from gosshd_py.load import load_config

from .documents import MADE, renewed
from .serving import ROOT, Served, wait_for

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("file", MADE)
def test_what_the_documents_take_from_the_code_is_up_to_date(file: str) -> None:
    assert (ROOT / file).read_text() == renewed(file), "run: python -m tests.documents"


def test_every_cause_is_told() -> None:
    for cause in Cause:
        assert f"`{cause}`" in README


def settings_table(record: type[msgspec.Struct]) -> list[str]:
    """The rows that the README must have, from the docstrings of the record's fields."""
    source = (ROOT / "gosshd_py" / "config.py").read_text()
    source = source[source.index(f"class {record.__name__}(") :].split("\nclass ")[0]
    rows = []
    for field in msgspec.structs.fields(record):
        pattern = rf'^    {field.name}: [^\n]*\n    """(.*?)"""'
        text = re.search(pattern, source, re.MULTILINE | re.DOTALL)
        if text is None and record is AccountSettings:
            continue  # as at the top level
        assert text, field.name
        default = field.default
        if isinstance(default, tuple):
            shown = ", ".join(default) or "–"
        else:
            plain = isinstance(default, str | int | float)
            shown = str(default).lower() or "–" if plain else "–"
        rows.append(f"| `{field.encode_name}` | {shown} | {' '.join(text[1].split())} |")
    return rows


@pytest.mark.parametrize("record", [Config, AccountSettings, AuthSettings, Rlimits])
def test_the_settings_are_the_configs(record: type[msgspec.Struct]) -> None:
    assert "\n" + "\n".join(settings_table(record)) + "\n\n" in README


@pytest.mark.parametrize("file", ["README.md", "docs/lifecycle.md", "docs/trace.md"])
def test_the_links_lead_somewhere(file: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#\S*)?\)", (ROOT / file).read_text()):
        if not target.startswith("https://"):
            assert ((ROOT / file).parent / target).exists(), target


def test_the_tour_names_events_that_there_are() -> None:
    tour = (ROOT / "docs" / "lifecycle.md").read_text()
    named = set(re.findall(r"`([a-z]+\.[a-z]+)`", tour))
    assert len(named) >= 40
    assert named <= set(EVENTS)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git would give a newcomer, with our environment in place of the download."""
    shutil.copytree(
        ROOT,
        tmp_path / "clone",
        ignore=shutil.ignore_patterns(".git", ".venv*", "ssh_host*", ".*_cache"),
    )
    return tmp_path / "clone"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def commands_of_a_newcomer(clone: Path, server: Served) -> None:
    """`make run`, and the ssh command that it prints."""
    port = free_port()
    # The newcomer has no .venv; in a test the one that runs us stands in, so that nothing is
    # downloaded (`make soak` runs pipx and uvx, which do download).
    link_environment(clone)
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS")  # of `make test` itself
    env = {key: value for key, value in os.environ.items() if key not in outer}
    env["GOSSHD_LISTEN"] = f"127.0.0.1:{port}"
    run = subprocess.Popen(
        ["make", "run"],
        cwd=clone,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        lines = [run.stdout.readline().strip() for _ in range(4)]
        assert lines[0] == f"listening on 127.0.0.1:{port}"
        known_hosts = clone / "known_hosts"
        assert lines[2].startswith(f"[localhost]:{port} ssh-ed25519 ")
        known_hosts.write_text(lines[2] + "\n")
        command = lines[3].removeprefix("connect with: ")
        assert command == COMMANDS[1].replace("2222", str(port))
        options = f"-F none -o BatchMode=yes -o UserKnownHostsFile={known_hosts}"
        argv = shlex.split(command.replace("ssh ", f"ssh {options} ", 1))
        result = subprocess.run([*argv, "echo hello"], capture_output=True, timeout=10, check=True)
        assert result.stdout == b"hello\n"
        assert (clone / "hostkeys" / "ssh_host_ed25519_key").exists()
    finally:
        os.killpg(run.pid, signal.SIGINT)  # ^C reaches make and the server
        run.communicate(timeout=10)


def link_environment(clone: Path) -> None:
    environment = clone / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "gosshd").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m gosshd_py "$@"\n'
    )
    (environment / "bin" / "gosshd").chmod(0o755)
    for stamp in (".installed", ".dev"):
        (environment / stamp).touch()


def gosshd(clone: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a gosshd command of the README as a shell would, in a home of its own."""
    link_environment(clone)
    env = {**os.environ, "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}", "HOME": str(clone)}
    (clone / ".ssh").mkdir()
    (clone / "lab.toml").write_text('home = "/tmp"\n')
    return subprocess.run(
        ["sh", "-ec", command],
        cwd=clone,
        env=env,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def command_check(clone: Path, server: Served) -> None:
    assert "good" in gosshd(clone, "gosshd check --config lab.toml").stdout


def command_passwd(clone: Path, server: Served) -> None:
    made = gosshd(clone, "echo secret | gosshd passwd")
    assert made.stdout.startswith('password = "$argon2id$')


def command_explain(clone: Path, server: Served) -> None:
    told = gosshd(clone, "gosshd explain forward alice db.lab:5432 --config lab.toml")
    assert told.stdout == "refused: permit_open of the account does not name db.lab:5432\n"


def command_reload(clone: Path, server: Served) -> None:
    """A server with that configuration, asked as the README says."""
    link_environment(clone)
    port = free_port()
    (clone / "lab.toml").write_text(f'listen = ["127.0.0.1:{port}"]\npid_file = "{clone}/pid"\n')
    argv = [sys.executable, "-m", "gosshd_py", "--config", "lab.toml"]
    run = subprocess.Popen(argv, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert run.stdout.readline().startswith("listening on ")
        wait_for("its pid file", (clone / "pid").exists)
        env = {**os.environ, "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}"}
        asked = subprocess.run(
            ["gosshd", "reload", "--config", "lab.toml"],
            cwd=clone, env=env, capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
        assert asked.stdout.startswith(f"asked process {run.pid} to reload")
        while "reloaded" not in (line := run.stderr.readline()):
            assert line
    finally:
        run.terminate()
        run.communicate(timeout=10)


def command_known_hosts(clone: Path, server: Served) -> None:
    assert gosshd(clone, "gosshd known-hosts >> ~/.ssh/known_hosts").returncode == 0
    assert (
        (clone / ".ssh" / "known_hosts").read_text().startswith("[localhost]:2222 ssh-ed25519 AAAA")
    )


def command_keys(clone: Path, server: Served) -> None:
    assert gosshd(clone, "gosshd keys").stdout.startswith("SHA256:")


def command_probe(clone: Path, server: Served) -> None:
    command = "gosshd probe 127.0.0.1:2222".replace("2222", str(server.port))
    assert gosshd(clone, command).stdout.startswith("SSH-2.0-")


def command_trace(clone: Path, server: Served) -> None:
    """The story in the README is what it tells, line by line, but for the numbers."""
    link_environment(clone)
    env = {**os.environ, "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}", "GOSSHD_LISTEN": "127.0.0.1:0"}  # fmt: skip
    argv = ["gosshd", "--trace", "--trace-data", "40"]
    run = subprocess.Popen(argv, cwd=clone, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    try:
        port = run.stdout.readline().strip().rpartition(":")[2]
        options = ["-F", "none", "-p", port, "-tt", "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={clone}/known"]  # fmt: skip
        subprocess.run(["ssh", *options, "u@localhost", "true"], check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=10)  # fmt: skip
        told = []
        while "tcp.closed" not in (line := run.stdout.readline()):
            assert line
            told.append(line)
        shown = re.search(r"```text\n(#1 .*?)```", README, re.DOTALL)[1].splitlines()
        for line in shown:
            where, name = line.split()[0], line.split()[3]
            begins = line.split("  ")[-1].split("…")[0].split()[:6]
            assert any(
                said.split()[0] == where and f" {name} " in said and " ".join(begins) in said
                for said in told
            ), line
    finally:
        run.terminate()
        run.communicate(timeout=10)


def command_timeline(clone: Path, server: Served) -> None:
    records: list[dict[str, object]] = [
        {
            "us": us,
            "time": 1.0,
            "pid": 1,
            "connection": 1,
            "channel": None,
            "event": event,
            "facts": {},
        }
        for us, event in ((0, "tcp.accepted"), (9, "tcp.closed"))
    ]
    (clone / "life.ndjson").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert gosshd(clone, "gosshd timeline life.ndjson -o lifecycle.html").returncode == 0
    assert "tcp.closed" in (clone / "lifecycle.html").read_text()


def command_follow(clone: Path, server: Served) -> None:
    """See test_timeline.py; here only that the words are those of the command."""
    assert "--follow" in gosshd(clone, "gosshd timeline --help").stdout


def command_labs(clone: Path, server: Served) -> None:
    assert "lost-output" in gosshd(clone, "gosshd labs").stdout


def command_lab(clone: Path, server: Served) -> None:
    assert gosshd(clone, "gosshd labs lost-output --check").returncode == 0


def target_of_the_makefile(clone: Path, server: Served) -> None:
    """Running the tests inside the tests would not end; that the target is there is what is asked."""
    for target in ("test", "lint", "soak", "fuzz", "test-container", "bench", "bench-quick"):
        plan = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert plan.stdout


def in_the_container_test(clone: Path, server: Served) -> None:
    assert "up -d" in (ROOT / "tests" / "container.sh").read_text()


def in_the_soak(clone: Path, server: Served) -> None:
    """Downloads, so it is test_installation_as_a_program below."""


RUNNERS: dict[str, Callable[[Path, Served], None]] = {
    "make run": commands_of_a_newcomer,
    "ssh anyuser@localhost -p 2222": commands_of_a_newcomer,
    "gosshd check --config lab.toml": command_check,
    "gosshd known-hosts >> ~/.ssh/known_hosts": command_known_hosts,
    "gosshd passwd": command_passwd,
    "gosshd explain forward alice db.lab:5432 --config lab.toml": command_explain,
    "gosshd reload --config lab.toml": command_reload,
    "gosshd keys": command_keys,
    "gosshd probe 127.0.0.1:2222": command_probe,
    "gosshd --trace --trace-data 40": command_trace,
    "gosshd --trace-file life.ndjson": command_trace,
    "gosshd timeline life.ndjson -o lifecycle.html": command_timeline,
    "gosshd timeline life.ndjson --follow": command_follow,
    "gosshd labs": command_labs,
    "gosshd labs lost-output": command_lab,
    "pipx install .": in_the_soak,
    "uvx --from . gosshd": in_the_soak,
    "docker compose up": in_the_container_test,
    "make test": target_of_the_makefile,
    "make lint": target_of_the_makefile,
    "make soak": target_of_the_makefile,
    "make fuzz": target_of_the_makefile,
    "make test-container": target_of_the_makefile,
    "make bench": target_of_the_makefile,
    "make bench-quick": target_of_the_makefile,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_works(command: str, clone: Path, server: Served) -> None:
    RUNNERS[command](clone, server)


@pytest.mark.soak
@pytest.mark.parametrize("command", ["pipx install .", "uvx --from . gosshd"])
def test_installation_as_a_program(command: str, clone: Path, tmp_path: Path) -> None:
    """With pipx and uv from the package index, into a home of its own."""
    tools = tmp_path / "tools"
    venv.create(tools, with_pip=True)
    name = {"pipx": "pipx", "uvx": "uv"}[command.split()[0]]
    subprocess.run([tools / "bin" / "pip", "install", "-q", name], check=True, timeout=200)
    home = tmp_path / "home"
    env = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{tools}/bin:{home}/.local/bin:{os.environ['PATH']}",
    }
    env["GOSSHD_LISTEN"] = f"127.0.0.1:{free_port()}"
    serving = command if name == "uv" else "gosshd"
    if name == "pipx":
        subprocess.run(shlex.split(command), cwd=clone, env=env, check=True, timeout=300)
    run = subprocess.Popen(
        shlex.split(serving), cwd=clone, env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout.readline().strip() == f"listening on {env['GOSSHD_LISTEN']}"
    finally:
        run.terminate()
        run.communicate(timeout=10)
    wait_for("its end", lambda: run.poll() is not None)


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", README, re.DOTALL))
def test_the_examples_are_configurations(block: str, tmp_path: Path) -> None:
    """But for the users, files and keys that only the reader has."""
    file = tmp_path / "lab.toml"
    file.write_text(block)
    try:
        load_config(str(file))
    except ConfigError as exc:
        mine = ("authorized_keys", "trusted_user_ca_keys", "password", "run_as", "shell", "listen")
        for problem in exc.problems:
            assert problem.split(": ")[1].split(".")[-1] in mine, problem
            assert "unknown key" not in problem
            assert "expected" not in problem
