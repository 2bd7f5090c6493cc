"""An SFTP server on standard input and output, for machines without OpenSSH's sftp-server(8).

    python -m gosshd_py.sftp [-R]

-R: read only. It runs as the session's user, in the session's confinement, like every other
program that a client starts; the file access is asyncssh's, the permissions are the kernel's.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import suppress
from typing import Any, cast

import asyncssh
from asyncssh.constants import FXF_APPEND, FXF_CREAT, FXF_TRUNC, FXF_WRITE
from asyncssh.sftp import run_sftp_server

WRITES = FXF_WRITE | FXF_APPEND | FXF_CREAT | FXF_TRUNC


MAX_READ = 256 * 1024
"""Bytes of an answer at most, as with OpenSSH's; the client asks for the rest again."""


class Files(asyncssh.SFTPServer):
    """The files that this process can reach."""

    def read(self, file_obj: object, offset: int, size: int) -> bytes:
        """Read some of what is asked for: the size is whatever the client has sent."""
        return cast("bytes", super().read(file_obj, offset, min(size, MAX_READ)))


def _denied(*_: Any, **__: Any) -> Any:
    raise asyncssh.SFTPPermissionDenied("this account is read-only")


class ReadOnlyFiles(Files):
    """The same without everything that changes something."""

    remove = rename = posix_rename = mkdir = rmdir = _denied
    setstat = lsetstat = fsetstat = symlink = link = write = _denied

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
        """SFTP version 3."""
        return _denied() if pflags & WRITES else super().open(path, pflags, attrs)

    def open56(self, path: bytes, desired_access: int, flags: int, attrs: asyncssh.SFTPAttrs) -> object:  # fmt: skip
        """SFTP versions 5 and 6, which we do not offer."""
        return _denied()


class Channel:
    """What asyncssh's server asks of the SSH channel that is not there."""

    logger = asyncssh.logging.logger

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_connection(self) -> Any:
        return self

    def is_closing(self) -> bool:
        return False


class Output(asyncio.BaseProtocol):
    """Hears whether standard output takes more."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()

    def pause_writing(self) -> None:
        self.open.clear()

    def resume_writing(self) -> None:
        self.open.set()


class Reader:
    """Standard input, as asyncssh reads it."""

    def __init__(self, stream: asyncio.StreamReader, output: Output) -> None:
        self._stream = stream
        self._output = output
        self.channel = Channel()
        self.logger = self.channel.logger

    async def readexactly(self, size: int) -> bytes:
        await self._output.open.wait()  # no new request while the answers pile up
        return await self._stream.readexactly(size)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        # The arguments of a symlink come in OpenSSH's order, not the draft's, from all that is in use.
        return "OpenSSH" if name == "client_version" else default


class Writer:
    """Standard output, as asyncssh writes it."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self.channel = Channel()
        self.logger = self.channel.logger

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def close(self) -> None:
        self._transport.close()

    async def wait_closed(self) -> None:
        return

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


async def serve(read_only: bool) -> None:
    """Serve until the client's end of file."""
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), sys.stdin.buffer)
    output, protocol = await loop.connect_write_pipe(Output, sys.stdout.buffer)
    files = ReadOnlyFiles if read_only else Files
    reader, writer = Reader(stream, protocol), Writer(output)
    with suppress(EOFError):  # the client may leave before it has said who it is
        await run_sftp_server(files(reader.channel), reader, writer, 3)  # type: ignore[arg-type]


def main() -> None:
    """The command line."""
    options = sys.argv[1:]
    if [option for option in options if option != "-R"]:
        sys.exit("usage: python -m gosshd_py.sftp [-R]")
    logging.disable()
    try:
        asyncio.run(serve("-R" in options))
    except (OSError, asyncssh.Error, ValueError) as exc:
        sys.exit(f"gosshd_py.sftp: {exc}")


if __name__ == "__main__":
    main()
