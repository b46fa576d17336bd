"""The page in a headless Chromium, as people use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.page.browser import CHROMIUM, Tab, chromium
from tests.server.server_harness import Live, until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt: chromium)")

ATTACK = '<img src=x onerror="window.hit=1"><script>window.hit=1</script><b id=made>x</b>'
READY = "document.querySelector('#state').textContent.includes('ready')"
ENDED = "/^(Ended|Failed)/.test(document.querySelector('#chat-state').textContent)"
CONTRAST = """
(() => {
  const light = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
      .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" && element.parentElement
      ? behind(element.parentElement) : color;
  };
  const ratios = [...document.querySelectorAll("h1,h2,h3,p,dt,dd,th,td,label,li,button,a")]
    .filter((element) => element.checkVisibility() && element.innerText && !element.disabled)
    .map((element) => {
      const pair = [light(getComputedStyle(element).color), light(behind(element))].sort();
      return [(pair[1] + 0.05) / (pair[0] + 0.05), element.outerHTML.slice(0, 80)];
    });
  return ratios.filter(([ratio]) => ratio < 4.5);
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Tab]:
    with chromium() as tab:
        yield tab


def ask(tab: Tab, text: str) -> str:
    """Send a message with the keyboard alone, and return what the page says of the end."""
    tab.look("document.querySelector('#prompt').focus()")
    tab.type(text)
    tab.press("Enter", 13)
    tab.until(ENDED)
    return tab.text("#chat-state")


def test_key_is_asked_for_and_kept_in_the_tab_alone(
    serve: Callable[..., Live], browser: Tab
) -> None:
    live = serve(api_keys=("right key",))
    browser.open(f"{live.url}/ui")
    browser.until("document.activeElement?.id === 'key'")
    browser.type("wrong")
    browser.press("Enter", 13)
    browser.until("document.querySelector('#state').textContent.includes('wrong')")
    browser.type("right key")
    browser.press("Enter", 13)
    browser.until(READY)
    assert browser.look("document.querySelector('#login').hidden")
    assert ask(browser, "hi").startswith("Ended")
    assert browser.look("localStorage.length + document.cookie.length") == 0
    assert "right key" not in browser.look("document.documentElement.outerHTML + location")
    browser.call("Page.reload")
    browser.until(READY)


def test_names_and_answers_are_text_and_never_markup(
    serve: Callable[..., Live], browser: Tab, tmp_path: Path
) -> None:
    live = serve(model_names=(ATTACK,))
    browser.console.clear()
    browser.open(f"{live.url}/ui")
    browser.until(READY)
    assert ATTACK in browser.text("#model")
    assert ask(browser, ATTACK).startswith("Ended")
    assert browser.text("#messages").count(ATTACK) == 2  # what was asked, and its echo
    assert browser.look("window.hit") is None
    assert browser.look("document.querySelectorAll('#made, img, script:not([src])').length") == 0
    refused = [entry for entry in browser.console if "net::ERR" not in entry]
    assert refused == []  # what the browser says of the last test's server aside
    browser.screenshot(tmp_path / "names.png", dark=False)


def test_scripts_that_got_into_the_page_do_not_run(
    serve: Callable[..., Live], browser: Tab
) -> None:
    live = serve()
    browser.open(f"{live.url}/ui")
    browser.until(READY)
    for attempt in ("setAttribute('onclick', 'window.hit=1')", "innerHTML = '<b>x'"):
        tried = f"try {{ document.body.{attempt}; return 'made' }} catch {{ return '' }}"
        assert browser.look(f"(() => {{ {tried} }})()") == ""
    browser.look("document.body.click()")
    assert browser.look("window.hit") is None


def test_latencies_and_chat_are_shown_light_and_dark(
    serve: Callable[..., Live], browser: Tab, tmp_path: Path
) -> None:
    live = serve(env={"FAKE_PAUSE": "0.005"})
    browser.open(f"{live.url}/ui")
    browser.until(READY)
    with live.client() as client:
        client.completions.create(model="alias", prompt="x" * 300, max_tokens=8)
    browser.until("document.querySelector('#latency').innerText.match(/long\\s+1\\s+[\\d.]+ m?s/)")
    assert "<assistant>" in browser.text("#messages") or ask(browser, "hello").startswith("Ended")
    for dark in (False, True):
        browser.screenshot(tmp_path / f"{dark}.png", dark=dark)
        assert browser.look(CONTRAST) == []
    backgrounds = (tmp_path / "False.png").read_bytes(), (tmp_path / "True.png").read_bytes()
    assert backgrounds[0] != backgrounds[1]
    browser.screenshot(tmp_path / "narrow.png", dark=False, width=360, height=1000)
    assert browser.look("document.documentElement.scrollWidth <= innerWidth")
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_keyboard_and_screen_readers_reach_everything(
    serve: Callable[..., Live], browser: Tab
) -> None:
    live = serve()
    browser.open(f"{live.url}/ui")
    browser.until(READY)
    reached = set()
    for _ in range(20):
        browser.press("Tab", 9)
        reached.add(browser.look("document.activeElement.id || document.activeElement.className"))
    assert {"skip", "pause", "scroll", "prompt", "send", "clear"} <= reached
    told = browser.accessible()
    assert {("button", name) for name in ("Pause", "Send", "Stop", "New conversation")} <= set(told)
    assert ("textbox", "Message") in told
    assert [name for role, name in told if role == "region" and not name] == []
    unnamed = [role for role, name in told if not name and role in ("button", "textbox", "image")]
    assert unnamed == []


def test_pause_and_a_hidden_page_cost_the_server_nothing(
    serve: Callable[..., Live], browser: Tab
) -> None:
    live = serve()
    latencies = live.instance.metrics.latencies
    assert not latencies.counting
    browser.open(f"{live.url}/ui")
    browser.until(READY)
    assert latencies.counting
    browser.look("document.querySelector('#pause').click()")
    until(lambda: not latencies.counting, "an end of the samples")
    assert browser.text("#state") == "Paused."
    browser.look("document.querySelector('#pause').click()")
    browser.until(READY)
    browser.open("about:blank")
    until(lambda: not latencies.counting, "an end of the samples")


def test_answer_can_be_stopped(serve: Callable[..., Live], browser: Tab, tmp_path: Path) -> None:
    live = serve(env={"FAKE_PAUSE": "0.2"})
    browser.open(f"{live.url}/ui")
    browser.until(READY)
    browser.look("document.querySelector('#prompt').focus()")
    browser.type("x" * 300)
    browser.press("Enter", 13)
    browser.until("document.querySelectorAll('#messages li').length === 2")
    browser.until("!document.querySelector('#stop').disabled")
    browser.look("document.querySelector('#stop').click()")
    browser.until("document.querySelector('#chat-state').textContent === 'Stopped.'")
    until(lambda: live.instance.traffic.in_flight == 0, "the end of the request")


def test_server_that_comes_back_is_watched_again(serve: Callable[..., Live], browser: Tab) -> None:
    live = serve()
    browser.open(f"{live.url}/ui")
    browser.until(READY)
    live.close()
    browser.until("/Trying again/.test(document.querySelector('#state').textContent)")
    again = serve(listen_port=live.port)
    assert again.port == live.port
    browser.until(READY)
