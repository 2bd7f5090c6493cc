"""`gosshd labs`: guided exercises, and the same unattended."""

from __future__ import annotations

import functools
import inspect
import re
import signal
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ..story import Story
from ..timeline.follow import Tail
from ..timeline.model import Read
from ..trace import Record
from .compare import side_by_side
from .exercises import EXERCISES, Exercise
from .lab import Lab, LabError, lab

console = Console(highlight=False)

MAX_CODE = 25
"""Lines of code that are shown of each side."""


@click.command()
@click.argument("name", required=False, metavar="[EXERCISE]")
@click.option(
    "--check",
    is_flag=True,
    help="Do it unattended: exit 1 if a fault shows no symptom, or the real server one.",
)
def labs(name: str | None, check: bool) -> None:  # fmt: skip
    """Exercises that break one promise of a server on purpose, and show in the trace how.

    Without an EXERCISE: list them. The broken server is a process of its own, on a free port of
    loopback, and ends with the exercise. With --check, and no EXERCISE: all of them.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # as ^C does: what is begun is cleared away
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if name is not None and name not in EXERCISES:
        raise click.UsageError(f"there is no exercise {name}; there are {', '.join(EXERCISES)}")
    try:
        if check:
            found = [_check(EXERCISES[one]) for one in ([name] if name else EXERCISES)]
            sys.exit(0 if all(found) else 1)
        elif name is None:
            _list()
        else:
            _guide(EXERCISES[name])
    except LabError as exc:
        raise click.ClickException(str(exc)) from exc


def _list() -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for exercise in EXERCISES.values():
        table.add_row(Text(exercise.name, style="bold"), exercise.promise)
    console.print(table)
    console.print("\ngosshd labs EXERCISE guides through one; --check does it unattended.")


# -- guided ------------------------------------------------------------------------------------------


def _guide(exercise: Exercise) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise LabError("the exercises want a terminal; use --check to do them unattended")
    _title(f"{exercise.name}: {exercise.promise}")
    _say(exercise.story)
    traces = []
    for fault, heading in ((exercise.name, "The broken server"), ("", "The same, as it should be")):
        _title(heading)
        with lab(fault) as running:
            console.print("In another terminal, type", style="dim")
            for command in exercise.type:
                typed = running.typed(command).replace("SERVER", str(running.pid))
                console.print(f"    {typed}", style="bold", soft_wrap=True)
            if fault:
                _say(f"Symptom: {exercise.symptom}")
                _say(f"Look for: {exercise.look_for}")
            console.print("The trace follows; Enter goes on, ^C ends.\n", style="dim")
            with _told(running):
                input()
            if (status := running.ended()) is not None:
                raise LabError(
                    f"the server of the exercise has ended before, with {status}; try again"
                )
            traces.append(running.records())
    _show(exercise, traces[1], traces[0])


@contextmanager
def _told(running: Lab) -> Iterator[None]:
    """Tell the story of the server while something else waits."""
    over = threading.Event()
    story = Story(sys.stdout)
    tail = Tail(running.folder / "trace.ndjson")

    def tell() -> None:
        while True:
            last = over.is_set()
            for it in Read(tail.lines()):
                if it.connection:
                    record = Record(it.us, it.time, it.connection, it.channel, it.event, it.facts)
                    story.write(record)
            if last:
                return
            time.sleep(0.1)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join(2)
        tail.close()


# -- unattended ----------------------------------------------------------------------------------------


def _check(exercise: Exercise) -> bool:
    """Do it with both servers, and show it. Returns whether only the broken one shows the symptom."""
    _title(f"{exercise.name}: {exercise.promise}")
    seen: dict[str, str] = {}
    traces: dict[str, list[dict[str, Any]]] = {}
    for which, fault in (("right", ""), ("wrong", exercise.name)):
        with lab(fault) as running:
            seen[which] = exercise.probe(running)
            running.wait_for(functools.partial(_settled, running), 1)
            traces[which] = running.records()
    _show(exercise, traces["right"], traces["wrong"])
    good = exercise.good(seen["right"]) and not exercise.good(seen["wrong"])
    for which in ("right", "wrong"):
        console.print(f"{which}: {seen[which]}")
    console.print(
        "as expected" if good else "NOT as expected", style="green" if good else "bold red"
    )
    return good


def _settled(running: Lab) -> bool:
    """Whether every connection and every session has ended, as far as the trace tells."""
    count = Counter(record["event"] for record in running.records())
    return (
        count["tcp.closed"] == count["tcp.accepted"] > 0
        and count["session.ended"] == count["program.spawned"]
    )


# -- what is shown ---------------------------------------------------------------------------------------


def _title(text: str) -> None:
    console.print(f"\n{text}", style="bold")


def _say(text: str) -> None:
    console.print(textwrap.fill(text, min(console.width, 100)), soft_wrap=True)


def _show(exercise: Exercise, right: list[dict[str, Any]], wrong: list[dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
    table.add_column("as it should be", ratio=1, overflow="fold")
    table.add_column("broken", ratio=1, overflow="fold")
    for ours, theirs, same in side_by_side(right, wrong):
        marks = ("  ", "  ") if same else ("- ", "+ ")
        styles = ("dim", "dim") if same else ("green", "red")
        table.add_row(*(
            Text(f"{mark}{line}" if line else "", style=style)
            for mark, line, style in zip(marks, (ours, theirs), styles, strict=True)
        ))  # fmt: skip
    console.print(table)
    for heading, part in (("The code that keeps the promise", exercise.right), ("and the code that does not", exercise.wrong)):  # fmt: skip
        file, line, source = code_of(part)
        console.print(f"\n{heading} ({file}:{line})", style="bold")
        if console.is_terminal and not console.no_color:
            console.print(Syntax(source, "python", background_color="default", word_wrap=True))
        else:
            console.print(source, markup=False, soft_wrap=True)


def code_of(part: Any) -> tuple[str, int, str]:
    """File, line and source of a function, as it stands there."""
    lines, number = inspect.getsourcelines(part)
    file = inspect.getsourcefile(part) or ""
    shown = textwrap.dedent("".join(lines[:MAX_CODE])).rstrip()
    return re.sub(r".*/(gosshd_py/)", r"\1", file), number, shown
