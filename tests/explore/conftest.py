"""Fixtures of the tests of the page of `layertap explore` in a real browser.

They run in an environment of their own, `.explore`, which has what drives a browser, and layertap's client without
torch; servers run in processes of `.venv`, the browser is the Chromium of the system. `make test-explore` runs them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from cluster.servers import Server
from explore.process import exploring
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from layertap import Client

SWITCHES = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """Returns the path of the system's Chromium, or of what LAYERTAP_CHROMIUM names."""
    return os.environ.get("LAYERTAP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = chromium()
    if path is None:
        pytest.skip("there is no Chromium; install Debian's package chromium, or set LAYERTAP_CHROMIUM")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=list(SWITCHES))
        yield found
        found.close()


@pytest.fixture(scope="session")
def server(browser: Browser) -> Iterator[Server]:
    found = Server("--log-level", "warning")
    yield found
    found.kill()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as found:
        yield found


@pytest.fixture(scope="session")
def address(server: Server) -> Iterator[str]:
    with exploring(server.address) as found:
        yield found.url


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    found = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    found.grant_permissions(["clipboard-read", "clipboard-write"])
    yield found
    found.close()


@pytest.fixture
def page(context: BrowserContext, address: str) -> Iterator[Page]:
    """The page, connected; at the end of the test nothing may have gone wrong in it or left this machine."""
    found = context.new_page()
    faults: list[str] = []
    host = address.split("/")[2]
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.on(
        "console", lambda said: faults.append(said.text) if said.type == "error" and not is_refusal(said.text) else None
    )
    found.on("request", lambda asked: None if is_own(asked.url, host) else faults.append(asked.url))
    opened(found, address)
    yield found
    assert not faults


def opened(page: Page, address: str) -> Page:
    """Opens the page and waits until it has the model."""
    page.goto(address)
    page.wait_for_selector("#server[data-state=here]")
    idle(page)
    return page


def idle(page: Page) -> None:
    """Waits until nothing is asked any more."""
    page.wait_for_selector("#panel[aria-busy=false]", state="attached")


def is_own(url: str, host: str) -> bool:
    return url.startswith((f"http://{host}/", "blob:", "data:"))


def is_refusal(said: str) -> bool:
    """Returns whether the browser says that an answer was a refusal, which the page shows."""
    return said.startswith("Failed to load resource: the server responded with a status of 4") or "503" in said
