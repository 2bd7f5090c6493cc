"""Settings: what a file and the flags may say, and that everything else is named and refused."""

from __future__ import annotations

import ipaddress
import json
import os
import pwd
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gosshd_py.accounts import find_account, system_users
from gosshd_py.config import Address, Config, ConfigError, is_loopback, parse_address
from gosshd_py.load import load_config

SALT = "c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaA"
KEYS = [field.name for field in msgspec.structs.fields(Config)]


def load(directory: Path, text: str | bytes, **flags: object) -> Config:
    file = directory / "gosshd.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(str(file), flags)


def problems(directory: Path, text: str | bytes, **flags: object) -> list[str]:
    """What is wrong with a file, without its folder's name."""
    with pytest.raises(ConfigError) as info:
        load(directory, text, **flags)
    assert str(info.value).splitlines() == info.value.problems
    return [line.removeprefix(f"{directory}/") for line in info.value.problems]


# -- what may be said ------------------------------------------------------------------------------


def test_no_file_and_an_empty_one_are_the_defaults(tmp_path: Path) -> None:
    assert load_config() == load(tmp_path, "") == Config()


def test_a_file_may_set_everything(tmp_path: Path) -> None:
    text = """
        listen = ["0.0.0.0:22", "[::1]:0", "some.name:2222"]
        hostkeys = "keys"
        shell = "/bin/sh"
        run_as = ""
        home = "/home/{user}/x"
        accept_env = ["FOO", "BAR_*"]
        permit_user_environment = ["BAZ"]
        open_to_network = true
        client_alive_interval = 0
        client_alive_count_max = 1
        login_grace_time = 0.5
        hangup_grace = 1
        trace = true
        trace_file = "trace.ndjson"
        trace_data = 80
        drain_timeout = 60
        log_format = "json"
        pid_file = "/tmp/pid"
        workers = "auto"
        open_to_local_users = true
        env = {A = "b"}
        umask = "022"
        rlimits = {nofile = 100, nproc = 10, core = 1, cpu = 60, as = 1000000000}
        motd = "hello"
        max_auth_tries = 0
        max_connections = 10
        per_source_max_connections = 5
        max_startups = 1
        per_source_max_startups = 2
        authfail_penalty = 1.5
        grace_exceeded_penalty = 1
        min_penalty = 1
        max_penalty = 0
        penalty_exempt = ["10.0.0.0/8", "::1"]
        max_sessions = 3
        connection_max_sessions = 4
        total_max_sessions = 5
        idle_timeout = 0
        session_timeout = 1
        unused_connection_timeout = 2
        request_timeout = 3
        auth = {trusted_user_ca_keys = []}
        sftp = false
        read_only = true
        permit_open = ["db.lab:5432", "[::1]:1-9", "*:*"]
        permit_listen = ["127.0.0.1:*"]
        permit_open_sockets = ["/x"]
        permit_listen_sockets = ["*"]
        gateway_ports = true
        agent_forwarding = true
        connection_max_forwards = 0
        accounts = {alice = {password = "!"}}
    """
    config = load(tmp_path, text)
    assert set(KEYS) == {line.split("=")[0].strip() for line in text.splitlines() if line.strip()}
    assert config.rlimits.set() == {"nofile": 100, "nproc": 10, "core": 1, "cpu": 60, "as": 10**9}
    assert config.addresses == (("0.0.0.0", 22), ("::1", 0), ("some.name", 2222))
    assert config.hostkeys_dir == Path("keys")
    assert (config.client_alive_interval, config.login_grace_time) == (0.0, 0.5)
    assert (config.accept_env, config.log_format) == (("FOO", "BAR_*"), "json")


def test_flags_override_even_what_is_wrong_in_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, 'listen = 5\nshell = "/bin/sh"\n', listen=("127.0.0.1:1",))
    assert (config.listen, config.shell) == (("127.0.0.1:1",), "/bin/sh")


def test_the_home_template_holds_the_login_name(tmp_path: Path) -> None:
    config = load(tmp_path, 'home = "/home/{user}/of/{user}"')
    assert find_account(config, "eve", {}).home == "/home/eve/of/eve"
    assert (
        find_account(Config(), "eve", system_users(Config())).home
        == pwd.getpwuid(os.geteuid()).pw_dir
    )


# -- what may not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("shel = 1", "1: shel: unknown key; did you mean shell?"),
        ("x = 1", f"1: x: unknown key; known are {', '.join(KEYS)}"),
        ("\n[server]\nlisten = []", "2: server: unknown key"),
        ("[[home]]\nx = 1", "1: home: expected a string, not [{'x': 1}]"),
        (
            "# one\u2028line\nshell = 3",
            "2: shell: expected true or false or a string or a list, not 3",
        ),
        ("home.x = 1", "1: home: expected a string, not {'x': 1}"),
        ("listen-on = 1", "1: listen-on: unknown key; did you mean listen?"),
        ("'shell' = 3", "1: shell: expected true or false or a string or a list, not 3"),
        (
            "accept_env = [\n'shell'\n]\nshell = 3",
            "4: shell: expected true or false or a string or a list, not 3",
        ),
        ("listen = '127.0.0.1:1'", "1: listen: expected a list, not '127.0.0.1:1'"),
        ("listen = [1]", "1: listen: expected a list, each item a string, not [1]"),
        ("listen = []", "1: listen: is empty; name at least one HOST:PORT"),
        (
            "listen = ['a']",
            "1: listen: 'a' is not HOST:PORT or [IPV6]:PORT with a port up to 65535",
        ),
        ("listen = ['127.0.0.1:65536']", "1: listen: '127.0.0.1:65536' is not HOST:PORT"),
        ("listen = ['::1:22']", "1: listen: '::1:22' is not HOST:PORT or [IPV6]:PORT"),
        ("listen = ['0.0.0.0:1']", "1: listen: 0.0.0.0:1 can be reached from other machines"),
        ("listen = ['[::]:1']", "1: listen: [::]:1 can be reached from other machines"),
        ("listen = ['my.host:1']", "1: listen: my.host:1 can be reached from other machines"),
        ('listen = ["localhost\\u0000:1"]', "1: listen: holds a NUL character"),
        ("open_to_network = 'yes'", "1: open_to_network: expected true or false, not 'yes'"),
        ("shell = 'bash'", "1: shell: 'bash' is not an absolute path; try /"),
        ("shell = ''", "1: shell: '' is not an absolute path; try /bin/bash"),
        ("shell = '/no/shell'", "1: shell: /no/shell is not an executable file; install it"),
        ("shell = '/tmp'", "1: shell: /tmp is not an executable file; install it"),
        ("shell = '/etc/passwd'", "1: shell: /etc/passwd is not an executable file; install it"),
        ('shell = "/bin/sh\\u0000"', "1: shell: holds a NUL character"),
        ('hostkeys = "a\\u0000"', "1: hostkeys: holds a NUL character"),
        ("home = 'x'", "1: home: 'x' is not an absolute path; begin it with /"),
        ("home = '{user}'", "1: home: '{user}' is not an absolute path; begin it with /"),
        ("home = '/{user.__class__}'", "1: home: '/{user.__class__}' may hold {user} and no other"),
        ("home = '/{user[0]}'", "1: home: '/{user[0]}' may hold {user} and no other braces"),
        ("home = '/{user!r}'", "1: home: '/{user!r}' may hold {user} and no other braces"),
        ("home = '/{user:>99999999}'", "1: home: '/{user:>99999999}' may hold {user} and no other"),
        ("home = '/{0}'", "1: home: '/{0}' may hold {user} and no other braces"),
        ("home = '/{}'", "1: home: '/{}' may hold {user} and no other braces"),
        ("home = '/{name}'", "1: home: '/{name}' may hold {user} and no other braces"),
        ("home = '/{{'", "1: home: '/{{' may hold {user} and no other braces"),
        ("home = 1979-05-27", "1: home: expected a string, not datetime.date(1979, 5, 27)"),
        ("client_alive_interval = true", "1: client_alive_interval: expected a number, not True"),
        (
            "client_alive_interval = -1",
            "1: client_alive_interval: expected a number >= 0.0, not -1",
        ),
        ("client_alive_count_max = 0", "1: client_alive_count_max: expected a whole number >= 1"),
        ("client_alive_count_max = 1.5", "1: client_alive_count_max: expected a whole number, not"),
        ("hangup_grace = 0", "1: hangup_grace: expected a number > 0.0, not 0"),
        ("login_grace_time = nan", "1: login_grace_time: expected a number >= 0.0, not nan"),
        ("shell = true", "1: shell: true is no program; name one, or say false for forwards only"),
        (
            "permit_open = ['db.lab']",
            "1: permit_open: 'db.lab' is not HOST:PORT, [IPV6]:PORT, HOST",
        ),
        ("permit_open = ['*.lab:1']", "1: permit_open: '*.lab:1': * stands for a whole host"),
        ("permit_open = ['127.1:1']", "1: permit_open: '127.1:1': write the address with its four"),
        ("permit_open = ['a:9-1']", "1: permit_open: 'a:9-1' has no port between 9 and 1"),
        (
            "permit_open = ['a:70000']",
            "1: permit_open: 'a:70000' has no port between 70000 and 70000",
        ),
        ("permit_listen = ['[x]:1']", "1: permit_listen: '[x]:1': x is not an IPv6 address"),
        ("permit_open_sockets = ['x']", "1: permit_open_sockets: 'x' is not an absolute path"),
        ("shell = []", "1: shell: '' is not an absolute path; try /bin/bash"),
        ("shell = ['/no/shell', '-x']", "1: shell: /no/shell is not an executable file"),
        ("shell = [1]", "1: shell: expected a list, each item a string, not [1]"),
        ("env = {A = 1}", "1: env: expected a table, each value a string, not {'A': 1}"),
        ("env = {'1A' = 'x'}", "1: env: '1A' is no name of a variable; use letters, digits"),
        ('[env]\nA = "\\u0000"', "2: env.A: holds a NUL character"),
        ("umask = '8'", "1: umask: expected three octal digits, such as \"027\", not '8'"),
        ("umask = 18", "1: umask: expected a string, not 18"),
        ("rlimits = 3", "1: rlimits: expected a table, not 3"),
        ("[rlimits]\nnofiles = 3", "2: rlimits.nofiles: unknown key; did you mean nofile?"),
        ("[rlimits]\n\nnofile = -1", "3: rlimits.nofile: expected a whole number >= 0, not -1"),
        ("rlimits.cpu = 'x'", "1: rlimits.cpu: expected a whole number, not 'x'"),
        (f'motd = "{"x" * 20000}"', "1: motd: is longer than 16384 characters; shorten it"),
        ("penalty_exempt = ['10.0.0.1/8']", "1: penalty_exempt: 10.0.0.1/8 has host bits set"),
        ("max_sessions = -1", "1: max_sessions: expected a whole number >= 0, not -1"),
        ("accounts = 3", "1: accounts: expected a table, not 3"),
        ("[accounts]", "1: accounts: names nobody; add [accounts.NAME], or take it out"),
        ("accounts.alice = 3", "1: accounts.alice: expected a table, not 3"),
        ("[accounts.alice]", "1: accounts.alice: nobody can log in; add password or authorized_"),
        ("[accounts.'a b']\npassword = '!'", '1: accounts."a b": is no login name: up to 32 of'),
        ("[accounts.-x]\npassword = '!'", "1: accounts.-x: is no login name: up to 32 of"),
        (
            "\n[accounts.al]\npasword = ''\npassword = '!'",
            "3: accounts.al.pasword: unknown key; did",
        ),
        (
            "[accounts.\"*\"]\npassword = 'secret'",
            '2: accounts."*".password: is not an argon2id hash;',
        ),
        ("accounts.al.password = 123456", "1: accounts.al.password: expected a string"),
        (
            f"accounts.al.password = '$argon2i$v=19$m=64,t=1,p=1${SALT}'",
            "1: accounts.al.password: is not",
        ),
        (
            f"accounts.al.password = '$argon2id$v=19$m=9999999,t=1,p=1${SALT}'",
            "1: accounts.al.password: asks for more",
        ),
        ("accounts.al.authorized_keys = ['']", "1: accounts.al.authorized_keys: holds an empty"),
        (
            "accounts.al.authorized_keys = ['k']",
            "1: accounts.al.authorized_keys: the options before",
        ),
        (
            "accounts.al.authorized_keys = ['/n']",
            "1: accounts.al.authorized_keys: /n: No such file",
        ),
        (
            "accounts.al.authorized_keys = ['/{x}']",
            "1: accounts.al.authorized_keys: '/{x}' may hold",
        ),
        (
            "[accounts.al]\npassword='!'\nprincipals=['{x}']",
            "3: accounts.al.principals: '{x}' may hold",
        ),
        (
            "[accounts.al]\npassword='!'\nhome='x'",
            "3: accounts.al.home: 'x' is not an absolute path",
        ),
        ("[accounts.al]\npassword='!'\nshell='x'", "3: accounts.al.shell: 'x' is not an absolute"),
        (
            "[accounts.al]\npassword='!'\n[accounts.al.rlimits]\ncpu=-1",
            "4: accounts.al.rlimits.cpu: expected",
        ),
        (
            "[auth]\ntrusted_user_ca_keys=['/n']\n[accounts.al]",
            "2: auth.trusted_user_ca_keys: /n: No such",
        ),
        ("[auth]\ntrusted = []", "2: auth.trusted: unknown key; known are trusted_user_ca_keys"),
        ("hangup_grace = '3'", "1: hangup_grace: expected a number, not '3'"),
        ("log_format = 'xml'", "1: log_format: expected text or json, not 'xml'"),
    ],
)
def test_a_problem_names_its_line_its_key_and_the_remedy(
    tmp_path: Path, text: str, problem: str
) -> None:
    (line,) = problems(tmp_path, text)
    assert line.startswith(f"gosshd.toml:{problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"listen = = 1", "not valid TOML: Invalid value (at line 1, column 10)"),
        (b"shell = '/bin/sh'\nshell = '/bin/sh'", "not valid TOML: Cannot overwrite a value"),
        (b"shell = '\xff'", "byte 9 is not UTF-8; save the file as UTF-8"),
        ("shell = 1".encode("utf-16"), "byte 0 is not UTF-8; save the file as UTF-8"),
        (b"client_alive_count_max = " + b"9" * 5000, "not valid TOML: Exceeds the limit"),
        (b"listen = " + b"[" * 5000, "not valid TOML: "),
    ],
)
def test_a_file_that_cannot_be_read_as_toml_is_one_problem(
    tmp_path: Path, text: bytes, problem: str
) -> None:
    (line,) = problems(tmp_path, text)
    assert line.startswith(f"gosshd.toml: {problem}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "no", "No such file or directory; name a readable file with --config"),
        (tmp_path, "Is a directory; name a readable file with --config"),
    ):
        with pytest.raises(ConfigError) as info:
            load_config(str(path))
        assert info.value.problems == [f"{path}: {reason}"]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = 'shell = "x"\nhoem = "/"\nlisten = ["a", "127.0.0.1:1", "1.2.3.4:1"]\nlog_format = 1\n'
    places = [":".join(line.split(":")[1:3]) for line in problems(tmp_path, text, home="{0}")]
    assert sorted(places) == [
        *(" '{0}' may hold {user} and no other braces", "1: shell", "2: hoem"),
        *("3: listen", "3: listen", "4: log_format"),
    ]


def test_a_flag_at_fault_is_named_as_it_was_typed() -> None:
    with pytest.raises(ConfigError) as info:
        load_config(None, {"run_as": "no such user", "log_format": "xml"})
    assert [line.split(":")[0] for line in info.value.problems] == ["--log-format", "--run-as"]


def test_only_root_can_run_shells_as_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (line,) = problems(tmp_path, 'run_as = "nobody"')
    assert line.startswith(
        "gosshd.toml:1: run_as: only root may run shells as nobody; start the server as root"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gets that far")
def test_a_user_to_run_as_must_exist_and_so_must_setpriv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load(tmp_path, 'run_as = "nobody"').run_as == "nobody"
    (line,) = problems(tmp_path, 'run_as = "nosuchuser"')
    assert line == (
        "gosshd.toml:1: run_as: there is no user nosuchuser on this machine; create it with useradd"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    (line,) = problems(tmp_path, 'run_as = "nobody"')
    assert line == "gosshd.toml:1: run_as: needs the program setpriv (package util-linux)"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), values, max_size=4))
def test_any_settings_are_a_config_or_lines_that_say_why_not(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, object]
) -> None:
    """JSON's spelling is TOML's for most values; the rest is broken TOML, which is welcome too."""
    text = "\n".join(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in settings.items())
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(text)
    try:
        config = load_config(str(file))
    except ConfigError as exc:
        assert exc.problems
        assert all(line.startswith(f"{file}:") for line in exc.problems)
        assert len(exc.problems) <= max(1, sum(len(str(value)) + 1 for value in settings.values()))
    else:
        assert all(is_loopback(address.host) for address in config.addresses)


# -- addresses -------------------------------------------------------------------------------------

ports = st.integers(0, 65535)


@given(st.ip_addresses(), ports)
def test_every_ip_address_and_port_is_an_address(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    address = Address(str(ip), port)
    assert parse_address(str(address)) == address
    assert str(address) == (f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}")


@given(st.text(max_size=30) | st.from_regex(r"\[?[0-9a-f:.%]*\]?:\d*", fullmatch=True))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        host, port = address = parse_address(text)
    except ValueError as exc:
        assert "HOST:PORT" in str(exc)
        return
    assert host
    assert not set(host) & set("[] \t\n")
    assert 0 <= port <= 65535
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ":",
            ":22",
            "host",
            "host:",
            "host:-1",
            "host:65536",
            "host:1e3",
            "host: 22",
            "a b:22",
        ),
        *("::1:22", "::1", "[::1]", "[::1]22", "[]:22", "[host]:22", "[1.2.3.4]:22", "[::1]:22 "),
        *("[::1:22", "[[::1]]:22", "host:２２", "host:\n22", "host:22\n", "user@host:22:22"),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


def test_an_ipv6_address_may_name_its_interface() -> None:
    assert parse_address("[fe80::1%br-0123]:22") == ("fe80::1%br-0123", 22)


@given(st.ip_addresses(), ports)
def test_only_loopback_is_listened_on_unasked(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    assume(ip.version == 4 or ip.ipv4_mapped is None)  # about which Pythons disagree
    flags = {"listen": [str(Address(str(ip), port))]}
    assert load_config(None, {**flags, "open_to_network": True}).addresses == ((str(ip), port),)
    if ip in ipaddress.ip_network("127.0.0.0/8") or str(ip) == "::1":
        assert load_config(None, flags).addresses == ((str(ip), port),)
    else:
        with pytest.raises(ConfigError, match="--open-to-network"):
            load_config(None, flags)


@given(st.integers(0, 2**24 - 1))
def test_all_of_127_is_loopback(number: int) -> None:
    assert is_loopback(str(ipaddress.IPv4Address(127 * 2**24 + number)))


def test_names_count_as_loopback_only_if_it_is_localhost() -> None:
    assert is_loopback("localhost")
    for name in ("localhost.example.org", "127.0.0.1.example.org", "127.1", "0", ""):
        assert not is_loopback(name)
