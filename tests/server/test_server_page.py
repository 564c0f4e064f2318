"""The page of edge-speq serve in a headless Chromium: typed into, looked at. Run as a script with tests/ in
PYTHONPATH, this file makes the picture in docs/images/server.png."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright
from support.served import Running, opened, running

from edge_speq.gguf import bundled as demo

KEY = "sesame-open"
LONG = "Tell me about the fox and the hare."  # the bundled model does, at length
SIZE: Any = {"width": 1280, "height": 800}


def chromium(play: Any) -> Browser:
    """The system's, or playwright's own. Skips where there is none."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        browser: Browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
    except Error as error:
        pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
    return browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        found = chromium(play)
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(bundled: tuple[Path, Path]) -> Iterator[Running]:
    # a slow link, so that a reply takes long enough to be looked at
    with running(opened(bundled[0], draft=bundled[1], throttle_link="100MB/s"), api_key=KEY) as it:
        yield it


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """The page, past the key. Complaints of the browser fail the test."""
    context = browser.new_context(viewport=SIZE)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    elsewhere: list[str] = []
    page.on(
        "request",
        lambda request: None if request.url.startswith((server.url, "data:")) else elsewhere.append(request.url),
    )
    page.goto(server.url)
    with_key(page)
    yield page
    context.close()
    assert [text for text in complaints if not re.search("status of 40[01]", text)] == []  # those are meant
    assert elsewhere == []


def with_key(page: Page) -> None:
    """Typed wrongly at first."""
    for key in ("wrong", KEY):
        expect(page.get_by_role("dialog", name="API key")).to_be_visible()
        page.keyboard.type(key)
        page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("ready")


def say(page: Page, text: str) -> None:
    page.locator("#message").focus()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def test_a_conversation_by_keyboard(page: Page, server: Running) -> None:
    page.get_by_label("Most tokens").fill("12")
    say(page, "Tell me of the fox")
    expect(page.get_by_role("article")).to_have_count(2)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    expect(page.locator("#message")).to_be_focused()
    reply = page.get_by_role("article").nth(1).locator("span")
    assert reply.inner_text().strip()
    say(page, "And then?")
    expect(page.get_by_role("article")).to_have_count(4)
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_role("article")).to_have_count(0)
    server.seconds_until((0, 0))


def test_escape_stops_a_reply(page: Page, server: Running) -> None:
    page.get_by_label("Most tokens").fill("900")
    page.get_by_label("Temperature").fill("0")
    say(page, LONG)
    expect(page.locator("#state")).to_have_text("writing")
    expect(page.get_by_role("article").nth(1)).to_contain_text(re.compile(r"\w+ \w+"))
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    server.seconds_until((0, 0))
    assert page.get_by_role("article").nth(1).locator("span").inner_text().strip()  # what was said stays


def test_errors_are_shown(page: Page) -> None:
    page.locator("#message").fill("word " * 3000)
    page.keyboard.press("Enter")
    expect(page.locator("#log .error")).to_contain_text("the context 1024")
    expect(page.get_by_role("article")).to_have_count(2)  # the message and the error; no empty reply


def test_the_map_is_the_servers(page: Page, server: Running) -> None:
    page.get_by_label("Most tokens").fill("20")
    say(page, "Once upon a time")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    server.seconds_until((0, 0))
    page.wait_for_timeout(700)
    rows = server.ask("/residency", authorization=f"Bearer {KEY}")[2]["residency"]
    held = sum(row.count("2") + row.count("3") for row in rows)
    expect(page.locator("#map-text")).to_contain_text(f"{held} of {len(rows) * len(rows[0])} experts are resident")
    drawn = page.locator("#map").evaluate(
        """(canvas, shape) => {
            const context = canvas.getContext("2d"), seen = [];
            const wide = canvas.width / shape[1], tall = canvas.height / shape[0];
            for (let y = 0; y < shape[0]; y++) for (let x = 0; x < shape[1]; x++)
                seen.push(context.getImageData((x + .5) * wide, (y + .5) * tall, 1, 1).data.join());
            return seen;
        }""",
        [len(rows), len(rows[0])],
    )
    states = "".join(rows)
    colours = {state: {colour for colour, s in zip(drawn, states, strict=True) if s == state} for state in set(states)}
    assert all(len(found) == 1 for found in colours.values())  # one colour a state
    assert len(set.union(*colours.values())) == len(colours)
    for name in ("Hits", "Link", "Stalled", "Slots", "K", "Acceptance"):
        expect(page.locator("dt", has_text=re.compile(f"^{name}$"))).to_be_visible()


def test_dark_and_narrow(page: Page) -> None:
    def background() -> str:
        found: str = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        return found

    light = background()
    page.emulate_media(color_scheme="dark")
    assert background() != light
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.locator("html").evaluate("html => html.scrollWidth <= html.clientWidth")  # nothing sticks out


def test_everything_has_a_name_and_can_be_reached(page: Page) -> None:
    unnamed = """all => all.filter((e) =>
        !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-labelledby"))).length"""
    assert page.locator("input:visible, textarea:visible, button:visible, canvas").evaluate_all(unnamed) == 0
    page.locator("#message").focus()
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.id"))
    assert reached == ["temperature", "tokens", "clear", "send"]


def screenshot(path: Path) -> None:
    """The page while the bundled model writes."""
    open_model = opened(demo.path(demo.MODEL), draft=demo.path(demo.DRAFT), draft_tokens=2, throttle_link="400MB/s")
    with running(open_model) as server, sync_playwright() as play:
        browser = chromium(play)
        page = browser.new_page(viewport=SIZE)
        page.goto(server.url)
        expect(page.locator("#state")).to_have_text("ready")
        page.get_by_label("Most tokens").fill("400")
        say(page, LONG)
        page.wait_for_timeout(2000)
        expect(page.locator("#state")).to_have_text("writing")  # short replies happen: try again
        page.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]))
