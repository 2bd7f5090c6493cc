"""Changing the rules while it runs: SIGHUP, gosshd reload, and how passwords get into the file."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from gosshd_py.passwords import _verify
from gosshd_py.pidfile import holder

from .keys import Key
from .serving import wait_for
from .test_cli import Gosshd, Start, environment, errors, gosshd_once, needs_root
from .test_cli import start as start_anywhere

__all__ = ["start_anywhere"]


@pytest.fixture
def start(start_anywhere: Start) -> Start:
    """As in test_cli.py, but with nobody's .bashrc."""

    def start_it(*args: str | Path, **how: Any) -> Gosshd:
        return start_anywhere(*args, **{"GOSSHD_HOME": "/tmp", **how})

    return start_it


def answers(it: Gosshd, event: str) -> int:
    return it.log_file.read_text().count(event)


def hangup(it: Gosshd) -> None:
    """SIGHUP, and wait until it has done something about it."""
    before = answers(it, "reloaded")
    it.process.send_signal(signal.SIGHUP)
    wait_for("a reload", lambda: answers(it, "reloaded") > before)


def enters(it: Gosshd, key: Key, user: str) -> bool:
    return it.ssh("-i", str(key.file), "HOST", "true", user=user).returncode == 0


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return Key(tmp_path / "keys")


def account(name: str, key: Key, more: str = "") -> str:
    return f"[accounts.{name}]\nauthorized_keys = ['{key.public}']\n{more}\n"


def test_a_reload_changes_who_may_enter_and_keeps_who_is_in(
    start: Start, key: Key, tmp_path: Path
) -> None:
    config = tmp_path / "lab.toml"
    config.write_text('umask = "027"\n' + account("alice", key))
    it = start("--config", config, "--listen", "127.0.0.1:0").wait_until_ready()
    argv = it.ssh_argv("-i", str(key.file), "HOST", "umask; read x; umask; echo $x", user="alice")
    inside = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert inside.stdout.readline() == b"0027\n"
    config.write_text('umask = "077"\naccept_env = ["NEW"]\n' + account("bob", key))
    assert not enters(it, key, "bob")
    hangup(it)
    assert enters(it, key, "bob")
    assert not enters(it, key, "alice")
    assert it.ssh("-i", str(key.file), "HOST", "umask", user="bob").stdout == b"0077\n"
    options = ("-i", str(key.file), "-o", "SendEnv=NEW")
    assert it.ssh(*options, "HOST", "echo $NEW", user="bob", NEW="rules").stdout == b"rules\n"
    out, _ = inside.communicate(b"still in\n", timeout=10)
    assert out == b"0027\nstill in\n"
    assert it.stop() == 0


def test_a_broken_file_changes_nothing_and_says_why(start: Start, key: Key, tmp_path: Path) -> None:
    config = tmp_path / "lab.toml"
    config.write_text(account("alice", key))
    it = start(
        "--config", config, "--listen", "127.0.0.1:0", "--log-format", "json"
    ).wait_until_ready()
    for broken, why in (
        ("[accounts.alice]\nshell = 'x'\nx = 1\n", [f"{config}:2: accounts.alice.shell: ", f"{config}:3: accounts.alice.x: "]),
        ("= 1", [f"{config}: not valid TOML"]),
    ):  # fmt: skip
        config.write_text(broken)
        hangup(it)
        reasons = [event["reason"] for event in it.events("not reloaded")][-len(why) :]
        for text in why:
            assert any(reason.startswith(text) for reason in reasons), reasons
        assert enters(it, key, "alice")
    config.unlink()
    hangup(it)
    assert f"{config}: No such file" in it.events("not reloaded")[-1]["reason"]
    (it.directory / "hostkeys").mkdir()
    state = it.directory / ".local/state/gosshd/hostkeys/ssh_host_ed25519_key"
    assert state.exists()
    config.write_text(account("alice", key))
    state.chmod(0o644)
    (it.directory / "hostkeys").rmdir()
    hangup(it)
    assert "has mode 0644" in it.events("not reloaded")[-1]["reason"]
    assert enters(it, key, "alice")
    state.chmod(0o600)
    hangup(it)
    assert len(it.events("reloaded")) == 1
    assert it.stop() == 0


def test_a_reload_never_opens_what_has_accounts_by_losing_them(
    start: Start, key: Key, tmp_path: Path
) -> None:
    """An empty file would be open mode; on an address for everybody that is refused."""
    config = tmp_path / "lab.toml"
    config.write_text(account("alice", key))
    it = start("--config", config, "--listen", "0.0.0.0:0").wait_until_ready()
    config.write_text("")
    hangup(it)
    assert "not reloaded" in it.log_file.read_text()
    assert "can be reached from other machines" in it.log_file.read_text()
    it.host = "127.0.0.1"
    assert enters(it, key, "alice")
    assert not enters(it, key, "bob")


def test_a_reload_never_lets_everybody_in(start: Start, key: Key, tmp_path: Path) -> None:
    """Not even where open mode is allowed: a truncated file has no accounts, either."""
    config = tmp_path / "lab.toml"
    config.write_text(account("alice", key))
    flags = ("--listen", "127.0.0.1:0", "--open-to-network")
    it = start("--config", config, *flags).wait_until_ready()
    config.write_text("")
    hangup(it)
    assert "there are none, which would let everybody in" in it.log_file.read_text()
    assert not enters(it, key, "bob")
    assert enters(it, key, "alice")


def test_listeners_that_stay_open_count_at_a_reload(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "lab.toml"
    config.write_text('listen = ["0.0.0.0:0"]\nopen_to_network = true\n')
    it = start("--config", config).wait_until_ready()
    config.write_text('listen = ["127.0.0.1:0"]\n')
    hangup(it)
    assert "not reloaded" in it.log_file.read_text()


def test_an_error_of_ours_does_not_deafen_the_server(
    start: Start, key: Key, tmp_path: Path
) -> None:
    config = tmp_path / "lab.toml"
    config.write_text(account("alice", key))
    it = start("--config", config, "--listen", "127.0.0.1:0").wait_until_ready()
    for hash_ in (
        "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ$",
        "$argon2id$v=19$m=-5,t=1,p=1$c29tZXNhbHQ$aGFzaGhhc2hoYXNoaGFzaA",
        "$argon2id$v=19$m=8,t=4000000000,p=1$c29tZXNhbHQ$aGFzaGhhc2hoYXNoaGFzaA",
        "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQxx$aGFzaGhhc2hoYXNoaGFzaA",
    ):
        config.write_text(f'[accounts.alice]\npassword = "{hash_}"\n')
        assert gosshd_once(tmp_path, "check", "--config", config).returncode == 2
        hangup(it)
        assert hash_ not in it.log_file.read_text()
    config.write_text(account("bob", key))
    hangup(it)
    assert enters(it, key, "bob")
    assert not enters(it, key, "alice")


def test_a_hash_in_the_wrong_place_is_not_shown(tmp_path: Path) -> None:
    from .keys import hashed

    config = tmp_path / "lab.toml"
    for text in ('accounts = {alice = "H"}', 'authorized_keys = "H"', '"H" = 1', '[accounts.alice]\nauthorized_keys = ["H"]', '[accounts."H"]\npassword = "!"'):  # fmt: skip
        config.write_text(text.replace("H", hashed()))
        result = gosshd_once(tmp_path, "check", "--config", config)
        assert result.returncode == 2
        assert hashed()[12:40] not in result.stderr


def test_a_pid_file_of_somebody_else_is_not_believed(tmp_path: Path) -> None:
    """Root's reload must not send a signal where a visitor's file and lock point to."""
    import fcntl
    import struct

    path = tmp_path / "pid"
    os.mkfifo(path)
    (line,) = errors(gosshd_once(tmp_path, "reload", "--pid-file", path), 1)
    assert "not a regular file of ours" in line
    path.unlink()
    with path.open("w") as file:  # F_OFD_SETLK: the holder of such a lock is told as -1
        fcntl.fcntl(file, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        assert holder(path) is None
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        with pytest.raises(PermissionError):
            holder(path)


def test_what_needs_a_restart_is_named(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "lab.toml"
    config.write_text('listen = ["127.0.0.1:0"]\n')
    it = start("--config", config).wait_until_ready()
    config.write_text('listen = ["127.0.0.2:0"]\nmotd = "new"\n')
    hangup(it)
    hangup(it)  # and again as long as it is so
    assert it.log_file.read_text().count("needs_restart=listen") == 2
    assert it.ssh("true").returncode == 0


def test_host_keys_are_read_again(start: Start) -> None:
    it = start("--listen", "127.0.0.1:0").wait_until_ready()
    keys = it.directory / ".local/state/gosshd/hostkeys"
    (keys / "ssh_host_ed25519_key").unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / "ssh_host_ed25519_key"], check=True)  # fmt: skip
    assert it.ssh("true").returncode == 0
    hangup(it)
    assert b"Host key verification failed" in it.ssh("true").stderr


def test_gosshd_reload_finds_the_server_by_its_configuration(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "lab.toml"
    pid_file = tmp_path / "folder" / "pid"
    config.write_text(f'listen = ["127.0.0.1:0"]\npid_file = "{pid_file}"\n')
    (line,) = errors(gosshd_once(tmp_path, "reload", "--config", config), 1)
    assert (
        line
        == f"{pid_file}: there is no such file; is the server running, and with this configuration?"
    )
    it = start("--config", config).wait_until_ready()
    wait_for("its pid", lambda: pid_file.exists() and pid_file.read_text())
    assert pid_file.read_text() == f"{it.process.pid}\n"
    result = gosshd_once(tmp_path, "reload", "--config", config)
    assert (
        result.stdout == f"asked process {it.process.pid} to reload; its log says what came of it\n"
    )
    wait_for("the reload", lambda: answers(it, "reloaded"))
    config.write_text("x = 1")
    (line,) = errors(gosshd_once(tmp_path, "reload", "--config", config), 2)
    assert line.startswith(f"{config}:1: x: unknown key")
    assert answers(it, "reloaded") == 1  # it was not even asked
    config.write_text(f'listen = ["127.0.0.1:0"]\npid_file = "{pid_file}"\n')
    second = start("--config", config).wait_until_ready()  # goes on without
    wait_for("its warning", lambda: "no pid file" in second.log_file.read_text())
    assert second.stop() == 0
    assert it.stop() == 0
    assert not pid_file.exists()


def test_a_file_left_behind_or_of_somebody_else_names_nobody(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")  # as after a crash, with a pid used again
    (line,) = errors(gosshd_once(tmp_path, "reload", "--pid-file", tmp_path / "pid"), 1)
    assert "no server holds this file" in line


def test_reload_cannot_guess_a_port(tmp_path: Path) -> None:
    (line,) = errors(gosshd_once(tmp_path, "reload", "--listen", "127.0.0.1:0"), 2)
    assert line.startswith("listen: port 0 names no server; name its file with --pid-file FILE")


# -- passwords --------------------------------------------------------------------------------------


def hash_in(line: str) -> str:
    found = re.fullmatch(r'password = "(\$argon2id\$[^"]+)"\s*', line)
    assert found, line
    return found[1]


def test_passwd_asks_twice_and_prints_the_line(tmp_path: Path) -> None:
    env = environment(tmp_path)
    argv = ["-m", "gosshd_py", "passwd"]
    terminal = pexpect.spawn(sys.executable, argv, env=env, timeout=15, encoding="utf-8")
    for prompt, answer in (
        ("Password: ", "secret"),
        ("Repeat for confirmation: ", "other"),
        ("Error: The two entered values do not match.", None),
        ("Password: ", "s\u00e9cret"),
        ("Repeat for confirmation: ", "s\u00e9cret"),
    ):
        terminal.expect_exact(prompt)
        if answer is not None:
            terminal.sendline(answer)
    terminal.expect(pexpect.EOF)
    assert "secret" not in terminal.before
    assert _verify(hash_in(terminal.before.strip()), "s\u00e9cret")


def test_passwd_reads_a_line_where_there_is_no_terminal(tmp_path: Path) -> None:
    def passwd(typed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gosshd_py", "passwd"], input=typed, capture_output=True,
            env=environment(tmp_path), text=True, timeout=20, check=False,
        )  # fmt: skip

    assert _verify(hash_in(passwd("se cret \n").stdout), "se cret ")
    for typed, why in (("\n", "an empty password"), ("", "an empty"), ("x" * 2000, "2000 characters"), ("a\x07b\n", "no client could send")):  # fmt: skip
        (line,) = errors(passwd(typed), 2)
        assert why in line


# -- warnings ---------------------------------------------------------------------------------------


@needs_root
def test_root_without_run_as_is_warned_of(start: Start, tmp_path: Path, key: Key) -> None:
    it = start("--listen", "127.0.0.1:0").wait_until_ready()
    warning = "run_as is not set: every visitor gets a shell as root; set run_as to another user"
    wait_for("the warning", lambda: warning in it.log_file.read_text())
    quiet = start("--listen", "127.0.0.1:0", "--run-as", "nobody").wait_until_ready()
    assert "run_as" not in quiet.log_file.read_text()
    config = tmp_path / "lab.toml"
    config.write_text(account("alice", key) + account("bob", key, "run_as = 'nobody'"))
    result = gosshd_once(tmp_path, "check", "--config", config)
    assert result.returncode == 0
    assert "run_as is not set: alice gets a shell as root" in result.stderr


def test_check_shows_lines_of_keys_that_will_not_be_used(tmp_path: Path, key: Key) -> None:
    keys = tmp_path / "authorized_keys"
    keys.write_text(f"{key.public}\nno-user-rc {key.public}\n")
    config = tmp_path / "lab.toml"
    config.write_text(f"[accounts.alice]\nauthorized_keys = ['{keys}']\n")
    result = gosshd_once(tmp_path, "check", "--config", config)
    assert result.returncode == 0
    warning = (
        f"accounts.alice: {keys}:2: the option no-user-rc is not supported; nobody can use this key"
    )
    assert f"gosshd: warning: {warning}" in result.stderr.splitlines()


def test_core_dumps_that_nobody_wanted_at_the_start_cannot_be_had_by_a_reload(
    start: Start, key: Key, tmp_path: Path
) -> None:
    config = tmp_path / "lab.toml"
    config.write_text(account("alice", key))
    it = start("--config", config, "--listen", "127.0.0.1:0", "--log-format", "json")
    it.wait_until_ready()
    assert resource.prlimit(it.process.pid, resource.RLIMIT_CORE) == (0, 0)
    config.write_text("rlimits = {core = 4096}\n" + account("alice", key))
    hangup(it)
    (event,) = it.events("not reloaded")
    assert event["reason"].startswith("rlimits: ")
    assert event["reason"].endswith("; restart it")
    assert enters(it, key, "alice")
    assert it.stop() == 0
