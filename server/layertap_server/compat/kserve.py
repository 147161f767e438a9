"""The Open Inference Protocol (KServe V2) over gRPC, on the server's own port: `--kserve`.

Requests go the way of the contract's own: the same preprocessing, queue, limits and errors. What each RPC does is said
in `protos/inference/open_inference.proto`, how requests are read in `kserve_requests`. Knows no gRPC: `rpc` answers the
calls with the methods of `Service`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

import layertap
from layertap import wire
from layertap.errors import InternalError, InvalidArgumentError, LayertapError, NotFoundError, UnavailableError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.compat import kserve_requests as requests
from layertap_server.compat import kserve_tensors as tensors
from layertap_server.compat import open_inference_pb2 as kserve
from layertap_server.protocol import rows
from layertap_server.protocol.offload import LARGE_BYTES, offload
from layertap_server.protocol.preprocess import Hold, Preprocessor
from layertap_server.protocol.requests import parse
from layertap_server.scheduler.batcher import Batcher
from layertap_server.types import RETRY_ELSEWHERE_S

if TYPE_CHECKING:
    from layertap_server.rpc.caller import Caller

log = logging.getLogger(__name__)

SERVICE_NAME: Final = kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
UNARY: Final = ("ServerMetadata", "ModelMetadata", "ModelInfer")
STREAMS: Final = ("ModelStreamInfer",)

_VERSION: Final = "1"
_IN_FLIGHT: Final = 2
"""Requests of one stream that are held at once: one is tokenized while another computes."""


class Service:
    """Answers the RPCs of the protocol.

    Attributes:
        unlimited: The RPCs that a full or stopping server answers too, by name.
        unary: The RPCs that answer with one message, by name.
        streams: The RPCs with streams of messages in both directions, by name; they get the first message.
    """

    def __init__(self, *, preprocessor: Preprocessor, batcher: Batcher, stopping: asyncio.Event) -> None:
        """Answers with the model of the preprocessor."""
        self._preprocessor = preprocessor
        self._model, self._sentences = preprocessor.model, preprocessor.sentences
        self._batcher = batcher
        self._stopping = stopping
        self._outputs = requests.outputs_of(self._model, self._sentences)
        self.unlimited = {"ServerLive": self._live, "ServerReady": self._ready, "ModelReady": self._model_ready}
        self.unary = dict(zip(UNARY, (self._server_metadata, self._model_metadata, self._infer), strict=True))
        self.streams = dict(zip(STREAMS, (self._infer_stream,), strict=True))

    def _live(self, raw: bytes) -> bytes:
        return kserve.ServerLiveResponse(live=True).SerializeToString()

    def _ready(self, raw: bytes) -> bytes:
        return kserve.ServerReadyResponse(ready=not self._stopping.is_set()).SerializeToString()

    def _model_ready(self, raw: bytes) -> bytes:
        try:
            request = kserve.ModelReadyRequest.FromString(raw)
            self._check_model(request.name, request.version)
        except (DecodeError, NotFoundError):
            return kserve.ModelReadyResponse(ready=False).SerializeToString()
        return kserve.ModelReadyResponse(ready=not self._stopping.is_set()).SerializeToString()

    async def _server_metadata(self, raw: bytes, caller: Caller) -> bytes:
        return kserve.ServerMetadataResponse(name="layertap", version=layertap.__version__).SerializeToString()

    async def _model_metadata(self, raw: bytes, caller: Caller) -> bytes:
        request = await parse(kserve.ModelMetadataRequest, raw)
        self._check_model(request.name, request.version)
        size = self._model.hidden_size
        answer = kserve.ModelMetadataResponse(name=request.name, versions=[_VERSION], platform="layertap")
        answer.inputs.add(name=requests.TEXT, datatype="BYTES", shape=[-1])
        for name in (requests.INPUT_IDS, *requests.BESIDE_IDS):
            answer.inputs.add(name=name, datatype="INT64", shape=[-1, -1])
        for name, outputs in self._outputs.items():
            width, shape = size, [-1]
            if name == requests.SENTENCE:
                width = self._sentences.dimensions or self._sentences.vector_size(size)
            elif outputs and outputs[0].pooled_vectors.strategy == pb.POOLING_STRATEGY_MEAN_MAX:
                width = 2 * size
            if outputs:
                shape += [-1, width] if outputs[0].HasField("hidden_states") else [width]
            answer.outputs.add(name=name, datatype="FP32" if outputs else "INT64", shape=shape)
        return answer.SerializeToString()

    async def _infer(self, raw: bytes, caller: Caller) -> bytes:
        return b"".join(await self._answer(await _parse(raw), caller, caller.add_bytes))

    async def _infer_stream(self, raw: bytes, caller: Caller) -> None:
        """Answers requests in their order; the server's end ends it once what has been read is answered."""
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        places = asyncio.Semaphore(_IN_FLIGHT)
        byte_counts: dict[asyncio.Task[bytes], int] = {}
        reading = False

        def note_idle() -> None:
            caller.set_waiting(reading and not byte_counts)

        async def read() -> None:
            nonlocal reading
            message: bytes | None = raw
            byte_count = 0  # Those of the first message are counted until the call ends.
            while message is not None:
                await places.acquire()
                task = asyncio.create_task(self._answer_in_stream(message, caller))
                byte_counts[task] = byte_count
                answers.put_nowait(task)
                await caller.stream_room()
                reading = True
                note_idle()
                message = await caller.read()
                reading = False
                note_idle()
                byte_count = len(message or b"")
                caller.add_stream_bytes(byte_count)

        reader, stop = asyncio.create_task(read()), asyncio.create_task(self._stopping.wait())
        stop.add_done_callback(lambda _: reader.cancel())
        reader.add_done_callback(lambda _: answers.put_nowait(None))
        try:
            while (task := await answers.get()) is not None:
                await caller.write(await task)
                caller.add_stream_bytes(-byte_counts.pop(task))
                note_idle()
                places.release()
        finally:
            left = (stop, reader, *byte_counts)
            for one in left:
                one.cancel()
            # What they hold they give back themselves, which must not come after the call's own end.
            await asyncio.gather(*left, return_exceptions=True)
        if reader.cancelled():
            raise UnavailableError("the server is stopping; send the rest to another", retry_after_s=RETRY_ELSEWHERE_S)
        reader.result()

    async def _answer_in_stream(self, raw: bytes, caller: Caller) -> bytes:
        """Returns the answer to one request of a stream, which may be its error."""
        request = kserve.ModelInferRequest()
        held: list[int] = []

        def hold(byte_count: int) -> None:
            held.append(byte_count)
            caller.add_stream_bytes(byte_count)

        try:
            request = await _parse(raw)
            pieces = await self._answer(request, caller, hold)
            return b"".join((wire.head(2, sum(map(len, pieces))), *pieces))
        except LayertapError as exc:
            error = exc
        except Exception:
            log.exception("a request of a stream failed")
            error = InternalError("the server failed; its log has the reason")
        finally:
            caller.add_stream_bytes(-sum(held))
        caller.record.failed_text_count += 1
        head = kserve.ModelInferResponse(model_name=request.model_name, id=request.id)
        message = f"{error.code.name}: {error.details}"
        return kserve.ModelStreamInferResponse(error_message=message, infer_response=head).SerializeToString()

    async def _answer(
        self, request: kserve.ModelInferRequest, caller: Caller, hold: Hold
    ) -> Sequence[bytes | memoryview]:
        """Returns the answer to one request in pieces."""
        self._check_model(request.model_name, request.model_version)
        asked = requests.read_options(request, self._outputs, self._model, self._sentences)
        limits = self._preprocessor.limits
        read = functools.partial(requests.read_inputs, request, max_text_count=limits.max_text_count)
        inputs = await offload(read, in_thread=request.ByteSize() > LARGE_BYTES)
        label = requests.TEXT if inputs[0].HasField("text") else "texts"
        plan, tokenized = await self._preprocessor.embed(inputs, asked.options, caller.record, hold=hold, label=label)
        size = tensors.response_bytes(plan, tokenized)
        if size > limits.max_response_bytes:
            raise InvalidArgumentError(
                f"the answer would have {size} bytes, the most is {limits.max_response_bytes} (--max-response-bytes of "
                "the server); send fewer texts, or ask for fewer layers, at once"
            )
        parts = await rows.collect(self._batcher, plan, tokenized, caller, label=label)
        pack = functools.partial(tensors.pack, request, asked, plan, tokenized, parts)
        return await offload(pack, in_thread=size > LARGE_BYTES)

    def _check_model(self, name: str, version: str) -> None:
        if name != self._model.model_id or version not in ("", _VERSION):
            raise NotFoundError(f"this server has the model {self._model.model_id}, version {_VERSION}, and no other")


async def _parse(raw: bytes) -> kserve.ModelInferRequest:
    return await parse(
        kserve.ModelInferRequest, raw, bytes_field=kserve.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
    )
