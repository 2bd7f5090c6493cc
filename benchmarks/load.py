"""The load generator where there is no Go: what benchmarks/go/load does, by asyncssh.

It takes more of the machine, so that ratios between servers are nearer to 1. Same arguments, same answers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time

import asyncssh

_ADDRESSES = itertools.count()


class Load:
    """What a client does to one server."""

    def __init__(self, address: str, user: str, key: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port, self._user, self._key = int(port), user, asyncssh.read_private_key(key)

    async def dial(self) -> asyncssh.SSHClientConnection:
        """Log in, from ever other addresses of loopback: dropbear lets five of one wait for a login."""
        source = f"127.0.1.{1 + next(_ADDRESSES) % 200}"
        return await asyncssh.connect(
            self._host, self._port, username=self._user, client_keys=[self._key], known_hosts=None,
            local_addr=(source, 0), server_host_key_algs=["ssh-ed25519"], config=None, agent_path=None,
        )  # fmt: skip

    async def logins(self, count: int, at_once: int) -> dict[str, float]:
        """Connect, log in, run `true` for its exit status, disconnect."""
        took: list[float] = []
        tasks = iter(range(count))

        async def work() -> None:
            for _ in tasks:
                began = time.perf_counter()
                async with await self.dial() as conn:
                    await conn.run("true", check=True, stdin=asyncssh.DEVNULL)
                took.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(at_once)))
        return {"per_second": count / (time.perf_counter() - began), **_percentiles(took)}

    async def terminal(self) -> asyncssh.SSHClientProcess[bytes]:
        """A terminal whose line discipline echoes each key; the program says nothing."""
        conn = await self.dial()
        return await conn.create_process(
            "exec cat > /dev/null", term_type="xterm", encoding=None, term_modes={asyncssh.PTY_ECHO: 1}
        )  # fmt: skip

    async def echo(self, sessions: int, seconds: int, interval_ms: int) -> dict[str, float]:
        """Keys typed one after the other, or by each session every interval."""
        typists = [await self.terminal() for _ in range(sessions)]
        await asyncio.sleep(sessions > 1)  # until the last shell has started
        took: list[float] = []

        async def key(typist: asyncssh.SSHClientProcess[bytes]) -> float:
            began = time.perf_counter()
            typist.stdin.write(b"x")
            answer = await typist.stdout.readexactly(1)
            assert answer == b"x", answer  # noqa: S101
            return time.perf_counter() - began

        async def work(number: int, typist: asyncssh.SSHClientProcess[bytes]) -> None:
            await key(typist)
            await asyncio.sleep(interval_ms / 1000 * number / sessions)
            keys = 0
            while time.perf_counter() < end:
                keys += 1
                if keys % 1000 == 999:  # a line of the terminal holds 4096
                    typist.stdin.write(b"\r")
                    await typist.stdout.readexactly(2)
                took.append(await key(typist))
                if interval_ms:
                    await asyncio.sleep(interval_ms / 1000)

        end = time.perf_counter() + seconds
        await asyncio.gather(*(work(*numbered) for numbered in enumerate(typists)))
        return _percentiles(took)

    async def hold(self, sessions: int) -> None:
        """So many connections, each with a terminal on which nothing happens, to the end of the input."""
        for _ in range(sessions):
            typist = await self.terminal()
            typist.stdin.write(b"x")
            await typist.stdout.readexactly(1)
            _HELD.append(typist)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)

    async def channels(self, count: int) -> dict[str, float]:
        """So many commands on one connection, asked for at once."""
        conn = await self.dial()
        began = time.perf_counter()
        await asyncio.gather(
            *(conn.run("true", check=True, stdin=asyncssh.DEVNULL) for _ in range(count))
        )
        return {"ms": (time.perf_counter() - began) * 1000}


_HELD: list[asyncssh.SSHClientProcess[bytes]] = []


def _percentiles(took: list[float]) -> dict[str, float]:
    took.sort()
    half, most = took[len(took) // 2], took[len(took) * 99 // 100]
    return {"p50_us": half * 1e6, "p99_us": most * 1e6, "count": len(took)}


if __name__ == "__main__":
    what, *where = sys.argv[1:5]
    result = asyncio.run(getattr(Load(*where), what)(*map(int, sys.argv[5:])))
    if result:
        print(json.dumps(result))
