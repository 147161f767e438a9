"""The one pipeline of all requests with texts: options to a plan, inputs to tokenized texts or the errors they get.

Embed, EmbedLayers, EmbedStream and Tokenize all enter here, and each check is made once, in this order: options, count,
each text, its tokens. Rules:
- Inputs are read and tokenized in slices, each at most one piece of work of a thread. Slices of several callers
  alternate, and a caller that has left costs at most the slice under way.
- Short work stays on the event loop: a thread would cost more than the work.
- Plans are cached by their known fields, up to a size: a request cannot make the cache hold more than it states here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from layertap.errors import InvalidArgumentError, LayertapError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.model.tokenizer import Item, Tokenized, Tokenizer
from layertap_server.observability.call_log import Record
from layertap_server.protocol import output_spec, validation
from layertap_server.protocol.limits import Limits
from layertap_server.types import Plan, Text

MessageT = TypeVar("MessageT", bound=Message)
T = TypeVar("T")
Result = Tokenized | LayertapError

LARGE_BYTES: Final = 64 << 10
"""Parsing and packing of more leave the event loop."""
_LARGE_INPUT_BYTES: Final = 4 << 10
"""Likewise for tokenizing."""
_SLICE_BYTES: Final = 64 << 10
"""Inputs that are tokenized at once; a longer text is a slice of its own."""
_SLICE_TEXTS: Final = 256
_SLICE_IDS: Final = 16 << 10
"""What is decoded at once, in token ids."""

_CACHED_OPTIONS: Final = 256
_MAX_KEY_BYTES: Final = 4 << 10
"""Larger options are resolved anew for each request. The keys of a full cache take 1 MiB."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of an embed request, checked and resolved for one model.

    Attributes:
        plan: What is asked of each text.
        prompt: What is put before each text.
        max_length: The most tokens of a text.
        truncation: "error", "right" or "left".
        lower_case: Whether strings are turned to lower case first.
    """

    plan: Plan
    prompt: str
    max_length: int
    truncation: str
    lower_case: bool


class Preprocessor:
    """The pipeline of one model."""

    def __init__(self, *, model: ModelFacts, limits: Limits, sentences: SentenceConfig, tokenizer: Tokenizer) -> None:
        self.model = model
        self.limits = limits
        self._sentences = sentences
        self._tokenizer = tokenizer
        self._executor = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="tokenize")
        self._cached = functools.lru_cache(_CACHED_OPTIONS)(self._parse_options)

    def options(self, options: pb.EmbedOptions) -> Options:
        """Returns resolved options.

        Raises:
            InvalidArgumentError: if an option is at fault.
            FailedPreconditionError: if the model has no pooler.
        """
        if options.ByteSize() > _MAX_KEY_BYTES:
            return self._resolve(options)
        known = pb.EmbedOptions()
        known.CopyFrom(options)
        known.ClearField("shared_memory")  # It is another in each call, and changes nothing here.
        known.DiscardUnknownFields()
        return self._cached(known.SerializeToString(deterministic=True))

    def named_prompt(self, options: pb.EmbedOptions) -> str:
        """Returns the prompt that options name; empty if they name none."""
        return self._sentences.prompts[options.prompt_name] if options.prompt_name else ""

    async def embed(
        self, inputs: Sequence[pb.Input], options: pb.EmbedOptions, record: Record, *, label: str = "inputs"
    ) -> tuple[Plan, list[Tokenized]]:
        """Returns the plan and the texts of a request that fails as a whole.

        Args:
            inputs: The texts.
            options: What is asked of each.
            record: What is known of the call.
            label: What an error calls the list of texts.

        Raises:
            LayertapError: if an option or a text is at fault.
        """
        resolved = self.options(options)
        validation.check_text_count(len(inputs), self.limits)
        texts: list[Tokenized] = []
        labels = [f"{label}[{n}]" for n in range(len(inputs))]
        started_at_ns = time.monotonic_ns()
        for part, size in _slices(inputs):
            texts += _all_good(await self._slice(inputs[part], resolved, labels[part], size))
        record.tokenize.note(started_at_ns, time.monotonic_ns())
        return resolved.plan, texts

    async def embed_each(
        self, inputs: Sequence[pb.Input], options: Options, labels: Sequence[str], record: Record
    ) -> list[Result]:
        """Returns for each text of a stream its tokens, or why it alone is refused."""
        results: list[Result] = []
        started_at_ns = time.monotonic_ns()
        for part, size in _slices(inputs):
            results += await self._slice(inputs[part], options, labels[part], size)
        record.tokenize.note(started_at_ns, time.monotonic_ns())
        return results

    async def tokenize(self, request: pb.TokenizeRequest, record: Record) -> list[Tokenized]:
        """Returns the texts of a Tokenize request.

        Raises:
            LayertapError: if an option or a text is at fault, or the answer would be too large.
        """
        inputs, limits = request.inputs, self.limits
        validation.check_text_count(len(inputs), limits)
        max_length = validation.max_length(request.max_length, self.model, at_most=limits.max_character_count)
        validation.check_padding(request.pad_to, max_length, len(inputs), limits)
        truncation = validation.truncation(request.truncation)
        labels = [f"inputs[{request.first_text + n}]" for n in range(len(inputs))]

        def work(part: slice) -> list[Result]:
            items = [self._item(one, label) for one, label in zip(inputs[part], labels[part], strict=True)]
            for label, item in zip(labels[part], items, strict=True):
                if isinstance(item, LayertapError):
                    raise item
                if isinstance(item, Text):
                    raise InvalidArgumentError(f"{label} is token ids already; send text, or ask Decode for its string")
            return self._tokenizer.encode(
                [item for item in items if not isinstance(item, LayertapError)],
                labels=labels[part],
                max_length=max_length,
                truncation=truncation,
                add_special_tokens=not request.omit_special_tokens,
            )

        texts: list[Tokenized] = []
        token_count = 0
        started_at_ns = time.monotonic_ns()
        for part, size in _slices(inputs):
            found = _all_good(await self._offload(functools.partial(work, part), in_thread=size > _LARGE_INPUT_BYTES))
            token_count += sum(max(one.text.token_count, request.pad_to) for one in found)
            validation.check_answered_tokens(token_count, limits)
            texts += found
        record.tokenize.note(started_at_ns, time.monotonic_ns())
        record.take([one.text for one in texts])
        return texts

    async def decode(self, request: pb.DecodeRequest, record: Record) -> list[str]:
        """Returns the strings of a Decode request.

        Raises:
            InvalidArgumentError: if the request is at fault, or the answer would be too large.
        """
        counts = validation.check_decode(request.texts, self.limits)
        record.text_count += len(counts)
        record.token_count += sum(counts)

        def work(part: slice) -> list[str]:
            ids = [
                validation.ids(text, f"texts[{part.start + n}]", self.model).tolist()
                for n, text in enumerate(request.texts[part])
            ]
            return self._tokenizer.decode(ids, skip_special_tokens=request.skip_special_tokens)

        texts: list[str] = []
        left = self.limits.max_response_bytes
        for part, size in _cut(counts, _SLICE_IDS):
            found = await self._offload(functools.partial(work, part), in_thread=size > 256)
            left -= sum(len(text.encode()) + 6 for text in found)
            if left < 0:
                raise InvalidArgumentError(
                    f"the answer has more than {self.limits.max_response_bytes} bytes, the most of one answer; "
                    "send fewer texts at once"
                )
            texts += found
        return texts

    def _parse_options(self, options: bytes) -> Options:
        return self._resolve(pb.EmbedOptions.FromString(options))

    def _resolve(self, options: pb.EmbedOptions) -> Options:
        plan = output_spec.plan(options, self.model)
        prompt = validation.prompt(options, self._sentences)
        max_length = validation.max_length(options.max_length, self.model, at_most=self.model.max_length)
        if prompt and not self._sentences.include_prompt:
            first_row = self._tokenizer.prompt_token_count(prompt, max_length=max_length, lower_case=options.lower_case)
            plan = plan.pooling_from(first_row)
        return Options(
            plan=plan,
            prompt=prompt,
            max_length=max_length,
            truncation=validation.truncation(options.truncation),
            lower_case=options.lower_case,
        )

    async def _slice(
        self, inputs: Sequence[pb.Input], options: Options, labels: Sequence[str], size: int
    ) -> list[Result]:
        """Returns the results of texts that are one piece of work."""

        def work() -> list[Result]:
            results: list[Result | None] = []
            items: list[Item] = []
            for message, label in zip(inputs, labels, strict=True):
                item = self._item(message, label, options.prompt)
                results.append(item if isinstance(item, LayertapError) else None)
                if not isinstance(item, LayertapError):
                    items.append(item)
            encoded = iter(
                self._tokenizer.encode(
                    items,
                    labels=[label for label, result in zip(labels, results, strict=True) if result is None],
                    max_length=options.max_length,
                    truncation=options.truncation,
                    lower_case=options.lower_case,
                )
            )
            return [
                self._checked(options.plan, next(encoded), label) if result is None else result
                for result, label in zip(results, labels, strict=True)
            ]

        return await self._offload(work, in_thread=size > _LARGE_INPUT_BYTES)

    def _item(self, message: pb.Input, label: str, prompt: str = "") -> Item | LayertapError:
        try:
            return validation.item(message, label, self.model, self.limits, prompt=prompt)
        except LayertapError as exc:
            return exc

    def _checked(self, plan: Plan, result: Result, label: str) -> Result:
        if isinstance(result, LayertapError):
            return result
        try:
            validation.check_fits(result.text, label, self.model)
            if plan.excludes_special_tokens:
                result = self._tokenizer.mark_special_tokens(result)
            checked = validation.check_tokenized(plan, result, label, self.limits)
        except LayertapError as exc:
            return exc
        # The tokenizer's own result is many times the size of the ids: it is kept only for an answer that needs it.
        return checked if plan.return_tokens else dataclasses.replace(checked, encoding=None)

    async def _offload(self, work: Callable[[], T], *, in_thread: bool) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work) if in_thread else work()


async def parse(kind: type[MessageT], raw: bytes) -> MessageT:
    """Returns a message.

    Raises:
        InvalidArgumentError: if the bytes are no such message.
    """
    try:
        return await offload(lambda: kind.FromString(raw), in_thread=len(raw) > LARGE_BYTES)
    except DecodeError as exc:
        raise InvalidArgumentError(
            f"the request is no {kind.DESCRIPTOR.name}; send what the contract describes"
        ) from exc


async def offload(work: Callable[[], T], *, in_thread: bool) -> T:
    """Returns what some work gives, done in a thread if it takes long."""
    return await asyncio.to_thread(work) if in_thread else work()


def _slices(inputs: Sequence[pb.Input]) -> Iterator[tuple[slice, int]]:
    return _cut([one.ByteSize() for one in inputs], _SLICE_BYTES)


def _cut(sizes: Sequence[int], most: int) -> Iterator[tuple[slice, int]]:
    """Yields consecutive parts of a list, each of at most so much in all or one entry, and what each is in all."""
    start = total = 0
    for end, size in enumerate(sizes):
        if end > start and (total + size > most or end - start == _SLICE_TEXTS):
            yield slice(start, end), total
            start, total = end, 0
        total += size
    if sizes:
        yield slice(start, len(sizes)), total


def _all_good(results: Sequence[Result]) -> list[Tokenized]:
    """Returns the texts if none is refused, else raises the first refusal."""
    texts = []
    for result in results:
        if isinstance(result, LayertapError):
            raise result
        texts.append(result)
    return texts
