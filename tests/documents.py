"""The parts of the documents that are made from the code. `python -m tests.documents` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Callable

from gosshd_py.lifecycle import EVENTS, TRANSITIONS, State

from .serving import ROOT


def diagram() -> str:
    """The table of states as a Mermaid state diagram."""
    name = {state: state.value.replace(" ", "_") for state in State}
    lines = ["stateDiagram-v2", f"    [*] --> {name[State.OPEN]}: shell, exec or subsystem request"]
    lines += [
        f"    {name[old]} --> {name[new]}: {event}" for (old, event), new in TRANSITIONS.items()
    ]
    return "\n".join(["```mermaid", *lines, f"    {name[State.CLOSED]} --> [*]", "```"])


def events() -> str:
    """The events of a trace as a table in Markdown."""
    rows = [
        f"| `{name}` | {meaning.lane} | {' '.join(f'`{fact}`' for fact in meaning.facts) or '–'} | {meaning.gloss} | {meaning.source} |"
        for name, meaning in EVENTS.items()
    ]
    return "\n".join(
        ["| event | lane | facts | what it means | who says so |", "|---|---|---|---|---|", *rows]
    )


LINE = re.compile(r"\[`([^`]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)")
"""A link to a line: what stands there, in which file."""


def linked(text: str) -> str:
    """The text with each such link leading to the line that has the words, the nearest if there are several."""

    def lead(link: re.Match[str]) -> str:
        words, file, number = link[1], link[2], int(link[3])
        lines = (ROOT / file).read_text().splitlines()
        found = [at for at, line in enumerate(lines, 1) if words in line]
        assert found, f"{file} has no line with {words!r}"
        assert len(found) == 1 or number in found or number == 0, (
            f"{file}: which of {found} is {words!r}?"
        )
        at = number if number in found else found[0]
        return f"[`{words}`](../{file}#L{at})"

    return LINE.sub(lead, text)


MADE: dict[str, tuple[str, Callable[[], str]]] = {
    "README.md": (r"```mermaid\n.*?```", diagram),
    "docs/lifecycle.md": (r"```mermaid\n.*?```", diagram),
    "docs/trace.md": (r"\| event \| lane \|.*?\n(?!\|)", lambda: events() + "\n"),
}
"""File, where its made part is, and what makes it."""


def renewed(file: str) -> str:
    """The file with its made part as it has to be."""
    pattern, make = MADE[file]
    text = (ROOT / file).read_text()
    assert re.search(pattern, text, re.DOTALL), f"{file} has no place for it"
    return linked(re.sub(pattern, lambda _: make(), text, flags=re.DOTALL))


if __name__ == "__main__":
    for made in MADE:
        (ROOT / made).write_text(renewed(made))
