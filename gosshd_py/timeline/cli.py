"""`gosshd timeline`: from a trace to a page, a picture, or a page that is live."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .. import logs
from .follow import Server, Watcher
from .model import Connection, Model, Read
from .page import page
from .svg import svg


@click.command()
@click.argument("file", metavar="FILE.ndjson")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Where to write; - is standard output.  [default: FILE.html, or FILE.svg]",
)
@click.option(
    "--connection",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only the connection that the trace calls #N.",
)
@click.option(
    "--svg",
    "as_svg",
    is_flag=True,
    help="A still picture of one connection for slides, in place of a page.",
)
@click.option(
    "--follow",
    is_flag=True,
    help="Serve the page on loopback and update it as sessions run, until ^C.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="PORT",
    help="Where --follow serves.  [default: any free port]",
)
def timeline(
    file: str, output: str | None, connection: int | None, as_svg: bool, follow: bool, port: int
) -> None:  # fmt: skip
    """Draw a trace over time: one page, to be opened in any browser, without a network.

    FILE.ndjson is what `gosshd --trace-file FILE.ndjson` has written, or is writing.
    """
    if follow:
        if as_svg or output:
            raise click.UsageError("--follow serves a page and writes none; leave -o and --svg out")
        _follow(Path(file), connection, port)
        return
    connections, dropped, bad = _read(file, connection)
    if as_svg:
        text = svg(connections[-1])
    else:
        text = page(connections, title=f"{Path(file).name} – timeline", dropped=dropped)
    if output == "-":
        click.echo(text, nl=False)
        return
    target = Path(output or Path(file).with_suffix(".svg" if as_svg else ".html"))
    target.write_text(text, encoding="utf-8")
    count = f"{len(connections)} connections" if len(connections) > 1 else connections[0].label
    click.echo(f"{target}: {logs.escape(connections[-1].label if as_svg else count)}", err=True)
    if bad:
        click.echo(f"{file}: {bad} lines are no events and are left out", err=True)


def _read(file: str, only: int | None) -> tuple[list[Connection], int, int]:
    """The connections, how many events were dropped, and how many lines are no events."""
    model = Model()
    try:
        with Path(file).open(encoding="utf-8", errors="replace") as lines:
            events = Read(lines)
            for event in events:
                model.feed(event)
    except OSError as exc:
        raise click.ClickException(f"{file}: {exc.strerror}") from exc
    if events.bad and not events.good:
        raise click.ClickException(f"{file}: is no trace; name a file of --trace-file")
    keys = [key for key, found in model.events.items() if only in (None, found[0].connection)]
    if not keys:
        numbers = sorted({found[0].connection for found in model.events.values()})
        known = f"; it has #{numbers[0]} to #{numbers[-1]}" if numbers else ""
        what = f"no connection #{only}" if only else "no connection"
        raise click.ClickException(f"{file}: there is {what} in this trace{known}")
    return [model.connection(key) for key in keys], model.dropped, events.bad


def _follow(path: Path, only: int | None, port: int) -> None:
    watcher = Watcher(path, only)
    with Server(port, watcher, f"{path.name} – live") as server:
        watcher.start()
        click.echo(server.url)
        if not path.exists():
            click.echo(f"waiting for {path}; start gosshd --trace-file {path}", err=True)
        try:
            server.serve_forever(0.2)
        except KeyboardInterrupt:
            sys.exit(0)
