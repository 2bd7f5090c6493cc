"""What was measured, as a table, a file and a picture."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from rich.table import Table

from .servers import OURS

Rounds = Sequence[float | None]
"""A number for each round; None: it was not measured in this one."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    unit: str
    more_is_better: bool
    values: Mapping[str, Rounds]
    """By server."""

    def median(self, server: str) -> float | None:
        """The middle of the rounds."""
        seen = _seen(self.values.get(server, ()))
        return statistics.median(seen) if seen else None

    def spread(self, server: str) -> tuple[float, float] | None:
        """The least and the most."""
        seen = _seen(self.values.get(server, ()))
        return (min(seen), max(seen)) if seen else None

    def ratio(self, server: str) -> float | None:
        """How many times better ours is than this server: the median of each round's own ratio.

        Rounds are measured one after the other on a machine that is not always equally fast; the
        servers of one round are neighbours in time.
        """
        ratios = []
        for ours, theirs in zip(
            self.values.get(OURS, ()), self.values.get(server, ()), strict=False
        ):
            if ours and theirs:
                ratios.append(ours / theirs if self.more_is_better else theirs / ours)
        return statistics.median(ratios) if ratios else None


def _seen(values: Rounds) -> list[float]:
    return [value for value in values if value is not None]


def number(value: float | None) -> str:
    """Three digits that matter, or all of a whole number."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 2)}f}"


def table(rows: Sequence[Row], servers: Sequence[str], title: str) -> Table:
    """Medians, spread of ours, and behind each peer's how many times better ours is."""
    made = Table(title=title, title_justify="left", caption_justify="left",
                 caption="medians; in brackets least and most; × how many times better gosshd is, round by round")  # fmt: skip
    made.add_column("")
    made.add_column("unit")
    for server in servers:
        made.add_column(server, justify="right")
    for row in rows:
        cells = []
        for server in servers:
            spread = row.spread(server)
            text = number(row.median(server))
            if spread and spread[0] != spread[1]:
                text += f" ({number(spread[0])}–{number(spread[1])})"
            ratio = row.ratio(server)
            if server != OURS and ratio is not None:
                style = "green" if ratio >= 1 else "yellow" if ratio >= 0.5 else "red"
                text += f" [{style}]{number(ratio)}×[/]"
            cells.append(text)
        made.add_row(row.what, row.unit, *cells)
    return made


def markdown(rows: Sequence[Row], servers: Sequence[str]) -> str:
    """The table for a document: medians, and the ratios in brackets."""
    lines = ["| | " + " | ".join(servers) + " |", "|---|" + "---:|" * len(servers)]
    for row in rows:
        cells = []
        for server in servers:
            ratio = row.ratio(server) if server != OURS else None
            cells.append(number(row.median(server)) + (f" ({number(ratio)}×)" if ratio else ""))
        lines.append(f"| {row.what}, {row.unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# -- the picture -------------------------------------------------------------------------------------

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Told apart by people who see colours otherwise, too (Okabe and Ito)."""

_LEFT, _WIDTH, _ROW, _TOP = 300, 620, 22, 64
_DECADES = (0.01, 0.1, 1, 10, 100)


def svg(rows: Sequence[Row], servers: Sequence[str], title: str) -> str:
    """A dot for each peer and row, to the right where ours is better; the axis is logarithmic."""
    peers = [server for server in servers if server != OURS]
    shown = [row for row in rows if any(row.ratio(peer) for peer in peers)]
    height = _TOP + _ROW * len(shown) + 30

    def x(ratio: float) -> float:
        low, high = math.log10(_DECADES[0]), math.log10(_DECADES[-1])
        return _LEFT + _WIDTH * (min(max(math.log10(ratio), low), high) - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 30}" height="{height}"'
        ' font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
        '<text x="10" y="38">how many times better gosshd is: right of 1 it is ahead</text>',
    ]
    for place, (peer, color) in enumerate(zip(peers, itertools.cycle(_COLORS), strict=False)):
        at = _LEFT + 110 * place
        parts.append(f'<circle cx="{at}" cy="34" r="5" fill="{color}"/>')
        parts.append(f'<text x="{at + 10}" y="38">{escape(peer)}</text>')
    for decade in _DECADES:
        weight = 1.5 if decade == 1 else 0.5
        parts.append(f'<line x1="{x(decade)}" x2="{x(decade)}" y1="{_TOP - 12}" y2="{height - 24}" stroke="#666" stroke-width="{weight}"/>')  # fmt: skip
        parts.append(f'<text x="{x(decade)}" y="{height - 8}" text-anchor="middle">{decade:g}×</text>')  # fmt: skip
    for place, row in enumerate(shown):
        y = _TOP + _ROW * place
        parts.append(f'<text x="10" y="{y + 4}">{escape(row.what)}</text>')
        for peer, color in zip(peers, itertools.cycle(_COLORS), strict=False):
            if ratio := row.ratio(peer):
                words = escape(f"{peer}: {number(row.median(peer))} {row.unit}, gosshd: {number(row.median(OURS))} {row.unit}")  # fmt: skip
                parts.append(f'<circle cx="{x(ratio):.1f}" cy="{y}" r="5" fill="{color}" fill-opacity="0.8"><title>{words}</title></circle>')  # fmt: skip
    return "\n".join([*parts, "</svg>", ""])
