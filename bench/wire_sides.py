"""The sides of bench/wire.py, each end in a process of its own: `serve SIDE` and `client SIDE ADDRESS`.

layertap's servers are in stand_in.py. All sides send the rows of `tensors.block`, and check once that they arrive.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import tensors
import worker

Layers = list[list[tensors.Rows]]
"""For each layer its rows, in one array or several."""

TEXT = "I love Paris"
CALLERS = 16


def frames(row_count: int) -> Iterator[tensors.Rows]:
    """Yields all layers in frames, none of them with rows of two layers."""
    block = tensors.block(row_count)
    for layer in range(tensors.LAYER_COUNT):
        for first in range(layer, layer + row_count, tensors.FRAME_ROWS):
            yield block[first : min(first + tensors.FRAME_ROWS, layer + row_count)]


# Servers. Each prints where it listens.


def serve_raw(row_count: int) -> None:
    """Answers each byte with all frames."""
    ready = list(frames(row_count))

    def answer(connection: socket.socket) -> None:
        while connection.recv(1):
            for frame in ready:
                connection.sendall(frame)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def serve_flight(row_count: int) -> None:
    """Answers do_get with a record batch for each frame."""
    import pyarrow as pa
    from pyarrow import flight

    kind = pa.list_(pa.float32(), tensors.WIDTH)
    schema = pa.schema([("rows", kind)])
    batches = [
        pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(frame.reshape(-1)), type=kind)], schema=schema)
        for frame in frames(row_count)
    ]

    class Tensors(flight.FlightServerBase):
        def do_get(self, context: Any, ticket: Any) -> Any:
            return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(schema, batches))

    server = Tensors("grpc://127.0.0.1:0")
    print(f"grpc://127.0.0.1:{server.port}", flush=True)
    server.serve()


def rows_message() -> Any:
    """Returns the class of `message Rows { repeated float values = 1; }`."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="rows.proto", package="bench", syntax="proto3")
    file.message_type.add(name="Rows").field.add(name="values", number=1, type=2, label=3)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("bench.Rows"))


async def serve_grpc(*handlers: Any) -> None:
    import grpc.aio

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers(handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def serve_ready(row_count: int) -> None:
    """Answers with a message for each frame, all of them made before, and does nothing else."""
    import grpc

    ready = [frame.tobytes() for frame in frames(row_count)]

    async def answer(request: bytes, context: Any) -> None:
        for message in ready:
            await context.write(message)

    method = grpc.unary_stream_rpc_method_handler(answer)
    asyncio.run(serve_grpc(grpc.method_handlers_generic_handler("bench.Rows", {"Get": method})))


def serve_repeated(row_count: int, as_list: bool) -> None:
    """Answers with a message of `repeated float` for each frame, made from its array each time."""
    import grpc

    message, ready = rows_message(), list(frames(row_count))

    async def answer(request: bytes, context: Any) -> AsyncIterator[Any]:
        for frame in ready:
            values = frame.reshape(-1)
            yield message(values=values.tolist() if as_list else values)

    method = grpc.unary_stream_rpc_method_handler(answer, response_serializer=message.SerializeToString)
    asyncio.run(serve_grpc(grpc.method_handlers_generic_handler("bench.Rows", {"Get": method})))


def serve_echo(row_count: int) -> None:
    """Answers unary Embed with what layertap answers to one short text, and does nothing else."""
    import grpc

    from layertap.v1 import embedding_pb2 as pb

    vector = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1, tensors.WIDTH], data=tensors.block(1)[0].tobytes())
    ready = pb.EmbedResponse(
        header=pb.EmbedHeader(
            model_id="stand-in",
            fingerprint="0" * 64,
            layer_count=12,
            dtype=pb.DTYPE_FLOAT32,
            outputs=[pb.OutputHeader(layers=[12], row_size=tensors.WIDTH)],
            token_counts=[5],
            truncated=[False],
        ),
        tensors=[pb.LayerTensor(layer=12, tensor=vector)],
        timings=pb.Timings(queue_time_ns=10_000, tokenize_time_ns=10_000, compute_time_ns=10_000),
    )

    async def answer(request: Any, context: Any) -> Any:
        return ready

    method = grpc.unary_unary_rpc_method_handler(
        answer, request_deserializer=pb.EmbedRequest.FromString, response_serializer=pb.EmbedResponse.SerializeToString
    )
    asyncio.run(serve_grpc(grpc.method_handlers_generic_handler("layertap.v1.EmbeddingService", {"Embed": method})))


SERVERS: dict[str, Callable[[int], None]] = {
    "raw": serve_raw,
    "flight": serve_flight,
    "grpc": serve_ready,
    "repeated": lambda row_count: serve_repeated(row_count, as_list=False),
    "repeated-list": lambda row_count: serve_repeated(row_count, as_list=True),
    "echo": serve_echo,
}


# Clients. Each returns what gets all layers of all texts, given their token ids.


def use_raw(address: str, row_count: int) -> Callable[[Any], Layers]:
    connection = socket.create_connection(("127.0.0.1", int(address)))

    def get(texts: Any) -> Layers:
        connection.sendall(b"?")
        layers: Layers = []
        for _ in range(tensors.LAYER_COUNT):
            rows = np.empty((row_count, tensors.WIDTH), np.float32)
            room = memoryview(rows).cast("B")
            while room:
                room = room[connection.recv_into(room) :]
            layers.append([rows])
        return layers

    return get


def by_layer(came: Iterator[tensors.Rows], row_count: int, *, assembled: bool = True) -> Layers:
    """Returns frames layer by layer, with `assembled` each layer in one array."""
    layers: Layers = []
    first = row_count
    for rows in came:
        if first == row_count:
            layers.append([np.empty((row_count, tensors.WIDTH), np.float32)] if assembled else [])
            first = 0
        if assembled:
            layers[-1][0][first : first + len(rows)] = rows
        else:
            layers[-1].append(rows)
        first += len(rows)
    return layers


def use_flight(address: str, row_count: int, assembled: bool) -> Callable[[Any], Layers]:
    """With `assembled` each layer becomes one array, as everywhere else; without, each frame is viewed in place."""
    from pyarrow import flight

    client = flight.connect(address)

    def get(texts: Any) -> Layers:
        chunks = client.do_get(flight.Ticket(b""))
        columns = (chunk.data.column(0).flatten().to_numpy(zero_copy_only=True) for chunk in chunks)
        return by_layer((column.reshape(-1, tensors.WIDTH) for column in columns), row_count, assembled=assembled)

    return get


def use_repeated(address: str, row_count: int) -> Callable[[Any], Layers]:
    import grpc

    channel = grpc.insecure_channel(address)
    method = channel.unary_stream("/bench.Rows/Get", None, rows_message().FromString)

    def get(texts: Any) -> Layers:
        arrays = (np.array(message.values, np.float32) for message in method(b""))
        return by_layer((array.reshape(-1, tensors.WIDTH) for array in arrays), row_count)

    return get


def use_ready(address: str, row_count: int) -> Callable[[Any], Layers]:
    import grpc

    method = grpc.insecure_channel(address).unary_stream("/bench.Rows/Get", None, None)

    def get(texts: Any) -> Layers:
        arrays = (np.frombuffer(message, np.float32) for message in method(b""))
        return by_layer((array.reshape(-1, tensors.WIDTH) for array in arrays), row_count)

    return get


def use_embed(client: Any) -> Callable[[Any], Layers]:
    def get(texts: Any) -> Layers:
        embedding = client.embed(texts, layers="all")
        return [[layer.reshape(-1, tensors.WIDTH)] for layer in embedding.hidden_states]

    return get


def use_embed_layers(client: Any) -> Callable[[Any], Layers]:
    def get(texts: Any) -> Layers:
        layers: list[dict[int, tensors.Rows]] = [{} for _ in range(tensors.LAYER_COUNT)]
        for part in client.embed_layers(texts):
            layers[part.layer].update(zip(part.texts, part.rows, strict=True))
        return [[rows for _, rows in sorted(layer.items())] for layer in layers]

    return get


CLIENTS: dict[str, Callable[[str, int], Callable[[Any], Layers]]] = {
    "raw": use_raw,
    "flight": lambda address, row_count: use_flight(address, row_count, assembled=False),
    "flight-assembled": lambda address, row_count: use_flight(address, row_count, assembled=True),
    "repeated": use_repeated,
    "grpc": use_ready,
}
LAYERTAP: dict[str, Callable[[Any], Callable[[Any], Layers]]] = {"embed": use_embed, "embed-layers": use_embed_layers}


async def small_layertap(address: str, count: int) -> None:
    """Sends `count` short texts, one a call, from several callers."""
    from layertap import AsyncClient

    async with AsyncClient(address) as client:

        async def caller() -> None:
            for _ in range(count // CALLERS):
                await client.embed(TEXT, pooling="mean")

        await asyncio.gather(*(caller() for _ in range(CALLERS)))


async def small_echo(address: str, count: int) -> None:
    """Sends the same messages with nothing around the generated code."""
    import grpc.aio

    from layertap.v1 import embedding_pb2 as pb
    from layertap.v1 import embedding_pb2_grpc

    mean = pb.PooledVectors(strategy=pb.POOLING_STRATEGY_MEAN, layer=-1)
    options = pb.EmbedOptions(
        outputs=[pb.Output(pooled_vectors=mean)], truncation=pb.TRUNCATION_ERROR, dtype=pb.DTYPE_FLOAT32
    )
    request = pb.EmbedRequest(inputs=[pb.Input(text=TEXT)], options=options)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)

        async def caller() -> None:
            for _ in range(count // CALLERS):
                await stub.Embed(request)

        await asyncio.gather(*(caller() for _ in range(CALLERS)))


SMALL = {"small-layertap": small_layertap, "small-echo": small_echo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=["serve", "client"])
    parser.add_argument("side", choices=sorted({*SERVERS, *CLIENTS, *LAYERTAP, *SMALL}))
    parser.add_argument("address", nargs="?", default="")
    parser.add_argument("--rows", type=int, default=1, help="of one layer")
    parser.add_argument("--requests", type=int, default=1, help="in one run")
    parser.add_argument("--shared-memory", action="store_true")
    parser.add_argument("--keep-pages", action="store_true")
    parser.add_argument(
        "--read", action="store_true", help="add all numbers up, as whoever asks for them would use them"
    )
    arguments = parser.parse_args()
    if arguments.end == "serve":
        SERVERS[arguments.side](arguments.rows)
        return
    if arguments.side in SMALL:
        small = SMALL[arguments.side]
        worker.serve(lambda texts, _: asyncio.run(small(arguments.address, arguments.requests)), lambda: "")
        return
    client = None
    if arguments.side in LAYERTAP:
        import layertap

        if arguments.keep_pages:
            layertap.keep_pages()
        client = layertap.Client(arguments.address, shared_memory=arguments.shared_memory)
        get = LAYERTAP[arguments.side](client)
    else:
        get = CLIENTS[arguments.side](arguments.address, arguments.rows)
    checked, byte_count = False, 0

    def run(texts: list[Any], _: int) -> None:
        nonlocal checked, byte_count
        for _ in range(arguments.requests):
            layers = get(texts)
            if not checked:
                tensors.check(layers, arguments.rows)
                checked = True
            elif arguments.read:
                for parts in layers:
                    for rows in parts:
                        rows.sum()
            byte_count += sum(rows.nbytes for parts in layers for rows in parts)
            del layers

    def describe() -> str:
        if client is None or not arguments.shared_memory:
            return ""
        return f"{client.shared_memory.byte_count / byte_count:.0%} of the bytes came through shared memory"

    worker.serve(run, describe)


if __name__ == "__main__":
    main()
