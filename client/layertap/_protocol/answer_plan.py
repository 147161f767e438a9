"""What all answers of one model to the same options have in common, as their headers promise it. Pure.

It is checked once and remembered. The counts of the texts, which a header has beside it, are checked in each answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Final, TypeAlias

from layertap import wire
from layertap.errors import DataLossError
from layertap.types import IntArray, ModelRef
from layertap.v1 import embedding_pb2 as pb

Key: TypeAlias = tuple[int, int]
"""What a tensor is known by: the position of its output in the request, and its layer."""

_MOST_TOKENS_A_BYTE: Final = 16
_MOST_MORE_TOKENS: Final = 1024
_MOST_ROW_SIZE: Final = 1 << 22

_MOST_PLANS: Final = 32
"""How many plans are remembered."""

_OF_TEXTS: Final = ("token_counts", "truncated", "word_counts", "span_counts", "window_counts")
"""The fields of a header that say something of its texts."""

_UNITS: Final = {
    "hidden_states": pb.ROW_UNIT_TOKEN,
    "word_vectors": pb.ROW_UNIT_WORD,
    "pooler_output": pb.ROW_UNIT_TEXT,
    "pooled_vectors": pb.ROW_UNIT_TEXT,
    "attentions": pb.ROW_UNIT_TOKEN_PAIR,
    "span_vectors": pb.ROW_UNIT_SPAN,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputPlan:
    """The tensors of one requested output.

    Attributes:
        unit: What has one row.
        row_size: The numbers of a row.
        keys: One for each layer.
    """

    unit: pb.RowUnit.ValueType
    row_size: int
    keys: tuple[Key, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowsPlan:
    """Which tensors hold the rows of tokens, or those of words.

    Attributes:
        layers: Those of single layers, by layer.
        mix: That of a mix of layers, as the only entry likewise; empty: none.
        mixed_layers: The layers in the mix.
    """

    layers: dict[int, Key]
    mix: dict[int, Key]
    mixed_layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnswerPlan:
    """What all answers of one model to the same options have in common.

    Attributes:
        header: Their header without what it says of texts.
        model: The model that answers.
        prompt: What stands before each text.
        returns_tokens: Whether tokens come too.
        has_windows: Whether texts may run as windows.
        outputs: The requested outputs, in their order.
        tokens: The tensors of token rows.
        words: The tensors of word rows; None: not requested.
        attentions: The tensors of attentions, by layer.
        heads: Their heads, in the order of a row.
        spans: Of each pooling of spans its tensor, by layer.
        pools: The tensors of the poolings.
        pooler_output: The tensor of the model's pooler; None: not requested.
    """

    header: pb.EmbedHeader
    model: ModelRef
    prompt: str
    returns_tokens: bool
    has_windows: bool
    outputs: tuple[OutputPlan, ...]
    tokens: RowsPlan
    words: RowsPlan | None
    attentions: dict[int, Key]
    heads: tuple[int, ...]
    spans: tuple[dict[int, Key], ...]
    pools: tuple[Key, ...]
    pooler_output: Key | None


def check_header(header: pb.EmbedHeader, options: pb.EmbedOptions, messages: Sequence[pb.Input]) -> AnswerPlan:
    """Returns what a header promises, if it is that of a request.

    Args:
        header: What opens the answer.
        options: What was asked.
        messages: The texts that were sent; none for a stream, whose results carry their own counts.

    Raises:
        DataLossError: if it is not.
    """
    common = pb.EmbedHeader()
    common.CopyFrom(header)
    for field in _OF_TEXTS:
        common.ClearField(field)
    plan = _plan(common.SerializeToString(), options.SerializeToString())
    if not _fits(header, plan, options, messages):
        raise _mismatch()
    return plan


def tensor_shapes(plan: AnswerPlan, header: pb.EmbedHeader) -> dict[Key, tuple[int, int]]:
    """Returns the shape of each tensor that a header promises: [row_count, row_size]."""
    shapes: dict[Key, tuple[int, int]] = {}
    for output in plan.outputs:
        row_count = sum(row_counts(output.unit, header.token_counts, header.word_counts, header.span_counts))
        for key in output.keys:
            shapes[key] = row_count, output.row_size
    return shapes


def row_counts(
    unit: pb.RowUnit.ValueType,
    token_counts: Sequence[int] | IntArray,
    word_counts: Sequence[int] | IntArray,
    span_counts: Sequence[int] | IntArray,
) -> Sequence[int] | IntArray:
    """Returns how many rows each text has in an output. Shape: [text_count]."""
    if unit == pb.ROW_UNIT_TOKEN:
        return token_counts
    if unit == pb.ROW_UNIT_TOKEN_PAIR:
        return [int(count) ** 2 for count in token_counts]
    if unit == pb.ROW_UNIT_SPAN:
        return span_counts
    return word_counts if unit == pb.ROW_UNIT_WORD else [1] * len(token_counts)


def span_count(message: pb.Input) -> int:
    """Returns how many spans a text has."""
    return len(message.spans.bounds) // 2 if message.HasField("spans") else 0


def token_bound(byte_count: int, options: pb.EmbedOptions) -> int:
    """Returns more tokens or words than any tokenizer makes of a text of so many bytes.

    No more memory than for these is allocated for one text.
    """
    return _MOST_TOKENS_A_BYTE * (byte_count + 4 * len(options.prompt)) + _MOST_MORE_TOKENS


@functools.lru_cache(_MOST_PLANS)
def _plan(common: bytes, asked: bytes) -> AnswerPlan:
    """Returns what a header promises of some options, given without the fields of its texts."""
    header, options = pb.EmbedHeader.FromString(common), pb.EmbedOptions.FromString(asked)
    wire.array_dtype(header.dtype)  # Refuses what this client does not know.
    if not len(header.outputs) == len(options.outputs) > 0 or not all(map(_is_output, options.outputs, header.outputs)):
        raise _mismatch()
    kinds = [output.WhichOneof("kind") for output in options.outputs]
    tensors = [{layer: (n, layer) for layer in output.layers} for n, output in enumerate(header.outputs)]

    def of(kind: str) -> list[dict[int, Key]]:
        return [own for own, other in zip(tensors, kinds, strict=True) if other == kind]

    def rows(kind: str) -> RowsPlan:
        plan = RowsPlan(layers={}, mix={}, mixed_layers=())
        for own, other, output in zip(tensors, kinds, header.outputs, strict=True):
            if other == kind and output.mixed_layers:
                plan = dataclasses.replace(plan, mix=own, mixed_layers=tuple(output.mixed_layers))
            elif other == kind:
                plan.layers.update(own)
        return plan

    return AnswerPlan(
        header=header,
        model=ModelRef(model_id=header.model_id, fingerprint=header.fingerprint),
        prompt=options.prompt or header.named_prompt,
        returns_tokens=options.return_tokens,
        has_windows=options.HasField("windows"),
        outputs=tuple(
            OutputPlan(unit=output.unit, row_size=output.row_size, keys=tuple(own.values()))
            for output, own in zip(header.outputs, tensors, strict=True)
        ),
        tokens=rows("hidden_states"),
        words=rows("word_vectors") if "word_vectors" in kinds else None,
        attentions=rows("attentions").layers,
        heads=next((tuple(output.heads) for output in header.outputs if output.heads), ()),
        spans=tuple(of("span_vectors")),
        pools=tuple(key for own in of("pooled_vectors") for key in own.values()),
        pooler_output=next((key for own in of("pooler_output") for key in own.values()), None),
    )


def _is_output(asked: pb.Output, output: pb.OutputHeader) -> bool:
    kind = asked.WhichOneof("kind")
    assert kind is not None
    mixed = kind not in ("pooler_output", "attentions") and getattr(asked, kind).HasField("mix")
    layers = output.layers
    return (
        0 < output.row_size <= _MOST_ROW_SIZE
        and output.unit == _UNITS[kind]
        and len(output.heads) == (output.row_size if kind == "attentions" else 0)
        and mixed == bool(output.mixed_layers)
        and (len(layers) == 1 or (output.unit != pb.ROW_UNIT_TEXT and not mixed))
        and len(set(layers)) == len(layers) > 0
    )


def _fits(header: pb.EmbedHeader, plan: AnswerPlan, options: pb.EmbedOptions, messages: Sequence[pb.Input]) -> bool:
    """Returns whether what a header says of its texts can be true of those of a request."""
    token_counts, word_counts, window_counts = header.token_counts[:], header.word_counts[:], header.window_counts[:]
    bounds = [token_bound(message.ByteSize(), options) for message in messages]
    return (
        _are_within(token_counts, 1, bounds)
        and len(header.truncated) == len(messages)
        and header.span_counts[:] == (list(map(span_count, messages)) if plan.spans else [])
        and (_are_within(word_counts, 0, bounds) if plan.words else not word_counts)
        and (_are_within(window_counts, 1, token_counts) if plan.has_windows else not window_counts)
    )


def _are_within(counts: list[int], least: int, bounds: list[int]) -> bool:
    fits = [least <= count <= bound for count, bound in zip(counts, bounds, strict=False)]
    return len(counts) == len(bounds) and all(fits)


def _mismatch() -> DataLossError:
    return DataLossError("the header is not that of this request; ask again")
