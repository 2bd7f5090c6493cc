"""Measure round by round, all servers in each round, and write down what was seen."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import click
import pexpect
from rich.console import Console

from .metrics import METRICS, QUICK, Metric, Sizes
from .report import Row, markdown, svg, table
from .servers import (
    APT,
    BUILD,
    HERE,
    OURS,
    PEERS,
    USUAL,
    BenchmarkError,
    Site,
    build,
    can_pin,
    run,
    why_not,
)
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
    for number in (signal.SIGTERM, signal.SIGHUP):  # as ^C does: what is begun is cleared away
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        site = Site(Path(folder), [sys.executable, str(HERE / "load.py")])
        there = _there(chosen, site, load)
        this = Run(wanted, there, site, QUICK if quick else Sizes(), rounds or (1 if quick else 5))
        try:
            this.measure()
        finally:
            this.tell(results)
    if site.failed:
        sys.exit(1)


def _there(chosen: list[str], site: Site, load: str | None) -> list[str]:
    """The servers that can be measured. Builds those in Go, and takes the load generator in Go if it may."""
    missing = {name: reason for name in chosen if (reason := why_not(name))}
    if load == "go" or "go" in chosen or (load is None and shutil.which("go")):
        console.print("building the Go programs", highlight=False)
        try:
            build()
            if load != "python":
                site.load = [str(BUILD / "load")]
        except (BenchmarkError, OSError) as exc:
            if load == "go":
                raise click.ClickException(str(exc)) from exc
            missing.setdefault("go", f"cannot be built: {exc}; {APT}")
    for name in [name for name in chosen if name in missing]:
        site.notes[name].append(missing[name])
        console.print(f"without {name}: {missing[name]}", style="yellow", highlight=False)
    if not can_pin():
        site.notes["machine"].append(
            "no processors 0 and 1: servers and clients share what there is"
        )
    return [name for name in chosen if name not in missing]


def _known(given: str, names: Collection[str], option: str) -> list[str]:
    chosen = [name.strip() for name in given.split(",") if name.strip()]
    if not chosen:
        raise click.UsageError(f"{option}: name one; there are {', '.join(names)}")
    for name in chosen:
        if name not in names:
            raise click.UsageError(f"{option}: there is no {name}; there are {', '.join(names)}")
    return chosen


@dataclass
class Run:
    """What is measured of whom, and what was seen."""

    metrics: list[Metric]
    servers: list[str]
    site: Site
    sizes: Sizes
    rounds: int
    values: dict[str, dict[str, list[float | None]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """By row and server: a number for each round."""

    def measure(self) -> None:
        """All rounds. What fails is noted, and the rest goes on."""
        for number in range(self.rounds):
            # Each goes first once: whoever does may find a cold cache.
            at = number % max(len(self.servers), 1)
            for metric in self.metrics:
                for name in self.servers[at:] + self.servers[:at]:
                    if number < metric.rounds and metric.suits(name):
                        with console.status(
                            f"round {number + 1} of {self.rounds}: {metric.name}, {name}"
                        ):
                            self._one(metric, name)
            console.print(f"round {number + 1} of {self.rounds} is over", highlight=False)

    def _one(self, metric: Metric, name: str) -> None:
        seen: dict[str, float] = {}
        try:
            seen = metric.measure(name, self.site, self.sizes)
        except (
            BenchmarkError,
            OSError,
            subprocess.SubprocessError,
            pexpect.ExceptionPexpect,
        ) as exc:
            reason = (str(exc).splitlines() or [type(exc).__name__])[0]
            self.site.notes[name].append(f"{metric.name}: {reason}")
            self.site.failed |= name == OURS or name not in USUAL
        for row in metric.rows:
            self.values[row][name].append(seen.get(row))

    def tell(self, results: Path) -> None:
        """The table, and the files."""
        rows = [
            Row(metric.what(row, self.sizes), *metric.rows[row][1:], values=self.values[row])
            for metric in self.metrics
            for row in metric.rows
        ]
        notes = self._notes()
        now = datetime.now().astimezone()
        facts = {
            "time": now.isoformat(timespec="seconds"),
            "quick": self.sizes is QUICK,
            "machine": machine(),
            "versions": _versions(self.servers),
            "notes": notes,
            "rows": [
                {"what": row.what, "unit": row.unit, "more_is_better": row.more_is_better,
                 "values": row.values, "median": {name: row.median(name) for name in self.servers},
                 "ratio": {name: row.ratio(name) for name in self.servers}} for row in rows
            ],
        }  # fmt: skip
        title = f"{now:%Y-%m-%d}, {machine()}"
        results.mkdir(parents=True, exist_ok=True)
        stem = results / f"{now:%Y-%m-%dT%H%M%S}"
        listed = "".join(f"- {note}\n" for note in notes)
        stem.with_suffix(".json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        stem.with_suffix(".svg").write_text(svg(rows, self.servers, title))
        stem.with_suffix(".md").write_text(f"{title}\n\n{markdown(rows, self.servers)}\n{listed}")
        Console(width=None if sys.stdout.isatty() else 160).print(table(rows, self.servers, title))
        print(listed, end="")
        print(f"results: {stem}.json, .svg, .md")

    def _notes(self) -> list[str]:
        peers = [PEERS[name] for name in self.servers if PEERS[name].note]
        few = [metric for metric in self.metrics if metric.rounds < self.rounds]
        return [
            *(f"{peer.name}, {peer.what}: {peer.note}" for peer in peers),
            *(
                f"{name}: {note}"
                for name, told in self.site.notes.items()
                for note in dict.fromkeys(told)
            ),
            *(f"{metric.name}: of {metric.rounds} rounds" for metric in few),
        ]


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
