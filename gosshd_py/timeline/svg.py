"""A timeline as a still picture for slides: the lanes and bars of one connection, and its events by name."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from .. import logs
from .model import Bar, Connection

WIDTH = 1600
LABEL, TOP, ROW, GAP, NAME = 100, 30, 22, 14, 13
"""Pixels: the lanes' names, the axis, a row of bars, between lanes, a row of names of events."""

NAMES = 3
"""Rows of names below the bars of a lane; what fits none gets a mark only."""


COLORS = {
    **dict.fromkeys(("open", "opened"), "#b6d7f2"),
    **dict.fromkeys(("handshake", "kex", "auth"), "#e3d5f5"),
    "running": "#bfe5c4",
    **dict.fromkeys(("input-ended", "draining"), "#f5e3a8"),
    **dict.fromkeys(("hanging-up", "closing", "closed"), "#f6c9a8"),
    "descriptor": "#cfe8e6",
    "slave": "#e4e4e4",
    "waiting": "#e58f8f",
}
FLOOD = ("data.", "window.", "input.", "output.read")
"""Beginnings of names that are marked, not written."""


class Axis:
    """Where a time stands: each step has some room, and longer ones more of it, but not in proportion."""

    def __init__(self, connection: Connection) -> None:
        self._times = [0]
        self._at = [0.0]
        for mark in connection.marks:
            step = mark.us - self._times[-1]
            if step > 0:
                drawn = 0.4 + math.log1p(step / 1000)
                self._times.append(mark.us)
                self._at.append(self._at[-1] + drawn)
        self._scale = (WIDTH - LABEL - 140) / max(self._at[-1], 1.0)

    def x(self, us: int) -> float:
        """Pixels from the left, of a time that is that of a mark."""
        return LABEL + self._at[bisect.bisect_right(self._times, us) - 1] * self._scale


def svg(connection: Connection) -> str:
    """The picture, as an SVG document on a white ground."""
    axis = Axis(connection)
    parts: list[str] = []
    tops = []
    y = TOP
    for lane in connection.lanes:
        tops.append(y)
        y += lane.rows * ROW + NAMES * NAME + GAP
    for number, lane in enumerate(connection.lanes):
        top, bottom = tops[number], tops[number] + lane.rows * ROW + NAMES * NAME + 4
        fill = "#f6f8fa" if number % 2 == 0 else "#fff"
        parts.append(
            f'<rect x="0" y="{top - 4}" width="{WIDTH}" height="{bottom - top + 8}" fill="{fill}"/>'
        )
        parts.append(_text(8, top + 15, lane.name, "600"))
        parts += [_bar(bar, axis, top, connection.end) for bar in lane.bars]
    for arrow in connection.arrows:
        if arrow.kind == "cause":
            ends = [connection.marks[mark] for mark in (arrow.cause, arrow.effect)]
            points = [
                (axis.x(m.us), tops[m.lane] + connection.lanes[m.lane].rows * ROW + 2) for m in ends
            ]
            parts += _arrow(points[0], points[1])
    parts += _names(connection, axis, tops)
    head = f"{connection.label}, {connection.end / 1000:.1f} ms; time is not drawn to scale"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
        ' font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{_xml(connection.label)}</title>",
        f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>',
        _text(8, 16, head),
        *parts,
        "</svg>\n",
    ])  # fmt: skip


def _xml(text: str) -> str:
    """Text, with nothing in it that XML has no place for (XML 1.0 §2.2)."""
    return escape(logs.escape(text))


def _text(x: float, y: float, text: str, weight: str = "400", size: float = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" font-size="{size}">{_xml(text)}</text>'


def _bar(bar: Bar, axis: Axis, top: int, end: int) -> str:
    left = axis.x(bar.begin)
    right = axis.x(bar.end) if bar.end is not None else axis.x(end) + 30
    y = top + bar.row * ROW
    width = max(right - left, 1.5)
    room = int((width - 6) / 6.5)
    label = (
        bar.label if len(bar.label) <= room else bar.label[: max(room - 1, 0)] + "…" * (room > 2)
    )
    return (
        f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 5}" rx="2" stroke="#ccc"'
        f" fill={quoteattr(COLORS.get(bar.state, '#eee'))}><title>{_xml(bar.label)}</title></rect>"
    ) + (_text(left + 4, y + 13, label) if room > 2 else "")


def _arrow(begin: tuple[float, float], end: tuple[float, float]) -> Iterator[str]:
    """A curve, and its head, without markers: not every program for slides draws those."""
    (x1, y1), (x2, y2) = begin, end
    bend = max(12.0, min(50.0, abs(x2 - x1) / 2))
    yield (
        f'<path d="M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"'
        ' fill="none" stroke="#8b949e"/>'
    )
    yield f'<path d="M{x2:.1f} {y2:.1f}l-6 -3v6z" fill="#8b949e"/>'


def _names(connection: Connection, axis: Axis, tops: list[int]) -> Iterator[str]:
    """A mark for each event, and its name where there is room."""
    free: dict[tuple[int, int], float] = {}
    for mark in connection.marks:
        x, base = axis.x(mark.us), tops[mark.lane] + connection.lanes[mark.lane].rows * ROW + 2
        yield f'<circle cx="{x:.1f}" cy="{base}" r="2.6" fill="#1b1f24"><title>{_xml(mark.event)}</title></circle>'
        if mark.event.startswith(FLOOD):
            continue
        for row in range(NAMES):
            if free.get((mark.lane, row), 0.0) <= x:
                free[mark.lane, row] = x + len(mark.event) * 5.7 + 10
                yield _text(x + 3, base + 10 + row * NAME, mark.event, size=10)
                break
