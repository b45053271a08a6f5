"""The page at /, in a real browser, against a real server with a tiny random model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from feedback.board import Story, open_board
from feedback.events import Feedback, Retraction
from serving.engine import Request, Stream
from tests.served import Served, config_for, served

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'heed[test]'")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

STATIC = Path(__file__).resolve().parent.parent / "serving" / "static"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with its driver here: apt install chromium chromium-driver"
)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1100,800",
)


class Page:
    """What a person at the page does and sees."""

    def __init__(self, browser: WebDriver, server: Served, *, closed: bool = False) -> None:
        """`closed`: until a key is given, the server tells nothing."""
        self.browser, self.server = browser, server
        browser.get(server.url)
        self.until(lambda: self.text("#key-trouble") if closed else self.text("#current") != "…")

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.all(selector)[-1]

    def text(self, selector: str) -> str:
        found = self.all(selector)
        return found[-1].text if found else ""

    def until(self, true: Callable[[], object], seconds: float = 20) -> None:
        give_up = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < give_up, self.one("body").text
            time.sleep(0.02)

    def write(self, words: str) -> None:
        self.one("#message").send_keys(words)

    def say(self, words: str) -> None:
        """Send a message and wait for the whole reply."""
        replies = len(self.all(".reply"))
        self.write(words + Keys.ENTER)
        self.until(lambda: len(self.all(".reply[aria-busy=false]")) == replies + 1)

    def press(self, thumb: str) -> None:
        self.one(f".thumb[data-value={thumb}]").click()
        self.until(lambda: self.one(f".thumb[data-value={thumb}]").is_enabled())

    def pressed(self) -> list[str | None]:
        return [each.get_attribute("data-value") for each in self.all(".thumb[aria-pressed=true]")]

    def story(self) -> list[str]:
        """The steps of the last thumb's story that have been reached."""
        script = "return [...document.querySelectorAll('.reply:last-of-type .story .done')].map((li) => li.textContent)"
        return list(self.browser.execute_script(script))

    def complaints(self) -> list[str]:
        """What the browser has logged since last asked: errors of scripts, refused loads."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def speak_briefly(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random model would babble on until no second message fits."""
    assert server.wiring.speaker is not None
    engine = server.wiring.speaker.engine
    submit = engine.submit

    def submit_brief(request: Request, **more: Any) -> Stream:
        return submit(replace(request, sampling=replace(request.sampling, max_tokens=6)), **more)

    monkeypatch.setattr(engine, "submit", submit_brief)


@pytest.fixture
def page(browser: WebDriver, server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    speak_briefly(server, monkeypatch)
    page = Page(browser, server)
    yield page
    assert page.complaints() == []
    browser.get("about:blank")


def thumbs(server: Served) -> list[tuple[str, float | None]]:
    return [(said.reply_ids[0], said.value) for said in server.said() if isinstance(said, Feedback)]


# chatting


def test_a_reply_is_streamed_and_says_which_version_spoke(page: Page):
    page.say("hi")
    assert page.text(".said") == "hi"
    assert page.text(".reply .version") == "v0"
    (exchange,) = page.server.exchanges()
    shown = page.one(".reply .text").get_attribute("textContent")
    assert shown == (exchange.content.reply or "(no words)")
    assert [message.content for message in exchange.content.messages] == ["hi"]


def test_a_conversation_goes_on_until_a_new_chat(page: Page):
    page.say("one")
    page.say("two")
    page.one("#new-chat").click()
    page.say("three")
    first, second, third = page.server.exchanges()
    assert [(one.conversation, one.turn) for one in (first, second)] == [
        (first.conversation, 0),
        (first.conversation, 1),
    ]
    assert [message.content for message in second.content.messages] == ["one", first.content.reply, "two"]
    assert (third.turn, len(third.content.messages)) == (0, 1)
    assert third.conversation != first.conversation


def test_enter_sends_and_shift_enter_starts_a_new_line(page: Page):
    page.write("a" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "b")
    assert page.one("#message").get_attribute("value") == "a\nb"
    assert page.all(".said") == []
    page.say("")
    assert page.text(".said") == "a\nb"
    assert page.one("#message").get_attribute("value") == ""


def test_an_empty_message_is_not_sent(page: Page):
    page.write("  " + Keys.ENTER)
    assert page.all(".said") == []


def test_words_are_never_taken_for_markup(page: Page):
    page.say("<img src=x onerror=alert(1)>")
    assert page.text(".said") == "<img src=x onerror=alert(1)>"
    assert page.all("#talk img") == []


def test_stop_ends_the_reply_and_what_was_said_is_kept(page: Page, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert page.server.wiring.speaker is not None
    forward = page.server.wiring.speaker.engine._forward
    run = forward.run
    monkeypatch.setattr(forward, "run", lambda *args: time.sleep(0.05) or run(*args))
    monkeypatch.setattr(
        page.server.wiring.speaker.chat, "eos_ids", frozenset()
    )  # it may not end by itself before we stop it
    page.write("go on" + Keys.ENTER)
    page.until(lambda: page.one(".reply .text").get_attribute("textContent"))
    page.one("#stop").click()
    page.until(lambda: "stopped" in page.text(".reply"))
    page.server.until(lambda: len(page.server.exchanges()) == 1)
    (exchange,) = page.server.exchanges()
    assert exchange.finish_reason == "abort"
    assert 0 < len(exchange.content.reply_ids) < 100
    assert page.one("#send").is_displayed()
    page.press("down")
    assert thumbs(page.server) == [(exchange.id, 0)], "a stopped reply can be rated"


# rating


def test_a_thumb_is_counted_and_its_story_is_told(page: Page):
    page.say("hi")
    page.press("up")
    (reply,) = page.server.exchanges()
    assert thumbs(page.server) == [(reply.id, 1)]
    assert page.pressed() == ["up"]
    assert page.story() == ["counted"]
    (given,) = page.server.said()
    board = open_board(page.server.wiring.config.feedback, "learner")
    now = time.time()
    page.server.ask(board.write_story(given.id, [Story("joined", now), Story("in_reward_model", now, update=1)]))
    page.until(lambda: page.story() == ["counted", "matched", "learned from"])
    page.server.ask(
        board.write_story(given.id, [Story("in_update", now, update=1), Story("in_version", now, version=1)])
    )
    page.until(lambda: page.story() == ["counted", "matched", "learned from", "in v1"])
    page.server.ask(board.write_story(given.id, [Story("served", now, version=1)]))
    page.until(lambda: page.story() == ["counted", "matched", "learned from", "in v1", "served"])
    page.server.ask(board.close())


def test_the_other_thumb_replaces_the_first_and_the_same_one_takes_it_back(page: Page):
    page.say("hi")
    page.press("up")
    page.press("down")
    (reply,) = page.server.exchanges()
    assert thumbs(page.server) == [(reply.id, 1), (reply.id, 0)]
    assert page.pressed() == ["down"]
    page.press("down")
    assert page.pressed() == []
    assert page.text(".story") == "taken back"
    assert isinstance(page.server.said()[-1], Retraction)


def test_a_person_is_the_same_one_after_a_reload(page: Page):
    page.say("hi")
    page.press("up")
    page.browser.refresh()
    page.say("hi")
    page.press("up")
    users = {said.content.user for said in page.server.said() if isinstance(said, Feedback)}
    users |= {exchange.content.user for exchange in page.server.exchanges()}
    assert len(users) == 1
    assert re.fullmatch(r"web-[0-9a-f]{24}", users.pop() or "")


# the strip


def test_a_version_that_arrives_is_announced_and_speaks(page: Page):
    assert page.text("#current") == "v0"
    page.say("hi")
    page.server.publish()
    page.until(lambda: page.text("#current") == "v1")
    assert page.text("#arrival") == "v1 has arrived and speaks from now on."
    page.say("hi")
    assert [each.text for each in page.all(".reply .version")] == ["v0", "v1"]


def test_the_strip_shows_what_the_learner_reports(page: Page):
    report = {
        "feedback": {
            "by_kind": {"thumb": 1205, "rating": 34},
            "by_status": {"joined": 1200, "pending": 34, "dropped": 5},
            "new": 7,
            "dropped": {"no_exchange": 5},
        },
        "liked": {
            "v0": {"share": 0.31, "count": 100},
            "v10": {"share": 0.9, "count": 8},
            "v2": {"share": 0.55, "count": 40},
        },
        "why": "nothing new: 12 of 50",
    }
    board = open_board(page.server.wiring.config.feedback, "learner")
    page.server.ask(board.set_report("policy", json.dumps(report)))
    page.server.ask(board.close())
    page.until(lambda: page.text("#counted") == "1,234")
    assert [row.text.split() for row in page.all("#liked li")] == [
        ["v0", "31%", "of", "100"],
        ["v2", "55%", "of", "40"],
        ["v10", "90%", "of", "8"],
    ]
    assert page.text("#why") == "Nothing new: 12 of 50."
    assert page.one("#liked .bar i").size["width"] == pytest.approx(0.9 * page.one("#liked .bar").size["width"], abs=1)


# prompts


def test_suggested_prompts_are_sent_by_a_click_each_in_a_chat_of_its_own(
    browser: WebDriver, tmp_path: Path, model_folder: Path
):
    knowing = shutil.copytree(model_folder, tmp_path / "model")
    (knowing / "prompts.json").write_text(json.dumps([f"question {number}" for number in range(9)]))
    with served(config_for(tmp_path / "data", knowing)) as server:
        page = Page(browser, server)
        page.until(lambda: len(page.all("#suggestions button")) == 4)
        for count in (1, 2):
            chosen = page.one("#suggestions button")
            words = chosen.text
            chosen.click()
            page.until(lambda count=count: len(page.all(".reply[aria-busy=false]")) == count)
            assert page.text(".said") == words
        assert [len(exchange.content.messages) for exchange in server.exchanges()] == [1, 1]
        assert page.complaints() == []
        browser.get("about:blank")


def test_without_known_prompts_none_are_suggested(page: Page):
    page.say("hi")
    assert not page.one("#prompts").is_displayed()


# where a key is needed


@pytest.fixture
def keyed(browser: WebDriver, serve_with: Callable[..., Served], tmp_path: Path, monkeypatch: Any) -> Iterator[Page]:
    digests = {name: hashlib.sha256(f"{name}-key".encode()).hexdigest() for name in ("web", "app")}
    keys = tmp_path / "keys.toml"
    keys.write_text("".join(f"[{name}]\nsha256 = '{digest}'\n" for name, digest in digests.items()))
    server = serve_with(api_keys_file=keys)
    speak_briefly(server, monkeypatch)
    yield Page(browser, server, closed=True)
    browser.get_log("browser")  # a 401 is an error to the browser
    browser.get("about:blank")


def give_key(page: Page, key: str) -> None:
    page.one("#key").clear()
    page.one("#key").send_keys(key + Keys.ENTER)


def test_a_key_is_asked_for_and_then_all_is_as_ever(keyed: Page):
    assert keyed.text("#key-trouble") == "This server needs an API key."
    assert keyed.browser.switch_to.active_element.get_attribute("id") == "key"
    assert keyed.one("#key").accessible_name == "API key"
    give_key(keyed, "web-key")
    keyed.until(lambda: not keyed.one("#key-form").is_displayed())
    keyed.say("hi")
    keyed.press("up")
    keyed.until(lambda: keyed.text("#current") == "v0")
    (reply,) = keyed.server.exchanges()
    assert thumbs(keyed.server) == [(reply.id, 1)]
    assert keyed.server.wiring.ids.verify_reply(reply.id, "web").kept
    assert keyed.story() == ["counted"]


@pytest.mark.parametrize("wrong", ["wrong-key", "ключ"])
def test_a_wrong_key_is_said_to_be_wrong_and_another_may_be_given(keyed: Page, wrong: str):
    give_key(keyed, wrong)
    keyed.until(lambda: keyed.text("#key-trouble") == "This API key is not one of this server's.")
    time.sleep(2.5)  # the page has asked for the policy again, without a key
    assert keyed.text("#key-trouble") == "This API key is not one of this server's."
    assert keyed.one("#key-form").is_displayed()
    give_key(keyed, "web-key")
    keyed.until(lambda: keyed.text("#current") == "v0")
    assert not keyed.one("#key-form").is_displayed()


def test_a_key_is_kept_for_the_visit_and_nowhere_else(keyed: Page):
    give_key(keyed, "web-key")
    keyed.until(lambda: keyed.text("#current") == "v0")
    keyed.browser.refresh()
    keyed.until(lambda: keyed.text("#current") == "v0")
    assert not keyed.one("#key-form").is_displayed()
    stored = "return [JSON.stringify(sessionStorage), JSON.stringify(localStorage) + document.cookie + location.href]"
    session, elsewhere = keyed.browser.execute_script(stored)
    assert "web-key" in session
    assert "web-key" not in elsewhere
    keyed.browser.switch_to.new_window("tab")
    try:
        other = Page(keyed.browser, keyed.server, closed=True)
        assert other.one("#key-form").is_displayed()
    finally:
        keyed.browser.close()
        keyed.browser.switch_to.window(keyed.browser.window_handles[0])


def test_a_key_that_is_taken_away_is_asked_for_again(keyed: Page):
    give_key(keyed, "web-key")
    keyed.until(lambda: keyed.text("#current") == "v0")
    keys = keyed.server.wiring.config.api_keys_file
    assert keys is not None
    keys.write_text("[app]" + keys.read_text().partition("[app]")[2])
    keyed.until(lambda: keyed.one("#key-form").is_displayed())
    assert keyed.text("#key-trouble") == "This API key is not one of this server's."
    give_key(keyed, "app-key")
    keyed.until(lambda: not keyed.one("#key-form").is_displayed())


def test_the_form_for_a_key_fits_a_small_screen(keyed: Page):
    size = {"width": 320, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    keyed.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        wide = keyed.browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide == [320, 320]
        assert keyed.one("#send").rect["y"] + keyed.one("#send").rect["height"] <= 700
        assert keyed.one("#key").rect["width"] > 150
    finally:
        keyed.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# when things go wrong


def test_a_message_too_long_for_the_model_is_told_plainly(browser: WebDriver, server: Served):
    page = Page(browser, server)
    page.say("word " * 60)
    assert page.text(".failed .note") == "This conversation has become too long for the model. Start a new chat."
    assert page.one(".failed .note").get_attribute("role") == "alert"
    page.one("#new-chat").click()
    page.say("hi")
    assert page.text(".reply:last-of-type .version") == "v0"
    page.complaints()


def test_a_server_that_is_gone_is_told_plainly(browser: WebDriver, tmp_path: Path, model_folder: Path):
    with served(config_for(tmp_path / "data", model_folder)) as server:
        page = Page(browser, server)
        page.say("hi")
    page.say("are you there?")
    assert page.text(".failed .note") == "The server cannot be reached. Is it still running?"
    page.until(lambda: page.text("#why") == "The server cannot be reached. Is it still running?")
    page.all(".thumb[data-value=up]")[0].click()
    page.until(lambda: "The server cannot be reached" in page.all(".reply")[0].text)
    assert page.pressed() == []
    page.complaints()


def test_while_the_model_is_loading_the_page_says_so(browser: WebDriver, serve_with: Callable[..., Served]):
    page = Page(browser, serve_with(speaks=False))
    assert page.text("#current") == "loading…"
    page.say("hi")
    assert page.text(".failed .note").startswith("The server is starting or stopping. Try again in")
    page.complaints()


# for everyone


def test_nothing_is_loaded_from_elsewhere(page: Page):
    page.say("hi")
    loaded = page.browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(loaded) > 5
    assert all(address.startswith(page.server.url) for address in loaded)
    for path in STATIC.iterdir():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text()), path.name


def test_everything_can_be_reached_and_done_by_keyboard(page: Page):
    page.say("hi")
    reached = []
    for _ in range(8):
        page.browser.switch_to.active_element.send_keys(Keys.SHIFT + Keys.TAB)
        active = page.browser.switch_to.active_element
        reached.append(active.accessible_name)
        if active.accessible_name == "Good reply":
            active.send_keys(Keys.ENTER)
            break
    assert reached[:2] == ["Bad reply", "Good reply"]
    page.until(lambda: page.pressed() == ["up"])


def test_every_control_has_a_name(page: Page):
    page.say("hi")
    for control in page.all("button, textarea, [role=log], section, ol, #suggestions"):
        assert control.accessible_name or not control.is_displayed(), control.get_attribute("outerHTML")
    assert page.one("html").get_attribute("lang") == "en"


@pytest.mark.parametrize("width", [320, 390, 768, 1600])
def test_it_fits_any_screen_and_nothing_sticks_out(page: Page, width: int):
    size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 500}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.say("a" * 60)
        page.press("up")
        wide = page.browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1] == width
        assert page.one("#send").is_displayed()
        bottom = page.one("#send").rect
        assert bottom["y"] + bottom["height"] <= 700
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_follows_the_light_or_dark_of_the_system(page: Page):
    def ground(scheme: str) -> str:
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        return page.one("body").value_of_css_property("background-color")

    assert ground("light") == "rgba(246, 245, 241, 1)"
    assert ground("dark") == "rgba(20, 24, 22, 1)"
    ground("")
