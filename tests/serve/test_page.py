"""The page in a real browser: texts, images, classes, refusals, the keyboard, a phone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

pytest.importorskip("playwright", reason="no Chromium: playwright is not installed")
from playwright.sync_api import expect

from browser import Watched, any_browser, scrolls_sideways, watched_page
from indexed import write_index
from served import served
from shards import picture

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with any_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(write_index(tmp_path_factory.mktemp("indexed"))) as address:
        yield address


@pytest.fixture
def watched(browser: Browser, address: str) -> Iterator[Watched]:
    """The page, open; afterwards nothing was asked of another server and nothing complained."""
    with watched_page(browser) as watched:
        watched.page.goto(address)
        watched.page.wait_for_selector(".shot")
        yield watched
        watched.page.wait_for_load_state("networkidle")
        assert {urlsplit(each).netloc for each in watched.requests} == {urlsplit(address).netloc}
        assert watched.complaints == []


@pytest.fixture
def page(watched: Watched) -> Page:
    return watched.page


def _search(page: Page, text: str) -> None:
    page.get_by_label("What the image shows").fill(text)
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_selector(".score:not(:empty)")


def _captions(page: Page) -> list[str]:
    return page.locator("#results .caption").all_inner_texts()


def test_a_text_finds_images(page: Page) -> None:
    assert page.locator("#results li").count() == 24  # examples
    page.locator("#k").select_option("96")
    _search(page, "a red circle")
    scores = [float(text) for text in page.locator(".score").all_inner_texts()]
    assert len(scores) == 48
    assert scores == sorted(scores, reverse=True)
    assert re.match(r"48 of 48 images, the nearest first · [\d.]+ ms", page.inner_text("#status"))
    for place in range(9):
        expect(page.locator(".shot img").nth(place)).to_have_js_property("naturalWidth", 72)


def test_the_address_holds_the_search(page: Page) -> None:
    _search(page, "a red circle")
    first = _captions(page)
    _search(page, "blue bar")
    assert "q=blue+bar" in page.url
    page.go_back()
    expect(page.locator("#results .caption")).to_have_text(first)
    assert page.input_value("#q") == "a red circle"
    page.reload()
    page.wait_for_selector(".score:not(:empty)")
    assert (_captions(page), page.input_value("#q")) == (first, "a red circle")
    page.locator("#options select").first.select_option("red circle")
    expect(page.locator("#results li")).to_have_count(2)
    assert "filter.label=red+circle" in page.url
    page.get_by_role("button", name="Clear filters").click()
    expect(page.locator("#results li")).to_have_count(48)
    assert "filter" not in page.url


def test_an_image_finds_itself(page: Page, tmp_path: Path) -> None:
    sent = tmp_path / "sent.png"
    sent.write_bytes(picture("green", "circle", 1))  # sample 1
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Search by an image").click()
    chooser.value.set_files(sent)
    page.wait_for_selector(".score:not(:empty)")
    assert _captions(page)[0] == "a green circle"
    assert page.inner_text("#chip-text") == "your image"
    page.reload()
    page.wait_for_selector(".score:not(:empty)")
    assert _captions(page)[0] == "a green circle"


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_dropped_and_pasted_images(page: Page, how: str) -> None:
    page.evaluate(
        """([how, bytes]) => {
            const carried = new DataTransfer();
            carried.items.add(new File([new Uint8Array(bytes)], "x.png", { type: "image/png" }));
            const init = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(how === "drop"
                ? new DragEvent("drop", { ...init, dataTransfer: carried })
                : new ClipboardEvent("paste", { ...init, clipboardData: carried }));
        }""",
        [how, list(picture("green", "circle", 1))],
    )
    page.wait_for_selector(".score:not(:empty)")
    assert _captions(page)[0] == "a green circle"


def test_more_like_a_result(page: Page) -> None:
    page.locator(".shot").nth(2).click()
    title = page.inner_text("#details-title")
    assert page.locator("dialog").get_by_text("72 × 72").is_visible()
    page.get_by_role("button", name="More like this").click()
    page.wait_for_selector(".score:not(:empty)")
    assert page.inner_text("#chip-text") == f"like “{title}”"
    assert page.locator("dialog").is_hidden()
    page.get_by_role("button", name="Remove the image from the search").click()
    page.wait_for_selector("#chip", state="hidden")
    page.get_by_role("button", name="Images like").first.click()
    page.wait_for_selector("#chip:visible")
    assert "like=0" in page.url


def _classify(page: Page, names: str) -> list[tuple[str, float]]:
    page.get_by_label("Classes").fill(names)
    page.get_by_role("button", name="Classify", exact=True).click()
    page.wait_for_selector("#bars li")
    return [
        (row.locator(".class").inner_text(), float(row.get_attribute("data-probability") or "nan"))
        for row in page.locator("#bars li").all()
    ]


def test_classes_by_names_alone(page: Page, tmp_path: Path) -> None:
    page.locator(".shot").nth(5).click()
    page.locator("dialog").get_by_role("button", name="Classify").click()
    page.wait_for_selector("#subject-image:visible")
    rows = _classify(page, "red circle\nblue square\n\n <b>bar</b> ")
    assert {name for name, _ in rows} == {"red circle", "blue square", "<b>bar</b>"}
    assert sum(share for _, share in rows) == pytest.approx(1)
    assert [share for _, share in rows] == sorted((share for _, share in rows), reverse=True)
    drawn = page.locator(".meter").evaluate_all(
        "(all) => all.map((e) => e.firstChild.clientWidth / e.clientWidth)"
    )
    assert drawn == pytest.approx([share for _, share in rows], abs=0.02)
    page.reload()
    page.wait_for_selector("#bars li")
    sent = tmp_path / "sent.png"
    sent.write_bytes(picture("green", "circle", 1))
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose another image").click()
    chooser.value.set_files(sent)
    expect(page.locator("#subject-caption")).to_have_text("your image")
    page.wait_for_selector("#bars li")
    page.get_by_role("link", name="Search").click()
    page.wait_for_selector(".shot")


def test_refusals_are_shown(browser: Browser, address: str, tmp_path: Path) -> None:
    files = {
        "empty.png": (b"", "0 bytes"),
        "cut.png": (picture("red", "circle", 1)[:150], "damaged"),
        "script.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
        "page.png": (b"<html><script>1</script>", "not an image"),
        "long.png": (bytes((10 << 20) + 1), "10 MiB"),
    }
    with watched_page(browser) as watched:
        page = watched.page
        page.goto(address)
        page.wait_for_selector(".shot")
        for name, (content, message) in files.items():
            (tmp_path / name).write_bytes(content)
            page.locator("#file").set_input_files(tmp_path / name)
            page.locator("#alert", has_text=message).wait_for()
            assert page.locator("#results li").count() == 24
        page.goto(f"{address}/?q=a&filter.label=nope")
        page.locator("#alert", has_text="label=nope").wait_for()
        page.goto(f"{address}/?view=classify&names=a%0Ab&image=gone")
        page.locator("#alert", has_text="not kept").wait_for()
        page.get_by_role("link", name="Search").click()
        page.wait_for_selector(".shot")
        assert page.locator("#alert").is_hidden()
        assert all("Failed to load resource" in each for each in watched.complaints)


def test_by_keyboard_alone(page: Page) -> None:
    def focused() -> str:
        return page.evaluate(
            "document.activeElement.getAttribute('aria-label') || document.activeElement.id"
        )

    press = page.keyboard.press
    press("/")
    assert focused() == "q"
    page.keyboard.type("a red circle")
    press("Enter")
    page.wait_for_selector(".score:not(:empty)")
    for _ in range(20):
        press("Tab")
        if "similarity" in focused():
            break
    names = page.locator(".shot").evaluate_all("(all) => all.map((e) => e.ariaLabel)")
    assert focused() == names[0]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press("ArrowRight")
    assert focused() == names[1]
    press("ArrowLeft")
    press("Enter")
    page.wait_for_selector("dialog:visible")
    press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    assert focused() == names[0]
    press("Tab")
    assert focused().startswith("Images like")
    press("Enter")
    page.wait_for_selector("#chip:visible")
    assert "like=" in page.url


def test_a_phone(browser: Browser, address: str) -> None:
    with watched_page(browser, width=360, height=740) as watched:
        page = watched.page
        for path in ("/", "/?q=red", "/?like=3", "/?view=classify&number=3&names=a%0A" + "b" * 200):
            page.goto(address + path)
            page.wait_for_selector(".shot:visible, #bars li")
            page.wait_for_load_state("networkidle")
            assert not scrolls_sideways(page), path
        page.goto(address)
        page.locator(".shot").first.click()
        box = page.locator("dialog").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert watched.complaints == []


CONTRAST = """
() => {
  const light = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${e.tagName} ${e.className} ${ratio.toFixed(2)}`);
  }
  return found;
}
"""


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(browser: Browser, address: str, dark: bool) -> None:
    with watched_page(browser, dark=dark) as watched:
        page = watched.page
        for path in ("/?q=red", "/?like=3", "/?view=classify&number=3&names=a%0Ab", "/?k=0&q=a"):
            page.goto(address + path)
            page.wait_for_selector(".shot:visible, #bars li, #alert:visible")
            assert page.evaluate(CONTRAST) == []
        assert page.locator("#alert").is_visible()
