"""The page of `layertap explore` in Chromium: what a user types, points at and chooses, and what the page shows."""

from __future__ import annotations

import csv
import json
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster.servers import Server
from explore.conftest import idle, opened
from explore.process import exploring
from playwright.sync_api import Browser, Page, expect

from layertap import Client, InvalidArgumentError, analysis

pytestmark = pytest.mark.timeout(180)
VIEWS = ["tokens", "layers", "change", "likeness", "map", "attention", "neighbours"]
BANKS = ["She sat on the bank of the river.", "He paid the cash into the bank."]
LONG = "a word and another " * 120


def show(page: Page, view: str, first: str | None = None, second: str | None = None) -> None:
    """Types sentences and opens a view."""
    for n, text in enumerate((first, second)):
        if text is not None:
            page.fill(f"#text-{n}", text)
    page.click(f"#tab-{view}")
    idle(page)


def rows(page: Page, figure: int = 0) -> list[list[str]]:
    """Returns the lines of the CSV that a picture saves."""
    with page.expect_download() as saved:
        page.locator("figure").nth(figure).get_by_role("button", name="Save as CSV").click()
    with Path(saved.value.path()).open(newline="") as file:
        return list(csv.reader(file))


def paste(page: Page, text: str) -> None:
    """Pastes a list of sentences."""
    page.evaluate("(text) => navigator.clipboard.writeText(text)", text)
    page.focus("#sentences")
    page.keyboard.press("Control+A")
    page.keyboard.press("Control+V")


def numbers(found: list[list[str]]) -> np.ndarray:
    return np.array(found, np.float64).astype(np.float32)


def set_layer(page: Page, layer: int) -> None:
    page.locator("#layer").evaluate(
        "(slider, layer) => { slider.value = layer; slider.dispatchEvent(new Event('input', {bubbles: true})); }", layer
    )
    idle(page)


def test_it_shows_the_model_and_the_first_tokens_at_once(page: Page, client: Client) -> None:
    expect(page.locator("#model")).to_contain_text(client.model_info().model_id)
    pieces = page.locator("figure").first.locator(".piece b").all_inner_texts()
    assert pieces == client.tokenize(page.input_value("#text-0")).tokens[0]


def test_tokens_follow_what_is_typed(page: Page, client: Client) -> None:
    page.fill("#text-1", "")
    page.locator("#text-0").press_sequentially(" Unbelievable tokenization!", delay=20)
    wanted = client.tokenize(page.input_value("#text-0"))
    pieces = page.locator(".piece b")
    expect(pieces).to_have_text(wanted.tokens[0])
    found = rows(page)
    assert [row[1] for row in found[1:]] == wanted.tokens[0]
    assert [int(row[2]) for row in found[1:]] == wanted.input_ids[0].tolist()


def test_what_is_cut_away_is_shown(page: Page) -> None:
    page.click("summary")
    page.select_option("#truncation", "right")
    page.fill("#max-length", "6")
    show(page, "tokens", BANKS[0], "")
    expect(page.locator("figure h3").first).to_have_text("Sentence: 6 tokens, cut")
    assert page.locator(".original s").inner_text().strip() == "bank of the river."


def test_a_mask_that_is_flipped_moves_the_rows(page: Page, client: Client) -> None:
    show(page, "tokens", BANKS[0], "")
    page.fill("[aria-label^='Pad to']", "13")
    page.press("[aria-label^='Pad to']", "Tab")
    expect(page.locator(".piece.padding")).to_have_count(2)
    expect(page.locator("figure .said")).to_contain_text("changes nothing")
    page.get_by_role("button", name="Attention mask of [PAD] at 11").click()
    expect(page.locator("figure .said")).to_contain_text("sees something else")
    assert page.locator("[value=hand]").is_checked()
    page.get_by_label("inverted").check()
    expect(page.locator(".piece button").first).to_have_text("0")
    expect(page.locator(".piece.padding button").first).to_have_text("1")


def test_layers_arrive_with_the_values_of_the_sdk(page: Page, client: Client) -> None:
    show(page, "layers", BANKS[0], "")
    expect(page.locator("figure h3")).to_contain_text("7 layers of 11 tokens in")
    found = rows(page)
    embedding = client.embed(BANKS[0], layers="all")
    wanted = np.concatenate([embedding.ragged(layer)[0] for layer in range(7)])
    assert np.array_equal(numbers([row[4:] for row in found[1:]]), wanted)
    page.select_option("#panel select", "64")
    expect(page.locator("figure h3")).to_contain_text("7 layers of 704 tokens in")
    page.get_by_role("button", name="Replay slowly").click()
    expect(page.locator(".strip.waiting").first).to_be_attached()
    expect(page.locator(".strip.waiting")).to_have_count(0)


def test_change_has_the_numbers_of_the_sdk_and_says_them_in_words(page: Page, client: Client) -> None:
    show(page, "change", *BANKS)
    embedding = client.embed(BANKS, layers="all")
    for n in (0, 1):
        found = numbers([row[3:] for row in rows(page, n)[1:]])
        for column, measure in enumerate(analysis.MEASURES):
            wanted = analysis.tokens_by_layers(embedding, measure=measure, text=n)
            assert np.array_equal(found[:, column], wanted.ravel())
    canvas = page.locator("figure canvas[role=img]").first
    canvas.hover(position={"x": 120, "y": 60})
    said = page.locator("figure .said").first
    expect(said).to_contain_text("cosine")
    page.mouse.move(0, 0)
    canvas.focus()
    for key in ("ArrowRight", *["ArrowRight"] * 5, "ArrowDown"):
        page.keyboard.press(key)
    expect(said).to_contain_text("(token 5) in layer 5")
    page.get_by_label("length of the row").check()
    expect(page.locator("figure h3").first).to_contain_text("length of each token")


def test_likeness_changes_with_the_layer_and_follows_a_pair(page: Page, client: Client) -> None:
    show(page, "likeness", *BANKS)
    embedding = client.embed(BANKS, layers="all")
    for layer in (6, 2):
        set_layer(page, layer)
        expect(page.locator("figure h3").first).to_contain_text(f"Layer {layer}")
        found = numbers([row[1:] for row in rows(page)[1:]])
        assert np.array_equal(found, analysis.similarity(embedding, layer=layer, texts=(0, 1)))
    canvas = page.locator("figure canvas[role=img]").first
    canvas.focus()
    for key in ("ArrowRight", *["ArrowDown"] * 5, *["ArrowRight"] * 7, "Enter"):
        page.keyboard.press(key)
    expect(page.locator(".legend").first).to_contain_text("“bank” and “bank”")
    found = numbers([row[1:] for row in rows(page, 1)[1:]])
    pools = client.embed(BANKS, pooling=analysis.each_layer("mean", 6))
    assert np.array_equal(found[:, 0], analysis.trajectory(pools))
    assert np.array_equal(found[:, 1], analysis.token_trajectory(embedding, tokens=((0, 5), (1, 7))))
    page.select_option("#panel select", "cls")
    expect(page.locator(".legend").first).to_contain_text("first token")


def test_the_map_keeps_its_axes_while_layers_play(page: Page, client: Client) -> None:
    show(page, "map", *BANKS)
    found = rows(page)
    wanted = analysis.projection(client.embed(BANKS, layers="all")).points
    assert np.array_equal(numbers([row[4:] for row in found[1:]]), wanted.reshape(-1, 2))
    set_layer(page, 5)
    page.get_by_role("button", name="Play through the layers").click()
    expect(page.locator("figure h3")).to_have_text("Layer 6")
    page.locator("figure canvas[role=img]").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("figure .said")).to_contain_text("token 0 of sentence 1")


def test_attention_shows_the_head_that_is_chosen(page: Page, client: Client) -> None:
    show(page, "attention", *BANKS)
    held = client.embed(BANKS[0], attentions="all").attentions
    title = page.locator("figure h3").nth(1)
    layer, head = map(int, re.findall(r"\d+", title.inner_text()))
    page.locator("figure canvas[role=img]").first.focus()
    page.keyboard.press("ArrowUp" if layer else "ArrowDown")
    layer += -1 if layer else 1
    expect(title).to_have_text(f"Layer {layer}, head {head}")
    found = numbers([row[1:] for row in rows(page, 1)[1:]])
    assert np.array_equal(found, held.ragged(layer)[0][head])
    page.locator("#panel select").select_option("1")
    expect(page.locator("figure canvas[role=img]").nth(1)).to_be_visible()
    idle(page)
    assert len(rows(page, 1)[0]) == 1 + len(client.tokenize(BANKS[1]).tokens[0])


def test_two_thousand_sentences_are_embedded_with_progress(page: Page, client: Client) -> None:
    sentences = [f"Sentence {n} is about {n % 7} boats and a river." for n in range(1999)] + [BANKS[0]]
    show(page, "neighbours", BANKS[0], "")
    paste(page, "\n".join(sentences))
    page.get_by_role("button", name="Embed the sentences").click()
    expect(page.locator("progress")).to_be_visible()
    expect(page.get_by_text("2000 sentences", exact=True)).to_be_visible(timeout=120_000)
    idle(page)
    expect(page.locator("tbody tr").first).to_contain_text(BANKS[0])
    found = rows(page)
    assert len(found) == 1 + 7 * 10
    poolings = analysis.each_layer("mean", 6)
    query = client.embed(BANKS[0], pooling=poolings).pools
    best = sentences.index(found[-9][3])
    pool = client.embed([sentences[best]], pooling=poolings).pools[6]
    assert float(found[-9][2]) == pytest.approx(float(analysis.cosines(pool, query[6])[0, 0]), abs=1e-6)
    set_layer(page, 0)
    expect(page.locator("figure h3").first).to_have_text("Nearest in layer 0")
    paste(page, "\n".join([*sentences, "one more"]))
    page.get_by_role("button", name="Embed the sentences").click()
    expect(page.locator("#panel .error")).to_contain_text("2001 entries, the page takes 2000")


def test_a_file_brings_its_sentences(page: Page, tmp_path: Path) -> None:
    show(page, "neighbours", BANKS[0])
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in BANKS))
    page.set_input_files("#file", path)
    expect(page.locator("#sentences")).to_have_value("\n".join(BANKS))
    page.set_input_files("#file", {"name": "x.jsonl", "mimeType": "", "buffer": b"{"})
    expect(page.locator("#panel .error")).to_contain_text("line 1 is not JSON")


# What is the same for all views.


def test_each_picture_is_copied_as_python_and_saved_and_has_names(page: Page) -> None:
    for view in VIEWS:
        show(page, view, *BANKS)
        if view == "neighbours":
            page.get_by_role("button", name="Embed the sentences").click()
            expect(page.locator("tbody tr").first).to_be_visible()
            idle(page)
        for figure in page.locator("figure").all():
            figure.get_by_role("button", name="Copy as Python").click()
            expect(page.locator("#toast")).to_have_class("shown")
            python = page.evaluate("navigator.clipboard.readText()")
            compile(python, "copied", "exec")
            assert "Client(" in python
            with page.expect_download() as saved:
                figure.get_by_role("button", name="Save as PNG").click()
            assert saved.value.suggested_filename.endswith(".png")
            assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")
        assert page.evaluate(NAMELESS) == []
        assert page.get_attribute("#panel", "aria-labelledby") == f"tab-{view}"


NAMELESS = """() => [...document.querySelectorAll('button, input, select, textarea, canvas[tabindex], [role=img]')]
  .filter((one) => one.checkVisibility())
  .filter((one) => !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length))
  .map((one) => one.outerHTML.slice(0, 120))"""
"""What a screen reader has no name for."""


def test_a_text_that_is_too_long_is_refused_in_the_words_of_the_sdk(page: Page, client: Client) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.embed([BANKS[0], LONG * 2], layers="all", return_tokens=True)
    wanted = str(caught.value).partition(" (request")[0]
    error = page.locator("#error")
    for view in ("change", "likeness", "map"):
        show(page, view, BANKS[0], LONG * 2)
        expect(error).to_contain_text(wanted)
        assert page.get_attribute("#text-0", "aria-invalid") == "true"
        show(page, view, *BANKS)
        expect(error).to_be_hidden()


def test_texts_of_many_tokens_are_drawn_and_pointed_at_without_a_stutter(page: Page) -> None:
    page.evaluate(
        "() => { window.slow = []; new PerformanceObserver((list) => window.slow.push(...list.getEntries().map((one) =>"
        " one.duration))).observe({ type: 'longtask' }); }"
    )
    for view in VIEWS[:-1]:
        show(page, view, LONG, LONG)
        canvas = page.locator("figure canvas[role=img]").first
        if canvas.count():
            canvas.scroll_into_view_if_needed()
            box = canvas.bounding_box()
            assert box is not None
            for n in range(30):
                page.mouse.move(box["x"] + 60 + 9 * n, box["y"] + 30 + 5 * n)
    # A tenth of it on a machine without other work; see bench/page.py.
    assert max(page.evaluate("window.slow"), default=0) < 2000


def test_tabs_and_sliders_are_used_with_the_keyboard(page: Page) -> None:
    page.focus("#tab-tokens")
    for view in VIEWS[1:]:
        page.keyboard.press("ArrowRight")
        expect(page.locator(f"#tab-{view}")).to_have_attribute("aria-selected", "true")
        expect(page.locator(f"#tab-{view}")).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator("#tab-tokens")).to_be_focused()
    show(page, "likeness")
    page.focus("#layer")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#layer-number")).to_have_text("5 of 6")
    expect(page.locator("figure h3").first).to_contain_text("Layer 5")


def test_a_phone_scrolls_only_down(browser: Browser, address: str) -> None:
    with browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as context:
        page = opened(context.new_page(), address)
        for view in VIEWS:
            show(page, view, *BANKS)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, view


def test_colours_follow_the_system_and_can_be_chosen(browser: Browser, address: str) -> None:
    with browser.new_context(color_scheme="dark") as context:
        page = opened(context.new_page(), address)
        show(page, "change", *BANKS)
        assert page.get_attribute("html", "data-theme") == "dark"
        page.click("#theme")
        assert page.get_attribute("html", "data-theme") == "light"
        page.emulate_media(color_scheme="light")
        page.click("#theme")
        assert page.get_attribute("#theme", "aria-label") == "Colours: as the system"
        assert page.get_attribute("html", "data-theme") == "light"
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


# The server.


def test_a_stopped_server_is_shown_and_waited_for(browser: Browser) -> None:
    server = Server("--log-level", "warning")
    port = server.address.rpartition(":")[2]
    with exploring(server.address, "--timeout-s", "5") as shown, browser.new_context() as context:
        page = opened(context.new_page(), shown.url)
        show(page, "change", *BANKS)
        server.kill()
        page.fill("#text-0", "The server is gone.")
        expect(page.locator("#away")).to_contain_text("waiting for it to come back", timeout=30_000)
        expect(page.locator("#server")).to_have_attribute("data-state", "away")
        assert server.address in page.inner_text("#away")
        again = Server("--log-level", "warning", "--port", port)
        try:
            expect(page.locator("#server")).to_have_attribute("data-state", "here", timeout=60_000)
            expect(page.locator("#away")).to_be_hidden()
            expect(page.locator("figure h3").first).to_be_visible()
            idle(page)
            assert [row[2] for row in rows(page)[1:8]] == ["[CLS]", "the", "server", "is", "gone", ".", "[SEP]"]
        finally:
            again.kill()


def test_without_its_own_process_the_page_says_what_to_do(browser: Browser, server: Server) -> None:
    with browser.new_context() as context:
        with exploring(server.address) as shown:
            page = opened(context.new_page(), shown.url)
        page.fill("#text-0", "Nothing answers.")
        expect(page.locator("#away")).to_contain_text("run layertap explore again", timeout=30_000)


def test_the_copied_lines_run_alone(page: Page, tmp_path: Path) -> None:
    show(page, "likeness", *BANKS)
    page.get_by_role("button", name="Copy as Python").first.click()
    expect(page.locator("#toast")).to_have_class("shown")
    program: Any = page.evaluate("navigator.clipboard.readText()")
    path = tmp_path / "copied.py"
    path.write_text(f"{program}print(similarity.shape, trajectory[-1])\n")
    python = Path(__file__).parents[2] / ".venv/bin/python"
    done = subprocess.run([python, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("(11, 10) 0.")


def test_make_explore_shows_the_embedded_model_and_leaves_no_server(browser: Browser) -> None:
    root = Path(__file__).parents[2]
    command = [root / ".venv/bin/python", root / "examples/explore.py", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, browser.new_context() as context:
        assert process.stdout is not None
        page = opened(context.new_page(), process.stdout.readline().strip())
        expect(page.locator(".piece").first).to_be_visible()
        host, port = page.inner_text("#server").split()[-1].split(":")
        process.terminate()
        assert process.wait(timeout=60) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
