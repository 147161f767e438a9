"""A model in this process: any number of inputs in, their embeddings out, in order and in bounded memory.

Texts pass the same preprocessor, queue and engine as those of an EmbedStream, so numbers and refusals are the same. How
they become pieces is in `pieces`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Final, TypedDict, Unpack

from layertap._protocol.inputs import InputItem
from layertap.errors import LayertapError
from layertap.results.embedding import Embedding
from layertap.types import ModelRef
from layertap.v1 import embedding_pb2 as pb
from layertap_server.app.limits import limits_of
from layertap_server.app.model_loading import find_model
from layertap_server.config import Config
from layertap_server.engine import cpu_threads
from layertap_server.engine.encoder import Encoder
from layertap_server.observability.call_log import Record
from layertap_server.offline.pieces import LABEL, Builder, Good, Piece, Stream, Tokenize
from layertap_server.protocol import responses
from layertap_server.protocol.preprocess import Preprocessor, Result
from layertap_server.scheduler.batcher import Batcher

_SAMPLE: Final = "a"
_UNBOUNDED: Final = 1 << 40
"""For limits of the queue, which holds no more than what is read ahead."""


class EngineOptions(TypedDict, total=False):
    """How the model is loaded and run: flags of `layertap-server` of the same names."""

    revision: str
    device: str
    dtype: str
    instances: int
    instance_threads: int
    max_batch_tokens: int
    max_character_count: int


class OfflineModel:
    """A loaded model with its engine threads. Several threads may embed at once.

    Attributes:
        ref: Its name and fingerprint.
    """

    def __init__(self, model_id: str = "", **engine: Unpack[EngineOptions]) -> None:
        """Loads it.

        Args:
            model_id: A folder with a checkpoint, or the name of one on the hub. Empty: the embedded model.
            engine: How it is loaded and run.

        Raises:
            ConfigError: if the model cannot be served, or an option does not suit it or the machine.
        """
        config = Config(
            model_id=model_id,
            max_queue_text_count=_UNBOUNDED,
            max_queue_token_count=_UNBOUNDED,
            max_output_bytes=_UNBOUNDED,
            **engine,
        )
        found = find_model(config)
        # No caller waits alone: a team of threads would only take cores from other processes.
        threads = dataclasses.replace(found.threads, lone_thread_count=found.threads.thread_count)
        found = dataclasses.replace(found, threads=threads)
        encoders = found.encoders(Encoder, before_fork=False)
        facts = found.facts(has_pooler=encoders[0].has_pooler)
        self.ref = ModelRef(model_id=facts.model_id, fingerprint=facts.fingerprint)
        self._facts, self._tokenizer = facts, found.tokenizer
        self._preprocessor = Preprocessor(
            model=facts, limits=limits_of(config), sentences=found.sentences, tokenizer=found.tokenizer
        )
        self._batcher = Batcher(
            cpu_threads.make(encoders, threads),
            found.queue_limits(config),
            apply_modules=encoders[0].apply_modules,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="tokenizing", daemon=True).start()

    def blank(self, options: pb.EmbedOptions) -> Embedding:
        """Returns an embedding of one short text with zeros for numbers: it has all arrays in their types.

        Raises:
            LayertapError: if an option is at fault.
        """
        builder, tokenize = self._prepare(options)
        message = pb.Input(text=_SAMPLE)
        (result,) = tokenize([message]).result()
        if isinstance(result, LayertapError):
            raise result
        return builder.blank(Good(message=message, tokenized=result, byte_count=0))

    def embed(self, inputs: Iterable[InputItem], options: pb.EmbedOptions) -> Iterator[Piece]:
        """Embeds inputs; yields their embeddings piece by piece, in order.

        Args:
            inputs: Texts as `Client.embed_stream` takes them; they are read as there is room.
            options: What is asked of each.

        Raises:
            LayertapError: if an option is at fault, or the engine has failed.
        """
        builder, tokenize = self._prepare(options)
        return Stream(inputs, tokenize, builder).pieces(self._batcher)

    def _prepare(self, options: pb.EmbedOptions) -> tuple[Builder, Tokenize]:
        resolved = self._preprocessor.options(options)

        def tokenize(messages: list[pb.Input]) -> Future[list[Result]]:
            labels = [LABEL] * len(messages)
            record = Record(method="", request_id="", client="")
            work = self._preprocessor.embed_each(messages, resolved, labels, record)
            return asyncio.run_coroutine_threadsafe(work, self._loop)

        header = responses.header(self._facts, resolved.plan)
        builder = Builder(options=options, header=header, plan=resolved.plan, tokenizer=self._tokenizer)
        return builder, tokenize
