"""Makes the pictures of `layertap explore` in docs/explore, each view in light and in dark; run by `make screenshots`.

Drives the Chromium of the system, with the embedded model. Their numbers do not depend on the machine, but for times.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.servers import Server
from explore.conftest import SWITCHES, chromium, idle, opened
from explore.process import exploring
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parent / "explore"
SIZE = {"width": 1120, "height": 880}
HEIGHTS = {"layers": 600}
"""Strips of values pack badly: fewer of them make a small file."""


def tokens(page: Page) -> None:
    page.fill("#text-1", "")
    page.fill("[aria-label^='Pad to']", "13")
    page.press("[aria-label^='Pad to']", "Tab")
    page.get_by_role("button", name="Attention mask of [PAD] at 11").click()
    page.locator("figure .said").filter(has_text="something else").wait_for()


def layers(page: Page) -> None:
    page.select_option("#panel select", "16")


def change(page: Page) -> None:
    keys(page, 0, "ArrowRight", *["ArrowRight"] * 5, "ArrowDown")


def likeness(page: Page) -> None:
    keys(page, 0, "ArrowRight", *["ArrowDown"] * 5, *["ArrowRight"] * 7, "Enter")
    page.locator(".legend", has_text="bank").first.wait_for()


def map_(page: Page) -> None:
    keys(page, 0, *["ArrowRight"] * 6)


def attention(page: Page) -> None:
    keys(page, 1, "ArrowRight", *["ArrowDown"] * 5)


def neighbours(page: Page) -> None:
    page.get_by_role("button", name="Embed the sentences").click()
    page.locator("tbody tr").first.wait_for()
    idle(page)
    page.locator("figure").first.scroll_into_view_if_needed()


VIEWS = {
    "tokens": tokens,
    "layers": layers,
    "change": change,
    "likeness": likeness,
    "map": map_,
    "attention": attention,
    "neighbours": neighbours,
}


def keys(page: Page, canvas: int, *names: str) -> None:
    """Moves the cursor of a picture."""
    page.locator("figure canvas[role=img]").nth(canvas).focus()
    for name in names:
        page.keyboard.press(name)


def main() -> None:
    path = chromium()
    if path is None:
        sys.exit("there is no Chromium; install Debian's package chromium, or set LAYERTAP_CHROMIUM")
    FOLDER.mkdir(exist_ok=True)
    server = Server("--log-level", "warning")
    with exploring(server.address) as shown, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(SWITCHES))
        for colors in ("light", "dark"):
            page = browser.new_page(viewport=SIZE, color_scheme=colors, reduced_motion="reduce")
            opened(page, shown.url)
            for view, prepare in VIEWS.items():
                page.get_by_role("button", name="bank, in two senses").click()
                page.click(f"#tab-{view}")
                page.wait_for_timeout(300)
                idle(page)
                prepare(page)
                page.wait_for_timeout(600)  # Until what moves has arrived.
                page.evaluate("document.querySelector('#server .words').textContent = 'connected to 127.0.0.1:50051'")
                if view not in ("attention", "neighbours"):
                    page.evaluate("scrollTo(0, 0)")
                clip = {"x": 0, "y": 0, "width": SIZE["width"], "height": HEIGHTS.get(view, SIZE["height"])}
                page.screenshot(path=FOLDER / f"{view}-{colors}.png", clip=clip)
        browser.close()
    server.kill()


if __name__ == "__main__":
    main()
