"""A trace drawn over time: the model, the picture, and the page in a real browser."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import asyncssh
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from gosshd_py.lifecycle import EVENTS
from gosshd_py.timeline import Connection, Model, Read, page, svg
from gosshd_py.timeline.follow import Tail
from gosshd_py.timeline.model import Bar

from .serving import ROOT, Served, run, wait_for
from .test_cli import gosshd_once
from .test_forward import Echo
from .test_limits import connect, read_all
from .test_trace import Traced

Serve = Callable[..., Served]


@pytest.fixture
def traced(serve: Serve, tmp_path: Path) -> Traced:
    return Traced(serve, tmp_path, trace_data=64)


def connections(file: Path) -> list[Connection]:
    model = Model()
    with file.open() as lines:
        for event in Read(lines):
            model.feed(event)
    return [model.connection(key) for key in model.events]


def some_life(traced: Traced, command: str = "stty size; exit 3") -> Connection:
    traced.server.ssh("-tt", "HOST", command)
    traced.over()
    return connections(traced.file)[-1]


# -- the model -----------------------------------------------------------------------------------------


def test_a_session_is_lanes_bars_and_arrows(traced: Traced) -> None:
    life = some_life(traced)
    assert [lane.name for lane in life.lanes] == ["TCP", "SSH", "channel 0", "pty 0", "process 0"]
    assert not life.open
    assert re.fullmatch(r"#1 anyuser@127\.0\.0\.1:\d+ stty size; exit 3", life.label)
    bars = [[bar.label for bar in lane.bars] for lane in life.lanes]
    assert bars[0][0].startswith("connected, fd ")
    assert bars[1] == ["identification", "key exchange", "authentication", "logged in as anyuser"] or bars[1].count("key exchange") == 2  # fmt: skip
    assert bars[2][:2] == ["open", "running"]
    assert bars[2][-3:] == ["draining", "hanging up", "closing"]
    assert bars[3][0].startswith("master, fd ")
    assert bars[4][0].startswith("pid ")
    assert all(
        bar.end is not None and bar.begin <= bar.end for lane in life.lanes for bar in lane.bars
    )
    arrows = {(life.marks[a.cause].event, life.marks[a.effect].event) for a in life.arrows}
    assert {
        *(("kex.started", "kex.completed"), ("channel.asked", "channel.opened")),
        *(("request.received", "pty.opened"), ("pty.opened", "program.spawned")),
        *(("program.reaped", "cause.named"), ("program.reaped", "exit.sent")),
        *(("output.ended", "eof.sent"), ("output.read", "data.sent")),
    } <= arrows
    assert all(arrow.cause < arrow.effect for arrow in life.arrows)


def test_pipes_have_three_bars_and_a_hang_up_is_a_cause(traced: Traced) -> None:
    async def leave() -> None:
        conn = await traced.server.connect()
        await conn.create_process("sleep 100")
        conn.abort()

    run(leave())
    traced.over()
    (life,) = connections(traced.file)
    pipes = next(lane for lane in life.lanes if lane.kind == "pty")
    assert (pipes.name, pipes.rows, len(pipes.bars)) == ("pipes 0", 3, 3)
    arrows = {(life.marks[a.cause].event, life.marks[a.effect].event) for a in life.arrows}
    assert ("cause.named", "fd.closed") in arrows
    assert {("fd.closed", "program.reaped"), ("signal.sent", "program.reaped")} & arrows


def test_a_trace_of_several_runs_keeps_them_apart(tmp_path: Path) -> None:
    """The kernel gives a pid again, and each server counts from 1."""

    file = tmp_path / "t.ndjson"
    file.write_text(
        line("trace.started", 0, began=1.0) + line("tcp.accepted")
        + line("trace.started", 0, began=2.0) + line("tcp.accepted")
        + line("tcp.accepted", pid=8) + '{"us": 1, "ti'
    )  # fmt: skip
    assert [found.number for found in connections(file)] == [1, 1, 1]


def test_a_file_that_is_rotated_in_the_middle_of_a_session_does_not_split_it(
    traced: Traced, tmp_path: Path
) -> None:
    terminal = traced.server.terminal("-tt", "HOST", "sh")
    wait_for("its start", lambda: traced.of("program.spawned"))
    traced.file.rename(tmp_path / "older")
    terminal.sendline("exit")
    wait_for("its end", lambda: traced.file.exists() and traced.of("tcp.closed"))
    whole = tmp_path / "whole"
    whole.write_text((tmp_path / "older").read_text() + traced.file.read_text())
    (life,) = connections(whole)
    assert not life.open
    assert connections(traced.file)[0].number == life.number  # and its second half can be drawn


def line(event: str, connection: Any = 1, pid: Any = 7, us: Any = 1, channel: Any = None, **facts: Any) -> str:  # fmt: skip
    return json.dumps({"us": us, "time": 1.0, "pid": pid, "connection": connection, "channel": channel, "event": event, "facts": facts}) + "\n"  # fmt: skip


@pytest.mark.parametrize("text", ["no trace\n", '{"a": 1}\n', "[]\n", "1\n", "\0\n"])
def test_what_is_no_trace_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "t.ndjson"
    file.write_text(text)
    result = gosshd_once(tmp_path, "timeline", file)
    assert result.returncode == 1
    assert result.stderr == f"gosshd: error: {file}: is no trace; name a file of --trace-file\n"


ODD = [
    line("tcp.accepted", us=None), line("tcp.accepted", us="1"), line("tcp.accepted", us=[1]),
    line("tcp.accepted", us=-1), line("tcp.accepted", us=2**60), line("tcp.accepted", us=float("nan")),
    line("tcp.accepted", pid=[]), line("tcp.accepted", connection={}), line("tcp.accepted", channel="0"),
    line([]), line(1), line(None),
    line("x").replace('"facts": {}', '"facts": []'), line("x").replace('"facts": {}', '"facts": null'),
    line("x").replace('"us": 1', '"us": 1e999'), line("x", a="b").replace('"b"', '"\\ud800"'),
    line("x", a="b").replace('"b"', "[" * 100_000 + "]" * 100_000), line("x", a=[[1]]), line("x")[:20] + "\n",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_a_line_that_is_no_event_is_left_out_and_counted(tmp_path: Path, odd: str) -> None:
    file = tmp_path / "t.ndjson"
    file.write_text("\n" + odd + line("tcp.accepted", peer="p", fd=3))
    for how in ((), ("--svg",)):
        result = gosshd_once(tmp_path, "timeline", file, *how)
        assert result.returncode == 0, result.stderr
        assert f"{file}: 1 lines are no events and are left out\n" in result.stderr


def test_facts_of_unexpected_kinds_are_drawn_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "t.ndjson"
    odd = ({"k": "\x00\x1b\ud83d"}, [1, None], "\x00\x08", None, True, 10**30, -0.5)
    names = (
        "what",
        "by",
        "to",
        "sender",
        "theirs",
        "request",
        "cause",
        "user",
        "events",
        "fd",
        "began",
    )
    events = ["trace.started", "trace.dropped", *EVENTS]
    file.write_text("".join(
        line(event, channel=channel, us=number, **dict.fromkeys(names, value))
        for number, (event, value, channel) in enumerate(itertools.product(events, odd, (None, 0)))
    ))  # fmt: skip
    for life in connections(file):
        data = re.search(r'id="trace">(.*?)</script>', page([life], title="t"), re.DOTALL)
        assert json.loads(data[1], parse_constant=pytest.fail)
        assert ET.fromstring(svg(life)) is not None


def bars(life: Connection, kind: str) -> dict[str, Bar]:
    return {bar.label: bar for lane in life.lanes if lane.kind == kind for bar in lane.bars}


def test_a_program_that_outlives_its_client_is_drawn_to_its_own_end(
    serve: Serve, tmp_path: Path
) -> None:
    traced = Traced(serve, tmp_path, hangup_grace=0.5)
    client = traced.server.terminal("-tt", "HOST", "trap '' HUP; echo rea''dy; sleep 50; sleep 50")
    client.expect("ready")
    client.close(force=True)
    traced.over()
    (life,) = connections(traced.file)
    at = {mark.event: mark.us for mark in life.marks}
    assert at["tcp.closed"] + 300_000 < at["program.reaped"]
    (process,) = bars(life, "process").values()
    assert process.end == at["program.reaped"]
    (connected,) = bars(life, "tcp").values()
    assert connected.end == at["tcp.closed"]
    master = next(bar for label, bar in bars(life, "pty").items() if label.startswith("master"))
    assert master.end == next(mark.us for mark in life.marks if mark.event == "fd.closed" and mark.facts["what"] == "master")  # fmt: skip
    hanging_up = bars(life, "channel")["hanging up"]
    assert hanging_up.end is not None
    assert hanging_up.end >= at["program.reaped"]
    assert not life.open
    until = [json.loads(text) for text in traced.file.read_text().splitlines()]
    shortened = tmp_path / "until"
    shortened.write_text("".join(
        json.dumps(event) + "\n" for event in until if event["event"] not in ("program.reaped", "state.changed", "session.ended")
    ))  # fmt: skip
    (still,) = connections(shortened)
    assert still.open  # the program runs


def test_what_a_session_was_is_still_drawn_when_keys_are_exchanged_anew(traced: Traced) -> None:
    data = "head -c 2000000 /dev/zero"
    traced.server.ssh("-o", "RekeyLimit=200K", "HOST", data)
    traced.over()
    (life,) = connections(traced.file)
    ssh = next(lane for lane in life.lanes if lane.kind == "ssh")
    kexes = [bar for bar in ssh.bars if bar.label == "key exchange"]
    assert len(kexes) > 2
    assert {bar.row for bar in kexes} == {1}
    login = next(bar for bar in ssh.bars if bar.label == "logged in as anyuser")
    assert login.end == next(mark.us for mark in life.marks if mark.event == "tcp.closed")
    identification = next(bar for bar in ssh.bars if bar.label == "identification")
    assert identification.end == kexes[0].begin


def test_each_channel_comes_from_its_own_request(traced: Traced) -> None:
    async def many() -> None:
        conn = await traced.server.connect()
        await asyncio.gather(*(conn.run("true") for _ in range(12)), return_exceptions=True)
        refused = await asyncio.gather(
            *(conn.open_connection("10.0.0.1", 80) for _ in range(3)), return_exceptions=True
        )
        assert all(isinstance(one, asyncssh.ChannelOpenError) for one in refused)
        conn.close()

    run(many())
    traced.over()
    (life,) = connections(traced.file)
    found = 0
    for arrow in life.arrows:
        cause, effect = life.marks[arrow.cause], life.marks[arrow.effect]
        if effect.event == "channel.opened":
            assert cause.facts["sender"] == effect.facts["theirs"]
            found += 1
        elif effect.event == "channel.refused":
            assert cause.facts["sender"] == effect.facts["sender"]
            found += 1
    assert found == 15
    assert len({arrow.effect for arrow in life.arrows}) == len(life.arrows)


def test_a_refused_connection_ends(serve: Serve, tmp_path: Path) -> None:
    traced = Traced(serve, tmp_path, max_connections=1)
    with connect(traced.server), connect(traced.server) as second:
        read_all(second)
    wait_for("their ends", lambda: len(traced.of("tcp.closed")) == 2)
    lives = connections(traced.file)
    assert sorted(life.open for life in lives) == [False, False]
    refused = next(
        life for life in lives if any(mark.event == "tcp.refused" for mark in life.marks)
    )
    assert [mark.event for mark in refused.marks] == ["tcp.accepted", "tcp.refused", "tcp.closed"]
    assert refused.marks[0].facts["fd"] == refused.marks[2].facts["fd"]


def test_a_forward_has_a_socket_and_no_process(serve: Serve, tmp_path: Path) -> None:
    with Echo(("127.0.0.1", 0), Echo.Handler) as echo:
        threading.Thread(target=echo.serve_forever, args=(0.01,), daemon=True).start()
        traced = Traced(serve, tmp_path, permit_open=["127.0.0.1:*"], trace_data=64)

        async def ask() -> None:
            conn = await traced.server.connect()
            reader, writer = await conn.open_connection("127.0.0.1", echo.server_address[1])
            writer.write(b"Cookie: secret")
            writer.write_eof()
            assert await reader.read() == b"Cookie: secret"
            conn.close()

        run(ask())
        echo.shutdown()
    wait_for("its end", lambda: traced.of("forward.completed"))
    assert "Cookie" not in traced.file.read_text()  # it is not ours to show
    for record in traced.of("data.received", "data.sent", "input.written", "output.read"):
        assert record["facts"].get("stream") is None
        assert "echo" not in record["facts"]
    (life,) = connections(traced.file)
    assert [lane.name for lane in life.lanes] == ["TCP", "SSH", "channel 0", "socket 0"]


def test_the_cause_of_an_end_is_not_an_old_limit(serve: Serve, tmp_path: Path) -> None:
    traced = Traced(serve, tmp_path, connection_max_sessions=1)

    async def main() -> None:
        conn = await traced.server.connect()
        process = await conn.create_process("cat")
        with pytest.raises(asyncssh.ChannelOpenError):
            await conn.run("true")
        process.stdin.write_eof()
        await process.wait()
        conn.close()

    run(main())
    traced.over()
    (life,) = connections(traced.file)
    causes = [life.marks[a.cause].event for a in life.arrows if life.marks[a.effect].event == "cause.named"]  # fmt: skip
    assert causes == ["program.reaped"]


def test_an_event_of_a_later_version_is_drawn_all_the_same(traced: Traced, tmp_path: Path) -> None:
    some_life(traced)
    lines = traced.file.read_text().replace("kex.completed", "kex.blessed")
    (tmp_path / "new.ndjson").write_text(lines)
    (life,) = connections(tmp_path / "new.ndjson")
    assert "kex.blessed" in page([life], title="t")
    assert ET.fromstring(svg(life)) is not None


# -- the command ---------------------------------------------------------------------------------------


def test_the_command_writes_a_page_or_a_picture(traced: Traced, tmp_path: Path) -> None:
    some_life(traced)
    result = gosshd_once(tmp_path, "timeline", traced.file, "-o", "life.html")
    assert (result.returncode, result.stdout) == (0, "")
    assert (tmp_path / "life.html").read_text().startswith("<!DOCTYPE html>")
    assert gosshd_once(tmp_path, "timeline", traced.file).returncode == 0
    assert traced.file.with_suffix(".html").exists()
    picture = gosshd_once(tmp_path, "timeline", traced.file, "--svg", "-o", "-").stdout
    drawn = ET.fromstring(picture)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    words = " ".join(text.text or "" for text in drawn.iter("{http://www.w3.org/2000/svg}text"))
    for word in ("TCP", "SSH", "channel 0", "pty 0", "process 0", "program.spawned", "tcp.closed"):
        assert word in words
    missing = gosshd_once(tmp_path, "timeline", traced.file, "--connection", "9")
    assert missing.returncode == 1
    assert missing.stderr.endswith("there is no connection #9 in this trace; it has #1 to #1\n")
    both = gosshd_once(tmp_path, "timeline", traced.file, "--follow", "--svg")
    assert both.returncode == 2
    assert gosshd_once(tmp_path, "timeline", "nowhere.ndjson").stderr == "gosshd: error: nowhere.ndjson: No such file or directory\n"  # fmt: skip


def test_the_page_needs_nothing_and_obeys_nobody(traced: Traced) -> None:
    """No network, and what a client has chosen is text, wherever it stands."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{style}{script}{data}"
    life = some_life(traced, f": '{evil}'")
    text = page([life], title=evil)
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:", text)
    assert "@import" not in text
    assert "url(" not in text.replace("url(#head", "")
    data = json.loads(re.search(r'id="trace">(.*?)</script>', text, re.DOTALL)[1])
    assert evil in json.dumps(data, ensure_ascii=False)
    ET.fromstring(svg(life))


# -- in a browser ----------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="not installed: chromium, chromium-driver",
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for word in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *(f"user-data-dir={tmp_path}/browser", "window-size=1300,800"),
    ):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    errors = [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]
    driver.quit()
    assert not [line for line in errors if "favicon" not in line["message"]], errors


def details(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "details").text


@needs_browser
def test_the_page_is_explored_by_keys_mouse_and_wheel(
    traced: Traced, tmp_path: Path, browser: webdriver.Chrome
) -> None:
    some_life(traced)
    traced.server.ssh("echo second")
    traced.over(2)
    (tmp_path / "life.html").write_text(page(connections(traced.file), title="t"))
    browser.get(f"file://{tmp_path}/life.html")
    lanes = browser.find_element(By.ID, "lanes")
    names = [text.text for text in lanes.find_elements(By.CSS_SELECTOR, "text.lane")]
    assert names == ["TCP", "SSH", "channel 0", "pipes 0", "process 0"]  # the last one
    Select(browser.find_element(By.ID, "connection")).select_by_index(0)
    # Keys: the first event, the next, the lane below.
    lanes.send_keys(Keys.HOME)
    assert details(browser).startswith("tcp.accepted\n")
    assert "see accept(2)" in details(browser)
    lanes.send_keys(Keys.ARROW_RIGHT)
    assert details(browser).startswith("version.sent\n")
    link = browser.find_element(By.CSS_SELECTOR, "#details a").get_attribute("href")
    assert link == "https://www.rfc-editor.org/rfc/rfc4253#section-4.2"
    lanes.send_keys(Keys.ARROW_UP)
    assert details(browser).startswith("tcp.accepted\n")
    lanes.send_keys(Keys.END, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert details(browser).startswith("program.reaped\n")
    assert "status 3" in details(browser)
    # From an effect to its cause.
    lanes.send_keys(Keys.HOME)
    while not details(browser).startswith("program.spawned"):
        lanes.send_keys(Keys.ARROW_RIGHT)
    browser.find_element(By.XPATH, "//aside//p[starts-with(., 'cause')]/button").click()
    assert details(browser).startswith("pty.opened\n")
    # Zoom: fewer marks are in view; all again by 0; the wheel does it, too.
    count = lambda: sum(len(mark.get_dom_attribute("data-numbers").split()) for mark in lanes.find_elements(By.CSS_SELECTOR, ".mark"))  # noqa: E731  # fmt: skip
    lanes.send_keys("0")
    every = count()
    lanes.send_keys("++++++")
    assert 0 < count() < every
    lanes.send_keys("0")
    assert count() == every
    browser.execute_script("arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -300, clientX: 600, bubbles: true, ctrlKey: true}))", lanes)  # fmt: skip
    assert count() < every
    lanes.send_keys("g0")  # time to scale: the handshake is one mark
    assert len(lanes.find_elements(By.CSS_SELECTOR, ".mark")) < every
    # A click on many events goes into them; on one it tells of it.
    many = next(m for m in lanes.find_elements(By.CSS_SELECTOR, "rect.mark"))
    before = count()
    ActionChains(browser).move_to_element(many).click().perform()
    assert count() < before
    lanes.send_keys("g0")
    single = lanes.find_elements(By.CSS_SELECTOR, "circle.mark")[-1]
    ActionChains(browser).move_to_element(single).click().perform()
    assert "after the start" in details(browser)
    # The table, for those who cannot see the picture.
    browser.find_element(By.CSS_SELECTOR, "#list summary").click()
    rows = lambda: browser.find_elements(By.CSS_SELECTOR, "#list tbody tr")  # noqa: E731
    wait_for("its rows", lambda: len(rows()) == every)
    assert "program.spawned" in browser.find_element(By.CSS_SELECTOR, "#list table").text


@needs_browser
def test_ten_thousand_events_open_in_two_seconds(
    tmp_path: Path, browser: webdriver.Chrome, traced: Traced
) -> None:
    some_life(traced)
    lines = traced.file.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if "output.read" in line)
    base = json.loads(lines[at])
    flood = []
    for _number in range(5000):
        for name in ("output.read", "data.sent"):
            base |= {"event": name, "us": base["us"] + 37}
            flood.append(json.dumps(base))
    late = [
        json.dumps({**json.loads(line), "us": json.loads(line)["us"] + 37 * 10_000})
        for line in lines[at + 1 :]
    ]
    (tmp_path / "many.ndjson").write_text("\n".join([*lines[: at + 1], *flood, *late]) + "\n")
    (life,) = connections(tmp_path / "many.ndjson")
    assert len(life.marks) > 10_000
    (tmp_path / "many.html").write_text(page([life], title="t"))
    took = []
    for _ in range(3):  # the machine may have been busy
        browser.get(f"file://{tmp_path}/many.html")
        took.append(int(browser.find_element(By.TAG_NAME, "html").get_dom_attribute("data-ready")))
    assert min(took) < 2000
    lanes = browser.find_element(By.ID, "lanes")
    began = time.monotonic()
    lanes.send_keys("+++--0", Keys.END, Keys.ARROW_LEFT)
    assert "after the start" in details(browser)
    assert time.monotonic() - began < 3
    browser.find_element(By.CSS_SELECTOR, "#list summary").click()
    rows = lambda: browser.find_elements(By.CSS_SELECTOR, "#list tbody tr")  # noqa: E731
    wait_for("its rows", lambda: len(rows()) == 1000)
    assert "show all 10" in browser.find_element(By.ID, "list").text


@needs_browser
def test_light_dark_narrow_and_paper(
    traced: Traced, tmp_path: Path, browser: webdriver.Chrome
) -> None:
    life = some_life(traced)
    (tmp_path / "life.html").write_text(page([life], title="t"))
    browser.get(f"file://{tmp_path}/life.html")
    colour = "return getComputedStyle(document.body).backgroundColor"
    for scheme, expected in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 29)")):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )  # fmt: skip
        assert browser.execute_script(colour) == expected
    browser.set_window_size(420, 800)
    wide = "return document.documentElement.scrollWidth <= innerWidth + 1"
    assert browser.execute_script(wide), "a telephone would have to scroll sideways"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(colour) == "rgb(255, 255, 255)"
    assert not browser.find_element(By.ID, "fit").is_displayed()
    paper = browser.print_page()
    assert len(paper) > 10_000  # base64 of a PDF
    assert browser.find_elements(By.CSS_SELECTOR, "#list tbody tr")  # the table is on paper


# -- live ----------------------------------------------------------------------------------------------


@pytest.fixture
def follow(traced: Traced) -> Iterator[str]:
    argv = [sys.executable, "-m", "gosshd_py", "timeline", str(traced.file), "--follow"]
    serving = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield serving.stdout.readline().strip()
    serving.send_signal(signal.SIGINT)
    assert serving.wait(5) == 0
    serving.stdout.close()


@needs_browser
def test_a_live_page_shows_sessions_as_they_run(
    traced: Traced, follow: str, browser: webdriver.Chrome
) -> None:
    browser.get(follow)
    assert "nothing has happened yet" in browser.find_element(By.ID, "note").text
    terminal = traced.server.terminal()
    terminal.expect(r"[$#]")
    lanes = browser.find_element(By.ID, "lanes")
    wait_for("its lanes", lambda: "pty 0" in lanes.text)
    option = browser.find_element(By.CSS_SELECTOR, "#connection option")
    assert option.text.endswith("…")  # it goes on
    terminal.sendline("exit")
    wait_for(
        "its end",
        lambda: not browser.find_element(By.CSS_SELECTOR, "#connection option").text.endswith("…"),
    )
    traced.server.ssh("echo two")
    wait_for(
        "the next", lambda: len(browser.find_elements(By.CSS_SELECTOR, "#connection option")) == 2
    )
    wait_for("it to be shown", lambda: "pipes 0" in lanes.text)


def test_a_live_page_is_for_those_who_know_its_address(traced: Traced, follow: str) -> None:
    some_life(traced)
    assert b"<!DOCTYPE html>" in urllib.request.urlopen(follow).read()
    origin = "/".join(follow.split("/")[:3])
    for url, headers, status in (
        (f"{origin}/", {}, 404),
        (f"{origin}/{'x' * 22}/", {}, 404),
        (follow, {"Host": "evil.example"}, 421),
        (f"{follow}../../etc/passwd", {}, 404),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(url, headers=headers))
        assert caught.value.code == status
        caught.value.close()
    _host, port = origin.removeprefix("http://").split(":")
    listening = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert {line.split()[3] for line in listening.splitlines()} == {f"127.0.0.1:{port}"}


def test_a_file_that_is_rotated_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "t"
    tail = Tail(file)
    assert list(tail.lines()) == []
    file.write_text("one\ntw")
    assert list(tail.lines()) == ["one"]
    with file.open("a") as more:
        more.write("o\nthree\n")
    file.rename(tmp_path / "t.1")
    file.write_text("four\n")
    assert list(tail.lines()) == ["two", "three", "four"]
    file.write_text("5\n")  # cut short
    assert list(tail.lines()) == ["5"]
    tail.close()
