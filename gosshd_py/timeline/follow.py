"""The same page, live: served on loopback, told of what happens by server-sent events.

Only who knows the address gets it: a trace tells who did what, and everybody on the machine reaches
loopback, as does a web page that has a name point there (DNS rebinding).
"""

from __future__ import annotations

import http.server
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from .model import Model, Read
from .page import as_json, drawn, page

LOOK = 0.2
"""Seconds between looks at the file."""

ALIVE = 15.0
"""Seconds of silence after which a comment is sent, so that a reader that has gone is noticed."""


SHARE = 10
"""For so many times as long as it has taken to tell the news, none is told."""


class Tail:
    """The lines of a file that grows, or is renamed and made anew (logrotate(8))."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._rest = ""

    def lines(self) -> Iterator[str]:
        """The whole lines that have come since the last call."""
        while True:
            if self._file is None:
                with suppress(FileNotFoundError):
                    self._file = self._path.open(encoding="utf-8", errors="replace")
            if self._file is None:
                return
            self._rest += self._file.read()
            *whole, self._rest = self._rest.split("\n")
            yield from whole
            if not self._replaced():
                return
            self._file.close()
            self._file, self._rest = None, ""

    def _replaced(self) -> bool:
        """Whether the path leads to another file by now; the old one is read to its end then."""
        assert self._file is not None  # noqa: S101
        try:
            there, ours = self._path.stat(), os.fstat(self._file.fileno())
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) != (
            ours.st_dev,
            ours.st_ino,
        ) or there.st_size < self._file.tell()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Watcher(threading.Thread):
    """Reads the file as it grows; connections are numbered by their latest change."""

    def __init__(self, path: Path, only: int | None) -> None:
        super().__init__(name="timeline", daemon=True)
        self._path = path
        self._only = only
        self._model = Model()
        self._news = threading.Condition()
        self._changed: dict[str, int] = {}
        self._version = 0

    def run(self) -> None:
        """Look again and again."""
        tail = Tail(self._path)
        while True:
            self._take(list(tail.lines()))
            time.sleep(LOOK)

    def _take(self, lines: list[str]) -> None:
        if not lines:
            return
        with self._news:
            self._version += 1
            for event in Read(lines):
                key = self._model.feed(event)
                if key is not None and self._only in (None, event.connection):
                    self._changed[key] = self._version
            self._news.notify_all()

    def since(self, version: int, seconds: float) -> tuple[int, list[Any], int]:
        """Wait for news behind a version. Returns the latest one, the connections, what was dropped."""
        with self._news:
            self._news.wait_for(lambda: self._version > version, seconds)
            changed = [key for key, when in self._changed.items() if when > version]
            connections = [self._model.connection(key) for key in changed]
            return self._version, connections, self._model.dropped


class Server(http.server.ThreadingHTTPServer):
    """The page and its news, on loopback, below a secret path."""

    daemon_threads = True

    def __init__(self, port: int, watcher: Watcher, title: str) -> None:
        """Raises OSError if the port cannot be listened on; 0 takes any free one."""
        super().__init__(("127.0.0.1", port), Handler)
        self.watcher = watcher
        self.title = title
        self.secret = secrets.token_urlsafe(16)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Only for mistakes of ours: readers may go as they like."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """What to open in a browser."""
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET for the page and for its news, and nothing else."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The page, or the stream of news."""
        path, _, query = self.path.partition("?")
        hosts = (f"127.0.0.1:{self.server.server_port}", f"localhost:{self.server.server_port}")
        if self.headers.get("Host") not in hosts:
            self.send_error(421)
        elif path == f"/{self.server.secret}/":
            self._page()
        elif path == f"/{self.server.secret}/news":
            with suppress(OSError):  # the reader has gone
                self._news(query)
        else:
            self.send_error(404)

    def _page(self) -> None:
        version, connections, dropped = self.server.watcher.since(-1, 0)
        follow = f"news?{version}"
        text = page(connections, title=self.server.title, dropped=dropped, follow=follow).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(text)

    def _news(self, query: str) -> None:
        """Server-sent events (HTML §9.2): each tells all connections that have changed."""
        asked = self.headers.get("Last-Event-ID") or query
        version = int(asked) if re.fullmatch("[0-9]{1,15}", asked, re.ASCII) else -1
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        while True:
            latest, connections, dropped = self.server.watcher.since(version, ALIVE)
            began = time.monotonic()
            news = {"connections": [drawn(found) for found in connections], "dropped": dropped}
            text = f"id: {latest}\ndata: {as_json(news)}\n\n" if latest > version else ": alive\n\n"
            self.wfile.write(text.encode())
            self.wfile.flush()
            version = latest
            # A connection is told whole, and a long one takes its time: most of it is others'.
            time.sleep(max(LOOK, SHARE * (time.monotonic() - began)))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name there
        """Say nothing: who serves the page sees it in the browser."""
