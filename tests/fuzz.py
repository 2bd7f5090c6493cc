"""Everything that we parse ourselves, fed with anything: `python -m tests.fuzz SECONDS` (make fuzz).

Each target takes one input and returns, or raises what it documents; whatever else it raises, or
a property that does not hold, is a bug. test_parsers.py runs each of them for a moment.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from gosshd_py.authentication import RejectedError, _decode, _signed_with
from gosshd_py.authorized_keys import match_source, parse_line, parse_time, read_keys
from gosshd_py.config import ConfigError, parse_address
from gosshd_py.limits import source_of
from gosshd_py.listen import refusal
from gosshd_py.load import load_config
from gosshd_py.logs import clean
from gosshd_py.modes import parse_modes
from gosshd_py.names import valid_user_name
from gosshd_py.passwords import check_hash
from gosshd_py.places import ForbiddenError, check_asked, check_found, parse_place
from gosshd_py.requests import env_allowed, parse_term

from .keys import Key, hashed

_directory = Path(tempfile.mkdtemp(prefix="gosshd-fuzz."))
_ca = Key(_directory, "ca")
_key = Key(_directory, "key").certify(_ca)
_rsa = Key(_directory, "rsa", "-t", "rsa")
_OPTIONS = (
    *("restrict", "pty", "no-pty", "cert-authority", "no-X11-forwarding", "port-forwarding"),
    *('command="a \\" b"', 'from="10.0.0.0/8,!*.1,::1"', 'expiry-time="20300101Z"'),
    *('principals="a,b"', 'permitopen="[::1]:*"', 'permitlisten="80"', 'environment="A=b"'),
)


def decoded_blob(path: str) -> bytes:
    import base64

    return base64.b64decode(Path(path).read_text().split()[1])


def mutated(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Good input with a few bytes changed, cut or put in."""
    change = st.tuples(st.integers(0, 4000), st.integers(0, 3), st.binary(max_size=8))

    def apply(arguments: tuple[bytes, list[tuple[int, int, bytes]]]) -> bytes:
        data = bytearray(arguments[0])
        for at, cut, new in arguments[1]:
            at %= len(data) + 1
            data[at : at + cut] = new
        return bytes(data)

    return st.tuples(st.sampled_from(seeds), st.lists(change, max_size=4)).map(apply)


def text(seeds: list[str]) -> st.SearchStrategy[str]:
    mutants = mutated([seed_.encode() for seed_ in seeds])
    return mutants.map(lambda data: data.decode("utf-8", "replace")) | st.text(max_size=200)


def key_line(line: str) -> None:
    with suppress(ValueError):
        parsed = parse_line(line.strip())
        parsed.refuses("127.0.0.1", 0.0)
    good, bad = read_keys(line if not line.startswith("/") else f" {line}")
    assert len(good) + len(bad) <= len(line.splitlines())


def public_key(blob: bytes) -> None:
    with suppress(RejectedError):
        key, certificate = _decode(blob)
        assert key.public_data
        if certificate is not None:
            with suppress(ValueError):
                _signed_with(certificate, blob)


def toml(file_text: str) -> None:
    file = _directory / "fuzz.toml"
    file.write_text(file_text)
    try:
        load_config(str(file))
    except ConfigError as exc:
        assert exc.problems
        assert all(problem.startswith(str(file)) for problem in exc.problems)


def pattern(source_and_list: tuple[Any, list[str]]) -> None:
    address, patterns = source_and_list
    line = f'from="{",".join(patterns)}" {_key.public}'
    with suppress(ValueError):
        match_source(str(address), parse_line(line).sources)


def rule(arguments: tuple[str, str, int, str]) -> None:
    """What is allowed is allowed by a rule that says so; loopback only by one that names it."""
    words, host, port, address = arguments
    try:
        place = parse_place(words)
    except ValueError:
        return
    with suppress(ForbiddenError):
        assert check_asked("permit_open", [words], None, host, port) == words
        assert place.low <= port <= place.high
        assert place.host in ("*", host.lower().rstrip(".")) or ":" in host or "." in host
    with suppress(ForbiddenError):
        check_found([words], None, "name", "127.0.0.1", port)
        assert place.host in ("*", "127.0.0.1", "localhost")
    with suppress(ForbiddenError):
        check_found([words], None, "name", address, port)


def raising_value_error(parse: Callable[[Any], object]) -> Callable[[Any], None]:
    def target(value: Any) -> None:
        with suppress(ValueError):
            parse(value)

    return target


def name(text_: str) -> None:
    if valid_user_name(text_):
        assert "/" not in text_
        assert text_[0] not in ".-"
        assert text_.isascii()


def log_text(text_: str) -> None:
    assert clean(text_).isprintable()


def check(text_: str) -> None:
    problem = check_hash(text_)
    assert not text_.strip() or len(text_) < 8 or text_ not in problem


_TOML = [
    'listen = ["127.0.0.1:1"]\n[accounts.alice]\npassword = "!"\nenv = {A = "b"}\n',
    '[auth]\ntrusted_user_ca_keys = ["x"]\n[accounts."*"]\nauthorized_keys = ["/x/{user}"]\n',
    'rlimits = {nofile = 10}\numask = "022"\nshell = ["/bin/sh"]\nmax_sessions = 3\n',
]

TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "authorized_keys": (
        text([_key.public, *(_key.line(option) for option in _OPTIONS), _key.line(",".join(_OPTIONS))]),
        key_line,
    ),
    "public keys and certificates": (  # the last seed: a modulus below zero
        mutated([decoded_blob(f"{file}") for file in (
            f"{_key.file}.pub", f"{_key.file}-cert.pub", f"{_rsa.file}.pub")] + [b"\0\0\0\x07ssh-rsa\0\0\0\x01\x03\0\0\1\0" + b"\xff" * 256]),
        public_key,
    ),
    "from=": (
        st.tuples(st.ip_addresses(), st.lists(text(["10.0.0.0/8", "!*", "::1/64", "1?.*"]))),
        pattern,
    ),
    "expiry-time=": (text(["20300101", "203001011200Z", "20300101120000"]), raising_value_error(parse_time)),
    "configuration": (text(_TOML), toml),
    "password hashes": (text([hashed()]), check),
    "addresses": (text(["127.0.0.1:22", "[::1]:22"]), raising_value_error(parse_address)),
    "rules for forwards": (
        st.tuples(text(["db.lab:5432", "[::1]:8000-8010", "127.0.0.1:*", "*:*", "LOCALHOST.:1-9"]), text(["127.0.0.1", "::ffff:127.0.0.1", "db.lab", "0"]), st.integers(0, 65535), st.ip_addresses().map(str)),
        rule,
    ),
    "sources": (st.ip_addresses().map(str), lambda address: assert_(source_of(address))),
    "names": (text(["alice", "a.b-c_d"]), name),
    "terminal modes": (mutated([bytes([1, 0, 0, 0, 3, 0]) * 3]), raising_value_error(parse_modes)),
    "TERM": (mutated([b"xterm-256color"]), raising_value_error(parse_term)),
    "env": (
        st.tuples(mutated([b"LC_ALL"]), st.binary(max_size=5000)),
        lambda pair: assert_(isinstance(env_allowed(pair[0], pair[1], ("LC_*",)), bool)),
    ),
    "log text": (st.text(max_size=1000), log_text),
    "refusals": (st.text(max_size=300), lambda words: assert_(refusal(words).startswith(b"SSH-"))),
}  # fmt: skip


def assert_(fact: object) -> None:
    assert fact


def run(target: str, examples: int, number: int | None = None) -> None:
    """Run one target with this many inputs."""
    strategy, function = TARGETS[target]

    def test(value: Any) -> None:
        function(value)

    fuzz = given(strategy)(test)
    if number is not None:
        fuzz = seed(number)(fuzz)
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=quiet
    )(fuzz)()  # fmt: skip


def main(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    runs = 0
    while time.monotonic() < deadline:
        for target in TARGETS:
            run(target, 200, random.randrange(2**32))
            runs += 1
    print(f"{runs} runs of 200 inputs over {len(TARGETS)} targets in {seconds:g} s: nothing found")


if __name__ == "__main__":
    main(float(sys.argv[1]))
