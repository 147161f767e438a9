"""Computed rows as messages of the contract: headers, tokens, words, frames, whole tensors.

Pure apart from protobuf. Rows of some texts become serialized messages below the frame size; each payload is written
once, behind its head. What each part takes on the wire is estimated here too, from counts, before it is made.
`shared_rows` is the only place that asks whether rows are in shared memory. The messages of EmbedStream are made in
`stream_responses`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

from layertap import wire
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.observability.call_log import Record
from layertap_server.scheduler.events import RowsReady
from layertap_server.shared_memory.segment import Lending
from layertap_server.types import Plan, Text, Unit

MessageT = TypeVar("MessageT", pb.TokenizedText, pb.SplitText)

HEAD_BYTES: Final = 256
"""Room in a streamed message for all but its rows and its lists."""
TEXT_BYTES: Final = 64
"""Room for what an answer says of one text besides its rows and lists."""
TOKEN_BYTES: Final = 48
"""Room for one token with all its numbers, in the vocabularies of BERT."""
LEAST_TOKEN_BYTES: Final = 9
"""The fewest bytes of one token: an empty piece and eight numbers, without the tags of the lists."""
WORD_BYTES: Final = 12
"""Room for the piece count and the offsets of one word."""

_CACHED_OUTPUT_COUNT: Final = 16
"""Plans with more outputs are not kept with their headers: what a request can make the cache hold is bounded."""

_UNITS = {
    Unit.TOKEN: pb.ROW_UNIT_TOKEN,
    Unit.WORD: pb.ROW_UNIT_WORD,
    Unit.TEXT: pb.ROW_UNIT_TEXT,
    Unit.TOKEN_PAIR: pb.ROW_UNIT_TOKEN_PAIR,
    Unit.SPAN: pb.ROW_UNIT_SPAN,
}


def list_bytes(plan: Plan, text: Text) -> int:
    """Returns room for the tokens and the words of one text, as far as the plan asks for them."""
    return TOKEN_BYTES * text.token_count * plan.return_tokens + WORD_BYTES * text.word_count


def byte_count(plan: Plan, texts: Iterable[Tokenized]) -> int:
    """Returns about how many bytes an answer of whole results takes."""
    counts, has_lists = plan.byte_counts, plan.return_tokens or plan.has_words
    sizes = [counts.of(one.text) + TEXT_BYTES + (list_bytes(plan, one.text) if has_lists else 0) for one in texts]
    return sum(sizes)


def header(model: ModelFacts, plan: Plan, tokenized: Sequence[Tokenized] = ()) -> pb.EmbedHeader:
    """Returns the header of an answer; without texts, that of an EmbedStream."""
    return pb.EmbedHeader(
        model_id=model.model_id,
        fingerprint=model.fingerprint,
        layer_count=model.layer_count,
        pad_token_id=model.pad_token_id,
        named_prompt=plan.named_prompt,
        dtype=wire.DTYPES[plan.dtype],
        outputs=[
            pb.OutputHeader(
                layers=output.layers,
                row_size=output.row_size,
                unit=_UNITS[output.unit],
                mixed_layers=output.mix.layers if output.mix is not None else (),
                heads=output.heads,
            )
            for output in plan.outputs
        ],
        **_of_texts(plan, tokenized),
    )


def _of_texts(plan: Plan, tokenized: Sequence[Tokenized]) -> dict[str, Any]:
    """Returns the fields of a header that tell of its texts."""
    return {
        "token_counts": [len(one.text.input_ids) for one in tokenized],
        "truncated": [one.truncated for one in tokenized],
        "word_counts": [one.text.word_count for one in tokenized] if plan.has_words else (),
        "span_counts": [one.text.span_count for one in tokenized] if plan.has_spans else (),
        "window_counts": [one.text.window_count for one in tokenized] if plan.of_windows is not None else (),
    }


def _header_of_plan(model: ModelFacts, plan: Plan) -> bytes:
    """Returns the fields of a header that are the same for all texts, serialized."""
    return header(model, plan).SerializeToString()


_cached_header: Final = functools.lru_cache(64)(_header_of_plan)


def timings(record: Record) -> pb.Timings:
    """Returns the time that the parts of a request took."""
    return pb.Timings(
        queue_time_ns=record.queue.time_ns,
        tokenize_time_ns=record.tokenize.time_ns,
        compute_time_ns=record.compute.time_ns,
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
        token_type_ids=([0] * count if text.token_type_ids is None else text.token_type_ids.tolist()) + [0] * pads,
        special_tokens_mask=encoding.special_tokens_mask + [1] * pads,
        offset_mapping=[end for pair in encoding.offsets for end in pair] + [0] * (2 * pads),
        word_ids=[-1 if word is None else word for word in encoding.word_ids] + [-1] * pads,
        truncated=one.truncated,
    )


def token_groups(
    tokenized: Sequence[Tokenized], tokenizer: Tokenizer, max_frame_bytes: int
) -> Iterator[pb.EmbedLayersResponse]:
    """Yields the tokens of all texts in messages below the frame size."""
    for first, texts in _groups((tokens(one, tokenizer) for one in tokenized), max_frame_bytes):
        yield pb.EmbedLayersResponse(tokens=pb.TokenizedTexts(first_text=first, texts=texts))


def words(one: Tokenized) -> pb.SplitText:
    """Returns one text as words."""
    found = one.text.words
    assert found is not None
    return pb.SplitText(
        piece_counts=found.piece_counts.tolist(),
        offsets=found.offsets.ravel().tolist(),
        first_word_count=found.first_word_count,
    )


def word_groups(tokenized: Sequence[Tokenized], max_frame_bytes: int) -> Iterator[pb.EmbedLayersResponse]:
    """Yields the words of all texts in messages below the frame size."""
    for first, texts in _groups(map(words, tokenized), max_frame_bytes):
        yield pb.EmbedLayersResponse(words=pb.SplitTexts(first_text=first, texts=texts))


def _groups(texts: Iterable[MessageT], max_frame_bytes: int) -> Iterator[tuple[int, list[MessageT]]]:
    """Yields texts in groups below the frame size, each with the position of its first."""
    group: list[MessageT] = []
    first = size = 0
    for text in texts:
        own = text.ByteSize() + 8
        if group and size + own > max_frame_bytes - HEAD_BYTES:
            yield first, group
            first, group, size = first + len(group), [], 0
        group.append(text)
        size += own
    yield first, group


def embedded(
    model: ModelFacts,
    plan: Plan,
    texts: Sequence[Tokenized],
    parts: Sequence[RowsReady],
    tokenizer: Tokenizer,
    record: Record,
) -> bytes:
    """Returns the whole answer of Embed, serialized."""
    is_small = len(plan.outputs) <= _CACHED_OUTPUT_COUNT
    of_plan = (_cached_header if is_small else _header_of_plan)(model, plan)
    if len(texts) == 1 and not (plan.has_words or plan.has_spans or plan.of_windows):
        of_texts = _header_of_one(len(texts[0].text.input_ids), texts[0].truncated)
    else:
        of_texts = pb.EmbedHeader(**_of_texts(plan, texts)).SerializeToString()
    head = wire.head(pb.EmbedResponse.HEADER_FIELD_NUMBER, len(of_plan) + len(of_texts))
    own_timings = timings(record).SerializeToString()
    timings_head = wire.head(pb.EmbedResponse.TIMINGS_FIELD_NUMBER, len(own_timings))
    lists = b""
    if plan.return_tokens or plan.has_words:
        lists = pb.EmbedResponse(
            tokens=[tokens(one, tokenizer) for one in texts] if plan.return_tokens else (),
            words=map(words, texts) if plan.has_words else (),
        ).SerializeToString()
    return b"".join((head, of_plan, of_texts, *_tensors(parts, plan), lists, timings_head, own_timings))


@functools.lru_cache(1024)
def _header_of_one(token_count: int, truncated: bool) -> bytes:
    """Returns the fields of a header that tell of its only text, which has neither words nor spans nor windows."""
    return pb.EmbedHeader(token_counts=(token_count,), truncated=(truncated,)).SerializeToString()


def _tensors(parts: Iterable[RowsReady], plan: Plan) -> Iterator[bytes | memoryview]:
    """Yields all layers of all texts as whole tensors, by output and layer: of each its head, then its rows."""
    places: dict[tuple[int, int], list[RowsReady]] = {}
    for part in parts:
        places.setdefault((part.rows.output_index, part.rows.layer), []).append(part)
    for (output_index, layer), own in sorted(places.items()):
        if len(own) > 1:
            own.sort(key=lambda part: (part.first_text, part.first_row))
        byte_count = sum([len(part.rows.data) for part in own])
        yield _tensor_head(
            output_index, layer, wire.DTYPES[plan.dtype], plan.outputs[output_index].row_size, byte_count
        )
        for part in own:
            yield part.rows.data


@functools.lru_cache(1024)
def _tensor_head(output_index: int, layer: int, dtype: pb.Dtype.ValueType, row_size: int, byte_count: int) -> bytes:
    """Returns what stands before the rows of a tensor in an answer of Embed. Nothing follows them."""
    shape = byte_count // (row_size * wire.item_bytes(dtype)), row_size
    tensor = pb.Tensor(dtype=dtype, shape=shape).SerializeToString() + wire.head(
        pb.Tensor.DATA_FIELD_NUMBER, byte_count
    )
    of_layer = pb.LayerTensor(output_index=output_index, layer=layer).SerializeToString() + wire.head(
        pb.LayerTensor.TENSOR_FIELD_NUMBER, len(tensor) + byte_count
    )
    size = len(of_layer) + len(tensor) + byte_count
    return wire.head(pb.EmbedResponse.TENSORS_FIELD_NUMBER, size) + of_layer + tensor


def shared_rows(data: Sequence[memoryview], lending: Lending | None) -> pb.SharedRows | None:
    """Returns the offsets of payloads in shared memory, to be sent with their message; None: none of them is in it."""
    if lending is None:
        return None
    offsets = [lending.offset_of(rows) for rows in data]
    inside = [offset for offset in offsets if offset is not None]
    if not inside or (slot := lending.send(inside)) is None:
        return None
    return pb.SharedRows(offsets=[-1 if offset is None else offset for offset in offsets], slot=slot)


def cuts(row_count: int, row_bytes: int, max_frame_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields the first row and the row count of each frame: as few frames as can be, and none much smaller."""
    most = max(1, (max_frame_bytes - HEAD_BYTES) // row_bytes)
    step = -(-row_count // -(-row_count // most)) if row_count else 1
    for first in range(0, row_count, step):
        yield first, min(step, row_count - first)
