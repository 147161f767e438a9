"""Who comes in: TLS both ways, tokens, their rotation while the server runs, and what the SDK says of each mistake."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import os
import re
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support import ROOT, Server, http2, open_client, poll, running
from support.authority import Authority

from layertap import TLS, Client, LayertapError, UnauthenticatedError, UnavailableError, wire
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc
from layertap_server.app.listening import listen_settings
from layertap_server.cli import parse
from layertap_server.flags import ConfigError
from layertap_server.observability.call_log import Record
from layertap_server.rpc.admission import client_of
from layertap_server.rpc.caller import Caller
from layertap_server.rpc.listener import Listener
from layertap_server.scheduler.call import Hooks

WAIT_S = 30.0
ALICE, BOB, CAROL = "alices-token-0123", "bobs-token-0123456", "carols-token-01234"


@dataclasses.dataclass(frozen=True, slots=True)
class House:
    """A running server and the files of its doors."""

    server: Server
    authority: Authority
    folder: Path
    ca: str
    metrics_url: str

    @property
    def tls(self) -> TLS:
        return TLS(ca=self.ca)

    def expiry(self) -> float:
        """Returns what the metrics say of the certificate."""
        with urllib.request.urlopen(self.metrics_url, timeout=WAIT_S) as answer:
            found = re.search(rb"^layertap_certificate_expiry_timestamp_seconds (\S+)$", answer.read(), re.MULTILINE)
        assert found
        return float(found[1])

    def write_tokens(self, text: str) -> None:
        new = self.folder / "tokens.new"
        new.write_text(text)
        new.chmod(0o600)
        new.replace(self.folder / "tokens")


def serve(folder: Path, model: Path, *flags: str) -> Iterator[House]:
    authority = Authority()
    cert, key = authority.sign("the server").write(folder, "server")
    tls = ("--tls-cert", cert, "--tls-key", key)
    with running("--device", "cpu", "--model-id", str(model), "--metrics-port", "0", *tls, *flags) as server:
        assert server.process.stdout
        url = server.process.stdout.readline().split()[-1].decode()
        yield House(server, authority, folder, authority.write(folder), url)


@pytest.fixture(scope="module")
def house(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Speaks TLS and asks for tokens."""
    folder = tmp_path_factory.mktemp("house")
    tokens = folder / "tokens"
    tokens.write_text(f"alice {ALICE}\nbob {BOB}\n")
    tokens.chmod(0o600)
    yield from serve(folder, tiny_folder, "--token-file", str(tokens), "--log-level", "debug")


@pytest.fixture(scope="module")
def mutual(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Speaks TLS with clients that have a certificate."""
    folder = tmp_path_factory.mktemp("mutual")
    own = Authority("signs clients")
    (folder / "clients").mkdir()
    for found in serve(folder, tiny_folder, "--tls-client-ca", own.write(folder, "client-ca")):
        yield dataclasses.replace(found, authority=own)


def ask(kind: str, address: str, **options: Any) -> tuple[int, ...]:
    """Goes once in by every kind of call."""
    client = open_client(kind, address, retries=0, timeout_s=WAIT_S, **options)
    try:
        client.model_info()
        list(client.embed_layers("I love Paris"))
        assert len(list(client.embed_stream(["one", "two"], pooling="mean"))) == 2
        return tuple(client.embed("I love Paris", pooling="mean").pooled.shape)
    finally:
        client.close()


def refusal(kind: str, address: str, **options: Any) -> LayertapError:
    """Returns with what a client is refused, whichever call it makes."""
    client = open_client(kind, address, retries=0, timeout_s=WAIT_S, **options)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: client.embed("I love Paris", pooling="mean"),
        client.model_info,
        lambda: list(client.embed_layers("I love Paris")),
        lambda: list(client.embed_stream(["I love Paris"], reconnect_timeout_s=0.1)),
    )
    found = []
    try:
        for call in calls:
            with pytest.raises(LayertapError) as caught:
                call()
            found.append(caught.value)
    finally:
        client.close()
    assert len({type(error) for error in found}) == 1, found
    return found[0]


def test_the_right_certificates_and_token_are_accepted(kind: str, house: House, mutual: House, tmp_path: Path) -> None:
    assert ask(kind, house.server.address, tls=house.tls, token=ALICE) == (1, 32)
    assert ask(kind, house.server.address, tls=TLS(ca=house.authority.pem), token=BOB) == (1, 32)
    named = house.server.address.replace("127.0.0.1", "localhost")
    assert ask(kind, named, tls=house.tls, token=BOB) == (1, 32)
    several = f"{house.server.address},{house.server.address}"
    assert ask(kind, several, tls=TLS(ca=house.ca, server_name="localhost"), token=BOB) == (1, 32)
    cert, key = mutual.authority.sign("alice").write(tmp_path, "alice")
    assert ask(kind, mutual.server.address, tls=TLS(ca=mutual.ca, cert=cert, key=key)) == (1, 32)


def test_credentials_come_from_the_environment(kind: str, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERTAP_TARGET", house.server.address)
    monkeypatch.setenv("LAYERTAP_TLS_CA", house.ca)
    monkeypatch.setenv("LAYERTAP_TOKEN", ALICE)
    assert ask(kind, "") == (1, 32)
    assert isinstance(refusal(kind, "", token=CAROL), UnauthenticatedError)


@pytest.mark.parametrize(
    ("options", "kind_of", "words"),
    [
        ({"tls": TLS(ca=Authority("another").pem), "token": ALICE}, UnavailableError, ["TLS(ca=", "LAYERTAP_TLS_CA"]),
        ({"tls": True, "token": ALICE}, UnavailableError, ["TLS(ca=", "LAYERTAP_TLS_CA"]),
        ({"tls": False}, UnavailableError, ["speaks TLS", "tls=True"]),
        ({}, UnauthenticatedError, ["none was sent", "token=", "LAYERTAP_TOKEN"]),
        ({"token": CAROL}, UnauthenticatedError, ["not valid here", "token="]),
        ({"token": ALICE[:-1]}, UnauthenticatedError, ["not valid here"]),
    ],
    ids=["wrong CA", "system's CAs", "plaintext", "no token", "wrong token", "half a token"],
)
def test_each_mistake_has_its_code_and_says_what_to_change(
    kind: str, house: House, options: dict[str, Any], kind_of: type[LayertapError], words: list[str]
) -> None:
    error = refusal(kind, house.server.address, **{"tls": house.tls, **options})
    assert type(error) is kind_of and error.retry_after_s is None
    assert all(word in error.details for word in words), error.details
    assert CAROL not in error.details and "Paris" not in error.details


def test_a_certificate_for_another_name_is_said_to_be_one(kind: str, house: House) -> None:
    error = refusal(kind, house.server.address, tls=TLS(ca=house.ca, server_name="other.example"), token=ALICE)
    assert isinstance(error, UnavailableError) and "another name" in error.details and "server_name" in error.details


def test_tls_to_a_plaintext_port_is_said_to_be_that(kind: str, tiny_server: Server, house: House) -> None:
    error = refusal(kind, tiny_server.address, tls=house.tls)
    assert isinstance(error, UnavailableError) and "speaks no TLS" in error.details


@pytest.mark.parametrize("papers", ["none", "expired", "another authority's"])
def test_clients_without_a_good_certificate_stay_out(kind: str, mutual: House, papers: str) -> None:
    tls = TLS(ca=mutual.ca)
    if papers != "none":
        signer = mutual.authority if papers == "expired" else Authority("another")
        paper = signer.sign("alice", days=(-3, -1) if papers == "expired" else (-3, 1))
        tls = TLS(ca=mutual.ca, cert=paper.cert, key=paper.key)
    error = refusal(kind, mutual.server.address, tls=tls)
    assert isinstance(error, UnavailableError)
    assert ("TLS(cert=" if papers == "none" else "tls.cert") in error.details, error.details


@contextlib.contextmanager
def channel_to(house: House) -> Iterator[grpc.Channel]:
    with grpc.secure_channel(house.server.address, grpc.ssl_channel_credentials(house.authority.pem)) as channel:
        yield channel


def test_health_is_open_and_all_else_asks_for_a_token(house: House) -> None:
    with channel_to(house) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        service = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        calls: list[Callable[..., Any]] = [
            lambda **given: list(reflection.ServerReflectionInfo(iter([question]), **given)),
            lambda **given: list(service.EmbedStream(iter([pb.EmbedStreamRequest()]), **given)),
            lambda **given: list(service.ShareMemory(pb.ShareMemoryRequest(), **given)),
            lambda **given: service.GetModelInfo(pb.GetModelInfoRequest(), **given),
            lambda **given: channel.unary_unary("/no.such.Service/Method", None, None)(b"", **given),
        ]
        for call in calls:
            for metadata in ((), (("authorization", f"Basic {ALICE}"),), (("authorization", "Bearer "),)):
                with pytest.raises(grpc.RpcError) as caught:
                    call(timeout=WAIT_S, metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
        metadata = (("authorization", f"bearer {ALICE}"),)
        assert service.GetModelInfo(pb.GetModelInfoRequest(), timeout=WAIT_S, metadata=metadata).layer_count == 3


def test_tokens_are_rotated_while_the_server_runs(house: House) -> None:
    given = {"tls": house.tls, "retries": 0}
    with (
        Client(house.server.address, token=BOB, **given) as bob,
        Client(house.server.address, token=CAROL, **given) as carol,
    ):
        assert bob.model_info().layer_count == 3
        with house.server.logging("the token file changed and is in force"):
            house.write_tokens(f"alice {ALICE}\ncarol {CAROL}\n")
        assert carol.model_info().layer_count == 3
        with pytest.raises(UnauthenticatedError):
            bob.model_info()
        with house.server.logging("the token file changed and cannot be used, the old stays in force: line 1"):
            house.write_tokens("half a li")
        assert carol.model_info().layer_count == 3
        with house.server.logging("the token file changed and is in force"):
            house.write_tokens(f"alice {ALICE}\nbob {BOB}\n")
        assert bob.model_info().layer_count == 3
    log = house.server.log.decode()
    assert not any(secret in log for secret in (ALICE, BOB, CAROL, "half"))


@pytest.mark.parametrize("tail", [b"", b"\xff", b"\xc3", b"\x80\xfe"])
@pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-request-id"])
def test_no_metadata_is_logged_also_when_grpc_cannot_decode_it(house: House, name: str, tail: bytes) -> None:
    value = b"Bearer " + ALICE.encode() + b"-secret" + tail
    for method in ("Embed", "NoSuchMethod"):
        answer = http2.call(
            house.server.address, f"/{wire.SERVICE_NAME}/{method}", {name: value}, ca=house.authority.pem
        )
        assert b"grpc-status" in answer
    with channel_to(house) as channel:  # Its line in the log follows those of the calls above.
        call = channel.unary_unary(f"/{wire.SERVICE_NAME}/Embed", None, None)
        marker = os.urandom(8).hex()
        with pytest.raises(grpc.RpcError):
            call(b"", metadata=(("authorization", f"Bearer {ALICE}"), ("x-request-id", marker)), timeout=WAIT_S)
    poll(lambda: marker.encode() in house.server.log)
    log = house.server.log
    assert b"DEBUG" in log and ALICE.encode() not in log and b"-secret" not in log
    assert log.count(b"Traceback") == 0 and log.count(b"grpc._cython.cygrpc reports a fault") <= 3


CHANGED = "the certificate changed and "
REFUSED = CHANGED + "cannot be used, the old stays in force: "


def test_a_certificate_is_rotated_in_every_process_while_the_server_runs(kind: str, house: House) -> None:
    address = house.server.address
    before = Client(address, tls=house.tls, token=ALICE)
    assert before.model_info().layer_count == 3
    other = Authority("the next one")

    # One that clients would refuse does not replace one that they accept.
    for days, words in (((-3, -1), "has expired on"), ((1, 3), "is not valid before")):
        with house.server.logging(f"{REFUSED}a certificate of --tls-cert {words}"):
            house.authority.sign("the server", days=days).write(house.folder, "server")
        assert ask(kind, address, tls=house.tls, token=ALICE) == (1, 32)

    paper = other.sign("the server", days=(-3, 0.5))
    with house.server.logging(f"{CHANGED}is in force"):
        paper.write(house.folder, "server")
    assert house.expiry() == x509.load_pem_x509_certificate(paper.cert).not_valid_after_utc.timestamp()
    assert ask(kind, address, tls=TLS(ca=other.pem), token=ALICE) == (1, 32)
    assert isinstance(refusal(kind, address, tls=house.tls, token=ALICE), UnavailableError)
    assert before.model_info().layer_count == 3  # What is connected stays so.

    with house.server.logging(f"{CHANGED}is in force"):
        house.authority.sign("the server").write(house.folder, "server")
    assert ask(kind, address, tls=house.tls, token=ALICE) == (1, 32)
    before.close()


def test_half_a_rotation_leaves_the_last_good_pair_in_force(kind: str, house: House) -> None:
    with house.server.logging(f"{REFUSED}--tls-cert and --tls-key are no certificate"):
        (house.folder / "server.pem").write_bytes(house.authority.sign("the server").cert)  # The key is of another.
    assert ask(kind, house.server.address, tls=house.tls, token=ALICE) == (1, 32)
    with house.server.logging(f"{CHANGED}is in force"):
        house.authority.sign("the server").write(house.folder, "server")
    assert ask(kind, house.server.address, tls=house.tls, token=ALICE) == (1, 32)


def test_a_server_whose_certificate_has_expired_is_said_to_have_one(kind: str) -> None:
    authority = Authority()
    paper = authority.sign("the server", days=(-3, -1))
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(paper.key, paper.cert)]))
    server.start()
    error = refusal(kind, f"127.0.0.1:{port}", tls=TLS(ca=authority.pem))
    server.stop(None).wait(WAIT_S)
    assert isinstance(error, UnavailableError) and "expired" in error.details and "renew" in error.details


@pytest.mark.parametrize(
    ("name", "hosts", "client"),
    [
        ("alice", ("a.example",), "alice"),
        ("", ("a.example", "b.example"), "a.example"),
        (" ", ("10.9.8.7",), "10.9.8.7"),
    ],
)
def test_the_log_names_a_client_by_its_certificate(
    mutual: House, name: str, hosts: tuple[str, ...], client: str
) -> None:
    paper = mutual.authority.sign(name, hosts=hosts)
    assert ask("sync", mutual.server.address, tls=TLS(ca=mutual.ca, cert=paper.cert, key=paper.key)) == (1, 32)
    poll(lambda: f"method=Embed code=OK client={client} ".encode() in mutual.server.log)


async def listens(*flags: str) -> None:
    listener = Listener(listen_settings(parse(["--port", "0", *flags], {})))
    server = listener.make_server(Hooks())
    listener.bind(server)
    await server.stop(None)


def test_unusable_files_end_the_start_before_the_server_listens(tmp_path: Path) -> None:
    authority = Authority()
    cert, key = authority.sign("one").write(tmp_path, "one")
    _, other_key = authority.sign("other").write(tmp_path, "other")
    expired_cert, expired_key = authority.sign("one", days=(-3, -1)).write(tmp_path, "expired")
    early_cert, early_key = authority.sign("one", days=(1, 3)).write(tmp_path, "early")
    old_ca = Authority("old", days=(-3, -1)).write(tmp_path, "old-ca")
    both_cas = tmp_path / "both-cas.pem"
    both_cas.write_bytes(Path(old_ca).read_bytes() + authority.pem)
    empty, pipe = tmp_path / "empty", tmp_path / "pipe"
    empty.touch()
    os.mkfifo(pipe)
    asyncio.run(listens("--tls-cert", cert, "--tls-key", key))
    asyncio.run(listens("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", str(both_cas)))
    for flags, words in (
        (["--tls-cert", cert, "--tls-key", other_key], "KEY_VALUES_MISMATCH"),
        (["--tls-cert", cert, "--tls-key", str(tmp_path / "none")], "No such file"),
        (["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", str(empty)], "--tls-client-ca"),
        (["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", old_ca], "--tls-client-ca has expired on"),
        (["--tls-cert", expired_cert, "--tls-key", expired_key], "--tls-cert has expired on"),
        (["--tls-cert", early_cert, "--tls-key", early_key], "--tls-cert is not valid before"),
        (["--tls-cert", str(pipe), "--tls-key", key], "not a regular file"),
        (["--token-file", str(pipe)], "not a regular file"),
        (["--token-file", str(tmp_path)], "not a regular file"),
        (["--token-file", str(empty)], "no token"),
        (["--token-file", str(tmp_path / "none")], "No such file"),
    ):
        with pytest.raises(ConfigError) as caught:
            asyncio.run(listens(*flags))
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("peer", "certificate", "client"),
    [
        ("ipv4:10.0.0.7:50321", {}, "10.0.0.7"),
        ("ipv6:%5B::1%5D:50321", {}, "[::1]"),
        ("unix:", {}, "unix"),
        ("ipv4:10.0.0.7:50321", {"x509_common_name": [b"alice"]}, "alice"),
        ("ipv4:10.0.0.7:50321", {"x509_common_name": [b""], "x509_subject_alternative_name": [b"", b"a.b"]}, "a.b"),
        ("ipv4:10.0.0.7:50321", {"x509_common_name": [b" "], "x509_subject_alternative_name": [b""]}, "10.0.0.7"),
    ],
)
def test_a_client_goes_by_its_certificate_else_its_address(
    peer: str, certificate: dict[str, list[bytes]], client: str
) -> None:
    context: Any = SimpleNamespace(auth_context=lambda: certificate)
    assert client_of(context, peer, by_certificate=True) == client
    calls: Any = {"record": Record(method="Embed", request_id="", client=client), "task": None, "shared": None}
    one, other = Caller(context, peer, **calls), Caller(context, peer, **calls)
    assert (one.connection == other.connection) is not peer.startswith("unix")


def test_a_connection_that_gets_too_old_is_replaced_without_an_error(tiny_folder: Path) -> None:
    flags = ("--device", "cpu", "--model-id", str(tiny_folder), "--max-connection-age-s", "1", "--grace-s", "1")
    with running(*flags) as server:
        client = Client(server.address)
        ends_at = time.monotonic() + 5

        def items() -> Iterator[str]:
            number = 0
            while time.monotonic() < ends_at:
                number += 1
                yield f"text {number}"

        found = client.embed_stream(items(), pooling="mean")
        count = 0
        for result in found:
            assert result.error is None and result.index == count
            count += 1
            if count % 50 == 0:
                assert client.embed("I love Paris", pooling="mean").pooled.shape == (1, 32)
        assert count > 1 and client.model_info().limits.max_connection_age_ns == 1_000_000_000
        client.close()


def test_the_recipe_of_the_documents_makes_certificates(tiny_folder: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/operate/tls-and-tokens.md").read_text()
    (recipe,) = re.findall(r"^```sh\n((?:openssl .*\n){3})```$", page, re.MULTILINE)
    subprocess.run(["sh", "-ec", recipe], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "server.pem", "server.key"))
    flags = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", ca, "--host", "0.0.0.0")
    alice = TLS(ca=ca, cert=str(tmp_path / "alice.pem"), key=str(tmp_path / "alice.key"))
    with running("--device", "cpu", "--model-id", str(tiny_folder), *flags) as server:
        port = server.address.rpartition(":")[2]
        assert ask("sync", f"localhost:{port}", tls=alice) == (1, 32)
        # As Python's own clients check, from 3.13 on.
        strict = ssl.create_default_context(cafile=ca)
        strict.verify_flags |= ssl.VERIFY_X509_STRICT
        strict.load_cert_chain(alice.cert, alice.key)
        with socket.create_connection(("127.0.0.1", int(port)), WAIT_S) as plain:
            strict.wrap_socket(plain, server_hostname="localhost").close()
    for name in ("server.pem", "alice.pem"):
        constraints = x509.load_pem_x509_certificate((tmp_path / name).read_bytes()).extensions
        assert not constraints.get_extension_for_class(x509.BasicConstraints).value.ca, f"{name} could sign others"
