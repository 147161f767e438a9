"""A request is refused by the lengths of its lists, before objects are made of them; others do not wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import grpc
import psutil
import pytest
from google.protobuf.message import Message
from support import Server
from support.answers import IDENTITY
from support.in_process import serving

from layertap.errors import InvalidArgumentError
from layertap.types import Limits
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc
from layertap_server.compat import kserve
from layertap_server.compat import open_inference_pb2 as inference
from layertap_server.model.checkpoint import EMBEDDED_MODEL
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.observability.call_log import Record
from layertap_server.protocol.preprocess import Preprocessor
from layertap_server.rpc.caller import Caller, Deadlines, Shared
from layertap_server.rpc.stream_memory import StreamMemory
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Hooks
from layertap_server.scheduler.fairness import Reads, RequestMemory
from layertap_server.scheduler.queue_limits import QueueLimits
from layertap_server.types import Rows, Run

WITHIN_S = 5.0
"""A server that first makes what it refuses takes several times as long."""
MOST_MEMORY = 512 << 20

LAST = pb.EmbedOptions(outputs=[pb.Output(hidden_states=pb.HiddenStates())])


@pytest.fixture(scope="module")
def stub(tiny_server: Server) -> Iterator[embedding_pb2_grpc.EmbeddingServiceStub]:
    with grpc.insecure_channel(tiny_server.address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        yield embedding_pb2_grpc.EmbeddingServiceStub(channel)


@pytest.fixture(scope="module")
def preprocessor() -> Preprocessor:
    tokenizer = Tokenizer(EMBEDDED_MODEL)
    model = dataclasses.replace(IDENTITY, vocab_size=30522)
    limits = Limits(**{field.name: 1 << 20 for field in pb.Limits.DESCRIPTOR.fields})
    return Preprocessor(model=model, limits=limits, sentences=SentenceConfig(max_length=512), tokenizer=tokenizer)


def options(**kinds: Message) -> pb.EmbedRequest:
    return pb.EmbedRequest(inputs=[pb.Input(text="a")], options=pb.EmbedOptions(outputs=[pb.Output(**kinds)]))


MANY = [0] * 5_000_000
REQUESTS = {
    "padding": ("Tokenize", pb.TokenizeRequest(inputs=[pb.Input(text="")] * 1000, pad_to=100_000, max_length=100_000)),
    "ids to decode": ("Decode", pb.DecodeRequest(texts=[pb.TokenIds(input_ids=MANY)])),
    "ids of many texts": ("Decode", pb.DecodeRequest(texts=[pb.TokenIds(input_ids=MANY[:5_000])] * 1000)),
    "layers": ("Embed", options(hidden_states=pb.HiddenStates(layers=MANY))),
    "mixed layers": ("Embed", options(hidden_states=pb.HiddenStates(mix=pb.LayerMix(layers=MANY)))),
    "weights": (
        "Embed",
        options(
            hidden_states=pb.HiddenStates(
                mix=pb.LayerMix(strategy=pb.MIX_STRATEGY_WEIGHTED, layers=[0], weights=MANY[:1_500_000])
            )
        ),
    ),
    "outputs": ("Embed", pb.EmbedRequest(inputs=[pb.Input(text="a")], options={"outputs": [pb.Output()] * 500_000})),
    "inputs": ("Embed", pb.EmbedRequest(inputs=[pb.Input(text="a")] * 500_000, options=LAST)),
    "words": (
        "Embed",
        pb.EmbedRequest(inputs=[pb.Input(words=pb.Words(words=[""] * 4_000_000))], options=LAST),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_long_lists_are_refused_before_objects_are_made_of_them(
    name: str, stub: embedding_pb2_grpc.EmbeddingServiceStub, tiny_server: Server
) -> None:
    rpc, request = REQUESTS[name]
    process = psutil.Process(tiny_server.process.pid)
    before = process.memory_info().rss
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, rpc)(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert time.monotonic() - started < WITHIN_S
    assert process.memory_info().rss - before < MOST_MEMORY


def test_the_cache_of_options_keeps_known_fields_of_a_bounded_size_only(preprocessor: Preprocessor) -> None:
    plain = preprocessor.options(LAST)
    unknown = pb.EmbedOptions.FromString(LAST.SerializeToString() + b"\xfa\x07\x04abcd")
    assert preprocessor.options(unknown) is plain  # Unknown fields are no part of the key.
    large = pb.EmbedOptions.FromString(LAST.SerializeToString() + b"\xfa\x07\x80\x80\x01" + bytes(1 << 14))
    assert preprocessor.options(large) == plain and preprocessor.options(large) is not plain


def test_texts_of_one_request_are_tokenized_in_slices_that_other_callers_come_between(
    preprocessor: Preprocessor,
) -> None:
    long = pb.EmbedOptions(outputs=LAST.outputs, truncation=pb.TRUNCATION_RIGHT)

    async def embed(texts: list[pb.Input], *, client: str) -> None:
        record = Record(method="Embed", request_id=client, client=client)
        await preprocessor.embed(texts, long, record, hold=lambda _bytes: None)

    async def run() -> bool:
        texts = [pb.Input(text="many words " * 5_000)] * 100
        slow = asyncio.create_task(embed(texts, client="a"))
        await asyncio.sleep(0)
        await embed([pb.Input(text="word " * 2_000)], client="b")
        first = not slow.done()
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        return first

    assert asyncio.run(run())


def test_no_step_of_the_loop_takes_in_much_of_a_message_of_many_small_texts(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Health comes between two of them. In CPU time, which does not depend on what else the machine does."""
    texts = [pb.StreamInput(id=n, input=pb.Input()) for n in range(16_000)]  # Each is refused by itself.
    requests = [
        pb.EmbedStreamRequest(options=pb.StreamOptions(options=LAST)),
        pb.EmbedStreamRequest(inputs=pb.StreamInputs(inputs=texts)),
    ]
    run, steps_s = asyncio.Handle._run, []

    def timed(handle: asyncio.Handle) -> None:
        started_s = time.thread_time()
        run(handle)
        steps_s.append(time.thread_time() - started_s)

    with serving(tiny_folder) as address, grpc.insecure_channel(address) as channel:
        gc.freeze()  # As a server does when it starts.
        monkeypatch.setattr(asyncio.Handle, "_run", timed)
        answers = embedding_pb2_grpc.EmbeddingServiceStub(channel).EmbedStream(iter(requests), timeout=60)
        assert sum(len(one.results.failures) for one in answers) == len(texts)
        monkeypatch.undo()
        gc.unfreeze()
    assert max(steps_s) < sum(steps_s) / 3


def test_an_error_names_no_more_prompts_than_its_metadata_can_carry(preprocessor: Preprocessor) -> None:
    sentences = SentenceConfig(max_length=512, prompts={f"prompt {n}": "" for n in range(5000)})
    many = Preprocessor(
        model=preprocessor.model, limits=preprocessor.limits, sentences=sentences, tokenizer=preprocessor.tokenizer
    )
    with pytest.raises(InvalidArgumentError, match=r"it has prompt 0, .* …; or send the prompt itself") as caught:
        many.options(pb.EmbedOptions(outputs=LAST.outputs, prompt_name="another"))
    assert len(caught.value.details) < 2000


class Context:
    """The context of a call whose client sends some messages, and then nothing more."""

    def __init__(self, *messages: bytes) -> None:
        self._messages = iter(messages)
        self.all_read, self.answered = asyncio.Event(), asyncio.Event()

    async def read(self) -> bytes:
        for message in self._messages:
            return message
        self.all_read.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def write(self, message: bytes) -> None:
        self.answered.set()

    def time_remaining(self) -> None:
        """The call has no deadline."""


REQUEST = inference.ModelInferRequest(model_name="m", outputs=[{"name": "mean"}])
REQUEST.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")


@contextlib.asynccontextmanager
async def kserve_stream(
    preprocessor: Preprocessor, batcher: Batcher, memory: StreamMemory, context: Context, first: bytes
) -> AsyncIterator[Caller]:
    """Answers a stream of the client "one" until the block ends, and waits for all of its tasks."""
    shared = Shared(
        memory=RequestMemory(MOST_MEMORY, Hooks()),
        streams=memory,
        deadlines=Deadlines(),
        reads=Reads(),
        stall_timeout_s=60,
        idle_timeout_s=60,
    )
    service = kserve.Service(preprocessor=preprocessor, batcher=batcher, stopping=asyncio.Event())
    begun: asyncio.Future[Caller] = asyncio.get_running_loop().create_future()

    async def call() -> None:
        task, record = asyncio.current_task(), Record(method="ModelStreamInfer", request_id="", client="one")
        assert task is not None
        caller = Caller(context, "ipv4:127.0.0.1:1", record, task, shared)  # type: ignore[arg-type]
        begun.set_result(caller)
        try:
            await service.streams["ModelStreamInfer"](first, caller)
        finally:
            caller.close()

    under_way = asyncio.create_task(call())
    try:
        yield await begun
    finally:
        under_way.cancel()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)


@pytest.fixture
def hanging() -> Iterator[Batcher]:
    """A queue whose instance computes until the test ends."""
    go_on = threading.Event()

    def encode(runs: Sequence[Run]) -> Iterator[Rows]:
        go_on.wait(60)
        yield from ()

    batcher = Batcher([encode], QueueLimits(**{field.name: 1 << 20 for field in dataclasses.fields(QueueLimits)}))
    yield batcher
    go_on.set()
    assert batcher.stop(timeout_s=60)


def test_a_stream_of_kserve_gives_back_once_what_its_requests_hold(
    preprocessor: Preprocessor, hanging: Batcher
) -> None:
    async def run() -> None:
        memory, message = StreamMemory(MOST_MEMORY), REQUEST.SerializeToString()
        context = Context(message)  # So two requests are under way, of which the second is not waited for.
        async with kserve_stream(preprocessor, hanging, memory, context, message):
            await asyncio.wait_for(context.all_read.wait(), 60)
        memory.add("another", MOST_MEMORY - 1)
        memory.add("one", 1)
        assert not memory.has_room("one")

    asyncio.run(run())


def test_a_stream_of_kserve_that_waits_for_memory_is_not_idle(preprocessor: Preprocessor, hanging: Batcher) -> None:
    async def run() -> None:
        memory, context = StreamMemory(MOST_MEMORY), Context()
        memory.add("one", MOST_MEMORY)
        refused = inference.ModelInferRequest(model_name="another").SerializeToString()
        async with kserve_stream(preprocessor, hanging, memory, context, refused) as caller:
            await asyncio.wait_for(context.answered.wait(), 60)
            assert caller.idle_s == 0
            memory.add("one", -MOST_MEMORY)
            await asyncio.wait_for(context.all_read.wait(), 60)
            assert caller.idle_s > 0

    asyncio.run(run())
