"""The one pipeline of all requests that embed texts: options to a plan, inputs to tokens or to the errors they get.

Embed, EmbedLayers and EmbedStream all enter here, and each check is made once, in this order: options, count, each
text, its tokens. Rules:
- Inputs are read and tokenized in slices, long ones in threads; see `offload`.
- Plans are cached by their known fields, up to a size: a request cannot make the cache hold more than it states here.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar, cast

from layertap.errors import LayertapError
from layertap.types import Limits
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.observability.call_log import Record
from layertap_server.protocol import spans, validation
from layertap_server.protocol.offload import LARGE_BYTES, SLICE_ENTRIES, Slices
from layertap_server.protocol.options import Options, resolve
from layertap_server.protocol.requests import EntryT, MessageT, parse_parts, sizes_of
from layertap_server.types import Plan

T = TypeVar("T")
Result = Tokenized | LayertapError
Hold = Callable[[int], None]
"""Counts bytes that a call holds from here on; raises if all calls together would hold too many."""

_SLICE_BYTES: Final = 16 << 10
"""Inputs that are tokenized at once, which takes a few milliseconds."""
_LARGE_SLICE_BYTES: Final = 4 << 10
"""Tokenizing of more leaves the event loop."""
_IDS_A_TEXT: Final = 16
"""So many bytes of token ids, which need no tokenizing, take as long as one of text."""
HELD_TEXT_BYTES: Final = 1024
"""What the server holds of one text besides its tokens and words, from its tokenizing to its answer."""
_HELD_TOKEN_BYTES: Final = 16
_HELD_ENCODED_TOKEN_BYTES: Final = 192
"""Of one token where the tokenizer's own result is kept, measured with tokens of one character."""
_HELD_SPAN_BYTES: Final = 40
"""Likewise of one span."""
_HELD_WORD_BYTES: Final = 40

_CACHED_OPTIONS: Final = 256
_MAX_KEY_BYTES: Final = 4 << 10
"""Larger options are resolved anew for each request. The keys of a full cache take 1 MiB."""


class Preprocessor:
    """The pipeline of one model.

    Attributes:
        model: The model's facts.
        limits: The limits in force.
        sentences: How the model's folder makes one vector of a text.
        tokenizer: The model's tokenizer.
        max_input_bytes: The most bytes of one text, as a message.
        slices: The threads in which long work on texts is done.
    """

    def __init__(self, *, model: ModelFacts, limits: Limits, sentences: SentenceConfig, tokenizer: Tokenizer) -> None:
        self.model = model
        self.limits = limits
        self.sentences = sentences
        self.tokenizer = tokenizer
        self._resolve = functools.partial(resolve, model=model, sentences=sentences, tokenizer=tokenizer, limits=limits)
        # Words of one character take most, or ids with masks.
        self.max_input_bytes = max(8 * limits.max_character_count, 32 * model.max_length) + (4 << 10)
        self.slices = Slices()
        self._cached = functools.lru_cache(_CACHED_OPTIONS)(
            lambda options: self._resolve(pb.EmbedOptions.FromString(options))
        )

    def options(self, options: pb.EmbedOptions) -> Options:
        """Returns resolved options.

        Raises:
            InvalidArgumentError: if an option is at fault.
            FailedPreconditionError: if the model has no pooler.
        """
        if options.ByteSize() > _MAX_KEY_BYTES:
            return self._resolve(options)
        if options.HasField("shared_memory"):  # It is another in each call, and changes nothing here.
            shared, options = options, pb.EmbedOptions()
            options.CopyFrom(shared)
            options.ClearField("shared_memory")
        options.DiscardUnknownFields()
        return self._cached(options.SerializeToString())

    def parse(
        self, kind: type[MessageT], entry_kind: type[EntryT], raw: bytes
    ) -> Coroutine[Any, Any, tuple[MessageT, Sequence[EntryT]]]:
        """Returns a request and its texts; see `parse_parts`."""
        return parse_parts(kind, entry_kind, raw, self.limits, self.max_input_bytes)

    async def embed(
        self,
        inputs: Sequence[pb.Input],
        options: pb.EmbedOptions,
        record: Record,
        *,
        hold: Hold,
        label: str = "inputs",
        byte_count: int = LARGE_BYTES,
    ) -> tuple[Plan, list[Tokenized]]:
        """Returns the plan and the texts of a request that fails as a whole.

        Args:
            inputs: The texts.
            options: What is asked of each.
            record: What is known of the call.
            hold: Counts what the texts take, as they are tokenized.
            label: What an error calls the list of texts.
            byte_count: The most bytes that all texts together may have, where it is known that they are few.

        Raises:
            LayertapError: if an option or a text is at fault.
        """
        resolved, count = self.options(options), len(inputs)
        validation.check_text_count(count, self.limits)
        labels = [f"{label}[{n}]" for n in range(count)]
        if count <= SLICE_ENTRIES and byte_count <= _LARGE_SLICE_BYTES:  # What `run` would do, in fewer steps.
            started_at_ns = time.monotonic_ns()
            results = all_good(self._results(inputs, labels, resolved))
            hold(sum(map(held_bytes, results)))
            record.tokenize.note(started_at_ns, time.monotonic_ns())
            return resolved.plan, results

        def work(part: slice) -> list[Tokenized]:
            return all_good(self._results(inputs[part], labels[part], resolved))

        def note(texts: list[Tokenized]) -> None:
            hold(sum(map(held_bytes, texts)))

        return resolved.plan, await self.run(work, inputs, record, note)

    async def embed_each(
        self,
        inputs: Sequence[pb.Input],
        options: Options,
        labels: Sequence[str],
        record: Record,
        *,
        byte_count: int | None = None,
    ) -> list[Result]:
        """Returns for each text of a stream its tokens, or why it alone is refused.

        Args:
            inputs: The texts.
            options: What is asked of each.
            labels: What to call each in an error.
            record: What is known of the call.
            byte_count: The size of all together, where it is known: protobuf takes long to tell that of each.
        """

        def work(part: slice) -> list[Result]:
            return self._results(inputs[part], labels[part], options)

        sizes = None
        if byte_count is not None:
            size = byte_count // len(inputs)
            sizes = [size // _IDS_A_TEXT if one.HasField("token_ids") else size for one in inputs]
        return await self.run(work, inputs, record, sizes=sizes)

    async def run(
        self,
        work: Callable[[slice], list[T]],
        inputs: Sequence[pb.Input],
        record: Record,
        note: Callable[[list[T]], None] = lambda _: None,
        *,
        sizes: Sequence[int] | None = None,
    ) -> list[T]:
        """Returns what tokenizing gives for all inputs, and records the time that it took.

        Args:
            work: Returns that of a slice, in any thread.
            inputs: The texts.
            record: What is known of the call.
            note: Called on the event loop with the results of each slice, in order.
            sizes: The size of each text in bytes, where it is known.
        """
        started_at_ns = time.monotonic_ns()
        count = len(inputs)
        sizes = sizes_of(inputs) if sizes is None else sizes
        if count <= SLICE_ENTRIES and sum(sizes) <= _LARGE_SLICE_BYTES:
            results = work(slice(count))
            note(results)
        else:
            results = await self.slices.run(
                work, sizes, client=record.client, most=_SLICE_BYTES, large=_LARGE_SLICE_BYTES, note=note
            )
        record.tokenize.note(started_at_ns, time.monotonic_ns())
        return results

    def _results(self, inputs: Sequence[pb.Input], labels: Sequence[str], options: Options) -> list[Result]:
        items = validation.items(inputs, labels, self.model, self.limits, prompt=options.prompt)
        results = self.tokenizer.encode(items, labels, options.tokenizing)
        if validation.are_plain(results, options.most_plain_tokens):
            for message in inputs:
                if message.HasField("spans"):
                    break
            else:
                return results
        return [
            self._checked(options, message, one, label)
            for message, one, label in zip(inputs, results, labels, strict=True)
        ]

    def _checked(self, options: Options, message: pb.Input, result: Result, label: str) -> Result:
        if isinstance(result, LayertapError):
            return result
        plan = options.plan
        try:
            spans.check_asked(message, plan, label)
            validation.check_fits(result.text, label, self.model)
            if plan.has_spans and message.HasField("spans"):
                found = spans.spans_of(message, result, label, prompt_length=len(options.prompt))
                result = dataclasses.replace(result, text=dataclasses.replace(result.text, spans=found))
            if plan.excludes_special_tokens:
                result = self.tokenizer.mark_special_tokens(result)
            checked = validation.check_tokenized(plan, result, label, self.limits)
        except LayertapError as exc:
            return exc
        # The tokenizer's own result is many times the size of the ids: it is kept only for an answer that needs it.
        return checked if plan.return_tokens else Tokenized(text=checked.text, truncated=checked.truncated)


def held_bytes(one: Tokenized) -> int:
    """Returns about how much memory the server holds for a text until it is answered."""
    text = one.text
    token_bytes = _HELD_TOKEN_BYTES if one.encoding is None else _HELD_ENCODED_TOKEN_BYTES
    byte_count = HELD_TEXT_BYTES + token_bytes * len(text.input_ids)
    if text.words is not None or text.spans is not None:
        byte_count += _HELD_WORD_BYTES * text.word_count + _HELD_SPAN_BYTES * text.span_count
    return byte_count


def all_good(results: list[Result]) -> list[Tokenized]:
    """Returns the texts if none is refused, else raises the first refusal."""
    for result in results:
        if isinstance(result, LayertapError):
            raise result
    return cast("list[Tokenized]", results)
