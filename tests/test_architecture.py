"""The layout of the package, held against the code: which module imports which, and how large the core is."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import gosshd_py
from gosshd_py.lifecycle import EVENTS

PACKAGE = Path(gosshd_py.__file__).parent

# A module may import only modules of earlier rows.
ROWS = (
    {"lifecycle", "config", "logs", "counts"},
    {"launch", "loop"},
    {
        "workers",
        "process",
        "modes",
        "requests",
        "session",
        "hostkeys",
        "listen",
        "names",
        "passwords",
    },
    {"places", "fsuser", "sftp", "packets", "ciphers", "threads", "trace"},
    {"wire", "authorized_keys", "accounts", "limits", "local", "pidfile", "sockets"},
    {"authentication", "checks", "flow", "pty", "pipes"},
    {"transport", "command", "load", "channel", "explain", "story", "timeline"},
    {"userauth"},
    {"forward"},
    {"connection"},
    {"server"},
    {"daemon"},
    {"labs"},
    {"cli", "__init__"},
    {"__main__"},
)
EDGES = {"channel", "pty", "pipes"}
SSH = {
    *(
        "channel",
        "flow",
        "wire",
        "packets",
        "connection",
        "transport",
        "userauth",
        "server",
        "hostkeys",
    ),
    *(
        "authentication",
        "authorized_keys",
        "cli",
        "forward",
        "sftp",
    ),  # keys and certificates; saslprep
}
CORE = ("session", "flow", "channel", "pty", "pipes", "lifecycle", "server", "connection")


def imports(module: str) -> set[str]:
    """The modules that one of ours imports: of this package by their short names.

    A folder is one room: what its files import from each other is its own business.
    """
    names: set[str] = set()
    folder = (PACKAGE / module).is_dir()
    for path in (PACKAGE / module).glob("*.py") if folder else [PACKAGE / f"{module}.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not (folder and node.level == 1):
                base = node.module or "__init__"
                names |= {base} if node.module else {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def test_every_module_is_in_a_row() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {path.stem for path in PACKAGE.glob("*.py")} | folders == set().union(*ROWS)


def test_imports_go_towards_the_ground() -> None:
    for number, row in enumerate(ROWS):
        below = set().union(*ROWS[:number])
        above = set().union(*ROWS) - below - row
        for module in row:
            assert not imports(module) & above, module
            assert not imports(module) & (row - {"config"}) or module == "logs", module


def test_session_knows_neither_ssh_nor_the_operating_system() -> None:
    assert imports("session") <= {
        *("__future__", "asyncio", "time", "collections.abc", "contextlib", "typing", "lifecycle")
    }


def test_only_their_edges_know_asyncssh_and_ptyprocess() -> None:
    for module in set().union(*ROWS):
        known = imports(module)
        assert "ptyprocess" not in known or module == "pty"
        assert "asyncssh" not in known or module in SSH


def test_the_core_can_be_read_in_one_sitting() -> None:
    total = sum(code_lines(PACKAGE / f"{module}.py") for module in CORE)
    assert total - len(EVENTS) < 1050, total  # about a thousand; the events are a glossary


def code_lines(path: Path) -> int:
    """Lines with code: no blank ones, no comments, no docstrings."""
    lines: set[int] = set()
    previous = tokenize.NEWLINE
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        docstring = token.type == tokenize.STRING and previous in {
            *(tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT)
        }
        if token.type not in skip and not docstring:
            lines |= set(range(token.start[0], token.end[0] + 1))
        previous = token.type
    return len(lines)
