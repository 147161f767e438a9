"""How soon the page of `layertap explore` shows numbers: from its command, at its first paint, after a change of layer.

Run by `make bench-explore`; drives the Chromium of the system. Prints a table; needs a machine without other work.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from explore.conftest import SWITCHES, chromium, idle, opened
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
COMMAND = [ROOT / ".venv/bin/python", ROOT / "examples/explore.py", "--no-browser"]
SHORT = ("She sat on the bank of the river.", "He paid the cash into the bank.")
LONG = ("a word and another " * 125, "some more words to read " * 100)
CHANGES = 12
CHANGE = """async (layer) => {
  const slider = document.getElementById("layer");
  const title = document.querySelector("figure h3");
  const began = performance.now();
  slider.value = layer;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  while (!title.textContent.startsWith(`Layer ${layer}`)) await new Promise((done) => setTimeout(done, 1));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - began;
}"""
"""From the slider to the frame in which the picture of the layer is painted, in milliseconds."""


def main() -> None:
    path = chromium()
    if path is None:
        sys.exit("there is no Chromium; install Debian's package chromium, or set LAYERTAP_CHROMIUM")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(SWITCHES))
        page = browser.new_page()
        began = time.perf_counter()
        with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            address = process.stdout.readline().strip()
            listening_s = time.perf_counter() - began
            opened(page, address)
            page.wait_for_selector(".piece")
            numbers_s = time.perf_counter() - began
            print(f"from make explore to its address    {listening_s:7.2f} s")
            print(f"from make explore to numbers        {numbers_s:7.2f} s   (bound: 15 s)")
            print(f"first paint of the page             {first_paint_s(page):7.2f} s   (bound: 1 s)")
            for name, texts in (("short", SHORT), ("long", LONG)):
                for view in ("likeness", "map"):
                    times = changes(page, view, texts)
                    shown = f"{statistics.median(times):7.1f} ms  (at most {max(times):.1f}; bound: 100 ms)"
                    print(f"change of layer, {view:8} {name:5}      {shown}")
            process.terminate()
        browser.close()


def first_paint_s(page: Page) -> float:
    """Returns when the first content was painted after the page was asked for."""
    script = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
    return float(page.evaluate(script))


def changes(page: Page, view: str, texts: tuple[str, str]) -> list[float]:
    """Returns how long changes of the layer take, in milliseconds."""
    for n, text in enumerate(texts):
        page.fill(f"#text-{n}", text)
    page.click(f"#tab-{view}")
    page.wait_for_timeout(1000)
    idle(page)
    return [float(page.evaluate(CHANGE, n % 6)) for n in range(CHANGES)]


if __name__ == "__main__":
    main()
