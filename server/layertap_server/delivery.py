"""Computed rows as messages of the contract: headers, frames, whole tensors, packed results.

Pure, but for protobuf. What the batcher delivers for some texts goes in, serialized messages that keep below the
frame size come out, each payload written once, behind its head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from layertap import wire
from layertap.errors import LayertapError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.batcher import RowsReady
from layertap_server.inbox import Clock
from layertap_server.shm import Lending
from layertap_server.tokenizer import Tokenized, Tokenizer
from layertap_server.work import Plan

_HEAD_BYTES = 256
"""Room in a message for all but its payload; larger lists are counted by themselves."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What opens every answer.

    Attributes:
        model_id: The name of the model.
        fingerprint: Its fingerprint.
        layer_count: L.
        pad_token_id: The id that padding uses.
    """

    model_id: str
    fingerprint: str
    layer_count: int
    pad_token_id: int


def header(identity: Identity, plan: Plan, tokenized: Sequence[Tokenized] = ()) -> pb.EmbedHeader:
    """Returns what opens an answer; without texts, that of an EmbedStream."""
    return pb.EmbedHeader(
        model_id=identity.model_id,
        fingerprint=identity.fingerprint,
        layer_count=identity.layer_count,
        pad_token_id=identity.pad_token_id,
        dtype=wire.DTYPES[plan.dtype],
        outputs=[
            pb.OutputHeader(layers=output.layers, row_size=output.row_size, per_token=output.per_token)
            for output in plan.outputs
        ],
        token_counts=[one.text.token_count for one in tokenized],
        truncated=[one.truncated for one in tokenized],
    )


def timings(clock: Clock) -> pb.Timings:
    """Returns where the time of a request went."""
    return pb.Timings(
        queue_time_ns=clock.queue_time_ns,
        tokenize_time_ns=clock.tokenize_time_ns,
        compute_time_ns=clock.compute_time_ns,
    )


def tokens(one: Tokenized, tokenizer: Tokenizer, *, pad_to: int = 0) -> pb.TokenizedText:
    """Returns one text as tokens, padded if asked."""
    encoding, text = one.encoding, one.text
    count = text.token_count
    if encoding is None:
        special = [int(token_id in tokenizer.special_token_ids) for token_id in text.input_ids.tolist()]
        return pb.TokenizedText(
            tokens=tokenizer.pieces(text),
            input_ids=text.input_ids.tolist(),
            attention_mask=[1] * count if text.attention_mask is None else text.attention_mask.tolist(),
            token_type_ids=[0] * count if text.token_type_ids is None else text.token_type_ids.tolist(),
            special_tokens_mask=special,
            offset_mapping=[0] * (2 * count),
            word_ids=[-1] * count,
        )
    pads = max(0, pad_to - count)
    return pb.TokenizedText(
        tokens=encoding.tokens + [tokenizer.pad_token] * pads,
        input_ids=encoding.ids + [tokenizer.pad_token_id] * pads,
        attention_mask=[1] * count + [0] * pads,
        token_type_ids=encoding.type_ids + [0] * pads,
        special_tokens_mask=encoding.special_tokens_mask + [1] * pads,
        offset_mapping=[end for pair in encoding.offsets for end in pair] + [0] * (2 * pads),
        word_ids=[-1 if word is None else word for word in encoding.word_ids] + [-1] * pads,
        truncated=one.truncated,
    )


def token_groups(
    tokenized: Sequence[Tokenized], tokenizer: Tokenizer, max_frame_bytes: int
) -> Iterator[pb.EmbedLayersResponse]:
    """Yields the tokens of all texts in messages below the frame size."""
    group = pb.TokenizedTexts(first_text=0)
    size = 0
    for position, one in enumerate(tokenized):
        text = tokens(one, tokenizer)
        size += text.ByteSize() + 8
        if group.texts and size > max_frame_bytes - _HEAD_BYTES:
            yield pb.EmbedLayersResponse(tokens=group)
            group, size = pb.TokenizedTexts(first_text=position), text.ByteSize() + 8
        group.texts.append(text)
    yield pb.EmbedLayersResponse(tokens=group)


def frames(ready: RowsReady, plan: Plan, max_frame_bytes: int, lending: Lending | None = None) -> Iterator[bytes]:
    """Yields one layer of some texts as EmbedLayers messages below the frame size.

    What lies in shared memory is one message, which says where.
    """
    output = plan.outputs[ready.rows.output_index]
    row_bytes = plan.row_bytes(output)
    counts = [text.token_count for text in ready.texts] if output.per_token else [1] * len(ready.texts)
    starts = np.cumsum([0, *counts])
    if shared := _shared_rows([ready.rows.data], lending):
        frame = pb.Frame(
            output_index=ready.rows.output_index,
            layer=ready.rows.layer,
            first_text=ready.first_text,
            row_count=int(starts[-1]),
        )
        yield pb.EmbedLayersResponse(frame=frame, shared_rows=shared).SerializeToString()
        return
    for first, count in _cuts(int(starts[-1]), row_bytes, max_frame_bytes):
        text = int(np.searchsorted(starts, first, side="right")) - 1
        frame = pb.Frame(
            output_index=ready.rows.output_index,
            layer=ready.rows.layer,
            first_text=ready.first_text + text,
            first_row=first - int(starts[text]),
            row_count=count,
        )
        data = ready.rows.data[first * row_bytes : (first + count) * row_bytes]
        yield wire.join(pb.EmbedLayersResponse(frame=frame), data)


def tensors(parts: Sequence[RowsReady], plan: Plan) -> Iterator[pb.LayerTensor]:
    """Yields all layers of all texts as whole tensors, by output and layer."""
    for output_index, output in enumerate(plan.outputs):
        for layer in output.layers:
            own = [p for p in parts if (p.rows.output_index, p.rows.layer) == (output_index, layer)]
            own.sort(key=lambda part: part.first_text)
            data = b"".join(part.rows.data for part in own)
            shape = len(data) // plan.row_bytes(output), output.row_size
            tensor = pb.Tensor(dtype=wire.DTYPES[plan.dtype], shape=shape, data=data)
            yield pb.LayerTensor(output_index=output_index, layer=layer, tensor=tensor)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """One text of an EmbedStream: its rows by output and layer, or why there are none.

    Attributes:
        id: The caller's id.
        tokenized: The text; None if it failed before it had tokens.
        parts: For each output in order and each of its layers ascending: output index, layer, rows.
        timings: Where the time went.
        error: Why there is no result.
        run: Whatever is the same for texts of the same run.
        position: Which text of its run it is; its rows follow those of the one before.
    """

    id: int
    tokenized: Tokenized | None = None
    parts: Sequence[tuple[int, int, memoryview]] = ()
    timings: pb.Timings | None = None
    error: LayertapError | None = None
    run: object = None
    position: int = 0

    @property
    def byte_count(self) -> int:
        """The bytes of its rows."""
        return sum(len(rows) for _, _, rows in self.parts)


def results(
    batch: Sequence[Result], plan: Plan, tokenizer: Tokenizer, max_frame_bytes: int, lending: Lending | None = None
) -> Iterator[tuple[bytes, Sequence[Result]]]:
    """Yields results as EmbedStream messages, each with the results that it completes.

    Results whose rows lie one after the other in shared memory make one message, which says where. Of the others small
    ones are packed together, large ones get frames of their own.
    """
    for stretch, lent in _stretches(batch, lending):
        if lent:
            yield from _lent(stretch, plan, tokenizer, max_frame_bytes, lent)
        else:
            yield from _sent(stretch, plan, tokenizer, max_frame_bytes)


def _stretches(batch: Sequence[Result], lending: Lending | None) -> Iterator[tuple[Sequence[Result], Lending | None]]:
    """Yields results that follow each other in shared memory, with what lends it, and all others between them."""
    if lending is None:
        yield batch, None
        return
    stretch: list[Result] = []
    lent: Lending | None = None
    for result in batch:
        last = stretch[-1] if stretch else None
        if last is None or result.run is not last.run or result.error is not None or last.error is not None:
            lies_there = any(lending.offset_of(rows) is not None for _, _, rows in result.parts)
            goes_on = last is not None and not lies_there and lent is None
        else:
            lies_there = lent is not None
            goes_on = lent is None or result.position == last.position + 1
        if not goes_on:
            if stretch:
                yield stretch, lent
            stretch, lent = [], lending if lies_there else None
        stretch.append(result)
    if stretch:
        yield stretch, lent


def _lent(
    batch: Sequence[Result], plan: Plan, tokenizer: Tokenizer, max_frame_bytes: int, lending: Lending
) -> Iterator[tuple[bytes, Sequence[Result]]]:
    """Yields results of consecutive texts of one run, which lie in shared memory, some of their outputs perhaps not."""
    room = max_frame_bytes - _HEAD_BYTES
    local = [n for n, (_, _, rows) in enumerate(batch[0].parts) if lending.offset_of(rows) is None]
    packed: list[Result] = []
    size = 0
    for result in (*batch, None):
        own = 0
        if result is not None:
            own = 64 + sum(len(result.parts[n][2]) for n in local) + _token_bytes(result, plan)
        if packed and (result is None or size + own > room):
            shared = _shared_rows([rows for _, _, rows in packed[0].parts], lending) if size <= room else None
            if shared is None:
                yield from _sent(packed, plan, tokenizer, max_frame_bytes)
            else:
                yield _pack(packed, plan, tokenizer, shared), packed
            packed, size = [], 0
        if result is not None:
            packed.append(result)
            size += own


def _sent(
    batch: Sequence[Result], plan: Plan, tokenizer: Tokenizer, max_frame_bytes: int
) -> Iterator[tuple[bytes, Sequence[Result]]]:
    """Yields results as messages with their rows."""
    room = max_frame_bytes - _HEAD_BYTES
    packed: list[Result] = []
    size = 0
    for result in batch:
        own = result.byte_count + _token_bytes(result, plan) + 64
        own += len(result.error.details.encode()) if result.error else 0
        if packed and size + own > room:
            yield _pack(packed, plan, tokenizer), packed
            packed, size = [], 0
        if own > room:
            *frames, last = _spread(result, plan, tokenizer, max_frame_bytes)
            yield from ((frame(), ()) for frame in frames)
            yield last(), (result,)
        else:
            packed.append(result)
            size += own
    if packed:
        yield _pack(packed, plan, tokenizer), packed


def split_run(ready: Sequence[RowsReady], plan: Plan) -> list[list[tuple[int, int, memoryview]]]:
    """Returns the rows of each text of a run, by output and layer."""
    order = sorted(ready, key=lambda part: (part.rows.output_index, part.rows.layer))
    texts: list[list[tuple[int, int, memoryview]]] = [[] for _ in order[0].texts]
    for part in order:
        output = plan.outputs[part.rows.output_index]
        row_bytes, start = plan.row_bytes(output), 0
        for own, text in zip(texts, part.texts, strict=True):
            end = start + row_bytes * (text.token_count if output.per_token else 1)
            own.append((part.rows.output_index, part.rows.layer, part.rows.data[start:end]))
            start = end
    return texts


def failures_of(ready: Sequence[RowsReady]) -> Mapping[int, LayertapError]:
    """Returns the texts, by position in the run, that failed, each with its first error."""
    failures: dict[int, LayertapError] = {}
    for part in ready:
        for position, error in part.rows.failures.items():
            failures.setdefault(position, error)
    return failures


def _shared_rows(data: Sequence[memoryview], lending: Lending | None) -> pb.SharedRows | None:
    """Returns where payloads lie if any of them lies in shared memory; a message must then be sent with it."""
    if lending is None:
        return None
    offsets = [lending.offset_of(rows) for rows in data]
    inside = [offset for offset in offsets if offset is not None]
    if not inside or (slot := lending.send(inside)) is None:
        return None
    return pb.SharedRows(offsets=[-1 if offset is None else offset for offset in offsets], slot=slot)


def _token_bytes(result: Result, plan: Plan) -> int:
    """Returns room for the tokens of a result, if they were asked for."""
    return 48 * result.tokenized.text.token_count if plan.return_tokens and result.tokenized is not None else 0


def _cuts(row_count: int, row_bytes: int, max_frame_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields first row and row count of each frame; one row is the least."""
    step = max(1, (max_frame_bytes - _HEAD_BYTES) // row_bytes)
    for first in range(0, row_count, step):
        yield first, min(step, row_count - first)


def _pack(batch: Sequence[Result], plan: Plan, tokenizer: Tokenizer, shared: pb.SharedRows | None = None) -> bytes:
    good = [result for result in batch if result.error is None]
    message = pb.StreamResults(
        ids=[result.id for result in good],
        failures=[
            pb.StreamFailure(id=result.id, code=int(result.error.code), message=result.error.details)
            for result in batch
            if result.error is not None
        ],
    )
    for result in good:
        assert result.tokenized is not None and result.timings is not None
        message.timings.append(result.timings)
        message.token_counts.append(result.tokenized.text.token_count)
        message.truncated.append(result.tokenized.truncated)
        if plan.return_tokens:
            message.tokens.append(tokens(result.tokenized, tokenizer))
    tensors = list(zip(*(result.parts for result in good), strict=True))
    if shared is not None:
        tensors = [parts for parts, offset in zip(tensors, shared.offsets, strict=True) if offset == -1]
    data = b"".join(rows for parts in tensors for _, _, rows in parts)
    return wire.join(pb.EmbedStreamResponse(results=message, shared_rows=shared), data)


def _spread(result: Result, plan: Plan, tokenizer: Tokenizer, max_frame_bytes: int) -> Iterator[Callable[[], bytes]]:
    """Yields what makes the frames of one large result, each made only when its turn comes."""
    assert result.tokenized is not None
    count = result.tokenized.text.token_count
    last = result.parts[-1]
    own_tokens = tokens(result.tokenized, tokenizer) if plan.return_tokens else None
    max_data_bytes = max_frame_bytes - (own_tokens.ByteSize() if own_tokens else 0)
    for part in result.parts:
        output_index, layer, rows = part
        output = plan.outputs[output_index]
        row_count = count if output.per_token else 1
        row_bytes = plan.row_bytes(output)
        for first, taken in _cuts(row_count, row_bytes, max_data_bytes):
            frame = pb.StreamFrame(
                id=result.id,
                output_index=output_index,
                layer=layer,
                first_row=first,
                row_count=taken,
                token_count=count,
                truncated=result.tokenized.truncated,
                done=part is last and first + taken == row_count,
            )
            if frame.done:
                frame.timings.CopyFrom(result.timings or pb.Timings())
                if own_tokens is not None:
                    frame.tokens.CopyFrom(own_tokens)
            data = rows[first * row_bytes : (first + taken) * row_bytes]
            yield partial(wire.join, pb.EmbedStreamResponse(frame=frame), data)
