"""Requests as they come off the socket: parsed, checked, tokenized, and never so that the event loop waits.

What takes long goes to a thread; what does not, stays: a thread would cost more than the work.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError, Message

from layertap.errors import InvalidArgumentError, LayertapError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.tokenizer import Item, Tokenized, Tokenizer
from layertap_server.observability.call_log import Record
from layertap_server.protocol.validation import Intake
from layertap_server.types import Plan, Text

MessageT = TypeVar("MessageT", bound=Message)
T = TypeVar("T")

LARGE_BYTES: Final = 64 << 10
"""From here on parsing and packing leave the loop."""
_LARGE_CHARACTERS: Final = 4 << 10
"""Likewise for tokenizing."""
_KNOWN_OPTIONS: Final = 256
"""Options whose plans are remembered: most callers ask for the same all day."""


class Reception:
    """Takes requests in for one model."""

    def __init__(self, *, intake: Intake, tokenizer: Tokenizer) -> None:
        """Takes what checks requests, and what makes tokens of texts."""
        self._intake = intake
        self._tokenizer = tokenizer
        self._known_plan = functools.lru_cache(_KNOWN_OPTIONS)(self._plan)

    async def embed(
        self, inputs: Sequence[pb.Input], options: pb.EmbedOptions, record: Record
    ) -> tuple[Plan, list[Tokenized]]:
        """Returns what an embed request asks for, and its texts as tokens.

        Raises:
            LayertapError: An option or a text is at fault.
        """
        plan = self._known_plan(_without_memory(options).SerializeToString(deterministic=True))
        self._intake.check_text_count(len(inputs))
        labels = [f"inputs[{n}]" for n in range(len(inputs))]
        prompt = self._intake.prompt(options)
        items = [self._intake.item(one, label, prompt=prompt) for one, label in zip(inputs, labels, strict=True)]
        started_at_ns = time.monotonic_ns()
        results = await self.encode(
            items,
            labels=labels,
            max_length=self._intake.max_length(options.max_length, at_most=self._intake.model.max_length),
            truncation=self._intake.truncation(options.truncation),
            lower_case=options.lower_case,
        )
        checked = [self._intake.checked(plan, one, label) for one, label in zip(results, labels, strict=True)]
        record.tokenize.note(started_at_ns, time.monotonic_ns())
        return plan, _all_good(checked)

    async def tokenize(self, request: pb.TokenizeRequest, record: Record) -> list[Tokenized]:
        """Returns the texts of a Tokenize request as tokens.

        Raises:
            LayertapError: An option or a text is at fault.
        """
        self._intake.check_text_count(len(request.inputs))
        max_length = self._intake.max_length(request.max_length, at_most=self._intake.limits.character_count)
        if not 0 <= request.pad_to <= max_length:
            raise InvalidArgumentError(
                f"pad_to is {request.pad_to}; it runs from 1 to max_length {max_length}, 0 means none"
            )
        labels = [f"inputs[{request.first_text + n}]" for n in range(len(request.inputs))]
        items = [self._intake.item(one, label) for one, label in zip(request.inputs, labels, strict=True)]
        for label, item in zip(labels, items, strict=True):
            if isinstance(item, Text):
                raise InvalidArgumentError(f"{label} is token ids already; send text, or ask Decode for its string")
        started_at_ns = time.monotonic_ns()
        results = await self.encode(
            items,
            labels=labels,
            max_length=max_length,
            truncation=self._intake.truncation(request.truncation),
            add_special_tokens=not request.omit_special_tokens,
        )
        record.tokenize.note(started_at_ns, time.monotonic_ns())
        texts = _all_good(results)
        record.take([one.text for one in texts])
        return texts

    async def encode(self, items: Sequence[Item], **options: Any) -> list[Tokenized | LayertapError]:
        """Tokenizes texts; see `Tokenizer.encode`."""
        size = sum(map(_character_count, items))
        return await offload(lambda: self._tokenizer.encode(items, **options), in_thread=size > _LARGE_CHARACTERS)

    def _plan(self, options: bytes) -> Plan:
        return self._intake.plan(pb.EmbedOptions.FromString(options))


async def parse(kind: type[MessageT], raw: bytes) -> MessageT:
    """Returns a message.

    Raises:
        InvalidArgumentError: It is none of this kind.
    """
    try:
        return await offload(lambda: kind.FromString(raw), in_thread=len(raw) > LARGE_BYTES)
    except DecodeError as exc:
        raise InvalidArgumentError(
            f"the request is no {kind.DESCRIPTOR.name}; send what the contract describes"
        ) from exc


async def offload(work: Callable[[], T], *, in_thread: bool) -> T:
    """Does some work here, or in a thread if it takes long."""
    return await asyncio.to_thread(work) if in_thread else work()


def _without_memory(options: pb.EmbedOptions) -> pb.EmbedOptions:
    """Returns options without what is another in each call, and changes nothing of the plan."""
    if not options.HasField("shared_memory"):
        return options
    plain = pb.EmbedOptions()
    plain.CopyFrom(options)
    plain.ClearField("shared_memory")
    return plain


def _all_good(results: Iterable[Tokenized | LayertapError]) -> list[Tokenized]:
    """Returns the texts if none is refused, else raises the first refusal."""
    texts = []
    for result in results:
        if isinstance(result, LayertapError):
            raise result
        texts.append(result)
    return texts


def _character_count(item: Item) -> int:
    if isinstance(item, Text):
        return 0
    return len(item) if isinstance(item, str) else sum(map(len, item))
