"""Texts that come as token ids: read and checked for a whole group at once, without an object for each number.

The numbers of a group become one array, of which each text has a view. Where one text may be at fault, each is read by
itself, so that the fault is named and harms no other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from google.protobuf.internal.containers import RepeatedScalarFieldContainer

from layertap.errors import InvalidArgumentError, LayertapError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.types import Ids, Text


def texts(messages: Sequence[pb.TokenIds], labels: Sequence[str], model: ModelFacts) -> list[Text | LayertapError]:
    """Returns texts, and of those at fault why: a count, an id, a mask or a type is outside its range."""
    if (whole := _whole(messages, model)) is not None:
        return [*whole]
    found: list[Text | LayertapError] = []
    for message, label in zip(messages, labels, strict=True):
        try:
            found.append(_text(message, label, model))
        except LayertapError as exc:
            found.append(exc)
    return found


def ids(message: pb.TokenIds, label: str, model: ModelFacts) -> Ids:
    """Returns token ids that the model knows.

    Raises:
        InvalidArgumentError: if one is outside the vocabulary.
    """
    found = np.array(message.input_ids, np.int32)
    if not _within(found, model.vocab_size):
        position = int(np.flatnonzero((found < 0) | (found >= model.vocab_size))[0])
        raise InvalidArgumentError(
            f"{label}.input_ids[{position}] is outside the vocabulary; ids run from 0 to {model.vocab_size - 1}"
        )
    return found


def _whole(messages: Sequence[pb.TokenIds], model: ModelFacts) -> list[Text] | None:
    """Returns texts of which none is at fault. None: one may be."""
    fields = [message.input_ids for message in messages]
    counts = [*map(len, fields)]
    if not (counts and min(counts) > 0 and max(counts) <= model.max_length):
        return None
    if (own := _views(fields, counts, model.vocab_size)) is None:
        return None
    of_masks = [message.attention_mask for message in messages]
    of_types = [message.token_type_ids for message in messages]
    if not any(of_masks) and not any(of_types):
        return [*map(Text, own)]
    masks = _views(of_masks, [*map(len, of_masks)], 2)
    types = _views(of_types, [*map(len, of_types)], _type_end(model))
    if masks is None or types is None:
        return None
    if any(len(one) not in (0, count) for beside in (masks, types) for one, count in zip(beside, counts, strict=True)):
        return None
    return [
        Text(one, attention_mask=None if mask.all() else mask, token_type_ids=of if of.any() else None)
        for one, mask, of in zip(own, masks, types, strict=True)
    ]


def _views(fields: Sequence[RepeatedScalarFieldContainer[int]], counts: Sequence[int], end: int) -> list[Ids] | None:
    """Returns lists of so many numbers as views of one array. None: a number is not from 0 to before the end."""
    joined = pb.TokenIds()  # protobuf joins them, and numpy copies the whole, without making objects of the numbers.
    numbers = joined.input_ids
    for field in fields:
        numbers.MergeFrom(field)
    whole = np.array(numbers, np.int32)
    if not _within(whole, end):
        return None
    found, start = [], 0
    for count in counts:
        found.append(whole[start : start + count])
        start += count
    return found


def _text(message: pb.TokenIds, label: str, model: ModelFacts) -> Text:
    count = len(message.input_ids)
    if not count:
        raise InvalidArgumentError(
            f"{label} has no input_ids; for the empty text send the ids of the special tokens that Tokenize adds to it"
        )
    if count > model.max_length:
        raise InvalidArgumentError(
            f"{label} has {count} token ids, the most is {model.max_length}; token ids are never cut, send fewer"
        )
    mask = _beside(message.attention_mask, "attention_mask", 2, count, label)
    types = _beside(message.token_type_ids, "token_type_ids", _type_end(model), count, label)
    return Text(
        ids(message, label, model),
        attention_mask=mask if mask is not None and not mask.all() else None,
        token_type_ids=types if types is not None and types.any() else None,
    )


def _type_end(model: ModelFacts) -> int:
    return max(1, model.type_vocab_size)


def _beside(values: RepeatedScalarFieldContainer[int], name: str, end: int, length: int, label: str) -> Ids | None:
    """Returns numbers that come one a token, if they were sent."""
    if not values:
        return None
    if len(values) != length:
        raise InvalidArgumentError(f"{label}.{name} has {len(values)} entries, input_ids {length}; make them equal")
    array = np.array(values, np.int32)
    if not _within(array, end):
        raise InvalidArgumentError(
            f"{label}.{name} has an entry outside its range; entries must be from 0 to {end - 1}"
        )
    return array


def _within(numbers: Ids, end: int) -> bool:
    """Returns whether all numbers are from 0 to before the end."""
    return not len(numbers) or bool(numbers.min() >= 0 and numbers.max() < end)
