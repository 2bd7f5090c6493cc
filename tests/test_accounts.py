"""Who may enter, with the real client: keys and their options, certificates, passwords, open mode."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import paramiko
import pexpect
import pytest

from gosshd_py import passwords
from gosshd_py.authorized_keys import check_source, match_source
from gosshd_py.local import socket_owner

from .keys import PASSWORD, Key, hashed
from .serving import Served, run, wait_for

Serve = Callable[..., Served]

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def login(
    server: Served, key: Key | None, *command: str, user: str = "alice", **kwargs: Any
) -> Any:
    """Log in by this key and no other."""
    options = ["-i", str(key.file), "-o", "IdentitiesOnly=yes"] if key else []
    return server.ssh(*options, "HOST", *(command or ("echo in",)), user=user, **kwargs)


def accepted(server: Served, key: Key | None, **kwargs: Any) -> bool:
    result = login(server, key, **kwargs)
    assert (result.stdout == b"in\n") == (result.returncode == 0), result
    if result.returncode:
        assert b"Permission denied" in result.stderr, result
    return result.returncode == 0


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return Key(tmp_path / "keys")


@pytest.fixture
def ca(tmp_path: Path) -> Key:
    return Key(tmp_path / "keys", "ca")


def test_a_key_opens_its_account_and_no_other(serve: Serve, key: Key, tmp_path: Path) -> None:
    other = Key(tmp_path / "keys", "other")
    server = serve(accounts={
        "alice": {"authorized_keys": [key.public]},
        "bob": {"authorized_keys": [other.public]},
    })  # fmt: skip
    assert accepted(server, key)
    assert not accepted(server, key, user="bob")
    assert not accepted(server, key, user="carol")
    assert not accepted(server, None)
    assert login(server, key, 'echo "$USER $LOGNAME"').stdout == b"alice alice\n"
    wait_for("lines", lambda: server.events("authentication accepted"))
    event = server.events("authentication accepted")[0]
    assert (event["user"], event["method"]) == ("alice", "publickey")
    assert event["key"] == f"{key.fingerprint} ssh-ed25519"
    reasons = {event["reason"] for event in server.events("authentication rejected")}
    assert reasons == {"not a key of this account", "no such account"}


def test_everybody_else_has_the_default_account(serve: Serve, key: Key, tmp_path: Path) -> None:
    (tmp_path / "keys" / "bob").write_text(key.public)
    server = serve(accounts={
        "alice": {"password": hashed()},
        "*": {"authorized_keys": [f"{tmp_path}/keys/{{user}}"], "env": {"WHO": "everybody"}},
    })  # fmt: skip
    assert login(server, key, "echo $WHO", user="bob").stdout == b"everybody\n"
    assert not accepted(server, key, user="carol")
    assert not accepted(server, key, user="alice")


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_every_usual_kind_of_key_works(serve: Serve, tmp_path: Path, kind: str) -> None:
    key = Key(tmp_path / "keys", kind, "-t", kind)
    server = serve(accounts={"alice": {"authorized_keys": [key.public]}})
    assert accepted(server, key)


def test_signatures_with_sha1_and_short_rsa_keys_are_refused(serve: Serve, tmp_path: Path) -> None:
    weak = Key(tmp_path / "keys", "weak", "-t", "rsa", "-b", "1024")
    rsa = Key(tmp_path / "keys", "rsa", "-t", "rsa")
    keys = tmp_path / "authorized_keys"
    keys.write_text(f"{weak.public}\n{rsa.public}\n")
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})
    assert accepted(server, rsa)
    assert not accepted(server, weak)
    sha1 = ["-o", "PubkeyAcceptedAlgorithms=ssh-rsa", "-i", str(rsa.file)]
    assert server.ssh(*sha1, "HOST", "true", user="alice").returncode == 255
    (pair,) = asyncssh.load_keypairs([rsa.file])
    pair.sig_algorithms = [b"ssh-rsa"]
    pair.set_sig_algorithm(b"ssh-rsa")
    with pytest.raises(asyncssh.PermissionDenied):
        run(server.connect(username="alice", client_keys=[pair]))
    assert server.events("authentication rejected", reason="the signature is wrong")


# -- options of a key's line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "in_"),
    [
        ("", True),
        ("restrict", True),
        ("no-pty,no-port-forwarding,no-agent-forwarding,no-X11-forwarding", True),
        ("NO-PTY", True),
        ('from="127.0.0.1"', True),
        ('from="127.0.0.*,!127.0.0.2"', True),
        ('from="10.0.0.0/8,127.0.0.0/8"', True),
        ('from="127.0.0.?"', True),
        ('from="*,!127.0.0.1"', False),
        ('from="*,!127.0.0.0/8"', False),
        ('from="10.0.0.0/8"', False),
        ('from="localhost"', False),
        ('expiry-time="29991231"', True),
        ('expiry-time="299912312359Z"', True),
        ('expiry-time="20200101"', False),
        ('expiry-time="29991231",expiry-time="20200101Z"', False),
        ('permitopen="db.lab:5432",permitopen="[::1]:*",permitlisten="8080",port-forwarding', True),
        ('environment="FOO=1",environment="LC_X=2"', True),
        # Each of these disables the key, and says so in the log.
        ("no-user-rc", "no-user-rc is not supported"),
        ("agent-forwarding", "agent-forwarding is not supported"),
        ("verify-required", "verify-required is not supported"),
        ('tunnel="0"', "tunnel= is not supported"),
        ('pty="yes"', "pty= is not supported"),
        ("command", 'needs a value: command="…"'),
        ('from="10.0.0.1/8"', "from=: 10.0.0.1/8 has host bits set"),
        ('from="!10.0.0.1"', "from= only excludes"),
        ('from=""', "from= has an empty entry"),
        ('from="*",from="*"', "from= stands there twice"),
        ('command="a",command="b"', "command= stands there twice"),
        ('principals="alice"', "principals= means nothing without cert-authority"),
        ('expiry-time="tomorrow"', "expiry-time= needs YYYYMMDD"),
        ('expiry-time="20201332"', "expiry-time= needs YYYYMMDD"),
        ('permitopen="db.lab"', "permitopen= needs HOST:PORT"),
        ('permitopen="db.lab:70000"', "permitopen= needs HOST:PORT"),
        ('permitlisten="a:b"', "permitlisten= needs PORT"),
        ('environment="1X=1"', 'environment= needs "NAME=value"'),
        ("pty,,no-pty", "options before the key are damaged"),
        ('command="unfinished', "options before the key are damaged"),
    ],
)
def test_the_options_of_a_line(
    serve: Serve, key: Key, tmp_path: Path, options: str, in_: bool | str
) -> None:
    keys = tmp_path / "authorized_keys"
    keys.write_text(f"# a comment\n\n{key.line(options)}\n")
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})
    assert accepted(server, key) == (in_ is True)
    lines = server.events("key line not used")
    if isinstance(in_, str):
        (line,) = lines
        assert in_ in line["reason"]
        assert line["reason"].startswith(f"{keys}:3: ")
    else:
        assert not lines


def test_a_damaged_line_hides_no_other(serve: Serve, key: Key, tmp_path: Path) -> None:
    keys = tmp_path / "authorized_keys"
    damaged = [
        "ssh-ed25519 AAAAdamaged",
        "\x00\x1b[2J",
        "ssh-dss AAAAB3NzaC1kc3M= x",
        "x" * 70000,
        "nonsense",
        key.public[:60],
    ]
    keys.write_bytes("\n".join([*damaged, key.public, *damaged[:3]]).encode() + b"\xff\xfe\n")
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})
    assert accepted(server, key)
    assert accepted(server, key)
    assert len(server.events("key line not used")) == len(damaged) + 3  # said once


@pytest.mark.parametrize("end", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"])
def test_only_a_newline_ends_a_line(serve: Serve, key: Key, tmp_path: Path, end: str) -> None:
    """What sshd takes for a comment must not be a second key without the first one's options."""
    other = Key(tmp_path / "keys", "other")
    keys = tmp_path / "authorized_keys"
    keys.write_bytes(f"restrict {key.public}{end}{other.public}\n".encode())
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})
    assert not accepted(server, other)
    assert server.events("key line not used")[0]["reason"].endswith("control characters in it")
    assert check_source(f"{key.public}{end}{other.public}", must_exist=True)


def test_an_address_is_excluded_however_it_is_written() -> None:
    for pattern in ("!2001:db8:0::1", "!2001:0db8::1", "!2001:DB8::1", "!2001:db8::/64"):
        assert not match_source("2001:db8::1", (pattern, "*"))
        assert match_source("2001:db8::2", (pattern, "*")) == ("/" not in pattern)


def test_a_locked_account_is_locked_for_keys_too(serve: Serve, key: Key, ca: Key) -> None:
    settings = {"password": "!", "authorized_keys": [key.public]}
    server = serve(accounts={"alice": settings}, auth={"trusted_user_ca_keys": [ca.public]})
    assert not accepted(server, key)
    assert not accepted(server, key.certify(ca))
    reasons = {event["reason"] for event in server.events("authentication rejected")}
    assert reasons == {"the account is locked"}


def test_variables_that_programs_rely_on_are_ours(serve: Serve, key: Key) -> None:
    line = key.line('command="env",environment="LAB=1",environment="LD_PRELOAD=/x"')
    server = serve(
        accounts={"alice": {"authorized_keys": [line]}},
        accept_env=["*"], permit_user_environment=["LAB"],
    )  # fmt: skip
    forged = dict.fromkeys(
        (
            "HOME",
            "USER",
            "LOGNAME",
            "SHELL",
            "SSH_CLIENT",
            "SSH_CONNECTION",
            "SSH_ORIGINAL_COMMAND",
        ),
        "forged",
    )
    options = ("-o", "SendEnv=*", "-i", str(key.file))
    known_hosts = ("-o", f"UserKnownHostsFile={server.known_hosts}")
    variables = {**forged, "FOO": "mine"}
    result = server.ssh(*options, *known_hosts, "HOST", user="alice", **variables)
    env = dict(line.split("=", 1) for line in result.stdout.decode().splitlines() if "=" in line)
    assert env["FOO"] == "mine"
    assert env["LAB"] == "1"
    assert "forged" not in env.values()
    assert "SSH_ORIGINAL_COMMAND" not in env


def test_the_files_are_read_at_each_login(serve: Serve, key: Key, tmp_path: Path) -> None:
    keys = tmp_path / "authorized_keys"
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})
    assert not accepted(server, key)
    keys.write_text(key.public)
    assert accepted(server, key)
    keys.write_text("")
    assert not accepted(server, key)
    assert not server.events("key line not used")


def test_a_file_that_others_could_have_written_is_not_used(
    serve: Serve, key: Key, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    keys = folder / "authorized_keys"
    keys.write_text(key.public)
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})
    assert accepted(server, key)
    keys.chmod(0o666)
    assert not accepted(server, key)
    keys.chmod(0o600)
    folder.chmod(0o775)
    assert not accepted(server, key)
    folder.chmod(0o755)
    assert accepted(server, key)
    keys.unlink()
    os.mkfifo(keys)
    assert not accepted(server, key)
    reasons = [event["reason"] for event in server.events("key line not used")]
    assert reasons == [
        f"{keys}: {keys} can be written by others; chmod go-w it",
        f"{keys}: {folder} can be written by others; chmod go-w it",
        f"{keys}: is not a regular file",
    ]


def test_a_forced_command_replaces_every_request(serve: Serve, key: Key) -> None:
    command = 'echo \\"$SSH_ORIGINAL_COMMAND\\" was asked; exit 3'
    server = serve(accounts={"alice": {"authorized_keys": [key.line(f'command="{command}"')]}})
    for request, asked in ((["ls -l"], "ls -l"), ([], ""), (["-s", "sftp"], "sftp")):
        options = [] if request[:1] != ["-s"] else ["-s"]
        argv = ["-i", str(key.file), *options, "HOST", *request[len(options) :]]
        result = server.ssh(*argv, user="alice")
        assert (result.stdout.decode(), result.returncode) == (f"{asked} was asked\n", 3), result


def test_terminals_can_be_forbidden_and_allowed_again(
    serve: Serve, key: Key, tmp_path: Path
) -> None:
    keys = tmp_path / "authorized_keys"
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})
    for options, has in (
        ("", 1),
        ("no-pty", 0),
        ("restrict", 0),
        ("restrict,pty", 1),
        ("pty,restrict", 0),
    ):
        keys.write_text(key.line(options))
        result = server.ssh("-tt", "-i", str(key.file), "HOST", "tty", user="alice")
        assert (b"/dev/pts/" in result.stdout) == bool(has), (options, result)
        assert (b"PTY allocation request failed" in result.stderr) == (not has)


def test_a_lines_environment_is_what_is_on_the_list(serve: Serve, key: Key) -> None:
    options = 'environment="LC_ROLE=student",environment="LD_PRELOAD=/x",environment="LC_A=line"'
    server = serve(accounts={"alice": {"authorized_keys": [key.line(options)], "env": {"LC_A": "account"}}})  # fmt: skip
    result = login(server, key, 'echo "$LC_ROLE $LC_A $LC_B [$LD_PRELOAD]"')
    assert result.stdout == b"student account  []\n"
    argv = ["-o", "SendEnv=LC_*", "-i", str(key.file), "HOST", 'echo "$LC_ROLE $LC_A $LC_B"']
    result = server.ssh(*argv, user="alice", LC_ROLE="teacher", LC_A="client", LC_B="client")
    assert result.stdout == b"student account client\n"


# -- certificates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["trusted_user_ca_keys", "cert-authority"])
def test_a_certificate_opens_the_account_of_its_principal(
    serve: Serve, key: Key, ca: Key, where: str
) -> None:
    alice: dict[str, Any] = {"authorized_keys": [ca.line("cert-authority")]}
    auth = {}
    if where == "trusted_user_ca_keys":
        alice, auth = {}, {"trusted_user_ca_keys": [ca.public]}
    server = serve(accounts={"alice": alice, "bob": {**alice, "principals": ["teachers", "{user}"]}}, auth=auth)  # fmt: skip
    assert not accepted(server, key)  # the bare key
    assert accepted(server, key.certify(ca))
    assert not accepted(server, key, user="bob")
    assert accepted(server, key.certify(ca, principals="x,bob"), user="bob")
    assert not accepted(server, key)
    assert accepted(server, key.certify(ca, principals="teachers"), user="bob")
    assert not accepted(server, key.certify(ca, principals=None))  # for everybody: for nobody
    assert not accepted(server, key.certify(ca, "-V", "20200101:20200102"))
    assert not accepted(server, key.certify(ca, "-V", "20990101:20990102"))
    assert not accepted(server, key.certify(ca, "-h"))
    assert not accepted(server, key.certify(key))
    assert accepted(server, key.certify(ca, "-O", "source-address=127.0.0.0/8"))
    assert not accepted(server, key.certify(ca, "-O", "source-address=10.0.0.0/8"))
    assert not accepted(server, key.certify(ca, "-O", "critical:unknown@x=1"))
    assert accepted(server, key.certify(ca, "-O", "extension:unknown@x=1"))
    event = server.events("authentication accepted")[0]
    ca_print = ca.fingerprint
    assert event["certificate"] == f"serial 7 CA {ca_print} id 'the id'"
    assert event["key"] == f"{key.fingerprint} ssh-ed25519"


def test_a_ca_line_has_options_too(serve: Serve, key: Key, ca: Key, tmp_path: Path) -> None:
    keys = tmp_path / "authorized_keys"
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})
    key.certify(ca, principals="staff")
    for options, in_ in (
        ('cert-authority,principals="staff,alice"', True),
        ('cert-authority,principals="alice"', False),
        ("cert-authority", False),
        ('cert-authority,principals="staff",from="10.0.0.0/8"', False),
        ('cert-authority,principals="staff",expiry-time="20200101"', False),
        ('principals="staff"', False),
    ):
        keys.write_text(ca.line(options))
        assert accepted(server, key) == in_, options
    assert not accepted(server, ca)
    keys.write_text(ca.line("cert-authority"))
    assert not accepted(server, ca), "a CA's own key is no login"


def test_a_ca_may_not_sign_with_sha1(serve: Serve, key: Key, tmp_path: Path) -> None:
    ca = Key(tmp_path / "keys", "rsa_ca", "-t", "rsa")
    server = serve(accounts={"alice": {}}, auth={"trusted_user_ca_keys": [ca.public]})
    assert accepted(server, key.certify(ca, "-t", "rsa-sha2-512"))
    assert not accepted(server, key.certify(ca, "-t", "ssh-rsa"))


def test_the_stricter_of_line_and_certificate_counts(
    serve: Serve, key: Key, ca: Key, tmp_path: Path
) -> None:
    keys = tmp_path / "authorized_keys"
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})

    def tty() -> bool:
        return (
            b"/dev/pts"
            in server.ssh("-tt", "-i", str(key.file), "HOST", "tty", user="alice").stdout
        )

    keys.write_text(ca.line("cert-authority"))
    key.certify(ca)
    assert tty()
    key.certify(ca, "-O", "clear")
    assert not tty()
    key.certify(ca, "-O", "clear", "-O", "permit-pty")
    assert tty()
    keys.write_text(ca.line("cert-authority,no-pty"))
    assert not tty()


def test_asking_for_a_key_is_no_try_if_the_answer_is_yes(
    serve: Serve, key: Key, tmp_path: Path
) -> None:
    """ssh asks before it signs, so two wrong keys and the right one are three tries, not four."""
    wrong = [Key(tmp_path / "keys", f"wrong{number}") for number in range(3)]
    server = serve(accounts={"alice": {"authorized_keys": [key.public]}}, max_auth_tries=3)
    options = ["-o", "IdentitiesOnly=yes"]
    for count, in_ in ((2, True), (3, False)):
        files = [word for other in wrong[:count] for word in ("-i", str(other.file))]
        result = server.ssh(*options, *files, "-i", str(key.file), "HOST", "true", user="alice")
        assert (result.returncode == 0) == in_, result
    assert b"too many failed logins" in result.stderr


def test_two_different_forced_commands_refuse(
    serve: Serve, key: Key, ca: Key, tmp_path: Path
) -> None:
    keys = tmp_path / "authorized_keys"
    server = serve(accounts={"alice": {"authorized_keys": [str(keys)]}})
    keys.write_text(ca.line('cert-authority,command="echo line"'))
    assert login(server, key.certify(ca)).stdout == b"line\n"
    assert not accepted(server, key.certify(ca, "-O", "force-command=echo certificate"))
    assert login(server, key.certify(ca, "-O", "force-command=echo line")).stdout == b"line\n"
    keys.write_text(ca.line("cert-authority"))
    key.certify(ca, "-O", "force-command=echo certificate")
    assert login(server, key).stdout == b"certificate\n"
    reasons = {event["reason"] for event in server.events("authentication rejected")}
    assert "the key's line and the certificate force different commands" in reasons


# -- passwords ----------------------------------------------------------------------------------------


def type_password(
    server: Served, *passwords: str, user: str = "alice", method: str = "password"
) -> Any:
    options = [
        "-o",
        "BatchMode=no",
        "-o",
        f"PreferredAuthentications={method}",
        "-o",
        "NumberOfPasswordPrompts=9",
    ]
    argv = server.ssh_argv(*options, "HOST", "echo in", user=user)
    client = pexpect.spawn(argv[0], argv[1:], timeout=10, encoding="utf-8")
    server.terminals.append(client)
    for password in passwords:
        assert client.expect(["assword: ", pexpect.EOF]) == 0, client.before
        client.sendline(password)
    return client


@pytest.mark.parametrize("method", ["password", "keyboard-interactive"])
def test_a_password_opens_its_account(serve: Serve, method: str) -> None:
    server = serve(accounts={"alice": {"password": hashed()}, "bob": {"password": "!"}})
    client = type_password(server, "wrong", PASSWORD, method=method)
    client.expect("\r\nin\r\n")
    (event,) = server.events("authentication accepted")
    assert (event["user"], event["method"]) == ("alice", method)
    for name in ("bob", "carol"):
        type_password(server, PASSWORD, user=name, method=method).expect("assword: ")
    reasons = [event["reason"] for event in server.events("authentication rejected", method=method)]
    assert reasons == ["wrong password", "the account is locked", "no such account"]
    log = server.log_file.read_text()
    assert PASSWORD not in log
    assert "$argon2" not in log


@pytest.mark.parametrize("method", ["password", "keyboard-interactive"])
def test_a_password_is_the_same_however_it_is_composed(serve: Serve, method: str) -> None:
    """Both methods prepare it alike (RFC 4013): clients differ in what they send for an é."""
    server = serve(accounts={"alice": {"password": hashed("caf\u00e9")}})
    type_password(server, "cafe\u0301", method=method).expect("\r\nin\r\n")


def test_passwords_are_asked_for_only_if_there_are_any(serve: Serve, key: Key) -> None:
    server = serve(accounts={"alice": {"authorized_keys": [key.public]}})
    assert b"Permission denied (publickey)." in server.ssh("true", user="alice").stderr
    server = serve(accounts={"alice": {"authorized_keys": [key.public]}, "bob": {"password": hashed()}})  # fmt: skip
    for name in ("alice", "bob", "carol"):
        denied = server.ssh("true", user=name).stderr
        assert b"Permission denied (publickey,keyboard-interactive,password)." in denied


def test_wrong_names_and_wrong_passwords_take_the_same_time(serve: Serve) -> None:
    """With hashes as gosshd passwd makes them; the answers to wrong ones come at fixed times."""
    from gosshd_py.passwords import make_hash

    server = serve(
        accounts={"alice": {"password": make_hash("x")}, "bob": {"password": "!"}}, max_auth_tries=0
    )
    times: dict[str, list[float]] = {"alice": [], "bob": [], "nobody": [], "../x": []}
    for _ in range(3):
        for name, measured in times.items():
            with server.paramiko_transport() as transport:
                began = time.monotonic()
                with pytest.raises(Exception, match="Authentication failed"):
                    transport.auth_password(name, "wrong", fallback=False)
                measured.append(time.monotonic() - began)
    best = {name: min(measured) for name, measured in times.items()}
    assert max(best.values()) - min(best.values()) < 0.05, times
    assert min(best.values()) > 0.25


def test_a_name_without_a_password_costs_a_hash_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    real = passwords._verify

    def compare(text: str, given: str) -> bool:
        compared.append(text)
        return real(text, given)

    monkeypatch.setattr(passwords, "_verify", compare)
    them = passwords.Passwords([hashed(), "!"])
    for expected in ("", "!", hashed()):
        assert not run(them.match(expected, "wrong"))
    assert not run(them.match(hashed(), "x" * 5000))
    assert len(compared) == 4
    assert all(text.startswith("$argon2id$v=19$m=1024,t=1,p=1$") for text in compared)
    assert run(them.match(hashed(), PASSWORD))


def test_hashing_does_not_stop_the_loop(serve: Serve) -> None:
    from gosshd_py.passwords import make_hash

    server = serve(accounts={"alice": {"password": make_hash("x")}})
    worst: list[float] = []
    while len(worst) < 3 and not (worst and worst[-1] < 0.05):  # the machine itself may stand still
        with server.paramiko_transport() as transport:
            server.ask("lag")
            with pytest.raises(Exception, match="Authentication failed"):
                transport.auth_password("alice", "wrong", fallback=False)
            worst.append(server.ask("lag")["worst"])
    assert worst[-1] < 0.05, worst


def test_another_name_in_the_same_connection_disconnects(serve: Serve) -> None:
    server = serve(accounts={"alice": {"password": hashed()}})
    with server.paramiko_transport() as transport:
        with pytest.raises(Exception, match="Authentication failed"):
            transport.auth_password("bob", "x", fallback=False)
        request = paramiko.Message()
        request.add_byte(paramiko.common.cMSG_USERAUTH_REQUEST)
        for text in ("alice", "ssh-connection", "password"):
            request.add_string(text)
        request.add_boolean(False)
        request.add_string(PASSWORD)
        transport._send_message(request)
        wait_for("its end", lambda: not transport.is_active())
        assert not transport.is_authenticated()
    wait_for("its line", lambda: server.events("connection closed"))
    assert server.events("connection closed")[0]["reason"] == "the user name was changed"


@pytest.mark.parametrize("name", ["", "..", "-o", "a/b", "a b", "ä", "a\nb", "x" * 33, "$(id)"])
def test_no_improper_name_gets_the_default_account(serve: Serve, name: str) -> None:
    server = serve(accounts={"*": {"password": hashed()}})
    with server.paramiko_transport() as transport:
        with pytest.raises(Exception):  # noqa: B017
            transport.auth_password(name, PASSWORD, fallback=False)
        assert not transport.is_authenticated()
    with server.paramiko_transport() as transport:
        transport.auth_password("anybody", PASSWORD, fallback=False)


def test_nothing_but_a_login_opens_a_channel(serve: Serve) -> None:
    server = serve(accounts={"alice": {"password": hashed()}})
    with server.paramiko_transport() as transport:
        with pytest.raises(Exception):  # noqa: B017
            transport.open_session(timeout=5)
    assert b"Permission denied" in server.ssh("true", user="alice").stderr
    assert not server.events("session started")


# -- open mode ----------------------------------------------------------------------------------------


def client_as(server: Served, user: str, *command: str) -> subprocess.CompletedProcess[bytes]:
    """The ssh client as another system user."""
    known_hosts = Path(f"/tmp/known_hosts.{os.getpid()}")
    known_hosts.write_text(server.known_hosts.read_text())
    known_hosts.chmod(0o644)
    options = ("-o", f"UserKnownHostsFile={known_hosts}", "-o", "LogLevel=INFO")
    argv = server.ssh_argv(*options, *(() if "HOST" in command else ("HOST",)), *command)
    try:
        return subprocess.run(argv, user=user, group=pwd.getpwnam(user).pw_gid, extra_groups=[], capture_output=True, timeout=20, check=False, env={"PATH": os.environ["PATH"]})  # fmt: skip
    finally:
        known_hosts.unlink()


@root
def test_open_mode_is_for_the_servers_own_user_and_root(serve: Serve) -> None:
    server = serve()
    assert server.ssh("true").returncode == 0
    refused = client_as(server, "nobody", "true")
    assert refused.returncode == 255
    assert b"gosshd: this server is open only to the user who runs it" in refused.stderr
    (event,) = server.events("authentication rejected")
    assert event["reason"] == "this server is open only to the user who runs it"
    assert client_as(serve(open_to_local_users=True), "nobody", "true").returncode == 0


@root
def test_a_socket_that_its_owner_has_closed_is_nobodys(serve: Serve, tmp_path: Path) -> None:
    """The kernel may show it as root's, so everything sent in one go before closing must not run."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = listener.getsockname()
        for closed in (False, True):
            client = socket.create_connection(here)
            ours, peer = listener.accept()
            if closed:
                client.close()
            assert (socket_owner(peer, here) is None) == closed
            ours.close()
            client.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:  # reached from an IPv6 socket
        here = listener.getsockname()
        with socket.socket(socket.AF_INET6) as client:
            client.connect((f"::ffff:{here[0]}", here[1]))
            ours, peer = listener.accept()
            assert socket_owner(peer, here) == os.geteuid()
            ours.close()
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        here = listener.getsockname()[:2]
        with socket.create_connection(here):
            ours, peer = listener.accept()
            assert socket_owner(peer[:2], here) == os.geteuid()
            ours.close()


# -- what an account's sessions are --------------------------------------------------------------------


def test_an_account_says_what_its_sessions_are(serve: Serve, key: Key, tmp_path: Path) -> None:
    common = {"authorized_keys": [key.public]}
    server = serve(
        home=f"{tmp_path}/homes/{{user}}",
        umask="027",
        env={"A": "all", "B": "all"},
        motd="Welcome.\nBe kind.",
        accounts={
            "alice": {**common, "env": {"B": "alice", "PATH": "/bin"}, "umask": "077",
                      "shell": ["/usr/bin/env", "SHELL_IS=env", "/bin/sh"], "motd": "",
                      "rlimits": {"nofile": 50, "nproc": 4000, "cpu": 60, "as": 2**31, "core": 1024}},
            "bob": common,
        },
    )  # fmt: skip
    show = "umask; echo $A $B $PATH $SHELL_IS; ulimit -n; ulimit -t; ulimit -v; pwd"
    assert login(server, key, show).stdout.decode().splitlines() == [
        *("0077", "all alice /bin env", "50", "60", str(2**21), f"{tmp_path}/homes/alice"),
    ]
    limits = login(server, key, "cat /proc/self/limits").stdout.decode()
    for name, value in (
        ("Max processes", 4000),
        ("Max core file size", 1024),
        ("Max open files", 50),
    ):
        (line,) = [line for line in limits.splitlines() if line.startswith(name)]
        assert line[26:].split()[:2] == [str(value)] * 2
    out = login(server, key, "umask; echo $A $B; ulimit -c", user="bob").stdout
    assert out == b"0027\nall all\n0\n"
    for name, greeted in (("alice", False), ("bob", True)):
        client = server.terminal("-tt", "-i", str(key.file), "HOST", user=name)
        client.expect(r"[$#] ")
        assert client.before.startswith(b"Welcome.\r\nBe kind.\r\n") == greeted, client.before
        client.sendline("exit")
        client.expect(pexpect.EOF)
        assert b"Welcome" not in login(server, key, user=name).stdout


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[Path]:
    """Where homes are made: for root, below folders that only root can change."""
    if os.geteuid() != 0:
        yield tmp_path / "homes"
        return
    folder = Path(tempfile.mkdtemp(prefix="gosshd-test-", dir="/srv"))
    folder.chmod(0o755)
    yield folder / "homes"
    shutil.rmtree(folder)


def test_a_home_is_made_at_the_first_login(serve: Serve, key: Key, homes: Path) -> None:
    settings: dict[str, Any] = {"home": f"{homes}/{{user}}"}
    if os.geteuid() == 0:
        settings["run_as"] = "nobody"
    server = serve(accounts={"alice": {"authorized_keys": [key.public]}}, **settings)
    argv = server.ssh_argv("-i", str(key.file), "HOST", "pwd; ls -A", user="alice")
    clients = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(4)
    ]
    skeleton = "".join(f"{name}\n" for name in sorted(os.listdir("/etc/skel")))
    for client in clients:
        out = client.communicate(timeout=20)[0].decode()
        assert out == f"{homes}/alice\n{skeleton}"
    home = homes / "alice"
    assert home.stat().st_mode & 0o7777 == 0o700
    owner = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid()
    assert {path.lstat().st_uid for path in [home, *home.rglob("*")]} == {owner}
    assert os.listdir(homes) == ["alice"]  # no half homes


@root
def test_root_makes_no_home_where_others_could_put_a_link(
    serve: Serve, key: Key, tmp_path: Path, homes: Path
) -> None:
    """Else a visitor could have anything given to himself (run_as) while root works by names."""
    theirs = homes.parent / "theirs"
    theirs.mkdir()
    shutil.chown(theirs, "nobody")
    (homes.parent / "link").symlink_to(tmp_path)
    for place in (theirs, theirs / "deeper", tmp_path, homes.parent / "link"):
        server = serve(
            accounts={"alice": {"authorized_keys": [key.public]}},
            home=f"{place}/{{user}}", run_as="nobody",
        )  # fmt: skip
        assert b"starting in /" in login(server, key, "pwd").stderr
        (event,) = server.events("home not made")
        assert "can be changed by others than root, so make the home yourself" in event["reason"]
        assert not (place / "alice").exists()


@root
def test_accounts_can_be_different_system_users(serve: Serve, key: Key) -> None:
    common = {"authorized_keys": [key.public]}
    server = serve(accounts={"alice": {**common, "run_as": "nobody"}, "bob": {**common, "run_as": "games"}})  # fmt: skip
    assert login(server, key, "id -un; id -G").stdout.split()[0] == b"nobody"
    assert login(server, key, "id -un", user="bob").stdout == b"games\n"


def test_an_account_may_have_only_so_many_sessions(serve: Serve, key: Key) -> None:
    common = {"authorized_keys": [key.public]}
    server = serve(accounts={"alice": {**common, "max_sessions": 1}, "bob": common})
    first = subprocess.Popen(server.ssh_argv("-i", str(key.file), "HOST", "cat", user="alice"), stdin=subprocess.PIPE)  # fmt: skip
    wait_for("the first", lambda: server.stats()["sessions"] == 1)
    refused = server.ssh("-o", "LogLevel=INFO", "-i", str(key.file), "HOST", "true", user="alice")
    assert refused.returncode == 255
    assert (
        b"the account alice has 1 sessions, which is the limit; close one first" in refused.stderr
    )
    assert login(server, key, user="bob").returncode == 0
    first.communicate(timeout=10)
    wait_for("room", lambda: login(server, key).returncode == 0)
    assert server.events("limit hit")[0]["limit"] == "max_sessions"
