"""Metrics against truth: what Prometheus reads is what the callers counted. And alerts that ask for what is there."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT, Server, poll, running

from layertap import wire
from layertap._protocol.inputs import to_messages
from layertap._protocol.options import embed_options
from layertap._protocol.requests import SERVICE
from layertap.v1 import embedding_pb2 as pb
from layertap_server.observability.call_log import CallLog
from layertap_server.observability.metrics import Endpoint, Metrics
from layertap_server.observability.metrics_sum import MetricsSum

WAIT_S = 30.0
RULES = ROOT / "deploy" / "prometheus.rules.yml"

LONG = "paris " * 510
"""512 tokens, 64 KiB a layer of the tiny model."""

FLAGS = (
    *("--metrics-port", "0", "--instances", "1", "--stall-timeout-s", "1", "--max-concurrent-call-count", "4"),
    *("--max-output-bytes", "300000", "--max-call-output-bytes", "300000"),
    *("--max-text-count", "100", "--max-queue-text-count", "100", "--shared-memory-bytes", "65536"),
)


def options(**changes: Any) -> pb.EmbedOptions:
    chosen: dict[str, Any] = {"layers": None, "pooler_output": False, "pooling": None, "dtype": "float32"}
    return embed_options(**chosen | changes, truncation="error", max_length=None, return_tokens=False)


ALL_LAYERS = options(layers="all")
POOLED = options(pooling="mean")


class Exposed:
    """What one reading of the metrics told."""

    def __init__(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            self.families = list(text_string_to_metric_families(answer.read().decode()))
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[f"layertap_{name}", frozenset(labels.items())]

    def by_method(self, name: str) -> dict[str, float]:
        """Returns what is not 0 of a metric, by method."""
        found = {dict(labels)["method"]: value for (own, labels), value in self.samples.items() if own == name}
        return {method: value for method, value in found.items() if value}

    def handled(self) -> dict[tuple[str, str], float]:
        """Returns what has happened of calls, by method and code."""
        own = [
            (dict(labels), n) for (name, labels), n in self.samples.items() if name.endswith("request_handled_total")
        ]
        return {(labels["method"], labels["code"]): count for labels, count in own if count}


class Load:
    """Calls a server and counts what it does."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.handled: Counter[tuple[str, str]] = Counter()
        self.texts: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def unary(self, method: str, request: Any, *, texts: int = 0, tokens: int = 0) -> None:
        """Calls and counts; texts and tokens are what a good call takes in."""
        call = self.channel.unary_unary(SERVICE + method, None, None)
        try:
            answer = call(request.SerializeToString(), timeout=WAIT_S)
        except grpc.RpcError as exc:
            self.handled[method, exc.code().name] += 1
            return
        self.handled[method, "OK"] += 1
        self.took(method, texts, tokens, [answer])

    def layers(self, texts: Sequence[str], **how: Any) -> Any:
        request = pb.EmbedLayersRequest(inputs=to_messages(list(texts)), options=ALL_LAYERS)
        call = self.channel.unary_stream(SERVICE + "EmbedLayers", None, None)
        return call(request.SerializeToString(), **{"timeout": WAIT_S} | how)

    def stream(self, requests: Iterator[pb.EmbedStreamRequest]) -> Any:
        call = self.channel.stream_stream(SERVICE + "EmbedStream", None, None)
        return call((request.SerializeToString() for request in requests), timeout=WAIT_S)

    def took(self, method: str, texts: int, tokens: int, answers: Sequence[bytes]) -> None:
        self.texts[method] += texts
        self.tokens[method] += tokens
        self.bytes[method] += sum(map(len, answers))

    def lease(self) -> Any:
        """Returns a call that has its answer, and lasts, and is never idle."""
        call = self.channel.unary_stream(SERVICE + "ShareMemory", None, None)(b"", timeout=WAIT_S)
        self.took("ShareMemory", 0, 0, [next(call)])
        return call

    def ended(self, method: str, call: Any) -> str:
        """Reads a call to its end and counts it under its code."""
        with contextlib.suppress(grpc.RpcError):  # Its code says it.
            for _ in call:
                pass
        code: str = call.code().name
        self.handled[method, code] += 1
        return code


def stream_of(*texts: str) -> Iterator[pb.EmbedStreamRequest]:
    yield pb.EmbedStreamRequest(options=pb.StreamOptions(options=POOLED))
    inputs = [pb.StreamInput(id=n, input=message) for n, message in enumerate(to_messages(list(texts)))]
    yield pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=inputs))


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with running("--device", "cpu", "--model-id", str(tiny_folder), *FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    return str(server.process.stdout.readline().decode().split()[-1])


@pytest.fixture
def load(server: Server) -> Iterator[Load]:
    # A small window, so that a reader who stops is felt at once.
    with grpc.insecure_channel(server.address, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        yield Load(channel)


def test_the_metrics_are_what_the_callers_counted(load: Load, url: str) -> None:
    before = Exposed(url)
    assert before("serving") == 1 and before("instances") == before("instances_live") == 1
    assert before("batch_tokens_count") == 0, "the warm-up is not counted as a batch"

    # What goes well, or is refused before the queue.
    good = pb.EmbedRequest(inputs=to_messages(["I love Paris", "Hello"]), options=POOLED)
    bad = pb.EmbedRequest(inputs=to_messages(["x"]), options=options(layers=[99]))
    for _ in range(2):
        load.unary("GetModelInfo", pb.GetModelInfoRequest())
        load.unary("Embed", good, texts=2, tokens=8)
        load.unary("Embed", bad)
    load.unary("Tokenize", pb.TokenizeRequest(inputs=to_messages(["Hello"])), texts=1, tokens=3)
    load.unary("Decode", pb.DecodeRequest(texts=[pb.TokenIds(input_ids=[101, 7592, 102])]), texts=1, tokens=3)
    load.took("EmbedLayers", 2, 8, list(call := load.layers(["I love Paris", "Hello"])))
    load.ended("EmbedLayers", call)
    lease = load.lease()
    load.unary("GetModelInfo", pb.GetModelInfoRequest())  # By then the server has counted what the lease has sent.
    lease.cancel()
    load.ended("ShareMemory", lease)
    load.took("EmbedStream", 2, 6, list(call := load.stream(stream_of("Hello", LONG + LONG, "Hello"))))
    assert load.ended("EmbedStream", call) == "OK"
    poll(lambda: sum(Exposed(url).by_method("layertap_request_started_total").values()) == sum(load.handled.values()))
    check_calls(load, url)
    found = Exposed(url)
    assert found.by_method("layertap_response_bytes_total") == load.bytes
    assert found("request_failed_texts_total", method="EmbedStream") == 1
    assert (found("batch_texts_sum"), found("batch_tokens_sum")) == (8, 30)
    batches = found("batch_tokens_count")
    assert found("batch_fill_ratio_sum") == pytest.approx(30 / 1024) and 4 <= batches <= 5
    assert batches == found("batch_inference_duration_seconds_count") == found("request_queue_duration_seconds_count")
    assert found("batch_inference_duration_seconds_sum") > 0 and found("request_queue_duration_seconds_sum") > 0
    assert found("request_tokenization_duration_seconds_count") == 5

    # Under way: streams that last are counted while they do; calls that last keep others out.
    last = [*stream_of("Hello")]
    streams = []
    for _ in range(4):
        done = threading.Event()
        streams.append((load.stream(until(done, last)), done))
    for call, _ in streams:
        assert len([next(call), next(call)]) == 2  # The header and the one result: it is certainly under way.
    live = Exposed(url)
    assert live("request_texts_total", method="EmbedStream") == load.texts["EmbedStream"] + 4
    for call, done in streams:
        done.set()
        assert load.ended("EmbedStream", call) == "OK"
    load.took("EmbedStream", 4, 12, [])
    check_calls(load, url)
    leases = [load.lease() for _ in range(4)]
    load.unary("GetModelInfo", pb.GetModelInfoRequest())
    for lease in leases:
        lease.cancel()
        assert load.ended("ShareMemory", lease) == "CANCELLED"
    check_calls(load, url)

    # A reader who stops, and while its texts fill the queue, one who is refused.
    stalled = load.layers([LONG] * 100)
    next(stalled)
    load.took("EmbedLayers", 100, 51200, [])
    poll(lambda: Exposed(url)("output_held_bytes") > 0)
    assert Exposed(url)("queue_size") >= 98 and Exposed(url)("queue_tokens") >= 98 * 512
    load.unary("Embed", pb.EmbedRequest(inputs=to_messages(["x"] * 100), options=POOLED))
    poll(lambda: Exposed(url)("stall_total") == 1)
    assert load.ended("EmbedLayers", stalled) == "DEADLINE_EXCEEDED"

    # One who leaves, and one whose deadline passes.
    left = load.layers([LONG] * 100)
    next(left)
    left.cancel()
    assert load.ended("EmbedLayers", left) == "CANCELLED"
    poll(lambda: sum(Exposed(url).by_method("layertap_request_started_total").values()) == sum(load.handled.values()))
    poll(lambda: Exposed(url)("queue_size") == 0)
    late = load.layers([LONG] * 10, timeout=0.9)  # Few, so that the answer has begun by then on a busy machine too.
    next(late)
    assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # Unread until its time is over.
    assert load.ended("EmbedLayers", late) == "DEADLINE_EXCEEDED"
    load.took("EmbedLayers", 110, 56320, [])

    check_calls(load, url)
    found = Exposed(url)
    assert found("refusal_total", reason="calls") == found("refusal_total", reason="queue_texts") == 1
    assert sum(value for (name, _), value in found.samples.items() if name == "layertap_refusal_total") == 2
    poll(
        lambda: Exposed(url)("output_held_bytes") == Exposed(url)("queue_tokens") == Exposed(url)("instances_busy") == 0
    )


@pytest.mark.parametrize("how", ["cancelled", "disconnected"])
def test_a_client_that_leaves_an_idle_stream_is_counted_as_one_that_cancels(server: Server, url: str, how: str) -> None:
    before = Exposed(url).handled()
    count = 20
    for _ in range(count):
        with grpc.insecure_channel(server.address) as channel:
            call = Load(channel).stream(until(threading.Event(), [*stream_of("Hello")]))
            assert len([next(call), next(call)]) == 2
            if how == "cancelled":
                call.cancel()
    cancelled = "EmbedStream", "CANCELLED"
    poll(lambda: sum(Exposed(url).handled().values()) == sum(before.values()) + count)
    assert Exposed(url).handled() == before | {cancelled: before.get(cancelled, 0) + count}
    poll(lambda: server.log.count(b"method=EmbedStream code=CANCELLED") >= count)


def check_calls(load: Load, url: str) -> None:
    """Waits until the server has ended all calls too, and compares the counts."""
    wanted = dict(load.handled)

    with contextlib.suppress(AssertionError):  # What is wrong is shown below.
        poll(lambda: Exposed(url).handled() == wanted, timeout_s=10)
    found = Exposed(url)
    assert found.handled() == wanted
    methods: Counter[str] = Counter()
    for (method, _), count in wanted.items():
        methods[method] += count
    assert found.by_method("layertap_request_started_total") == methods
    assert found.by_method("layertap_request_duration_seconds_count") == methods
    assert found.by_method("layertap_request_texts_total") == +load.texts
    assert found.by_method("layertap_request_tokens_total") == +load.tokens


def until(done: threading.Event, requests: Sequence[pb.EmbedStreamRequest]) -> Iterator[pb.EmbedStreamRequest]:
    yield from requests
    assert done.wait(WAIT_S)


def test_every_rpc_of_the_contract_has_its_metrics() -> None:
    assert set(wire.RPC_NAMES) == set(pb.DESCRIPTOR.services_by_name["EmbeddingService"].methods_by_name)


def test_the_documents_have_every_metric_and_no_other(url: str) -> None:
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/operate/metrics.md").read_text(), re.MULTILINE)
    documented = [re.sub(r"\{.*|_total\b.*", "", name) for row in rows for name in re.findall(r"`([^`]+)`", row)]
    of_processes = MetricsSum(lambda: None, lambda: (2, 2)).collect()
    names = {family.name for family in (*Exposed(url).families, *of_processes)}
    there = {name.removeprefix("layertap_") for name in names if re.match(r"layertap_(?!.*_created$)", name)}
    assert sorted(documented) == sorted(there)


def test_names_are_as_prometheus_wants_them(url: str) -> None:
    for family in Exposed(url).families:
        if family.name.startswith("layertap_"):
            assert family.documentation.endswith("."), family.name
            assert family.type in ("counter", "gauge", "histogram"), family.name
            assert not re.search(r"_(ms|ns|count|mib|duration|time)$", family.name), family.name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
def test_promtool_accepts_the_alerts() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
def test_promtool_accepts_the_metrics(url: str) -> None:
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=answer.read(), capture_output=True, timeout=WAIT_S
        )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_closed_endpoint_listens_no_more_and_leaves_no_thread() -> None:
    metrics = Metrics(model_id="m", fingerprint="f", methods=wire.RPC_NAMES, max_batch_tokens=8)
    call_log = CallLog([metrics])
    call_log.close(call_log.open("Embed", client="me", metadata={}))
    endpoint = Endpoint(metrics.registry, "127.0.0.1", 0)
    assert Exposed(endpoint.url)("request_handled_total", method="Embed", code="OK") == 1
    endpoint.close()
    with pytest.raises(urllib.error.URLError):
        Exposed(endpoint.url)
