"""OpenAI's API over plain HTTP: the vectors of `encode`, every refusal, and bounds on callers that are slow or many."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import http.client
import json
import re
import signal
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Server, faulty, poll, running
from support.authority import Authority
from support.openai_api import WAIT_S, Reply, address_of, ask, connect, reply_of

from layertap import Client

TEXTS = ["I love Paris", "", "BERT reads both ways " * 20, "größer, 大きい 😀"]
ALICE, BOB = "alices-token-0123", "bobs-token-0123456"
MAX_BYTES = 1 << 20


def write_sentence_config(folder: Path) -> None:
    """Two poolings, a default prompt, a length of 12 and Normalize: all that a folder can say."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    described = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(described))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": ["cls", "mean"]}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openai") / "org--tiny"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_sentence_config(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = ("--model-id", str(folder), "--model-name", "org/tiny", "--max-request-bytes", str(MAX_BYTES))
    with running("--device", "cpu", "--http-port", "0", "--metrics-port", "0", *flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def embed(server: Server, texts: object, **fields: object) -> Reply:
    return ask(server, {"model": "org/tiny", "input": texts, **fields})


def vectors_of(reply: Reply) -> np.ndarray:
    assert reply.status == 200, reply
    rows = [item["embedding"] for item in reply.body["data"]]
    if isinstance(rows[0], str):
        return np.array([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])
    return np.array(rows)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors_are_those_of_encode_to_the_last_bit(server: Server, client: Client, encoding: str) -> None:
    reply = embed(server, TEXTS, encoding_format=encoding)
    assert np.array_equal(vectors_of(reply), client.encode(TEXTS))
    assert vectors_of(reply).shape == (4, 64)
    assert [item["index"] for item in reply.body["data"]] == [0, 1, 2, 3]
    assert (reply.body["object"], reply.body["model"]) == ("list", "org/tiny")
    assert np.array_equal(vectors_of(embed(server, TEXTS[0], encoding_format=encoding))[0], client.encode(TEXTS[0]))
    found = vectors_of(embed(server, TEXTS, encoding_format=encoding, dimensions=20))
    assert np.array_equal(found, client.encode(TEXTS, truncate_dim=20, normalize_embeddings=True))


def test_many_texts_come_in_their_order_with_the_tokens_they_took(server: Server, client: Client) -> None:
    texts = [f"text {n} " * (n % 9) for n in range(1000)]
    for encoding in ("float", "base64"):
        reply = embed(server, texts, encoding_format=encoding)
        assert np.array_equal(vectors_of(reply), client.encode(texts))
        assert [item["index"] for item in reply.body["data"]] == list(range(1000))
    prompted = client.tokenize([f"query: {text}" for text in texts], truncation="right", max_length=12)
    count = int(prompted.token_counts.sum())
    assert reply.body["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_the_model_is_listed_and_checked(server: Server) -> None:
    (one,) = ask(server, method="GET", path="/v1/models").body["data"]
    assert one["id"] == "org/tiny" and one["object"] == "model"
    for name in ("org/tiny", "org%2Ftiny"):
        assert ask(server, method="GET", path=f"/v1/models/{name}").body == one
    for reply in (
        ask(server, method="GET", path="/v1/models/other"),
        ask(server, {"model": "other", "input": "x"}),
    ):
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        assert "org/tiny" in reply.error["message"]


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"input": []}, 400, "empty list"),
        ({"input": [[1, 2]]}, 400, "check_embedding_ctx_length"),
        ({"input": ["x"], "dimensions": 65}, 400, "above 64"),
        ({"input": ["x"], "dimensions": 10**30}, 400, "above 64"),
        ({"input": ["x"] * 1001}, 400, "more than 1000 texts"),
        ({"input": ["x", "s3cret " * 20_000]}, 400, r"input\[1\] has 140007 characters, the most is 100000"),
        ({"input": "s3cret" * 200_000}, 413, f"more than {MAX_BYTES} bytes"),
        (b"\xff\xfe", 400, "UTF-8"),
        (b"[" * 100_000, 400, "an object"),
    ],
)
def test_bad_requests_are_refused_with_the_right_status(server: Server, request_: Any, status: int, words: str) -> None:
    request = request_ if isinstance(request_, bytes) else {"model": "org/tiny", **request_}
    reply = ask(server, request)
    assert reply.status == status and re.search(words, reply.error["message"]), reply
    assert reply.error["type"] == "invalid_request_error" and reply.headers["x-request-id"]
    assert "s3cret" not in json.dumps(reply.body) and b"s3cret" not in server.log
    assert embed(server, "x").status == 200


def test_a_body_without_a_length_is_bounded_as_it_comes(server: Server) -> None:
    with contextlib.closing(connect(server)) as connection:
        body = (b" " * 65536 for _ in range(20))
        connection.request("POST", "/v1/embeddings", body, encode_chunked=True)
        assert reply_of(connection).status == 413
    with contextlib.closing(connect(server)) as connection:
        connection.putrequest("POST", "/v1/embeddings")
        connection.putheader("content-length", str(10 << 30))
        connection.endheaders()
        assert reply_of(connection).status == 413, "before any of it is sent"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/nothing"])
def test_a_caller_that_sends_all_before_it_reads_gets_the_answer(server: Server, path: str) -> None:
    with contextlib.closing(connect(server)) as connection:
        connection.request("POST", path, b" " * (20 << 20), {"connection": "close"})
        assert reply_of(connection).status == (413 if path == "/v1/embeddings" else 404)


def test_other_paths_methods_and_encodings_are_refused(server: Server) -> None:
    assert ask(server, method="GET").status == 405
    assert ask(server, {}, path="/v1/models").status == 405
    reply = ask(server, {}, path="/v1/chat/completions")
    assert reply.status == 404 and "POST /v1/embeddings" in reply.error["message"]
    reply = ask(server, {"model": "org/tiny", "input": "x"}, headers={"content-encoding": "gzip"})
    assert reply.status == 400 and "compressed" in reply.error["message"]


def test_one_connection_carries_many_requests(server: Server) -> None:
    with contextlib.closing(connect(server)) as connection:
        for text in ("one", "two", 3, "four"):
            connection.request("POST", "/v1/embeddings", json.dumps({"model": "org/tiny", "input": text}))
            assert reply_of(connection).status == (400 if text == 3 else 200)
            assert connection.sock is not None, "the connection is kept"


def test_requests_sent_at_once_are_answered_one_after_the_other(server: Server) -> None:
    host, port = address_of(server)
    bodies = [json.dumps({"model": "org/tiny", "input": f"{n}", "dimensions": n}).encode() for n in (1, 2, 3)]
    sent = b"".join(
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(b), b) for b in bodies
    )
    with socket.create_connection((host, port), WAIT_S) as caller, caller.makefile("rb") as answers:
        caller.sendall(sent)
        for n in (1, 2, 3):
            while not (line := answers.readline()).startswith(b"content-length"):
                assert line
            answers.readline()
            assert len(json.loads(answers.read(int(line.split()[1])))["data"][0]["embedding"]) == n


def test_a_body_waits_for_the_servers_word_if_the_caller_asks_for_that(server: Server) -> None:
    body = json.dumps({"model": "org/tiny", "input": "x"}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(address_of(server), WAIT_S) as caller, caller.makefile("rb") as answers:
        caller.sendall(head % len(body))
        assert answers.readline().startswith(b"HTTP/1.1 100")
        answers.readline()
        caller.sendall(body)
        assert answers.readline().startswith(b"HTTP/1.1 200")
    with socket.create_connection(address_of(server), WAIT_S) as caller, caller.makefile("rb") as answers:
        caller.sendall(head % (10 << 30))
        answer = answers.read()  # To the end: what comes next cannot be told from the body.
        assert answer.startswith(b"HTTP/1.1 413")


def test_each_call_is_one_line_of_the_log_under_its_request_id(server: Server) -> None:
    reply = ask(server, {"model": "org/tiny", "input": ["s3cret", "b"]}, headers={"x-request-id": "mine-7"})
    assert reply.headers["x-request-id"] == "mine-7"
    poll(lambda: b"request_id=mine-7" in server.log)
    (line,) = [line for line in server.log.decode().splitlines() if "request_id=mine-7" in line]
    assert 'method="POST /v1/embeddings" code=OK client=127.0.0.1' in line and "text_count=2" in line
    assert f"token_count={reply.body['usage']['prompt_tokens']} " in line and "s3cret" not in line


def test_metrics_count_the_calls_by_method_and_status(server: Server) -> None:
    stdout = server.process.stdout
    assert stdout
    host, port = address_of(server)
    assert stdout.readline().decode() == f"clients of OpenAI's API find it at http://{host}:{port}/v1\n"
    url = stdout.readline().decode().split()[-1]

    def counts() -> dict[str, float]:
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            found = re.findall(
                r'^layertap_request_handled_total{code="(\w+)",method="POST /v1/embeddings"} (\S+)$',
                answer.read().decode(),
                re.MULTILINE,
            )
        return {code: float(count) for code, count in found}

    assert embed(server, "x").status == 200 and embed(server, []).status == 400
    before = counts()
    for texts in ("x", "y", []):
        embed(server, texts)
    poll(lambda: counts()["OK"] == before["OK"] + 2)
    assert counts()["INVALID_ARGUMENT"] == before["INVALID_ARGUMENT"] + 1


def test_garbage_is_answered_and_leaves_no_trace(server: Server) -> None:
    before = server.log
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"x" * 100_000,
        b"PRI * HTTP/2.0\r\n\r\n",
    ):
        with socket.create_connection(address_of(server), WAIT_S) as caller, contextlib.suppress(ConnectionError):
            caller.sendall(garbage)
            caller.shutdown(socket.SHUT_WR)
            assert caller.recv(1 << 16)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 404", b"")
    assert embed(server, "x").status == 200
    assert b"WARNING" not in server.log[len(before) :] and b"ERROR" not in server.log[len(before) :]


# --- callers that are slow, many or gone -------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Iterator[Server]:
    """Has two places for calls and six for connections; takes half a second for a batch, and a second for each wait."""
    flags = ("--device", "cpu", "--instances", "1", "--model-id", str(folder), "--model-name", "org/tiny")
    bounds = ("--max-concurrent-call-count", "2", "--max-connection-count", "6", "--stall-timeout-s", "1")
    bounds += ("--max-batch-tokens", "65536")
    script = Path(faulty.__file__)
    with running(*flags, *bounds, "--http-port", "0", "--batch-s", "0.5", script=script) as server:
        yield server


@pytest.mark.one_process  # Each of several has its share of the limit: one call.
def test_a_full_server_refuses_at_once_and_says_when_to_come_again(narrow: Server) -> None:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda n: embed(narrow, f"text {n}"), range(6)))
    assert {reply.status for reply in replies} == {200, 429}
    for reply in replies:
        if reply.status == 429:
            assert reply.error["type"] == "rate_limit_error" and "2 calls under way" in reply.error["message"]
            assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("1", "500")
    assert embed(narrow, "x").status == 200


def test_what_texts_become_counts_in_the_memory_of_requests(folder: Path) -> None:
    texts = ["paris " * 10] * 1000  # 64 KB as they come.
    bounds = ("--max-request-bytes", "128KiB", "--max-queue-bytes", "2MiB")
    with running("--model-id", str(folder), "--model-name", "org/tiny", "--http-port", "0", *bounds) as server:
        reply = embed(server, texts)
        assert reply.status == 429 and "the requests under way take" in reply.error["message"], reply
        assert embed(server, "x").status == 200


def test_a_request_that_does_not_come_whole_ends(narrow: Server) -> None:
    with socket.create_connection(address_of(narrow), WAIT_S) as caller, caller.makefile("rb") as answers:
        caller.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        answer = answers.read()
        assert answer.startswith(b"HTTP/1.1 408") and b"did not come whole within 1 s" in answer
    with socket.create_connection(address_of(narrow), WAIT_S) as caller:
        caller.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost:")  # Headers without an end.
        assert caller.recv(1) == b""
    with socket.create_connection(address_of(narrow), WAIT_S) as caller:
        assert caller.recv(1) == b"", "a connection without any request"


def test_silent_connections_make_place_for_others(narrow: Server) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address_of(narrow), WAIT_S)) for _ in range(20)]
        assert embed(narrow, "x").status == 200
        assert silent[0].recv(1) == b""


@pytest.mark.one_process  # Each of several has its share of the limit: one call.
def test_an_answer_that_is_not_read_is_dropped(narrow: Server) -> None:
    body = json.dumps({"model": "org/tiny", "input": ["x"] * 1000}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nx-request-id: unread\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.settimeout(WAIT_S)
        caller.connect(address_of(narrow))
        caller.sendall((head + body) * 10)  # Several, since the system itself buffers megabytes.
        poll(lambda: re.search(rb"request_id=unread .*code=DEADLINE_EXCEEDED", narrow.log) is not None)
    assert embed(narrow, "x").status == 200


def test_a_caller_that_leaves_costs_nothing_more(narrow: Server) -> None:
    with contextlib.closing(connect(narrow)) as connection:
        body = json.dumps({"model": "org/tiny", "input": "x"})
        connection.request("POST", "/v1/embeddings", body, {"x-request-id": "gone"})
    poll(lambda: b"request_id=gone" in narrow.log)
    assert re.search(rb"request_id=gone .* code=CANCELLED", narrow.log)
    assert embed(narrow, "x").status == 200


def test_sigterm_answers_what_is_under_way_and_takes_no_more(narrow: Server) -> None:
    """The last test of this server."""
    with contextlib.closing(connect(narrow)) as busy, contextlib.closing(connect(narrow)) as idle:
        idle.request("GET", "/v1/models")
        assert reply_of(idle).status == 200
        batch_count = len(re.findall(rb"encoding \d+ texts", narrow.log))
        busy.request("POST", "/v1/embeddings", json.dumps({"model": "org/tiny", "input": ["x"] * 77}))
        poll(lambda: len(re.findall(rb"encoding \d+ texts", narrow.log)) > batch_count)
        narrow.signal(signal.SIGTERM)
        assert len(vectors_of(reply_of(busy))) == 77
        with pytest.raises(OSError):
            embed(narrow, "too late")
        with pytest.raises((OSError, http.client.HTTPException)):
            idle.request("GET", "/v1/models")
            reply_of(idle)


# --- TLS and tokens ------------------------------------------------------------------------------


def test_tls_and_tokens_are_those_of_grpc_and_read_again_when_they_change(folder: Path, tmp_path: Path) -> None:
    authority, other = Authority(), Authority("the next one")
    cert, key = authority.sign("the server").write(tmp_path, "server")
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {ALICE}\n")
    tokens.chmod(0o600)
    flags = ("--device", "cpu", "--model-id", str(folder), "--model-name", "org/tiny", "--http-port", "0")
    flags += ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", authority.write(tmp_path))
    own = authority.sign("carol").write(tmp_path, "carol")
    tls = ssl.create_default_context(cadata=authority.pem.decode())
    with running(*flags, "--token-file", str(tokens)) as server:

        def models(token: str | None, tls: ssl.SSLContext = tls) -> Reply:
            headers = {} if token is None else {"authorization": token}
            return ask(server, method="GET", path="/v1/models", headers=headers, tls=tls)

        with pytest.raises(OSError):  # Without a certificate of its own.
            models(f"Bearer {ALICE}")
        tls.load_cert_chain(*own)
        assert models(f"Bearer {ALICE}").status == 200
        for token in (None, "Bearer ", f"Basic {ALICE}", f"Bearer {BOB}"):
            reply = models(token)
            assert (reply.status, reply.error["type"]) == (401, "authentication_error")
        assert ask(server, b"x" * 100_000, tls=tls).status == 401
        with server.logging("the token file changed and is in force"):
            tokens.write_text(f"bob {BOB}\n")
        assert models(f"Bearer {ALICE}").status == 401
        assert models(f"Bearer {BOB}").status == 200
        with server.logging("the certificate changed and is in force"):
            other.sign("the server").write(tmp_path, "server")
        with pytest.raises(ssl.SSLCertVerificationError):
            models(f"Bearer {BOB}")
        next_tls = ssl.create_default_context(cadata=other.pem.decode())
        next_tls.load_cert_chain(*own)
        assert models(f"Bearer {BOB}", next_tls).status == 200
        with server.logging("the certificate changed and cannot be used"):
            (tmp_path / "server.pem").write_text("half a certifi")
        assert models(f"Bearer {BOB}", next_tls).status == 200
        with socket.create_connection(address_of(server), WAIT_S) as plain, contextlib.suppress(ConnectionError):
            plain.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            assert not plain.recv(1 << 16).startswith(b"HTTP")
        poll(lambda: b"client=bob" in server.log)
        assert b"client=alice" in server.log
        assert not any(secret.encode() in server.log for secret in (ALICE, BOB))
