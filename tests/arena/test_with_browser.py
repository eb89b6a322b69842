"""The page in headless Chromium, at the widths of a laptop and a projector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from tests.arena.conftest import missing_for_pages
from tests.arena.watching import contrast

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WHY_NOT = missing_for_pages()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


@pytest.fixture
def visit(browser: Browser, arena: str) -> Iterator[Callable[..., Page]]:
    """Opens the page; afterwards: no error was logged, and nothing was asked of any other host."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_page(width: int = 1280, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if not_here(request.url) else None)
        page.goto(arena)
        page.locator("#preset option").first.wait_for(state="attached")
        return page

    def not_here(url: str) -> bool:
        return not url.startswith((arena, "data:,"))

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def race(page: Page, mode: str = "turns", watching: Sequence[Page] = ()) -> None:
    """The audience's own two prompts, from the button to the verdict, on this page and on those that watch."""
    for one in (page, *watching):  # a verdict from before must not be taken for this one's
        one.get_by_role("status").evaluate("e => { e.textContent = '' }")
    page.get_by_label("Show", exact=True).select_option("Your own prompts")
    page.get_by_label("in turns" if mode == "turns" else mode, exact=True).check()
    page.locator("#prompts").fill("a first prompt\nand a second one")
    page.get_by_role("button", name="Race").click()
    for one in (page, *watching):
        to_the_verdict(one)


def to_the_verdict(page: Page) -> None:
    from playwright.sync_api import expect

    expect(page.get_by_role("status")).to_contain_text("Output: m1 ", timeout=120_000)


@pytest.mark.parametrize("mode", ["turns", "together"])
def test_both_stages_answer_side_by_side(visit: Callable[..., Page], mode: str) -> None:
    page = visit()
    race(page, mode)
    lanes = page.locator("article.lane")
    texts = [lane.locator(".answers .text").all_inner_texts() for lane in lanes.all()]
    assert len(texts) == 2
    assert texts[0] == texts[1]
    assert all(len(text.split()) == 96 for text in texts[0]), "a model without a tokenizer answers in token ids"
    for lane in lanes.all():
        assert lane.locator(".badge").inner_text() == "done"
        assert lane.locator(".figures dd").first.inner_text() != "–"
        assert "of" in (lane.get_by_role("img").first.get_attribute("aria-label") or "")
    assert page.get_by_role("button", name="Replay").is_enabled()
    assert page.get_by_role("button", name="Race").is_enabled()


def test_a_replay_ends_as_the_race_did(visit: Callable[..., Page]) -> None:
    from playwright.sync_api import expect

    page = visit()
    race(page, "together")
    before = page.locator("#lanes").inner_text()
    page.get_by_role("button", name="Replay").click()
    expect(page.get_by_role("status")).to_contain_text("The recordings")
    expect(page.get_by_role("status")).to_contain_text("Output: m1 ", timeout=30_000)
    assert page.locator("#lanes").inner_text() == before


def test_who_opens_the_page_late_sees_the_end(visit: Callable[..., Page]) -> None:
    from playwright.sync_api import expect

    race(visit(), "together")
    late = visit(1920)
    expect(late.get_by_role("status")).to_contain_text("Output: m1 ")
    expect(late.locator(".badge")).to_have_text(["done", "done"])
    expect(late.get_by_label("Show", exact=True)).to_have_value("own")
    assert late.get_by_label("together", exact=True).is_checked()


def test_nothing_sticks_out_and_the_memory_is_drawn_at_any_width(visit: Callable[..., Page]) -> None:
    pages = {width: visit(width) for width in (700, 1280, 1920)}
    race(pages[1280], "together", watching=[pages[700], pages[1920]])
    count = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    for width, page in pages.items():
        assert page.locator("html").evaluate("e => e.scrollWidth <= e.clientWidth"), width
        assert all(canvas.evaluate(count) > 4 for canvas in page.locator("canvas").all()), width


def test_light_and_dark_follow_the_system_and_the_button(visit: Callable[..., Page]) -> None:
    page = visit(color_scheme="dark")
    root = page.locator("html")
    assert root.get_attribute("data-theme") == "dark"
    dark = root.evaluate("e => getComputedStyle(e).backgroundColor")
    page.get_by_role("button", name="Switch to light colours").click()
    assert root.get_attribute("data-theme") == "light"
    assert root.evaluate("e => getComputedStyle(e).backgroundColor") != dark
    page.reload()
    assert root.get_attribute("data-theme") == "light"


def test_the_keyboard_reaches_everything_in_order(visit: Callable[..., Page]) -> None:
    page = visit()
    reached: list[str] = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.locator(":focus").evaluate("e => e.id || e.name || e.textContent"))
    order = [name for name in reached if name != "prompts"]  # there only for the audience's own
    assert order[:5] == ["Skip to the stages", "theme", "preset", "mode", "run"]


def test_text_has_the_contrast_of_wcag_aa_in_light_and_dark(visit: Callable[..., Page]) -> None:
    light, dark = visit(color_scheme="light"), visit(color_scheme="dark")
    race(light, "together", watching=[dark])
    for page in (light, dark):
        assert low_contrasts(page) == []


def low_contrasts(page: Page) -> list[tuple[str, float]]:
    """Texts that are hard to read, and the contrast of each."""
    pairs = page.locator("body").evaluate(
        """body => [...body.querySelectorAll(
            "h1, h2 .name, .badge, p, dt, dd, small, button, .state, .text span, li b"
        )].filter((e) => e.checkVisibility() && e.textContent && !e.disabled).map((e) => {
            let behind = e;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor, e.textContent.slice(0, 40)];
        })"""
    )
    assert len(pairs) > 20
    return [(text, contrast(front, back)) for front, back, text in pairs if contrast(front, back) < 4.5]
