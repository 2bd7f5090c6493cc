"""A timeline as one HTML page that needs nothing else: no network, no other files."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from ..lifecycle import EVENTS
from .model import Connection


def page(
    connections: Iterable[Connection], *, title: str, dropped: int = 0, follow: str = ""
) -> str:
    """The page. follow: where it hears of what happens later, as server-sent events."""
    data = {
        "connections": [drawn(connection) for connection in connections],
        "events": {name: (meaning.gloss, meaning.source) for name, meaning in EVENTS.items()},
        "dropped": dropped,
        "follow": follow,
    }
    parts = {
        "{title}": html.escape(title),
        "{style}": _part("page.css"),
        "{script}": _part("page.js"),
        "{data}": as_json(data),
    }
    # In one go: what clients have chosen may look like one of these places.
    return re.sub(r"\{\w+\}", lambda place: parts[place[0]], _part("page.html"))


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends that element (HTML §4.12.1.3)."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def drawn(connection: Connection) -> dict[str, Any]:
    """A connection as page.js takes it: lists in place of records, since there are many."""
    return {
        "key": connection.key,
        "label": connection.label,
        "began": connection.began,
        "open": connection.open,
        "end": connection.end,
        "lanes": [
            {
                "name": lane.name,
                "kind": lane.kind,
                "rows": lane.rows,
                "bars": [(bar.begin, bar.end, bar.label, bar.state, bar.row) for bar in lane.bars],
            }
            for lane in connection.lanes
        ],
        "marks": [(mark.us, mark.lane, mark.event, mark.facts) for mark in connection.marks],
        "arrows": [(arrow.cause, arrow.effect, arrow.kind) for arrow in connection.arrows],
    }
