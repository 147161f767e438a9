"""What a client is before its first call: targets, proxies, tokens, metadata, deadlines, copies."""

from __future__ import annotations

import _thread
import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest

from layertap import TLS, AsyncClient, Client, FailedPreconditionError, InvalidArgumentError
from layertap._protocol.responses import ModelPin
from layertap._transport import targets
from layertap._transport.settings import resolve

KINDS = pytest.mark.parametrize("kind", [Client, AsyncClient])


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TARGET", "TOKEN", "TLS_CA", "TLS_CERT", "TLS_KEY", "TIMEOUT_S"):
        monkeypatch.delenv(f"LAYERTAP_{name}", raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_arguments_beat_the_environment_and_that_beats_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve(None)
    assert (found.target, found.tls, found.token, found.timeout_s) == ("127.0.0.1:50051", None, None, 60.0)
    for name, value in (("TARGET", "there:7"), ("TOKEN", "t0"), ("TLS_CA", "ca.pem"), ("TIMEOUT_S", "7.5")):
        monkeypatch.setenv(f"LAYERTAP_{name}", value)
    found = resolve(None)
    assert (found.target, found.tls, found.token, found.timeout_s) == ("there:7", TLS(ca="ca.pem"), "t0", 7.5)
    found = resolve("localhost:1", tls=False, token="", timeout_s=1)
    assert (found.target, found.tls, found.token, found.timeout_s) == ("localhost:1", None, None, 1)
    monkeypatch.setenv("LAYERTAP_TLS_CERT", "cert.pem")
    with pytest.raises(InvalidArgumentError, match="cert without its key"):
        resolve(None)


@pytest.mark.parametrize(
    ("target", "uri", "balanced"),
    [
        ("example.org:50051", "example.org:50051", False),
        ("unix:/run/layertap", "unix:/run/layertap", False),
        ("dns:///example.org:50051", "dns:///example.org:50051", True),
        ("10.0.0.1:1, 10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2", True),
        ("localhost:1,127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("[::1]:1,[::1]:2", "ipv6:[::1]:1,[::1]:2", True),
    ],
)
def test_targets_in_grpcs_words(target: str, uri: str, balanced: bool) -> None:
    found = resolve(target)
    assert found.uri == uri
    assert ("loadBalancingConfig" in json.loads(found.service_config)) is balanced


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "one.example:1,two.example:2"}, ["IP addresses", "dns:///"]),
        ({"target": "10.0.0.1,10.0.0.2"}, ["with ports"]),
        ({"target": "10.0.0.1:1,[::1]:1"}, ["of one kind"]),
        ({"target": None, "retries": 5}, ["retries", "4"]),
        ({"target": None, "retries": -1}, ["retries", "0"]),
        ({"target": None, "timeout_s": 0}, ["timeout_s"]),
        ({"target": None, "token": "two words"}, ["token"]),
        ({"target": None, "token": "end\n"}, ["token"]),
        ({"target": "10.0.0.1:1", "token": "t0"}, ["unencrypted", "tls=TLS(ca=", "LAYERTAP_TLS_CA", "tls=False"]),
        ({"target": "10.0.0.1:1,127.0.0.1:1", "token": "t0"}, ["unencrypted"]),
        ({"target": "dns:///example.org:1", "token": "t0"}, ["unencrypted"]),
        ({"target": "127.0.0.1.example.org:1", "token": "t0"}, ["unencrypted"]),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(arguments: dict[str, Any], words: list[str]) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(InvalidArgumentError) as caught:
            make(**arguments)
        assert all(word in caught.value.details for word in words), caught.value.details
        assert "t0" not in caught.value.details and "two words" not in caught.value.details


@pytest.mark.parametrize(
    "arguments",
    [
        {"target": "127.0.0.1:1"},
        {"target": "localhost:1"},
        {"target": "[::1]:1"},
        {"target": "unix:/s"},
        {"target": "dns:///localhost:1"},
        {"target": "127.0.0.1:1,127.0.0.1:2"},
        {"target": "10.0.0.1:1", "tls": True},
        {"target": "10.0.0.1:1", "tls": False},
    ],
)
def test_a_token_goes_over_tls_to_loopback_or_where_tls_is_refused_by_name(arguments: dict[str, Any]) -> None:
    found = resolve(token="t0", **arguments)
    assert found.metadata == (("authorization", "Bearer t0"),) and "t0" not in repr(found)


@pytest.mark.parametrize(
    ("target", "uri"),
    [
        ("127.0.0.1", "127.0.0.1:50051"),
        ("example.org", "example.org:50051"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("[::1]:7", "[::1]:7"),
        ("dns:///example.org", "dns:///example.org:50051"),
        ("dns:example.org", "dns:example.org:50051"),
        ("unix:/run/x", "unix:/run/x"),
    ],
)
def test_a_target_without_a_port_has_the_default_one(target: str, uri: str) -> None:
    assert resolve(target).uri == uri


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("http://example.org:7", ["URL", "'example.org:7'"]),
        ("https://example.org:7/x", ["'example.org:7'", "tls=True"]),
        ("http://[::1]", ["'[::1]:50051'"]),
    ],
)
def test_a_url_is_refused_with_the_right_form(target: str, words: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Client(target)
    assert all(word in caught.value.details for word in words)


@KINDS
def test_an_argument_of_a_wrong_type_is_refused_by_name(kind: type[Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="target is of type int; pass a str"):
        kind(50051)
    with pytest.raises(InvalidArgumentError, match=r"tls is of type str; pass True, False or TLS\(ca=…\)"):
        kind("example.org", tls="ca.pem")


@KINDS
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"retries": "3"}, "retries is '3'; pass a whole number from 0 to 4"),
        ({"retries": 2.5}, "retries is 2.5"),
        ({"connections": 2.5}, "connections is 2.5; pass a whole number from 1 to 256"),
        ({"connections": "2"}, "connections is '2'"),
        ({"options": {"grpc.x": 1}}, "options is no list"),
        ({"options": 5}, "options is no list"),
        ({"token": b"x"}, "token is of type bytes; pass a str"),
        ({"fingerprint": 5}, "fingerprint is of type int; pass a str"),
        ({"fingerprint": ""}, "fingerprint is no fingerprint"),
    ],
)
def test_settings_of_a_wrong_type_are_refused_by_name(kind: type[Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        kind("127.0.0.1:1", **arguments)


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1", True),
        ("localhost:1", True),
        ("::1", True),
        ("dns:///localhost:1", True),
        ("dns:localhost", True),
        ("unix:/s", True),
        ("dns://8.8.8.8/localhost", False),
        ("dns://8.8.8.8/localhost:1", False),
        ("xds:///localhost:1", False),
        ("google-c2p:///localhost:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
    ],
)
def test_what_is_this_host(target: str, local: bool) -> None:
    assert targets.is_local(target) is local
    if not local:
        with pytest.raises(InvalidArgumentError, match="unencrypted"):
            Client(target, token="secret")


def test_the_proxy_is_the_one_that_grpc_takes() -> None:
    environment = {"http_proxy": "p:1", "no_proxy": "example.org, 10.0.0.0/8"}
    assert targets.proxy_variable("other.net:1", environment) == "http_proxy"
    assert targets.proxy_variable("other.net:1", environment | {"grpc_proxy": "p:2"}) == "grpc_proxy"
    for target in ("a.example.org:1", "10.1.2.3:1", "127.0.0.1:1", "unix:/s", "localhost"):
        assert targets.proxy_variable(target, environment) is None


def test_no_token_goes_unencrypted_to_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:3128")
    with pytest.raises(InvalidArgumentError, match="http_proxy"):
        Client("10.0.0.1:1", token="secret", tls=False)
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    Client("10.0.0.1:1", token="secret", tls=False)


@KINDS
def test_clients_are_pickled_copied_and_compared_as_their_settings(kind: type[Any]) -> None:
    settings = {"tls": TLS(ca=b"-----BEGIN x"), "token": "secret", "retries": 1, "fingerprint": "f", "timeout_s": 7.0}
    client = kind("example.org:1", **settings, options=[("grpc.x", 1)])
    for other in (pickle.loads(pickle.dumps(client)), copy.copy(client), copy.deepcopy(client)):
        assert type(other) is kind and other == client and hash(other) == hash(client) and other is not client
        assert pickle.dumps(other) == pickle.dumps(client)
    assert client != kind("example.org:2", **settings) and client != "example.org:1"
    assert "secret" not in repr(client) + str(vars(client))


@KINDS
def test_a_client_that_was_used_is_pickled_as_its_settings(kind: type[Any]) -> None:
    client = kind("127.0.0.1:1", fingerprint="f")
    before = pickle.dumps(client)
    assert client.shared_memory.byte_count == 0 and client._transport.pin is not None
    assert pickle.dumps(client) == before and not pickle.loads(before).shared_memory.wanted


@pytest.mark.parametrize(
    "metadata",
    [
        [("Upper", "x")],
        [("grpc-timeout", "x")],
        {"x": 1},
        {"x": "line\nend"},
        {"x-bin": "no bytes"},
        {"x": b"bytes"},
        "text",
        7,
    ],
)
def test_metadata_that_grpc_cannot_carry_is_refused_at_the_call(metadata: Any) -> None:
    for method in ("embed", "tokenize", "embed_layers", "embed_stream", "encode"):
        with pytest.raises(InvalidArgumentError, match="metadata"):
            getattr(Client("127.0.0.1:1"), method)(["x"], metadata=metadata)


def test_metadata_is_carried_beside_the_token_and_does_not_replace_it() -> None:
    connection = resolve("localhost:1", token="secret")
    call = connection.call(None, {"x-request-id": "a", "b-bin": b"\xff"})
    assert call.metadata == (("authorization", "Bearer secret"), ("x-request-id", "a"), ("b-bin", b"\xff"))
    assert "secret" not in repr(call)
    with pytest.raises(InvalidArgumentError, match="authorization"):
        connection.call(None, {"authorization": "Basic x"})
    with pytest.raises(InvalidArgumentError, match="unencrypted"):
        resolve("10.0.0.1:1").call(None, {"authorization": "Basic x"})


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), pytest.param(10**5000, id="huge"), "7", True])
def test_a_deadline_is_a_number_of_seconds(timeout_s: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout_s"):
        Client("127.0.0.1:1").embed("x", timeout_s=timeout_s)


def test_a_deadline_beyond_all_clocks_is_one_that_a_clock_holds() -> None:
    assert resolve(None).call(1e18).timeout_s < 1e9


def test_a_client_keeps_the_first_model() -> None:
    pin = ModelPin()
    pin.check("one", "a" * 64)
    pin.check("one", "a" * 64)
    with pytest.raises(FailedPreconditionError, match=r"'two'.*bbbb.*'one'.*aaaa"):
        pin.check("two", "b" * 64)
    with pytest.raises(FailedPreconditionError, match="cccc"):
        ModelPin("c" * 64).check("one", "a" * 64)


def test_streams_refuse_patched_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_thread, "start_new_thread", lambda *_: None)
    with pytest.raises(FailedPreconditionError, match="thread=False"):
        Client("127.0.0.1:1").embed_stream(["x"])


def test_importing_layertap_sets_no_variable_and_loads_no_grpc() -> None:
    code = """
import os, sys
import numpy, google.protobuf.message
before = dict(os.environ)
import layertap, layertap._transport.settings
layertap.Client("nowhere.invalid:1"), layertap.AsyncClient("nowhere.invalid:1")
print(before == dict(os.environ), "grpc" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "False"], done.stderr
