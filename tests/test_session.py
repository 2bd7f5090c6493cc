"""session.py by itself: no SSH and no processes, only programs and channels made of futures."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gosshd_py import session
from gosshd_py.lifecycle import (
    SILENT,
    TRANSITIONS,
    Cause,
    Event,
    ExitStatus,
    Life,
    State,
    Trace,
)
from gosshd_py.session import run_session

from .documents import diagram
from .serving import run


class Stream:
    """A source and a sink: what is written can be read."""

    def __init__(self, *chunks: bytes, ended: bool = False) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()
        for chunk in chunks:
            self.queue.put_nowait(chunk)
        if ended:
            self.queue.put_nowait(b"")
        self.written = b""
        self.over = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def read(self) -> bytes:
        if self.over:
            return b""
        data = await self.queue.get()
        self.over = not data
        return data

    async def write(self, data: bytes) -> None:
        await self.gate.wait()
        if self.error:
            raise self.error
        self.written += data

    async def write_eof(self) -> None:
        self.written += b"<EOF>"


class Program:
    def __init__(self, journal: list[str], *outputs: Stream) -> None:
        self.journal = journal
        self.stdin = Stream()
        self.outputs = outputs or (Stream(),)
        self.ended: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        self.close_error: Exception | None = None

    def end(self, **status: Any) -> None:
        self.ended.set_result(ExitStatus(**status))
        for output in self.outputs:
            output.queue.put_nowait(b"")

    async def aclose(self) -> None:
        self.journal.append("program closed")
        if not self.ended.done():
            self.end(signal=1)
        if self.close_error:
            raise self.close_error


class Channel:
    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.stdin = Stream()
        self.outputs = (Stream(), Stream())
        self.ended: asyncio.Future[Cause] = asyncio.get_running_loop().create_future()

    def end(self, cause: Cause) -> None:
        self.ended.set_result(cause)
        self.stdin.queue.put_nowait(b"")

    async def aclose(self, status: ExitStatus | None) -> None:
        self.journal.append(f"channel closed, {status}")


class Scene:
    """A session under way, and the steps that it has taken."""

    def __init__(self, *outputs: Stream, drain_timeout: float = 5) -> None:
        self.journal: list[str] = []
        self.states = [State.OPEN]
        self.causes: list[tuple[str, Cause]] = []
        self.program = Program(self.journal, *outputs)
        self.channel = Channel(self.journal)
        self.task = asyncio.create_task(
            run_session(
                self.channel,
                self.program,
                trace=Trace(self.tell),
                drain_timeout=drain_timeout,
            )
        )

    def tell(self, _: int, __: int | None, event: str, facts: dict[str, Any]) -> None:
        if event == "state.changed":
            self.states.append(facts["to"])
        else:
            self.causes.append((event, facts["cause"]))

    async def over(self) -> Any:
        ending = await self.task
        assert self.journal[0] == "program closed"
        assert self.journal[1].startswith("channel closed")
        assert len(self.journal) == 2  # each once, in this order
        assert self.states[-1] is State.CLOSED
        assert len(asyncio.all_tasks()) == 1
        return ending


def test_output_is_delivered_before_an_exit_is_reported() -> None:
    async def main() -> None:
        scene = Scene(Stream(b"one", b"two"), Stream(b"err"))
        scene.program.end(code=3)
        ending = await scene.over()
        assert [output.written for output in scene.channel.outputs] == [b"onetwo", b"err"]
        assert (ending.cause, ending.status, ending.bytes_out) == (Cause.EXITED, ExitStatus(3), 9)
        assert scene.journal[1] == "channel closed, status 3"
        assert scene.states[1:] == ["running", "draining", "hanging up", "closing", "closed"]

    run(main())


def test_client_eof_ends_the_input_and_nothing_else() -> None:
    async def main() -> None:
        scene = Scene()
        for data in (b"in", b""):
            scene.channel.stdin.queue.put_nowait(data)
        await until(lambda: State.INPUT_ENDED in scene.states)
        assert scene.program.stdin.written == b"in<EOF>"
        scene.program.outputs[0].queue.put_nowait(b"still here")
        await until(lambda: scene.channel.outputs[0].written == b"still here")
        scene.program.end()
        assert (await scene.over()).bytes_in == 2

    run(main())


@pytest.mark.parametrize("cause", [Cause.CLIENT_CLOSED, Cause.CONNECTION_LOST, Cause.SHUTDOWN])
def test_the_channels_end_hangs_up_on_the_program(cause: Cause) -> None:
    async def main() -> None:
        scene = Scene()
        await until(lambda: State.RUNNING in scene.states)
        scene.channel.end(cause)
        ending = await scene.over()
        assert (ending.cause, ending.status) == (cause, ExitStatus(signal=1))

    run(main())


def test_the_first_cause_is_kept() -> None:
    """The program has exited; that the client leaves while output drains changes nothing."""

    async def main() -> None:
        scene = Scene(Stream(b"x"))
        scene.channel.outputs[0].gate.clear()
        scene.program.end(signal=15)
        await until(lambda: State.DRAINING in scene.states)
        scene.channel.end(Cause.CONNECTION_LOST)
        assert (await scene.over()).cause is Cause.SIGNALLED

    run(main())


def test_a_client_that_takes_nothing_is_given_up_when_the_program_has_ended() -> None:
    async def main() -> None:
        scene = Scene(Stream(b"x"), drain_timeout=0.05)
        scene.channel.outputs[0].gate.clear()
        scene.program.end()
        ending = await scene.over()
        assert ending.cause is Cause.EXITED
        assert ending.bytes_out == 0

    run(main())


def test_input_that_the_program_refuses_is_read_and_dropped() -> None:
    async def main() -> None:
        scene = Scene()
        scene.program.stdin.error = BrokenPipeError()
        for data in (b"1", b"2", b"3", b""):
            scene.channel.stdin.queue.put_nowait(data)
        await until(lambda: State.INPUT_ENDED in scene.states)
        scene.program.end()
        ending = await scene.over()
        assert (ending.cause, ending.bytes_in) == (Cause.EXITED, 0)

    run(main())


@pytest.mark.parametrize("where", ["read output", "write output", "read input"])
def test_an_error_of_ours_is_recorded_and_closes_like_any_other_end(where: str) -> None:
    async def main() -> None:
        async def broken(*_: object) -> bytes:
            raise ZeroDivisionError(where)

        scene = Scene(Stream(b"x"))
        if where == "read output":
            scene.program.outputs[0].read = broken  # type: ignore[method-assign]
        elif where == "write output":
            scene.channel.outputs[0].write = broken  # type: ignore[method-assign, assignment]
        else:
            scene.channel.stdin.read = broken  # type: ignore[method-assign]
        ending = await scene.over()
        assert ending.cause is Cause.ERROR
        assert isinstance(ending.error, ExceptionGroup)
        assert where in str(ending.error.exceptions[0])

    run(main())


def test_the_channel_is_closed_even_when_closing_the_program_fails() -> None:
    async def main() -> None:
        scene = Scene()
        scene.program.close_error = RuntimeError("stuck")
        scene.program.end()
        with pytest.raises(RuntimeError, match="stuck"):
            await scene.task
        assert scene.journal == ["program closed", "channel closed, status 0"]

    run(main())


def test_a_cancelled_session_still_closes_both() -> None:
    async def main() -> None:
        scene = Scene()
        await until(lambda: State.RUNNING in scene.states)
        scene.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scene.task
        assert len(scene.journal) == 2
        assert len(asyncio.all_tasks()) == 1

    run(main())


def test_what_was_sent_before_close_reaches_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "INPUT_GRACE", 1.0)

    async def main() -> None:
        scene = Scene()
        scene.program.stdin.gate.clear()
        scene.channel.stdin.queue.put_nowait(b"last words")
        await until(lambda: State.RUNNING in scene.states)
        scene.channel.end(Cause.CLIENT_CLOSED)
        asyncio.get_running_loop().call_later(0.05, scene.program.stdin.gate.set)
        asyncio.get_running_loop().call_later(0.1, scene.program.end)
        await scene.over()
        assert scene.program.stdin.written == b"last words<EOF>"

    run(main())


async def until(condition: Any) -> None:
    """Let the loop run until it is so."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


# -- the table -----------------------------------------------------------------------------------


def test_every_state_is_reached_and_every_walk_ends_closed() -> None:
    reached = {State.OPEN} | set(TRANSITIONS.values())
    assert reached == set(State)
    assert {event for _, event in TRANSITIONS} == set(Event)
    ends = set(State) - {state for state, _ in TRANSITIONS}
    assert ends == {State.CLOSED}


@given(st.lists(st.sampled_from(Event), max_size=12))
def test_a_step_that_the_table_lacks_is_refused(events: list[Event]) -> None:
    life = Life(SILENT)
    for event in events:
        before = life.state
        if (before, event) in TRANSITIONS:
            life.advance(event)
        else:
            with pytest.raises(KeyError):
                life.advance(event)
            assert life.state is before


def test_the_diagram_shows_every_transition() -> None:
    assert sum(" --> " in line for line in diagram().splitlines()) == len(TRANSITIONS) + 2
