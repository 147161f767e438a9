"""What callers who mean harm take of a server with default flags, and how long others wait meanwhile.

Each kind is tried on a server of its own, with the embedded model, whose address space is limited. Told is by how much
its memory grew at most, how long another caller's short Embed and a health check took, and how often they failed. All
hostile traffic comes from addresses of its own (127.0.0.2 and so on) in bare HTTP/2 frames. `--server-python` runs the
server of another checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import multiprocessing
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from support.http2 import Connection

SERVICE = "/layertap.v1.EmbeddingService/"
SPAWN = multiprocessing.get_context("spawn")
POOLED = pb.EmbedOptions(outputs=[pb.Output(pooled_vectors=pb.PooledVectors())])
CUT = pb.EmbedOptions(outputs=POOLED.outputs, truncation=pb.TRUNCATION_RIGHT)
LAYERS = pb.EmbedOptions(outputs=[pb.Output(hidden_states=pb.HiddenStates(all_layers=True))])
OPENING = pb.EmbedStreamRequest(options=pb.StreamOptions(options=CUT)).SerializeToString()
MB = 1 << 20


def call_all(address: str, seconds: float, calls: list[tuple[str, tuple[bytes, ...], int | None, bool]]) -> None:
    """Makes calls at once over one connection: RPC, messages, the length the last one claims, whether compressed."""
    with Connection(address, host="127.0.0.2") as connection:
        for rpc, messages, byte_count, compressed in calls:
            connection.open(SERVICE + rpc, *messages, byte_count=byte_count, compressed=compressed)
        _work(connection, seconds, len(calls))


def _work(connection: Connection, seconds: float, count: int) -> None:
    ends_at = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        connection.pump(seconds)
        while len(connection.ended) < count and time.monotonic() < ends_at and not connection.closed:
            connection.wait(0.1, count)


def whole(
    rpc: str, message: bytes, count: int = 1, *, compressed: bool = False
) -> list[tuple[str, tuple[bytes, ...], int | None, bool]]:
    return count * [(rpc, (gzip.compress(message, 1) if compressed else message,), None, compressed)]


def padding(address: str, seconds: float) -> None:
    request = pb.TokenizeRequest(inputs=[pb.Input(text="")] * 1000, pad_to=100_000, max_length=100_000)
    call_all(address, seconds, whole("Tokenize", request.SerializeToString()))


def decode(address: str, seconds: float) -> None:
    ids = pb.TokenIds(input_ids=[0] * 60_000).SerializeToString()
    call_all(address, seconds, whole("Decode", _field(1, ids) * 1000))


def lists(address: str, seconds: float) -> None:
    states = _field(1, bytes(60_000_000))
    request = _field(1, pb.Input(text="a").SerializeToString()) + _field(2, _field(1, _field(1, states)))
    call_all(address, seconds, whole("Embed", request, compressed=True))


def entries(address: str, seconds: float) -> None:
    call_all(address, seconds, whole("Embed", b"\x0a\x00" * (4 * MB - 1000), 8, compressed=True))


def unknown(address: str, seconds: float) -> None:
    options = POOLED.SerializeToString()
    for n in range(128):
        request = _field(1, pb.Input(text="a").SerializeToString())
        request += _field(2, options + _field(1000, struct.pack(">I", n) + bytes(7 * MB)))
        call_all(address, seconds / 40, whole("Embed", request))


def tokenizing(address: str, seconds: float) -> None:
    texts = [pb.Input(text="a " * 49_000)] * 70
    call_all(address, seconds, whole("Embed", pb.EmbedRequest(inputs=texts, options=CUT).SerializeToString(), 24))


def halves(address: str, seconds: float) -> None:
    call_all(address, seconds, 60 * [("Embed", (bytes(60 * MB - 1),), 60 * MB, False)])


def small_halves(address: str, seconds: float) -> None:
    call_all(address, seconds, 120 * [("Embed", (bytes(8 * MB - 1),), 8 * MB, False)])


def messages(address: str, seconds: float) -> None:
    one = pb.StreamInput(id=0, input=pb.Input(text="word " * 15_000))
    inputs = []
    for n in range(100):
        one.id = n
        inputs.append(_field(1, one.SerializeToString()))
    message = _field(2, b"".join(inputs))
    call_all(address, seconds, 60 * [("EmbedStream", (OPENING, message), None, False)])


def unread(address: str, seconds: float) -> None:
    inputs = [pb.StreamInput(id=n, input=pb.Input(text="a")) for n in range(5000)]
    message = pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=inputs)).SerializeToString()
    call_all(address, seconds, 12 * [("EmbedStream", (OPENING, message), None, False)])


def buffers(address: str, seconds: float) -> None:
    request = pb.EmbedLayersRequest(inputs=[pb.Input(text="paris " * 500)] * 20, options=LAYERS).SerializeToString()
    call_all(address, seconds, 20 * [("EmbedLayers", (request, bytes(100 * MB)), None, False)])


def idle(address: str, seconds: float) -> None:
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(Connection(address, host=f"127.0.0.{n}")) for n in range(2, 11)]
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            for connection in connections:
                if not connection.closed and connection.open_count < 30:
                    connection.open(SERVICE + "EmbedStream", OPENING)
                with contextlib.suppress(OSError):
                    connection.pump(0.01)
                    connection.wait(0.01)


def mixes(address: str, seconds: float) -> None:
    options = pb.EmbedOptions(truncation=pb.TRUNCATION_RIGHT)
    for n in range(64):
        layers = [(n >> k & 1) + 2 * k for k in range(3)] + [6]
        mix = pb.LayerMix(strategy=pb.MIX_STRATEGY_CONCAT, layers=layers if n % 2 else layers[::-1])
        options.outputs.add(pooled_vectors=pb.PooledVectors(mix=mix, dimensions=1 + n))
    for n in range(64):
        del options.outputs[n].pooled_vectors.mix.layers[:]
        order = list(range(7))
        np.random.default_rng(n).shuffle(order)
        options.outputs[n].pooled_vectors.mix.layers.extend(order)
    request = pb.EmbedRequest(inputs=[pb.Input(text="paris " * 510)] * 5, options=options).SerializeToString()
    call_all(address, seconds, whole("Embed", request, 4))


def attentions(address: str, seconds: float) -> None:
    options = pb.EmbedOptions(outputs=[pb.Output(attentions=pb.Attentions(all_layers=True))], truncation=CUT.truncation)
    request = pb.EmbedLayersRequest(inputs=[pb.Input(text="paris " * 500)] * 20, options=options).SerializeToString()
    call_all(address, seconds, 20 * [("EmbedLayers", (request, bytes(100 * MB)), None, False)])


def long(address: str, seconds: float) -> None:
    request = pb.EmbedRequest(inputs=[pb.Input(text="paris " * 500)] * 40, options=CUT).SerializeToString()
    call_all(address, seconds, whole("Embed", request, 20))


def windows(address: str, seconds: float) -> None:
    options = pb.EmbedOptions(outputs=POOLED.outputs, windows=pb.Windows(stride=64))
    texts = [pb.Input(text="paris " * 16_000)] * 20
    call_all(address, seconds, whole("Embed", pb.EmbedRequest(inputs=texts, options=options).SerializeToString(), 20))


def bombs(address: str, seconds: float) -> None:
    call_all(address, seconds, whole("Embed", bytes(1 << 30), 60, compressed=True))


def health_halves(address: str, seconds: float) -> None:
    with Connection(address, host="127.0.0.2") as connection:
        for _ in range(60):
            connection.open("/grpc.health.v1.Health/Check", bytes(8 * MB - 1), byte_count=8 * MB)
        _work(connection, seconds, 60)


def nothing(address: str, seconds: float) -> None:
    time.sleep(seconds)


KINDS: dict[str, tuple[str, Callable[[str, float], None]]] = {
    "nothing": ("nothing: the machine alone", nothing),
    "padding": ("Tokenize of 1,000 empty texts, pad_to=100,000", padding),
    "decode": ("Decode of 60 M ids", decode),
    "lists": ("60 M layers, gzipped", lists),
    "entries": ("8 requests of 4 M empty texts, gzipped", entries),
    "unknown": ("128 requests with 7 MB of unknown fields in their options", unknown),
    "tokenizing": ("24 requests of 7 MB of long texts, cut", tokenizing),
    "halves": ("60 requests of 60 MB without their last byte", halves),
    "small-halves": ("120 requests of 8 MB without their last byte", small_halves),
    "messages": ("60 streams with one message of 7 MB each", messages),
    "unread": ("12 unread streams of 5,000 short texts", unread),
    "buffers": ("20 calls that send 100 MB that nothing reads", buffers),
    "idle": ("9 addresses with 30 idle streams each", idle),
    "mixes": ("64 different mixes of all layers on 5 texts, 4 times", mixes),
    "attentions": ("20 calls of 20 texts with all attentions, and 100 MB that nothing reads", attentions),
    "long": ("20 requests of 40 texts of 500 tokens", long),
    "windows": ("20 requests of 20 texts of 16,000 tokens as windows", windows),
    "bombs": ("60 requests of 1 GiB, gzipped to 1 MB", bombs),
    "health": ("60 health checks of 8 MB without their last byte", health_halves),
}


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


class Server:
    """A server with default flags and a limited address space."""

    def __init__(self, python: str, limit: int) -> None:
        def limit_memory() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        self._process = subprocess.Popen(
            [python, "-m", "layertap_server", "--port", "0", "--log-level", "error", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=limit_memory,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().split()[-1]
        self._memory = psutil.Process(self._process.pid)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def memory(self) -> int:
        try:
            return int(self._memory.memory_info().rss)
        except psutil.NoSuchProcess:
            return 0

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Probe(threading.Thread):
    """Calls again and again, each time over a connection that it keeps, until it is stopped."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._ended = threading.Event()
        self.times_s: list[float] = []
        self.failures: list[str] = []
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            started = time.perf_counter()
            try:
                self._call()
            except grpc.RpcError as exc:
                self.failures.append(exc.code().name)
            self.times_s.append(time.perf_counter() - started)

    def stop(self) -> str:
        self._ended.set()
        self.join()
        p99 = f"{np.percentile(self.times_s, 99) * 1e3:.0f}" if self.times_s else "none"
        return f"{p99} ms" + (f", {len(self.failures)} of {len(self.times_s)} failed" if self.failures else "")


@contextlib.contextmanager
def watched(server: Server) -> Iterator[list[int]]:
    """Yields a list that has, at the end, the most memory that the server took."""
    most = [server.memory]
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            most[0] = max(most[0], server.memory)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield most
    ended.set()
    thread.join()


def attack(kind: str, address: str, seconds: float, ends: Any) -> None:
    """Tries one kind, in a process of its own; says when it has imported what it needs, and waits for leave."""
    ends.send("ready")
    ends.recv()
    KINDS[kind][1](address, seconds)


def table(
    kinds: Iterable[str],
    *,
    seconds: float,
    limit_gb: int = 6,
    server_python: str = sys.executable,
    shared: bool = False,
) -> None:
    """Tries kinds one after the other, each on a server of its own unless it is shared, and prints the table."""
    print("| what is sent | memory at most | and after | another caller's Embed, p99 | health, p99 |")
    print("|---|---|---|---|---|")
    server: Server | None = None
    try:
        for kind in kinds:
            if server is not None and not (shared and server.alive):
                server.stop()
                server = None
            server = server or Server(server_python, limit_gb << 30)
            print(measure(kind, seconds, server), flush=True)
    finally:
        if server is not None:
            server.stop()


def measure(kind: str, seconds: float, server: Server) -> str:
    """Tries one kind; returns a line of the table."""
    title, _ = KINDS[kind]
    with (
        grpc.insecure_channel(server.address) as channel,
        grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as other,
    ):
        stub, health = embedding_pb2_grpc.EmbeddingServiceStub(channel), health_pb2_grpc.HealthStub(other)
        request = pb.EmbedRequest(inputs=[pb.Input(text="I love Paris")], options=POOLED)
        for _ in range(50):
            stub.Embed(request, timeout=60)
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=attack, args=(kind, server.address, seconds, theirs), daemon=True)
        process.start()
        ours.recv()
        before = server.memory
        with watched(server) as most:
            callers = Probe(lambda: stub.Embed(request, timeout=30))
            probes = Probe(lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=30))
            ours.send("go")
            process.join(timeout=seconds + 60)
            process.kill()
            called, checked = callers.stop(), probes.stop()
        grown = f"{(most[0] - before) / 2**20:,.0f} MB" if server.alive else "the server has ended"
        left = f"{(server.memory - before) / 2**20:,.0f} MB"
        return f"| {title} | {grown} | {left} | {called} | {checked} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"a comma list of {', '.join(KINDS)}")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each kind goes on at most")
    parser.add_argument("--limit-gb", type=int, default=6, help="the address space of the server, in GiB")
    parser.add_argument("--server-python", default=sys.executable, help="the Python that runs the server")
    parser.add_argument("--shared", action="store_true", help="tries all kinds on one server, as long as it lives")
    arguments = parser.parse_args()
    kinds = list(filter(None, arguments.only.split(","))) or list(KINDS)
    table(
        kinds,
        seconds=arguments.seconds,
        limit_gb=arguments.limit_gb,
        server_python=arguments.server_python,
        shared=arguments.shared,
    )


if __name__ == "__main__":
    main()
