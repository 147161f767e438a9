"""`layertap explore` without a browser: its numbers are the SDK's, its Python gives them, and only its page may ask."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explore.process import Page, exploring
from support import ROOT, Server, poll, running

from layertap import Client, Pooling, TokenIds, analysis
from layertap.cli import main

BANKS = ["She sat on the bank of the river.", "He paid the cash into the bank."]
SENTENCES = ["A boat on a river.", "Money in a bank.", "Two eggs and flour.", "The stream rose.", "A loan."]
STATIC = ROOT / "client/layertap/explore/static"


@pytest.fixture(scope="module")
def page(real_server: Server) -> Iterator[Page]:
    with exploring(real_server.address) as found:
        yield found


@pytest.fixture
def client(real_server: Server) -> Iterator[Client]:
    with Client(real_server.address) as found:
        yield found


def run_lines(python: str) -> dict[str, Any]:
    """Returns what the copied lines have made."""
    names: dict[str, Any] = {}
    exec(compile(python, "copied", "exec"), names)
    names["client"].close()
    return names


def same_as_the_lines(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Compares each array of a message, to the last bit, with what the copied lines give its name."""
    assert arrays
    names = run_lines(header["python"])
    for name, values in arrays.items():
        found = names[name] if name in names else names[name[:-2]][int(name[-1])]
        assert np.array_equal(values, np.asarray(found, values.dtype)), name


def test_the_model_is_that_of_the_server(page: Page, client: Client) -> None:
    header, _ = page.ask("info")
    info = client.model_info()
    assert header["target"] == client.target and header["fingerprint"] == info.fingerprint
    assert (header["layer_count"], header["attention_head_count"]) == (6, 12)


def test_tokens_are_those_of_tokenize(page: Page, client: Client) -> None:
    header, arrays = page.ask("tokens", texts=BANKS, max_length=6, truncation="right", special_tokens=False)
    wanted = client.tokenize(BANKS, max_length=6, truncation="right", add_special_tokens=False)
    assert not arrays and [one["truncated"] for one in header["tokens"]] == [True, True]
    for n, one in enumerate(header["tokens"]):
        assert one["tokens"] == wanted.tokens[n] and one["input_ids"] == wanted.input_ids[n].tolist()
        assert one["offset_mapping"] == wanted.offset_mapping[n].tolist()
    assert np.array_equal(run_lines(header["python"])["tokens"].input_ids, wanted.input_ids)


@pytest.mark.parametrize("masks", [None, "inverted", "seen"])
def test_padding_and_masks_move_rows_as_the_sdk_says(masks: str | None, page: Page, client: Client) -> None:
    ids = client.tokenize(BANKS[0], pad_to=14)
    own = ids.attention_mask[0]
    mask = {None: own, "inverted": 1 - own, "seen": np.ones_like(own)}[masks]
    asked = {} if masks is None else {"masks": [mask.tolist()]}
    header, arrays = page.ask("tokens", texts=BANKS[:1], pad_to=14, **asked)
    assert arrays["cosine_0"].shape == (7, own.sum())
    assert (arrays["difference_0"].max() < 1e-5) == (masks is None)  # Padding that is masked moves nothing.
    given = TokenIds(input_ids=ids.input_ids[0], attention_mask=mask, token_type_ids=ids.token_type_ids[0])
    after = client.embed([given], layers="all").ragged(6)[0][: own.sum()]
    before = client.embed([ids.input_ids[0, : own.sum()].tolist()], layers="all").ragged(6)[0]
    assert np.array_equal(arrays["difference_0"][6], np.abs(after - before).max(-1))
    same_as_the_lines(header, arrays)


def test_layers_arrive_one_after_the_other_with_every_row(page: Page, client: Client) -> None:
    status, found = page.post("layers", json.dumps({"texts": BANKS, "copies": 3}).encode())
    assert status == 200 and found[0][0]["text_count"] == 6 and found[-1][0]["done"]
    parts = [(header, arrays) for header, arrays in found[1:-1] if arrays]
    wanted = client.embed(BANKS, layers="all")
    rows = {(header["layer"], int(name[-1])): values for header, arrays in parts for name, values in arrays.items()}
    assert sorted(rows) == [(layer, text) for layer in range(7) for text in (0, 1)]
    for (layer, text), values in rows.items():
        assert np.array_equal(values, wanted.ragged(layer)[text])
    times = [header["elapsed_ms"] for header, _ in found[1:]]
    assert times == sorted(times) and times[0] > 0
    assert found[0][0]["tokens"][0] == client.tokenize(BANKS[0]).tokens[0]
    run_lines(found[0][0]["python"])


def test_change_is_that_of_the_analysis(page: Page, client: Client) -> None:
    header, arrays = page.ask("change", texts=BANKS)
    embedding = client.embed(BANKS, layers="all")
    assert set(arrays) == {f"{measure}_{n}" for measure in analysis.MEASURES for n in (0, 1)}
    for n in (0, 1):
        assert np.array_equal(arrays[f"norm_{n}"], analysis.tokens_by_layers(embedding, measure="norm", text=n))
    assert [len(own) for own in header["tokens"]] == embedding.token_counts.tolist()
    same_as_the_lines(header, arrays)


@pytest.mark.parametrize(("pooling", "special"), [("mean", True), ("cls", True), ("mean_max", False)])
def test_likeness_is_that_of_the_sdk(pooling: Any, special: bool, page: Page, client: Client) -> None:
    asked = {"texts": BANKS, "layer": 3, "pooling": pooling, "special_tokens": special, "pair": [[0, 5], [1, 7]]}
    header, arrays = page.ask("likeness", **asked)
    assert header["tokens"][0][5] == header["tokens"][1][7] == "bank"
    poolings = [Pooling(pooling, layer=layer, include_special_tokens=special) for layer in range(7)]
    pools = client.embed(BANKS, pooling=poolings).pools
    assert arrays["trajectory"] == pytest.approx([analysis.cosines(pool, pool)[0, 1] for pool in pools], abs=1e-6)
    assert arrays["token_trajectory"][3] == arrays["similarity"][5, 7]
    assert arrays["token_trajectory"][6] < arrays["token_trajectory"][0]  # The two senses part.
    same_as_the_lines(header, arrays)


def test_one_text_is_compared_with_itself(page: Page) -> None:
    header, arrays = page.ask("likeness", texts=BANKS[:1], layer=6)
    assert np.allclose(np.diag(arrays["similarity"]), 1) and set(arrays) == {"similarity"}
    same_as_the_lines(header, arrays)


@pytest.mark.parametrize("axes_of", [None, 0, 6])
def test_the_map_is_that_of_the_analysis(axes_of: int | None, page: Page) -> None:
    header, arrays = page.ask("map", texts=BANKS, axes_of=axes_of)
    assert arrays["points"].shape == (7, sum(map(len, header["tokens"])), 2)
    same_as_the_lines(header, arrays)


def test_attention_is_that_of_the_sdk(page: Page, client: Client) -> None:
    header, arrays = page.ask("attention", texts=BANKS, text=1, layer=2, head=7, grid=True)
    held = client.embed(BANKS[1], attentions="all").attentions
    assert np.array_equal(arrays.pop("grid"), np.stack([held.ragged(layer)[0] for layer in range(6)]))
    assert np.array_equal(arrays["attention"], held.ragged(2)[0][7])
    same_as_the_lines(header, arrays)


def test_the_small_heads_of_a_long_text_show_the_largest_of_each_block(page: Page, client: Client) -> None:
    text = "a bank by the river " * 12
    _, arrays = page.ask("attention", texts=[text], grid=True)
    whole = client.embed(text, attentions="all").attentions.ragged(4)[0][3]
    assert whole.shape == (62, 62) and arrays["grid"].shape == (6, 12, 21, 21)
    assert arrays["grid"][4, 3, 2, 20] == whole[6:9, 60:].max()


def test_neighbours_are_the_nearest_in_each_layer(page: Page, client: Client) -> None:
    status, found = page.post("corpus", json.dumps({"sentences": [*SENTENCES, *SENTENCES * 20]}).encode())
    assert status == 200 and [header["done_count"] for header, _ in found[:-1]] == [50, 100]
    assert found[-1][0]["sentence_count"] == 105
    described, _ = page.ask("corpus", sentences=SENTENCES, pooling="cls")
    header, arrays = page.ask("nearest", corpus=described["corpus"], texts=[BANKS[0]])
    poolings = analysis.each_layer("cls", 6)
    rows = np.stack(client.embed(SENTENCES, pooling=poolings).pools)
    query = client.embed(BANKS[0], pooling=poolings).pools
    for layer in range(7):
        order, cosines = analysis.nearest(rows[layer], query[layer][0])
        assert arrays["positions"][layer].tolist() == order.tolist()
        np.testing.assert_allclose(arrays["cosines"][layer], cosines, atol=1e-6)
    assert header["sentences"][str(arrays["positions"][6, 0])] == SENTENCES[0]
    same_as_the_lines(header, arrays)


def test_a_sentence_that_cannot_be_embedded_is_named_and_the_others_are(page: Page) -> None:
    described, _ = page.ask("corpus", sentences=["fine", "word " * 600, "also fine"])
    assert described["sentence_count"] == 2 and described["bad"][0]["index"] == 1
    assert "512" in described["bad"][0]["details"]
    error = page.refusal("corpus", sentences=["word " * 600])
    assert error["code"] == "INVALID_ARGUMENT" and "no sentence could be embedded" in error["details"]


# Files.


def send(page: Page, name: str, data: bytes) -> tuple[int, dict[str, Any]]:
    status, found = page.post("sentences", data, X_File_Name=name)
    return status, found[-1][0]


def test_files_of_texts_become_sentences(page: Page) -> None:
    texts = [*SENTENCES, "one\u2028text\x85on one line"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    for name, data in (("a.TXT", "\ufeff" + "\r\n".join(texts) + "\n\n"), ("b.jsonl", lines)):
        status, header = send(page, name, data.encode())
        assert status == 200 and header["sentences"] == texts and header["has_texts"] and not header["columns"]


@pytest.mark.parametrize("pooled", [True, False])
def test_vectors_of_a_file_that_the_command_line_made_are_used_as_they_are(
    pooled: bool, page: Page, client: Client, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "vectors.parquet"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    made = ["embed", str(corpus), "--pooling", "max"] if pooled else ["encode", str(corpus)]
    assert main([*made, "--keep", "text", "-o", str(output), "--target", client.target]) == 0
    capsys.readouterr()
    column = "pool_0" if pooled else "sentence_embedding"
    status, header = send(page, "vectors.parquet", output.read_bytes())
    assert status == 200 and header["sentences"] == SENTENCES and header["columns"] == [column]
    described, _ = page.ask("corpus", column=column, pooling="max")
    found, arrays = page.ask("nearest", corpus=described["corpus"], texts=[BANKS[0]])
    query = client.embed(BANKS[0], pooling="max").pooled[0] if pooled else client.encode(BANKS[0])
    wanted = client.embed(SENTENCES, pooling="max").pooled if pooled else client.encode(SENTENCES)
    order, cosines = analysis.nearest(wanted, query)
    assert arrays["positions"].tolist() == [order.tolist()]
    np.testing.assert_allclose(arrays["cosines"][0], cosines, atol=1e-6)
    same_as_the_lines({"python": found["python"].replace('"vectors.parquet"', repr(str(output)))}, arrays)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"x", "choose .txt, .jsonl or .parquet"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"\n\n", "no sentence"),
        ("a.txt", b"x\n" * 2001, "2001 sentences, the page takes 2000"),
        ("a.jsonl", b'{"text": "x"}\n{"title": "y"}', "line 2 has no string as 'text'"),
        ("a.jsonl", b"\n\n{", "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 has no string as 'text', or one with a lone surrogate"),
        ("a.parquet", b"PAR1", "no Parquet, or is damaged"),
    ],
)
def test_a_file_that_is_no_corpus_is_refused(name: str, data: bytes, said: str, page: Page) -> None:
    status, header = send(page, name, data)
    assert status == 400 and said in header["error"]["details"]


def test_a_parquet_file_with_strings_that_are_none_is_refused(page: Page) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array([b"caf\xe9"]).view(pa.string())}), buffer)
    status, header = send(page, "a.parquet", buffer.getvalue())
    assert status == 400 and "is damaged" in header["error"]["details"]


def test_vectors_of_another_model_are_refused(page: Page) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(768, np.float32)), 384)
    buffer = io.BytesIO()
    table = pa.table({"ids": [1, 2], "pool_0": vectors}).replace_schema_metadata({"fingerprint": "f" * 64})
    pq.write_table(table, buffer)
    assert send(page, "a.parquet", buffer.getvalue())[1]["has_texts"] is False
    assert "are of the model ffffffffffff" in page.refusal("corpus", column="pool_0")["details"]


# Errors.


def test_errors_are_the_words_of_the_sdk(page: Page, client: Client) -> None:
    with pytest.raises(Exception) as caught:
        client.embed(["fine", "word " * 600], layers="all", return_tokens=True)
    error = page.refusal("change", texts=["fine", "word " * 600])
    assert error["code"] == "INVALID_ARGUMENT"
    assert error["details"].partition(" (request")[0] == str(caught.value).partition(" (request")[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "texts is not a list"),
        ({"texts": ["a", "b", "c"]}, "the page takes 2"),
        ({"texts": [1]}, "texts is not a list of strings"),
        ({"texts": ["a"], "max_length": 0}, "max_length is not a whole number"),
        ({"texts": ["a"], "truncation": "middle"}, "truncation is not one of error, right, left"),
        ({"texts": ["a"], "pad_to": "9"}, "pad_to is not a whole number"),
        ({"texts": ["a"], "special_tokens": 1}, "special_tokens is not true or false"),
        ({"texts": ["a"], "masks": [[0.5]]}, "masks is not a list of lists"),
        ({"texts": ["a", "b"], "masks": [[1, 1, 1]]}, "one for each text"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], said: str, page: Page) -> None:
    error = page.refusal("tokens", **fields)
    assert error["code"] == "INVALID_ARGUMENT" and said in error["details"]


def test_a_file_is_not_sent_in_json(page: Page) -> None:
    assert "there is no file" in page.refusal("sentences", file="text", file_name=1)["details"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff"])
def test_what_is_not_json_is_refused(body: bytes, page: Page) -> None:
    status, found = page.post("change", body)
    assert status == 400 and "not JSON" in found[0][0]["error"]["details"].replace("not a JSON object", "not JSON")


def test_without_a_server_the_page_says_so() -> None:
    with exploring("127.0.0.1:1", "--timeout-s", "1") as page:
        error = page.refusal("info")
        assert error["code"] == "UNAVAILABLE" and "127.0.0.1:1" in error["details"]
        assert page.request("GET", page.path)[0] == 200


def test_a_server_that_comes_back_with_another_model_is_taken(tiny_folder: Path, real_folder: Path) -> None:
    with running("--device", "cpu", "--model-id", str(tiny_folder)) as server, exploring(server.address) as page:
        before, _ = page.ask("info")
        page.ask("change", texts=BANKS)
        assert server.stop() == 0
        again = ["--port", server.address.rpartition(":")[2], "--model-id", str(real_folder), "--device", "cpu"]
        with running(*again):
            poll(lambda: _answers(page))
            after, _ = page.ask("info")
            assert after["fingerprint"] != before["fingerprint"] and after["layer_count"] == 6
            assert page.ask("change", texts=BANKS)[1]["norm_0"].shape == (7, 11)


def _answers(page: Page) -> bool:
    return page.post("info", b"{}")[0] == 200


def test_a_page_that_leaves_ends_its_call(page: Page) -> None:
    body = json.dumps({"texts": BANKS, "copies": 256}).encode()
    host, port = page.host.split(":")
    head = f"POST {page.path}api/layers HTTP/1.1\r\nHost: {page.host}\r\nOrigin: http://{page.host}\r\n"
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert connection.recv(1024).startswith(b"HTTP/1.1 200")
    assert page.ask("change", texts=BANKS)[1]  # The command has said nothing about it: see `exploring`.


def test_the_browser_is_opened_at_the_address(real_server: Server, tmp_path: Path) -> None:
    browser, told = tmp_path / "browser", tmp_path / "told"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {told}.new && mv {told}.new {told}\n')
    browser.chmod(0o755)
    with exploring(real_server.address, "--browser", environment={"BROWSER": f"{browser} %s"}) as page:
        poll(told.exists)
        assert told.read_text() == page.url


def test_without_its_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["explore", "--no-browser"]) == 2
    assert "layertap explore needs uvicorn; install it with: pip install 'layertap[explore]'" in capsys.readouterr().err


def test_a_wrong_target_or_port_is_wrong_usage(capsys: pytest.CaptureFixture[str], page: Page) -> None:
    assert main(["explore", "--no-browser", "--target", "one:1,two:2"]) == 2
    assert "pass IP addresses" in capsys.readouterr().err
    port = page.host.partition(":")[2]
    assert main(["explore", "--no-browser", "--port", port]) == 2
    assert f"port {port} cannot be opened" in capsys.readouterr().err


# Who may ask.


def test_the_page_loads_nothing_from_elsewhere_and_is_not_kept(page: Page) -> None:
    status, headers, body = page.request("GET", page.path)
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
    assert not re.search(rb"(https?:)?//\w|style=|onclick=|<script(?! type=\"module\" src)", body)
    for path in STATIC.rglob("*.*"):
        if path.suffix in (".js", ".css") and "vendor" not in path.parts:
            text = path.read_text()
            assert "innerHTML" not in text and "localStorage" not in text and "document.cookie" not in text, path
            assert not re.search(r"https?://(?!www\.w3\.org)", text), path


def test_each_page_has_its_own_token(page: Page, real_server: Server) -> None:
    token = page.path.strip("/")
    assert len(base64.urlsafe_b64decode(token)) == 24
    with exploring(real_server.address) as other:
        assert other.path != page.path


@pytest.mark.parametrize("path", ["/", "/x/", "/%00/", "/api/info", "/x/api/info", "/index.html", "//"])
def test_without_the_token_there_is_nothing(path: str, page: Page) -> None:
    for method in ("GET", "POST"):
        status, _, body = page.request(method, path, b"{}", Origin=f"http://{page.host}")
        assert status == 404 and b"lacks its token" in body


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "evil.example:80", ""])
def test_another_host_name_is_refused(host: str, page: Page) -> None:
    status, _, body = page.request("GET", page.path, Host=host)
    assert status in (400, 403) and b"<html" not in body


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1"])
def test_another_site_may_not_ask(origin: str, page: Page) -> None:
    for method, path in (("POST", "api/info"), ("GET", ""), ("GET", "app.js")):
        assert page.request(method, page.path + path, b"{}", Origin=origin)[0] == 403


def test_a_view_is_asked_by_the_page_alone(page: Page) -> None:
    origin = f"http://{page.host}"
    assert page.request("POST", f"{page.path}api/info", b"{}")[0] == 405
    assert page.request("GET", f"{page.path}api/info", Origin=origin)[0] == 405
    assert page.request("POST", f"{page.path}api/nothing", b"{}", Origin=origin)[0] == 404
    assert page.request("POST", page.path, b"{}", Origin=origin)[0] == 405


@pytest.mark.parametrize("path", ["../app.py", "..%2fapp.py", "static/index.html", "vendor/", "vendor/../../app.py"])
def test_there_is_no_way_out_of_the_folder(path: str, page: Page) -> None:
    assert page.request("GET", page.path + path)[0] == 404


def test_a_request_that_is_too_long_is_refused(page: Page) -> None:
    status, _, body = page.request(
        "POST", f"{page.path}api/info", b" " * ((64 << 20) + 1), Origin=f"http://{page.host}"
    )
    assert status == 413 and b"64 MiB" in body
