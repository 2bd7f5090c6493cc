"""From a TOML file and flags to a Config. Fails closed, names file, line and key at fault.

Every problem is found before anything is used: a file with three mistakes gets three lines.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from .checks import problems_of
from .config import AccountSettings, AuthSettings, Config, ConfigError, Rlimits, show

Key = tuple[str, ...]
"""A key with the tables that it is in: ("accounts", "alice", "home")."""

_TABLES: dict[Key, type[msgspec.Struct]] = {
    (): Config,
    ("auth",): AuthSettings,
    ("rlimits",): Rlimits,
    ("accounts", "*"): AccountSettings,
    ("accounts", "*", "rlimits"): Rlimits,
}
"""Which tables have which keys; here * is any account's name."""


def load_config(file: str | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    """Read the file, let the flags override it, check everything. Raises ConfigError."""
    values: dict[str, Any] = {}
    text = ""
    if file is not None:
        text = _read(file)
        values = _parse(file, text)
    flags = flags or {}

    def place(key: Key) -> str:
        if key[0] in flags:
            return "--" + key[0].replace("_", "-")
        return _place(file, text, key) if file is not None else dotted(key)

    problems: list[tuple[Key, str]] = []
    config: Config = _decode({**values, **flags}, (), problems)
    unread = {key[:length] for key, _ in problems for length in range(1, len(key))}
    problems += [found for found in problems_of(config) if found[0] not in unread]
    if problems:
        raise ConfigError([f"{place(key)}: {problem}" for key, problem in problems])
    return config


def dotted(key: Key) -> str:
    """The key as TOML writes it."""
    return ".".join(
        word if re.fullmatch(r"[\w-]+", word, re.ASCII) else f'"{word}"' for word in key
    )


def _decode(table: Mapping[str, Any], at: Key, problems: list[tuple[Key, str]]) -> Any:
    """Make the record of a table; what is wrong in it is noted and left out."""
    struct = _TABLES[_general(at)]
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    good: dict[str, Any] = {}
    for name, value in table.items():
        key = (*at, name)
        if name not in fields:
            problems.append((key, f"unknown key{_nearest(name, fields)}"))
        elif key == ("accounts",) and isinstance(value, dict):
            good[name] = _accounts(value, problems)
        else:
            value = _value(fields[name].type, value, key, problems)  # noqa: PLW2901
            if value is not None:
                good[fields[name].name] = value
    return struct(**good)


def _accounts(table: Mapping[str, Any], problems: list[tuple[Key, str]]) -> dict[str, Any]:
    accounts = {
        name: _value(AccountSettings, settings, ("accounts", name), problems)
        for name, settings in table.items()
    }
    return {name: settings for name, settings in accounts.items() if settings is not None}


def _value(wanted: Any, value: Any, key: Key, problems: list[tuple[Key, str]]) -> Any:
    """Decode one value; None, and a problem more, if it cannot be."""
    if _general(key) in _TABLES and isinstance(value, dict):
        return _decode(value, key, problems)
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as exc:
        got = "" if key[-1] == "password" else f", not {show(value)}"
        problems.append((key, _plain(str(exc), wanted) + got))
        return None


def _general(key: Key) -> Key:
    return ("accounts", "*", *key[2:]) if key[:1] == ("accounts",) and len(key) > 1 else key


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError([f"{file}: {exc.strerror}; name a readable file with --config"]) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(
            [f"{file}: byte {exc.start} is not UTF-8; save the file as UTF-8"]
        ) from exc


def _parse(file: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # also for numbers and nesting without end
        raise ConfigError([f"{file}: not valid TOML: {exc}; correct that line"]) from exc


_WORD = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_HEADER = re.compile(rf"\s*\[\[?\s*({_WORD}(?:\s*\.\s*{_WORD})*)\s*\]")
_ASSIGNMENT = re.compile(rf"\s*({_WORD}(?:\s*\.\s*{_WORD})*)\s*=")


def _place(file: str, text: str, key: Key) -> str:
    """FILE:LINE: key, with the line where the key, or the innermost table around it, is found."""
    table: Key = ()
    best, found = 0, ""
    for number, line in enumerate(_LONG.sub(_only_its_lines, text).split("\n"), 1):
        if match := _HEADER.match(line):
            table = here = _words(match[1])
        elif match := _ASSIGNMENT.match(line):
            here = (*table, *_words(match[1]))
        else:
            continue
        here = here[: len(key)]  # a.b = 1 is where a is
        if key[: len(here)] == here and len(here) > best:
            best, found = len(here), f":{number}"
    return f"{file}{found}: {dotted(key)}"


# Strings of several lines, in which a line can look like a key; and, so that quotes in them do not
# count, comments and other strings.
_LONG = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?"{3,5}|'{3}.*?'{3,5}|#[^\n]*|"(?:\\.|[^"\\\n])*"|'[^'\n]*'""", re.DOTALL
)


def _only_its_lines(found: re.Match[str]) -> str:
    return found[0] if found[0][:3] not in ('"""', "'''") else '""' + "\n" * found[0].count("\n")


def _words(path: str) -> Key:
    return tuple(word.strip("\"'") for word in re.findall(_WORD, path))


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


_TOML = {
    "array": "a list",
    "str": "a string",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "object": "a table",
}


def _choices(wanted: Any) -> list[str]:
    """What a Literal, perhaps beside a number, allows."""
    if get_origin(wanted) is Literal:
        return list(get_args(wanted))
    if get_origin(wanted) in (UnionType, Union):
        return [choice for part in get_args(wanted) for choice in _choices(part)]
    return ["a whole number"]


def _plain(message: str, wanted: Any) -> str:
    """msgspec's words for JSON, in TOML's; what it got is shown by the caller."""
    if message.startswith("Invalid enum value") or "`int | str`" in message:
        return f"expected {' or '.join(_choices(wanted))}"
    if "matching regex" in message:
        return 'expected three octal digits, such as "027"'
    expected, _, got = message.removeprefix("Expected ").partition(", got ")
    types = re.search("`(.*)`", expected)
    assert types  # noqa: S101  # msgspec's own form
    plain = " or ".join(_TOML[word] for word in types[1].split(" | ") if word != "null")
    inside = ""
    if "$[" in got:
        inside = "a table, each value " if "$[...]" in got else "a list, each item "
    return f"expected {inside}{plain}{expected[types.end() :]}"
