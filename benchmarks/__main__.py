"""Measure round by round, all servers in each round, and write down what was seen."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console

from .metrics import METRICS, QUICK, Metric, Sizes
from .report import Row, markdown, svg, table
from .servers import APT, BUILD, HERE, PEERS, USUAL, BenchmarkError, Site, build, run, why_not
from .variants import VARIANTS

console = Console(stderr=True)


@click.command(epilog=f"The peers, on Debian: {APT}")
@click.option(
    "--quick", is_flag=True, help="One round of little: a minute, to see whether it works."
)
@click.option("--rounds", type=click.IntRange(1), metavar="N", help="Of each metric.  [default: 5]")
@click.option(
    "--servers",
    default=",".join(USUAL),
    metavar="LIST",
    show_default=True,
    help=f"Which ones; there are also {', '.join(VARIANTS)}, which lack one thing.",
)
@click.option(
    "--metrics", default=",".join(METRICS), metavar="LIST", show_default=True, help="Which ones."
)
@click.option(
    "--load",
    type=click.Choice(["go", "python"]),
    help="The load generator.  [default: go, where there is Go]",
)
@click.option("--results", type=click.Path(file_okay=False, path_type=Path), default=HERE / "results",
              help="Folder for JSON, picture and table.")  # fmt: skip
def main(*, quick: bool, rounds: int | None, servers: str, metrics: str, load: str | None, results: Path) -> None:  # fmt: skip
    """Compare gosshd with its peers on this machine, in one run."""
    chosen = _known(servers, PEERS, "--servers")
    wanted = [METRICS[name] for name in _known(metrics, METRICS, "--metrics")]
    for program in ("ssh", "sftp", "taskset"):
        if not shutil.which(program):
            raise click.ClickException(f"{program} is missing; {APT}")
    present = []
    for name in chosen:
        if reason := why_not(name):
            console.print(f"without {name}: {reason}", style="yellow", highlight=False)
        else:
            present.append(name)
    by_go = load == "go" or (load is None and shutil.which("go") is not None)
    sizes = QUICK if quick else Sizes()
    try:
        if by_go or "go" in present:
            console.print("building the Go programs", highlight=False)
            build()
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            command = [str(BUILD / "load")] if by_go else [sys.executable, str(HERE / "load.py")]
            site = Site(Path(folder), command)
            values = _measure(wanted, present, site, sizes, rounds or (1 if quick else 5))
            for name, notes in site.notes.items():
                for note in dict.fromkeys(notes):
                    console.print(f"{name} {note}", style="yellow", highlight=False)
    except BenchmarkError as exc:
        raise click.ClickException(str(exc)) from exc
    _tell(wanted, present, values, sizes, results)


def _known(given: str, names: Collection[str], option: str) -> list[str]:
    chosen = [name.strip() for name in given.split(",") if name.strip()]
    for name in chosen:
        if name not in names:
            raise click.UsageError(f"{option}: there is no {name}; there are {', '.join(names)}")
    return chosen


Values = dict[str, dict[str, list[float | None]]]
"""By row and server: a number for each round."""


def _measure(metrics: list[Metric], servers: list[str], site: Site, sizes: Sizes, rounds: int) -> Values:  # fmt: skip
    values: Values = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        # Each goes first once: whoever does may find a cold cache.
        order = servers[number % len(servers) :] + servers[: number % len(servers)]
        for metric in metrics:
            for name in order:
                if number >= metric.rounds or not metric.suits(name):
                    continue
                with console.status(f"round {number + 1} of {rounds}: {metric.name}, {name}"):
                    seen = metric.measure(name, site, sizes)
                for row in metric.rows:
                    values[row][name].append(seen.get(row))
        console.print(f"round {number + 1} of {rounds} is over", highlight=False)
    return values


def _tell(metrics: list[Metric], servers: list[str], values: Values, sizes: Sizes, results: Path) -> None:  # fmt: skip
    rows = [
        Row(metric.what(row, sizes), *metric.rows[row][1:], values=values[row])
        for metric in metrics
        for row in metric.rows
    ]
    now = datetime.now().astimezone()
    facts = {
        "time": now.isoformat(timespec="seconds"),
        "quick": sizes is QUICK,
        "machine": machine(),
        "versions": _versions(servers),
        "rows": [
            {"what": row.what, "unit": row.unit, "more_is_better": row.more_is_better,
             "values": row.values, "median": {name: row.median(name) for name in servers},
             "ratio": {name: row.ratio(name) for name in servers}} for row in rows
        ],
    }  # fmt: skip
    title = f"{now:%Y-%m-%d}, {machine()}"
    results.mkdir(parents=True, exist_ok=True)
    stem = results / f"{now:%Y-%m-%dT%H%M%S}"
    stem.with_suffix(".json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    stem.with_suffix(".svg").write_text(svg(rows, servers, title))
    stem.with_suffix(".md").write_text(f"{title}\n\n{markdown(rows, servers)}")
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows, servers, title))
    for name in servers:
        if PEERS[name].note:
            print(f"{name}, {PEERS[name].what}: {PEERS[name].note}")
    print(f"results: {stem}.json, .svg, .md")


def machine() -> str:
    """The machine, in general terms."""
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{len(os.sched_getaffinity(0))} × {name[1] if name else platform.machine()}, Linux {kernel}"


def _versions(servers: list[str]) -> dict[str, str]:
    ask = {
        "sshd": ("ssh", "-V"),
        "dropbear": ("dropbear", "-V"),
        "go": ("go", "version"),
    }
    found = {"gosshd": version("gosshd-py"), "asyncssh": version("asyncssh"), "Python": platform.python_version()}  # fmt: skip
    for name in servers:
        if name in ask:
            found[name] = run("sh", "-c", f"{' '.join(ask[name])} 2>&1").strip()
    return found


main(prog_name="python -m benchmarks")
