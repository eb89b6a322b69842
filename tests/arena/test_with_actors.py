"""The page in headless Chromium, before stages that do as they are told: what fails, what loads, and what fits."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from common.arena.presets import PRESETS
from tests.arena.actors import Actor, on_stage
from tests.arena.conftest import missing_for_pages
from tests.arena.watching import contrast
from tests.serving.running import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WHY_NOT = missing_for_pages()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
LAPTOP, PROJECTOR = (1280, 800), (1920, 1080)
LONG = 10_000
"""Steps: until it is stopped."""
SPY = """
  window.written = [];  // [class of the canvas, text, pixels of its type]
  const write = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, ...where) {
    written.push([this.canvas.className, String(text), parseFloat(this.font.match(/[\\d.]+px/)[0])]);
    write.call(this, text, ...where);
  };
"""


@contextmanager
def seen(browser: Browser, url: str, size: tuple[int, int] = LAPTOP, scheme: Any = "light") -> Generator[Page]:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page.add_init_script(SPY)
    page.goto(url)
    page.locator("#preset option").first.wait_for(state="attached")
    try:
        yield page
    finally:
        page.close()


def expect_status(page: Page, text: str) -> None:
    from playwright.sync_api import expect

    expect(page.get_by_role("status")).to_contain_text(text, timeout=60_000)


def start(page: Page, preset: str) -> None:
    page.get_by_label("Show").select_option(preset)
    page.get_by_role("button", name="Race").click()


def race(page: Page, preset: str = "many") -> None:
    """To the verdict; the recordings are not waited for."""
    start(page, preset)
    to_the_verdict(page)


def to_the_verdict(page: Page) -> None:
    expect_status(page, "The recordings")
    page.locator("#stop").evaluate("button => button.click()")
    expect_status(page, "m1 ")


def test_before_the_first_race_nothing_is_claimed_of_the_stages(browser: Browser) -> None:
    with on_stage(Actor("m1"), Actor("m6")) as stage, seen(browser, stage.url) as page:
        expect_status(page, "Press Race")
        assert page.locator(".held").all_inner_texts() == ["", ""]
        assert not page.locator(".badge").first.is_visible()
        assert page.evaluate("written") == []
        labels = [image.get_attribute("aria-label") for image in page.get_by_role("img").all()]
        assert labels[:2] == ["Steps of m1: nothing yet", "KV memory of m1: nothing yet"]


@pytest.mark.parametrize("fails", ["prepare", "play"])
def test_a_stage_that_fails_says_why_until_the_next_race(browser: Browser, fails: str) -> None:
    failing = Actor("m1")
    failing.fails[fails] = "the memory is too small: raise it"
    with on_stage(failing, Actor("m6")) as stage, seen(browser, stage.url) as page:
        from playwright.sync_api import expect

        page.get_by_role("button", name="Race").click()
        expect(page.locator(".badge")).to_have_text(["failed", "done"], timeout=60_000)
        expect_status(page, "m1: the memory is too small: raise it")
        assert page.locator(".note").first.inner_text() == "the memory is too small: raise it"
        with seen(browser, stage.url) as late:
            expect(late.locator(".badge")).to_have_text(["failed", "done"])
            expect_status(late, "m1: the memory is too small")
        failing.fails.clear()
        race(page)
        assert page.locator(".badge").all_inner_texts() == ["done", "done"]


def test_what_loads_is_told_and_can_be_stopped(browser: Browser) -> None:
    slow = Actor("m7")
    slow.loads = True
    with on_stage(Actor("m1"), slow) as stage, seen(browser, stage.url) as page:
        page.get_by_role("button", name="Race").click()
        expect_status(page, "m7: making its 4-bit weights, 3 of 30.")
        bar = page.get_by_role("progressbar", name="Loading")
        assert bar.evaluate("bar => [bar.value, bar.max]") == [3, 30]
        page.get_by_role("button", name="Stop").click()
        expect_status(page, "Stopped.")
        assert not bar.is_visible()
        assert not page.locator(".badge").last.is_visible()
        slow.loads = False
        race(page)


@pytest.mark.parametrize("done", [0, 3])
def test_a_page_that_is_opened_while_something_loads_shows_how_far_it_is(browser: Browser, done: int) -> None:
    """Where nothing is done yet, as in a first long prompt, the bar moves: it has no value."""
    slow = Actor("m7")
    slow.loads, slow.done = True, done
    with on_stage(Actor("m1"), slow) as stage, seen(browser, stage.url) as page:
        page.get_by_role("button", name="Race").click()
        expect_status(page, f"m7: making its 4-bit weights, {done} of 30.")
        with seen(browser, stage.url) as late:
            for one in (page, late):
                expect_status(one, f"m7: making its 4-bit weights, {done} of 30.")
                bar = one.get_by_role("progressbar", name="Loading")
                assert bar.is_visible()
                assert bar.evaluate("bar => [bar.hasAttribute('value'), bar.value]") == [done > 0, done]
        page.get_by_role("button", name="Stop").click()
        expect_status(page, "Stopped.")


def test_one_answer_is_not_answers(browser: Browser) -> None:
    with on_stage(Actor("m1"), Actor("m6")) as stage, seen(browser, stage.url) as page:
        shows = (
            "lane => [1, 2].map((count) => (lane.show({ together: count }), lane.values.together.value.textContent))"
        )
        lane = page.evaluate_handle(
            """async () => {
                const { Lane } = await import("/static/lane.js");
                const { sides, figures } = await (await fetch("/api/setup")).json();
                return new Lane(sides[0], figures, document.getElementById("lane"));
            }"""
        )
        assert lane.evaluate(shows) == ["1 answer", "2 answers"]


class Deaf(Actor):
    """Does not stop in time: the page loses its arena in the middle of a race, and never hears that it ended."""

    def stop(self) -> None:
        threading.Timer(3, super().stop).start()  # the server waits 1 s


@pytest.mark.parametrize("actor", [Actor, Deaf])
def test_the_page_lives_on_when_the_arena_starts_again(browser: Browser, actor: type[Actor]) -> None:
    with on_stage(actor("m1", steps=LONG), Actor("m6")) as stage:
        page = browser.new_page()
        page.goto(stage.url)
        expect_status(page, "Press Race")
        page.get_by_role("button", name="Race").click()
        expect_status(page, "m1: live")
    expect_status(page, "The arena does not answer")
    page.get_by_label("Show").select_option("long")
    with page.expect_event("requestfailed", lambda request: request.method == "POST"):
        page.locator("#controls").evaluate("form => form.requestSubmit()")  # no server is there: said, not thrown
    with on_stage(Actor("m1"), Actor("m6"), port=stage.port):
        expect_status(page, "Press Race")
        race(page)
    page.close()


def test_the_claim_is_that_of_the_race_on_the_screen(browser: Browser) -> None:
    with on_stage(Actor("m1"), Actor("m6")) as stage, seen(browser, stage.url) as page:
        race(page, "many")
        page.get_by_label("Show").select_option("long")
        assert page.locator("#claim").inner_text().startswith("Twelve questions")
        assert page.locator("#fairness").inner_text().startswith("Next: A long prompt arrives.")
        race(page, "long")
        assert page.locator("#claim").inner_text().startswith("Three answers")


def test_the_focus_stays_where_it_was_and_descriptions_are_those_of_this_race(browser: Browser) -> None:
    with on_stage(Actor("m1"), Actor("m6", steps=LONG)) as stage, seen(browser, stage.url) as page:
        page.get_by_label("Show").select_option("long")
        page.locator("#run").press("Enter")
        expect_status(page, "m6: live")
        assert page.evaluate("document.activeElement.id") == "run"
        assert page.locator("#run").get_attribute("aria-disabled") == "true"
        label = "Steps of m{}: {} steps; {} of 4 answers done"
        images = page.locator(".timeline")
        assert images.first.get_attribute("aria-label") == label.format(1, 24, 4)
        assert images.last.get_attribute("aria-label") == label.format(6, 0, 0)
        page.locator("#stop").press("Enter")
        expect_status(page, "Stopped.")
        assert page.evaluate("document.activeElement.id") == "stop"


def test_a_race_of_two_fits_the_screen(browser: Browser) -> None:
    with (
        on_stage(Actor("m1"), Actor("m7")) as stage,
        seen(browser, stage.url, LAPTOP) as laptop,
        seen(browser, stage.url, PROJECTOR) as projector,
    ):
        for preset in PRESETS:
            race(laptop, preset.key)
            to_the_verdict(projector)
            for page in (laptop, projector):
                lanes, screen = page.evaluate(
                    "[document.querySelector('#lanes').getBoundingClientRect().bottom, innerHeight]"
                )
                assert lanes <= screen, (preset.key, screen)
                assert page.locator(".answers li").last.is_visible()
                assert page.locator(".answers .text").evaluate_all(
                    """all => all.every((text) => text.textContent.startsWith("The lamp turned") && text.scrollTop === 0
                        && text.firstChild.getClientRects()[0].top >= text.getBoundingClientRect().top)"""
                ), "the beginning of every answer is in sight"
            cut = projector.locator("h2 .name, dt, dd, .head b").evaluate_all(
                "all => all.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"
            )
            assert cut == [], preset.key


def test_four_stages_stand_side_by_side_and_nothing_sticks_out(browser: Browser) -> None:
    actors = [Actor(name) for name in ("m1", "m3", "m6", "m7")]
    with on_stage(*actors) as stage, seen(browser, stage.url, PROJECTOR) as page:
        race(page)
        boxes = page.evaluate("[...document.querySelectorAll('.lane')].map((lane) => lane.getBoundingClientRect().top)")
        assert len(set(boxes)) == 1
        assert page.locator("body *").evaluate_all(
            "all => all.every((e) => e.closest('.text, .skip') || e.getBoundingClientRect().right <= innerWidth)"
        )


def test_numbers_are_in_the_pictures_and_grow_with_the_page(browser: Browser) -> None:
    """Also in the smallest cells, of the largest memory: colours are never alone."""
    sizes: list[float] = []

    def numbered(page: Page) -> bool:
        found = page.evaluate("[...new Set(written.map(([picture, text]) => `${picture} ${text}`))]")
        return {f"{picture} {number}" for picture in ("timeline", "memory") for number in range(1, 5)} <= set(found)

    with on_stage(Actor("m1"), Actor("m6")) as stage:
        for size in (LAPTOP, PROJECTOR):
            with seen(browser, stage.url, size) as page:
                start(page, "long")
                wait_until(lambda page=page: numbered(page))
                sizes.append(min(pixels for *_, pixels in page.evaluate("written")))
    assert sizes[0] >= 9
    assert sizes[1] >= sizes[0] * 1.2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_drawn_stands_out_from_the_page(browser: Browser, scheme: str) -> None:
    """WCAG 1.4.11: 3 to 1 for whatever carries a meaning; what waits has an outline in `--edge`, what is free a dot."""
    names = ["prefill", "decode", "recompute", "idle", "edge", "kept"]
    with on_stage(Actor("m1"), Actor("m6")) as stage, seen(browser, stage.url, scheme=scheme) as page:
        colours: dict[str, list[float]] = page.evaluate(
            """async (names) => {
                const { colourOf, style } = await import("/static/canvas.js");
                const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
                const drawn = (colour) => {
                    context.fillStyle = colour;
                    context.fillRect(0, 0, 1, 1);
                    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
                };
                const answers = Array.from({ length: 16 }, (_, i) => [`answer ${i + 1}`, drawn(colourOf(i))]);
                const named = ["card", ...names].map((name) => [name, drawn(style(`--${name}`))]);
                return Object.fromEntries([...named, ...answers]);
            }""",
            names,
        )
    behind = f"rgb({', '.join(map(str, colours.pop('card')))})"
    found = {name: contrast(f"rgb({', '.join(map(str, colour))})", behind) for name, colour in colours.items()}
    assert len(found) == len(names) + 16
    assert {name: ratio for name, ratio in found.items() if ratio < 3} == {}
