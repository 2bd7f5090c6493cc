"""Ways round the rules of accounts and limits that once were open, and defaults that must not move."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import resource
import shutil
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import argon2
import asyncssh
import msgspec
import paramiko
import pytest
from asyncssh.packet import String
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gosshd_py import authorized_keys, checks, launch, local, passwords, process
from gosshd_py.authentication import Authenticator
from gosshd_py.config import AccountSettings, Config
from gosshd_py.counts import Times
from gosshd_py.lifecycle import Cause, SpawnError
from gosshd_py.limits import Penalties, SessionClock

from .keys import PASSWORD, Key, hashed
from .serving import ROOT, Served, run, wait_for
from .test_accounts import accepted, ca, client_as, homes, key, login, root  # noqa: F401
from .test_cli import Start, gosshd_once, start  # noqa: F401
from .test_limits import guess

Serve = Callable[..., Served]


# -- what the issue fixes as defaults ------------------------------------------------------------------


def test_the_defaults() -> None:
    config = Config()
    assert {name: getattr(config, name) for name in (
        "max_startups", "per_source_max_startups", "login_grace_time", "max_auth_tries", "max_penalty",
        "connection_max_sessions", "total_max_sessions", "idle_timeout", "unused_connection_timeout",
        "request_timeout", "session_timeout", "connection_max_forwards",
    )} == {
        "max_startups": 100, "per_source_max_startups": 20, "login_grace_time": 20, "max_auth_tries": 6,
        "max_penalty": 600, "connection_max_sessions": 64, "total_max_sessions": 1000,
        "idle_timeout": 30 * 60, "unused_connection_timeout": 5 * 60, "request_timeout": 20,
        "session_timeout": 0, "connection_max_forwards": 64,
    }  # fmt: skip
    assert (config.client_alive_interval, config.client_alive_count_max) == (15, 3)
    assert not (config.agent_forwarding or config.gateway_ports or config.permit_open)


def test_a_terminal_is_warned_a_minute_before_its_time_is_over() -> None:
    class Channel:
        has_terminal = True

        def __init__(self, now: float) -> None:
            self.active = now
            self.told: list[str] = []

        def notice(self, text: str) -> None:
            self.told.append(text)

        def end(self, cause: Cause, text: str = "") -> None:
            self.told.append(cause)

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        channel = Channel(loop.time())
        clock = SessionClock(channel, Config(idle_timeout=1800, session_timeout=7200), lambda *_, **__: None)  # fmt: skip
        due = sorted(timer.when() - channel.active for timer in clock._timers.values())
        channel.active -= 1741  # as if so long ago
        clock.stop()
        SessionClock(channel, Config(idle_timeout=1800), lambda *_, **__: None).stop()
        assert channel.told == ["\r\ngosshd: this session is idle and ends in 59 s; press a key to keep it"]  # fmt: skip
        return due

    assert run(main()) == pytest.approx([1740, 7140], abs=1)


# -- penalties -----------------------------------------------------------------------------------------


def refused(server: Served) -> bool:
    """Whether a new connection is refused."""
    with socket.create_connection((server.host, server.port), timeout=5) as sock:
        return b"too many failed" in sock.recv(500) + sock.recv(500)


def test_a_wrong_password_is_penalised_once(serve: Serve) -> None:
    server = serve(
        accounts={"alice": {"password": hashed()}}, max_penalty=600, authfail_penalty=50, min_penalty=120
    )  # fmt: skip
    for tried in range(2):
        assert "in" != guess(server, "wrong", source="127.0.0.1"), tried
        assert "Permission denied" in guess(server, "wrong", source="127.0.0.3")
    assert guess(server, PASSWORD, source="127.0.0.1") == "in"
    guess(server, "wrong", source="127.0.0.1")
    assert "too many failed" in guess(server, PASSWORD, source="127.0.0.1")


def test_refused_keys_are_penalised_once_for_each_connection_without_a_login(
    serve: Serve, key: Key, tmp_path: Path
) -> None:
    other = [Key(tmp_path / "keys", f"other{number}") for number in range(8)]
    account = {"authorized_keys": [key.public]}
    server = serve(
        accounts={"alice": account}, max_penalty=600, authfail_penalty=50, min_penalty=80
    )
    words = [word for wrong in other[:2] for word in ("-i", str(wrong.file))]
    options = ["-o", "IdentitiesOnly=yes"]
    for _ in range(3):  # wrong ones before the right one are no failure
        files = [*words, "-i", str(key.file)]
        assert server.ssh(*options, *files, "HOST", "true", user="alice").returncode == 0
    words = [word for wrong in other for word in ("-i", str(wrong.file))]
    result = server.ssh(*options, *words, "HOST", "true", user="alice")
    assert b"too many failed logins" in result.stderr  # the seventh: penalised once, too
    assert accepted(server, key)
    assert not accepted(server, other[0])
    assert b"too many failed or unfinished logins" in login(server, key).stderr


def test_a_client_that_leaves_in_open_mode_gets_no_penalty(serve: Serve) -> None:
    server = serve(login_grace_time=0.2, grace_exceeded_penalty=100, min_penalty=1, max_penalty=600)
    with socket.create_connection((server.host, server.port), timeout=5) as sock:
        while sock.recv(4096):
            pass
    assert server.ssh("echo in").stdout == b"in\n"


@pytest.mark.parametrize("exempt", ["::1", "::1/128", "::/64"])
def test_a_single_ipv6_address_can_be_exempt(exempt: str) -> None:
    penalties = Penalties(Times())
    penalties.add(Config(penalty_exempt=(exempt,)), "::1", 100)
    assert penalties.seconds_left(Config(), "::1") == 0
    penalties.add(Config(), "::2", 100)
    assert penalties.seconds_left(Config(), "::1") > 99  # the same /64
    assert penalties.seconds_left(Config(penalty_exempt=(exempt,)), "::1") == 0


# -- connections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "words"),
    [("max_connections", b"too many connections; try again"), ("per_source_max_connections", b"too many connections from your address")],
)  # fmt: skip
def test_connections_that_have_logged_in_are_counted_too(
    serve: Serve, limit: str, words: bytes
) -> None:
    server = serve(**{limit: 3})

    async def main() -> None:
        inside = [await server.connect() for _ in range(3)]
        result = await asyncio.to_thread(server.ssh, "true")
        assert words in result.stderr
        inside[0].abort()
        await asyncio.to_thread(wait_for, "room", lambda: server.ssh("true").returncode == 0)
        for conn in inside:
            conn.abort()

    run(main())
    assert server.events("connection refused", limit=limit)


def test_many_guessers_of_one_source_keep_no_others_password_waiting(serve: Serve) -> None:
    """Each source has its hashes examined one after the other; two at a time, of 64 MiB each."""
    slow = argon2.PasswordHasher(time_cost=12, memory_cost=65536, parallelism=1).hash(PASSWORD)
    server = serve(accounts={"alice": {"password": slow}}, login_grace_time=60)
    server.ask("patch userauth.PASSWORD_DELAY 0")

    async def one_guess() -> None:
        with suppress(asyncssh.Error, OSError):
            await server.connect(
                username="alice", password="wrong", local_addr=("127.0.0.9", 0), connect_timeout=60,
            )  # fmt: skip

    async def main() -> tuple[float, float]:
        began = time.monotonic()
        (await server.connect(username="alice", password=PASSWORD)).abort()
        alone = time.monotonic() - began
        guessers = [asyncio.create_task(one_guess()) for _ in range(12)]
        await asyncio.sleep(3 * alone)  # they are all waiting for theirs by now
        began = time.monotonic()
        (await server.connect(username="alice", password=PASSWORD, connect_timeout=60)).abort()
        took = time.monotonic() - began
        await asyncio.gather(*guessers)
        return alone, took

    alone, took = run(main())
    assert took < 5 * alone  # and not 12
    assert passwords._HASHES_AT_ONCE == 2


def test_answers_are_not_piled_up_for_a_client_that_has_not_logged_in(serve: Serve) -> None:
    server = serve()
    before = server.stats()["rss"]
    with server.paramiko_transport() as transport:
        unknown = paramiko.Message()
        unknown.add_byte(bytes([199]))
        unknown.add_string(b"x" * 100)
        transport.packetizer.read_message = lambda: time.sleep(100)
        try:
            for _ in range(200_000):
                transport._send_message(unknown)
        except (EOFError, OSError):
            pass
        else:
            pytest.fail("all of it was answered")
    assert server.stats()["rss"] - before < 8 * 2**20


# -- names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ａｄｍｉｎ", "ad\u00admin", "\u212aelvin"])
def test_a_name_is_what_is_sent_and_not_what_it_could_be_folded_to(serve: Serve, name: str) -> None:
    server = serve()
    result = server.ssh("-o", "LogLevel=INFO", "HOST", "true", user=name)
    assert b"that is no login name" in result.stderr
    inside = serve(accounts={"*": {"password": hashed()}})
    with inside.paramiko_transport() as transport:
        with pytest.raises(paramiko.SSHException):
            transport.auth_password(name, PASSWORD, fallback=False)


@pytest.mark.parametrize("names", [("", "alice"), ("ａlice", "alice"), ("alice", "bob")])
def test_a_changed_name_disconnects_however_it_is_spelled(
    serve: Serve, names: tuple[str, str]
) -> None:
    server = serve(accounts={"*": {"password": hashed()}})
    with server.paramiko_transport() as transport:
        service = paramiko.Message()
        service.add_byte(paramiko.common.cMSG_SERVICE_REQUEST)
        service.add_string("ssh-userauth")
        transport._send_message(service)
        for name in names:
            request = paramiko.Message()
            request.add_byte(paramiko.common.cMSG_USERAUTH_REQUEST)
            for text in (name, "ssh-connection", "none"):
                request.add_string(text)
            transport._send_message(request)
        transport.join(10)
    wait_for("its line", lambda: server.events("connection closed"))
    assert server.events("connection closed")[0]["reason"] == "the user name was changed"


# -- files of keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "lines"), [("x", 400_000), ("x", 9_000)])
def test_a_file_full_of_nonsense_stops_nobody_and_fills_no_log(
    serve: Serve, key: Key, tmp_path: Path, line: str, lines: int
) -> None:
    keys = tmp_path / "authorized_keys"
    server = serve(
        accounts={
            "alice": {"authorized_keys": [str(keys)]},
            "bob": {"authorized_keys": [key.public]},
        }
    )
    server.ask("lag")
    for number in range(5):
        keys.write_text(f"{line}\n" * lines + f"#{number}\n")
        assert not accepted(server, key)
    assert server.ask("lag")["worst"] < 0.25
    told = server.events("key line not used")
    assert 1 <= len(told) <= authorized_keys.MAX_PROBLEMS + 1
    assert server.log_file.stat().st_size < 20_000
    assert accepted(server, key, user="bob")


def test_keys_behind_the_tenth_bad_line_are_used(serve: Serve, key: Key, tmp_path: Path) -> None:
    keys = tmp_path / "authorized_keys"
    keys.write_text("x\n" * 25 + key.public)
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})
    assert accepted(server, key)
    assert server.events("key line not used")[-1]["reason"] == f"{keys}: 15 more lines are not used"


def test_a_file_system_that_hangs_ends_the_login_and_no_other(
    serve: Serve, key: Key, tmp_path: Path
) -> None:
    """Not the others' logins, and not the end of the server."""
    server = serve(
        accounts={"alice": {"authorized_keys": [key.public]}, "bob": {"password": hashed()}}
    )
    server.ask("patch authentication.KEY_FILES_TIME 0.3")
    server.ask("sabotage keys")
    assert not accepted(server, key)
    reason = server.events("authentication rejected")[0]["reason"]
    assert reason == "the files of keys cannot be read: too slow"
    assert guess_as(server, "bob") == "in"
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 3


def guess_as(server: Served, name: str) -> str:
    async def main() -> str:
        conn = await server.connect(username=name, password=PASSWORD)
        conn.abort()
        return "in"

    return run(main())


@root
def test_links_on_the_way_to_a_file_count(serve: Serve, key: Key, homes: Path) -> None:
    """A folder that others can write must not lead to keys, nor a link that is somebody else's."""
    base = homes.parent
    safe, shared = base / "safe", base / "shared"
    safe.mkdir()
    shared.mkdir(mode=0o755)
    (safe / "mallory").write_text(key.public)
    (shared / "bob").symlink_to(safe / "mallory")
    (base / "bob").symlink_to(shared / "bob")
    for setting in (shared / "bob", base / "bob"):
        server = serve(accounts={"bob": {"authorized_keys": [str(setting)]}})
        assert accepted(server, key, user="bob")
        shared.chmod(0o777)
        assert not accepted(server, key, user="bob")
        shared.chmod(0o755)
        os.chown(shared / "bob", pwd.getpwnam("nobody").pw_uid, -1, follow_symlinks=False)
        assert not accepted(server, key, user="bob")
        os.chown(shared / "bob", 0, -1, follow_symlinks=False)
    assert any(
        "shared can be written by others" in e["reason"] for e in server.events("key line not used")
    )


@root
@pytest.mark.parametrize("kind", ["authorized_keys", "trusted_user_ca_keys"])
def test_a_file_of_another_owner_is_not_used(
    serve: Serve, key: Key, ca: Key, homes: Path, kind: str
) -> None:
    file = homes.parent / "file"
    file.write_text(key.public if kind == "authorized_keys" else ca.public)
    if kind == "authorized_keys":
        server = serve(accounts={"alice": {"authorized_keys": [str(file)]}})
    else:
        key.certify(ca)
        server = serve(accounts={"alice": {}}, auth={"trusted_user_ca_keys": [str(file)]})
    assert accepted(server, key)
    os.chown(file, pwd.getpwnam("games").pw_uid, -1)
    assert not accepted(server, key)
    os.chown(file, 0, -1)
    file.chmod(0o664)
    assert not accepted(server, key)


@root
def test_a_users_link_leads_root_nowhere(serve: Serve, key: Key, homes: Path) -> None:
    """Not to open what only root can, nor to show it in the log."""
    folder, secret = homes.parent / "theirs", homes.parent / "secret"
    secret.write_text("hunter2secret x\n")
    secret.chmod(0o600)
    folder.mkdir()
    (folder / "keys").symlink_to(secret)
    for path in (folder, folder / "keys"):
        os.chown(path, pwd.getpwnam("nobody").pw_uid, -1, follow_symlinks=False)
    server = serve(
        accounts={"alice": {"authorized_keys": [str(folder / "keys")], "run_as": "nobody"}}
    )
    assert not accepted(server, key)
    assert server.events("key line not used")[0]["reason"].endswith("keys: Permission denied")
    assert "hunter2" not in server.log_file.read_text()
    (folder / "keys").unlink()
    (folder / "keys").write_text(key.public)
    os.chown(folder / "keys", pwd.getpwnam("nobody").pw_uid, -1)
    assert accepted(server, key)


# -- certificates and key options ------------------------------------------------------------------------


def test_a_long_certificate_id_hides_neither_serial_nor_ca(serve: Serve, key: Key, ca: Key) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-s", str(ca.file), "-I", "x" * 300, "-z", "42", "-n", "alice", f"{key.file}.pub"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = serve(accounts={"alice": {}}, auth={"trusted_user_ca_keys": [ca.public]})
    assert accepted(server, key)
    shown = server.events("authentication accepted")[0]["certificate"]
    assert shown.startswith(f"serial 42 CA {ca.fingerprint} id 'xxx")


@pytest.mark.parametrize("how", ["no-agent-forwarding", "restrict", "certificate", "none"])
def test_the_agent_is_forwarded_only_if_the_key_permits_it(
    serve: Serve, key: Key, ca: Key, tmp_path: Path, how: str
) -> None:
    line = key.line({"no-agent-forwarding": how, "restrict": how}.get(how, ""))
    settings: dict[str, Any] = {"accounts": {"alice": {"authorized_keys": [line]}}}
    if how == "certificate":
        key.certify(ca, "-O", "clear", "-O", "permit-pty", "-O", "permit-port-forwarding")
        settings = {"accounts": {"alice": {}}, "auth": {"trusted_user_ca_keys": [ca.public]}}
    server = serve(agent_forwarding=True, **settings)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_for("the agent", (tmp_path / "agent").exists)
        argv = ["-A", "-i", str(key.file), "-o", f"IdentityAgent={tmp_path}/agent", "HOST", "echo $SSH_AUTH_SOCK"]  # fmt: skip
        out = server.ssh(*argv, user="alice").stdout.strip()
        assert bool(out) == (how == "none")
    finally:
        agent.terminate()
        agent.wait(5)


@pytest.mark.parametrize("permitted", [True, False])
def test_a_certificate_says_whether_ports_may_be_forwarded(
    serve: Serve, key: Key, ca: Key, permitted: bool
) -> None:
    options = ["-O", "permit-port-forwarding"] if permitted else ["-O", "permit-pty"]
    key.certify(ca, "-O", "clear", *options)
    server = serve(accounts={"alice": {}}, auth={"trusted_user_ca_keys": [ca.public]}, permit_open=["127.0.0.1:*"])  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as listener:
        at = f"127.0.0.1:{listener.getsockname()[1]}"
        argv = ["-o", "LogLevel=INFO", "-i", str(key.file), "-W", at, "HOST"]
        client = subprocess.Popen(
            server.ssh_argv(*argv, user="alice"), stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if permitted:
            listener.settimeout(10)
            listener.accept()[0].close()
        _, told = client.communicate(timeout=10)
        assert (b"administratively prohibited" in told) != permitted


def test_a_security_keys_touch_is_asked_for() -> None:
    """As sshd does (PROTOCOL.u2f), unless its line says no-touch-required, which disables the key here."""
    device = Ed25519PrivateKey.generate()
    public = device.public_key().public_bytes_raw()
    blob = String("sk-ssh-ed25519@openssh.com") + String(public) + String("ssh:")
    line = f"sk-ssh-ed25519@openssh.com {b64encode(blob).decode()}"
    account = AccountSettings(authorized_keys=(line,))

    def signed(flags: int) -> bytes:
        rest = bytes([flags]) + (1).to_bytes(4, "big")
        digests = sha256(b"ssh:").digest(), sha256(b"data").digest()
        signature = device.sign(digests[0] + rest + digests[1])
        return String("sk-ssh-ed25519@openssh.com") + String(signature) + rest

    async def verify() -> list[bool]:
        authenticator = Authenticator(Config(accounts={"alice": account}))
        _, key = await authenticator.public_key("alice", blob, "127.0.0.1")
        return [key.verify(b"data", signed(flags)) for flags in (0, 1)]

    assert run(verify()) == [False, True]
    assert authorized_keys.read_keys(f"no-touch-required {line}")[0] == []


def test_an_unknown_key_is_answered_after_the_same_time_for_every_name(
    serve: Serve, key: Key
) -> None:
    server = serve(accounts={"alice": {"authorized_keys": [Key(key.file.parent, "other").public]}})
    server.ask("patch userauth.KEY_DELAY 0.4")
    for name in ("alice", "nobody-at-all"):
        began = time.monotonic()
        assert not accepted(server, key, user=name)
        assert time.monotonic() - began > 0.4


# -- open mode -----------------------------------------------------------------------------------------


@root
def test_open_mode_tells_users_apart_on_ipv6_too(serve: Serve) -> None:
    server = serve(listen=["[::1]:0"])
    assert server.ssh("-o", "HostName=::1", "HOST", "echo in").stdout == b"in\n"
    refusal = client_as(server, "nobody", "-o", "HostName=::1", "HOST", "true")
    assert b"open only to the user who runs it" in refusal.stderr


def test_root_is_let_in_by_a_server_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, uid, allowed in (
        (0, 1000, True),
        (1000, 1000, True),
        (1001, 1000, False),
        (None, 0, False),
    ):
        monkeypatch.setattr(local, "socket_owner", lambda *_, owner=owner: owner)
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        assert local.allowed_owner("127.0.0.1", 1, "127.0.0.1", 2) == allowed


# -- what sessions are -----------------------------------------------------------------------------------


@root
def test_a_shells_groups_are_its_users(serve: Serve) -> None:
    name = f"gosshd-t{os.getpid() % 10000}"
    if shutil.which("useradd") is None:
        pytest.skip("not installed: useradd")
    subprocess.run(["useradd", "-M", "-G", "games,mail", name], check=True, capture_output=True)
    try:
        server = serve(run_as=name)
        groups = set(server.ssh("HOST", "id -Gn").stdout.decode().split())
        assert groups == {name, "games", "mail"}
        assert os.getgroups() != [grp.getgrnam("games").gr_gid]
    finally:
        server.stop()
        subprocess.run(["userdel", name], check=True, capture_output=True)


def test_core_dumps_are_off_unless_asked_for(serve: Serve) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
        off, on = serve(), serve(rlimits={"core": 4096, "nofile": 100})
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    assert off.ssh("HOST", "grep core /proc/self/limits").stdout.split()[4:6] == [b"0", b"0"]
    if hard == resource.RLIM_INFINITY or hard >= 4096:
        assert on.ssh("HOST", "grep core /proc/self/limits").stdout.split()[4] == b"4096"


def test_an_accounts_limits_leave_the_others_as_they_are(serve: Serve, key: Key) -> None:
    account = {"authorized_keys": [key.public], "rlimits": {"cpu": 60}}
    server = serve(accounts={"alice": account}, rlimits={"nofile": 100, "cpu": 600, "core": 1024})
    shown = login(server, key, "ulimit -n; ulimit -t; ulimit -c").stdout.split()
    assert shown == [b"100", b"60", b"1"]


@root
def test_limits_that_the_user_could_not_set_are_told_by_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    limit = {"nofile": 8192}

    def problems(**settings: Any) -> list[str]:
        return [".".join(key) for key, _ in checks.problems_of(msgspec.convert(settings, Config))]

    assert problems(rlimits=limit) == []
    assert problems(rlimits=limit, run_as="nobody") == ["rlimits"]
    assert problems(rlimits=limit, accounts={"a": {"password": hashed(), "run_as": "nobody"}}) == ["accounts.a"]  # fmt: skip
    assert problems(accounts={"a": {"password": hashed(), "run_as": "nobody", "rlimits": limit}}) == ["accounts.a.rlimits"]  # fmt: skip


@root
def test_a_home_is_made_with_a_containers_few_capabilities(homes: Path) -> None:
    """CHOWN, but not FOWNER: what is given away can no longer be changed."""
    caps = "-all,+setuid,+setgid,+chown,+kill"
    script = f"""
from gosshd_py.accounts import Account
import os, pwd, sys
import gosshd_py.accounts
nobody = pwd.getpwnam("nobody")
account = Account("a", ("/bin/sh",), True, (nobody.pw_uid, nobody.pw_gid), {str(homes)!r} + "/a", True)
account.make_home()
def fails(*_): raise OSError(5, "no")
gosshd_py.accounts.Path.rename = fails
other = Account("b", ("/bin/sh",), True, (nobody.pw_uid, nobody.pw_gid), {str(homes)!r} + "/b", True)
try:
    other.make_home()
except OSError as exc:
    print(exc)
"""
    argv = ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}", sys.executable, "-c", script]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stdout == "[Errno 5] no\n", result.stderr
    assert os.listdir(homes) == ["a"]  # nothing half-made is left
    assert (homes / "a").stat().st_mode & 0o777 == 0o700
    assert (homes / "a").owner() == "nobody"


def test_variables_are_nobody_elses_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's arguments are everybody's (proc(5)), its environment is not."""
    seen: list[Any] = []

    def popen(argv: list[Any], **options: Any) -> None:
        seen.append((argv, options["env"]))
        raise OSError(1, "no")

    monkeypatch.setattr(subprocess, "Popen", popen)
    command = launch.Command(["/bin/sh"], {"HOME": "/"}, {"TOKEN": b"s3cr3t", "LD_PRELOAD": b"x"})
    with pytest.raises(SpawnError):
        process.spawn(command, stdin=0, stdout=1, stderr=2, terminal=False)
    ((argv, env),) = seen
    assert not any("s3cr3t" in os.fsdecode(word) for word in argv)
    assert b"TOKEN=s3cr3t" in env.values()
    assert "LD_PRELOAD" not in env  # before the user is changed


def test_the_events_of_a_session_have_all_their_fields(serve: Serve) -> None:
    server = serve()
    server.ssh("-tt", "HOST", "stty size; exit 3")
    wait_for("its line", lambda: server.events("session over"))
    (event,) = server.events("session over")
    assert {
        *(
            "peer",
            "user",
            "kind",
            "command",
            "pty",
            "size",
            "cause",
            "exit",
            "bytes_in",
            "bytes_out",
        ),
        *("seconds", "delivered"),
    } <= set(event)
    assert (event["bytes_out"], event["exit"], event["delivered"]) == (
        len("24 80\r\n"),
        "status 3",
        True,
    )


# -- gosshd check, reload and the like -------------------------------------------------------------------


def check(tmp_path: Path, text: str) -> tuple[int, str]:
    (tmp_path / "c.toml").write_text(text)
    result = gosshd_once(tmp_path, "check", "--config", str(tmp_path / "c.toml"), NO_COLOR="1")
    return result.returncode, result.stderr


def test_check_tells_of_keys_that_will_not_do(tmp_path: Path, key: Key, ca: Key) -> None:
    (tmp_path / "garbage").write_text("no key\n")
    settings = f'[accounts."*"]\n[auth]\ntrusted_user_ca_keys = ["{tmp_path}/garbage"]\n'
    status, told = check(tmp_path, settings)
    assert status == 2
    assert "c.toml:3: auth.trusted_user_ca_keys: " in told
    settings = f'[accounts."*"]\n[auth]\ntrusted_user_ca_keys = ["{ca.file}"]\n'
    assert check(tmp_path, settings)[0] == 2  # the private key
    keys = tmp_path / "open"
    keys.write_text(key.public)
    keys.chmod(0o666)
    status, told = check(tmp_path, f'[accounts.alice]\nauthorized_keys = ["{keys}"]\n')
    assert "gosshd: warning: accounts.alice: " in told
    assert "can be written by others" in told


def test_check_tells_of_a_host_key_that_will_not_do(tmp_path: Path) -> None:
    (tmp_path / "hostkeys").mkdir()
    assert check(tmp_path, 'hostkeys = "hostkeys"\n')[0] == 0
    assert os.listdir(tmp_path / "hostkeys") == []
    (tmp_path / "hostkeys" / "ssh_host_ed25519_key").write_text("x")
    status, told = check(tmp_path, 'hostkeys = "hostkeys"\n')
    assert status == 2
    assert "\ngosshd: error: hostkeys: " in f"\n{told}"


def test_a_nul_hides_no_other_problem(tmp_path: Path) -> None:
    status, told = check(
        tmp_path,
        'motd = "a\\u0000b"\npenalty_exempt = ["10.0.0.1/8"]\n[accounts.a]\nhome = "\\u0000"\n',
    )
    assert status == 2
    assert sorted(line.split(": ")[3] for line in told.splitlines()) == [
        *("accounts.a", "accounts.a.home", "motd", "penalty_exempt"),
    ]


def test_a_line_that_only_looks_like_the_key_is_not_told(tmp_path: Path) -> None:
    text = (
        'motd = """\nlisten = here\n[accounts]\n"""\n# """\numask = "022"\nlisten = ["nowhere"]\n'
    )
    assert "c.toml:7: listen: " in check(tmp_path, text)[1]


@root
def test_only_who_gets_a_shell_as_root_is_warned_of(tmp_path: Path, key: Key) -> None:
    keys = f'authorized_keys = ["{key.public}"]'
    text = f'[accounts.tunnel]\nshell = false\n{keys}\n[accounts.locked]\npassword = "!"\n{keys}\n'
    assert check(tmp_path, text) == (0, "")
    told = check(tmp_path, f"{text}[accounts.alice]\n{keys}\n")[1]
    assert (
        told
        == "gosshd: warning: run_as is not set: alice gets a shell as root; set run_as to another user\n"
    )


@root
def test_a_reload_warns_of_what_it_allows(start: Start, tmp_path: Path, key: Key) -> None:
    config = tmp_path / "lab.toml"
    account = f'[accounts.alice]\nauthorized_keys = ["{key.public}"]\n'
    config.write_text(f'run_as = "nobody"\n{account}')
    server = start("--config", str(config), "--listen", "127.0.0.1:0").wait_until_ready()
    config.write_text(account)
    server.process.send_signal(1)
    wait_for("the warning", lambda: "alice gets a shell as root" in server.log_file.read_text())


def test_a_configuration_that_cannot_be_read_in_time_deafens_nobody(
    start: Start, tmp_path: Path, key: Key
) -> None:
    config = tmp_path / "lab.toml"
    config.write_text(f'[accounts.alice]\nauthorized_keys = ["{key.public}"]\n')
    server = start("--config", str(config), "--listen", "127.0.0.1:0").wait_until_ready()
    config.unlink()
    os.mkfifo(config)
    server.process.send_signal(1)
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 5


def test_probe_shows_nothing_that_a_terminal_would_obey(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        argv = [
            sys.executable,
            "-m",
            "gosshd_py",
            "probe",
            f"127.0.0.1:{listener.getsockname()[1]}",
        ]
        probe = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE)
        with listener.accept()[0] as sock:
            sock.sendall(b"SSH-2.0-\x1b]0;evil\x07\r\n")
            assert probe.communicate(timeout=10)[0] == b"SSH-2.0-\\x1b]0;evil\\x07\n"


def test_a_file_that_holds_no_pid_is_not_taken_for_one(start: Start, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("do not lose me")
    server = start("--pid-file", str(precious), "--listen", "127.0.0.1:0").wait_until_ready()
    assert server.stop() == 0
    assert precious.read_text() == "do not lose me"
    assert "it holds something else than a pid" in server.log_file.read_text()
