"""A trace drawn over time: the model, the picture, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from gosshd_py.timeline import Connection, Model, TraceError, page, read_events, svg
from gosshd_py.timeline.follow import Tail

from .serving import ROOT, Served, run, wait_for
from .test_cli import gosshd_once
from .test_trace import Traced

Serve = Callable[..., Served]


@pytest.fixture
def traced(serve: Serve, tmp_path: Path) -> Traced:
    return Traced(serve, tmp_path, trace_data=64)


def connections(file: Path) -> list[Connection]:
    model = Model()
    with file.open() as lines:
        for event in read_events(lines, str(file)):
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

    def line(event: str, connection: int, pid: int = 7) -> str:
        return json.dumps({"us": 1, "time": 1.0, "pid": pid, "connection": connection, "channel": None, "event": event, "facts": {}})  # fmt: skip

    file = tmp_path / "t.ndjson"
    lines = [line("trace.started", 0), line("tcp.accepted", 1), line("trace.started", 0), line("tcp.accepted", 1), line("tcp.accepted", 1, 8)]  # fmt: skip
    file.write_text("\n".join([*lines, '{"us": 1, "ti']))
    assert [found.number for found in connections(file)] == [1, 1, 1]


@pytest.mark.parametrize("text", ["no trace\n", '{"a": 1}\n', "[]\n", "1\n"])
def test_what_is_no_trace_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "t.ndjson"
    file.write_text(text)
    with pytest.raises(TraceError, match="name a file of --trace-file"):
        connections(file)
    result = gosshd_once(tmp_path, "timeline", file)
    assert result.returncode == 1
    assert result.stderr.startswith("gosshd: error: ")
    assert len(result.stderr.splitlines()) == 1


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
    browser.execute_script("arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -300, clientX: 600, bubbles: true}))", lanes)  # fmt: skip
    assert count() <= every
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
