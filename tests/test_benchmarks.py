"""The benchmark's own sums, and that it runs to its end against the server. No figure is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.report import Row, markdown, number, svg, table
from benchmarks.servers import OURS, PEERS, USUAL
from benchmarks.variants import VARIANTS

from .serving import ROOT

RATE = Row(
    "logins", "/s", more_is_better=True,
    values={OURS: [100.0, 300.0, 200.0], "sshd": [50.0, 100.0, 200.0], "dropbear": [None, 10.0, None]},
)  # fmt: skip
TIME = Row("echo", "µs", more_is_better=False, values={OURS: [100.0], "sshd": [50.0]})


def test_medians_spreads_and_ratios_of_the_same_round() -> None:
    assert RATE.median(OURS) == 200
    assert RATE.spread(OURS) == (100, 300)
    assert RATE.ratio("sshd") == 2  # the median of 2, 3 and 1, and not 200 to 100
    assert RATE.ratio("dropbear") == 30  # only the round in which both were there
    assert TIME.ratio("sshd") == 0.5  # less time is better
    assert TIME.median("go") is None
    assert TIME.spread("go") is None
    assert TIME.ratio("go") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.1234, "0.12"), (12.345, "12.3"), (1234.5, "1,234"), (99.95, "100.0")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_the_table_says_what_was_measured() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(table([RATE, TIME], [OURS, "sshd", "dropbear"], "a machine"))
        text = console.export_text()
    assert "200 (100–300)" in text
    assert "2.00×" in text
    assert "0.50×" in text
    assert markdown([TIME], [OURS, "sshd", "go"]).splitlines()[-1] == "| echo, µs | 100 | 50.0 (0.50×) | – |"  # fmt: skip


def test_the_picture_is_one_and_has_a_point_for_each_peer() -> None:
    picture = ET.fromstring(svg([RATE, TIME], [OURS, "sshd", "dropbear"], "<a & b>"))
    points = [
        float(circle.attrib["cx"])
        for circle in picture.iter("{http://www.w3.org/2000/svg}circle")
        if len(circle)  # with a title; the legend's have none
    ]
    assert len(points) == 3
    rate, _, time = points
    assert time < rate  # twice as slow is left of twice as fast


def test_a_run_from_the_start_to_the_files(tmp_path: Path) -> None:
    """Against our own server, with the load generator that needs nothing else."""
    argv = ["--quick", "--servers", "gosshd,one-read", "--load", "python", "--results", str(tmp_path),
            "--metrics", "true,echo,channels,start"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *argv], cwd=ROOT, capture_output=True, text=True, timeout=80
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ssh host true" in done.stdout
    (file,) = tmp_path.glob("*.json")
    seen = json.loads(file.read_text())
    assert [row["what"] for row in seen["rows"]][:2] == [
        "ssh host true",
        "echo of a key, 1 session, p50",
    ]
    for row in seen["rows"]:
        assert row["median"]["gosshd"] > 0, row
        assert row["median"]["one-read"] > 0, row
        assert row["ratio"]["gosshd"] == 1
    ET.parse(next(tmp_path.glob("*.svg")))
    assert "| ssh host true, ms |" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--servers", "gosshd,telnetd", "there is no telnetd; there are gosshd, sshd, dropbear, go"),
        ("--servers", ",", "name one; there are gosshd, sshd"),
        ("--metrics", "speed", "there is no speed; there are true, prompt"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(option: str, value: str, words: str) -> None:
    argv = [sys.executable, "-m", "benchmarks", option, value]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_variant_lacks_something_that_is_there() -> None:
    """A name that is no more would be set in vain, and the table would say that it brings nothing."""
    assert set(PEERS) == {*USUAL, *VARIANTS}
    for code in VARIANTS.values():
        check = (
            "import builtins, sys\n"
            "import gosshd_py.cli\n"
            f"before = {{m: set(vars(sys.modules['gosshd_py.' + m])) for m in ('process', 'launch', 'transport', 'listen', 'daemon', 'pty')}}\n"
            f"{code}\n"
            "for m, names in before.items(): assert set(vars(sys.modules['gosshd_py.' + m])) == names, m\n"
        )
        subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=20)
