"""What users pass as texts, as the contract's inputs.

Pure. A `str` is one text; anything else is an iterable of items: str (text), tuple of two str (pair), list of str
(words), list or 1-D array of ints (ids), or `TokenIds`; or a whole `TokenIds` or `Tokens`, whose rows are texts.
Errors name the item by its position, never by its content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from layertap.errors import InvalidArgumentError
from layertap.types import IntArray, TokenIds, Tokens
from layertap.v1 import embedding_pb2 as pb

InputItem: TypeAlias = "str | tuple[str, str] | list[str] | list[int] | npt.NDArray[np.integer] | TokenIds"
"""One text."""

Inputs: TypeAlias = "str | TokenIds | Tokens | Iterable[InputItem]"
"""One text, or several."""

_WHAT_IS_ALLOWED = "a str, a tuple of two str, a list of str, a list or 1-D array of ints, or TokenIds"


def to_messages(inputs: Inputs) -> list[pb.Input]:
    """Returns one message for each text.

    Raises:
        InvalidArgumentError: There is no text, or an item is of another type.
    """
    if isinstance(inputs, str):
        messages = [to_message(inputs, 0)]
    elif isinstance(inputs, Tokens):
        messages = list(_from_tokens(inputs))
    elif isinstance(inputs, TokenIds):
        messages = list(_from_batch(inputs))
    elif not isinstance(inputs, (bytes, dict)) and isinstance(inputs, Iterable):
        messages = [to_message(item, index) for index, item in enumerate(inputs)]
    else:
        raise InvalidArgumentError(
            f"inputs is {_type_name(inputs)}; pass a str, or an iterable whose items are {_WHAT_IS_ALLOWED}"
        )
    if not messages:
        raise InvalidArgumentError("inputs is empty; pass at least one text")
    return messages


def to_message(item: InputItem, index: int) -> pb.Input:
    """Returns one text as a message.

    Args:
        item: The text.
        index: Its position, for errors.

    Raises:
        InvalidArgumentError: The item is of another type.
    """
    try:
        if isinstance(item, str):
            return pb.Input(text=item)
        if isinstance(item, tuple) and all(isinstance(part, str) for part in item) and len(item) == 2:
            return pb.Input(pair=pb.TextPair(first=item[0], second=item[1]))
        if isinstance(item, list) and item and all(isinstance(word, str) for word in item):
            return pb.Input(words=pb.Words(words=cast("list[str]", item)))
    except (UnicodeEncodeError, ValueError) as exc:
        raise InvalidArgumentError(
            f"inputs[{index}] has a lone surrogate, which UTF-8 cannot carry; replace it before embedding"
        ) from exc
    if isinstance(item, TokenIds):
        return _token_ids(item.input_ids, item.attention_mask, item.token_type_ids, index)
    if isinstance(item, (list, np.ndarray)) and len(item):
        return _token_ids(item, None, None, index)
    if isinstance(item, (list, np.ndarray)):
        raise InvalidArgumentError(f'inputs[{index}] is empty; for the empty text pass ""')
    raise InvalidArgumentError(f"inputs[{index}] is {_type_name(item)}; pass {_WHAT_IS_ALLOWED}")


def attention_mask(messages: list[pb.Input], token_counts: IntArray) -> IntArray:
    """Returns the mask that was computed with. Shape: [text_count, length]."""
    length = int(token_counts.max(initial=0))
    mask = (np.arange(length) < token_counts[:, None]).astype(np.int64)
    for row, message in zip(mask, messages, strict=True):
        if message.token_ids.attention_mask:
            row[: len(message.token_ids.attention_mask)] = message.token_ids.attention_mask
    return mask


def _from_tokens(tokens: Tokens) -> Iterator[pb.Input]:
    for index, count in enumerate(tokens.token_counts):
        yield _token_ids(
            tokens.input_ids[index, :count],
            tokens.attention_mask[index, :count],
            tokens.token_type_ids[index, :count],
            index,
        )


def _from_batch(batch: TokenIds) -> Iterator[pb.Input]:
    ids = np.asarray(batch.input_ids)
    if ids.ndim != 2:
        yield _token_ids(ids, batch.attention_mask, batch.token_type_ids, 0)
        return
    for name in ("attention_mask", "token_type_ids"):
        given = getattr(batch, name)
        if given is not None and np.shape(given) != ids.shape:
            raise InvalidArgumentError(f"{name} has shape {np.shape(given)}, input_ids {ids.shape}; make them equal")
    masks, types = batch.attention_mask, batch.token_type_ids
    for index, row in enumerate(ids):
        mask = None if masks is None else np.asarray(masks)[index]
        yield _token_ids(row, mask, None if types is None else np.asarray(types)[index], index)


def _token_ids(ids: npt.ArrayLike, mask: npt.ArrayLike | None, types: npt.ArrayLike | None, index: int) -> pb.Input:
    return pb.Input(
        token_ids=pb.TokenIds(
            input_ids=_integers(ids, "input_ids", index),
            attention_mask=[] if mask is None else _integers(mask, "attention_mask", index),
            token_type_ids=[] if types is None else _integers(types, "token_type_ids", index),
        )
    )


def _integers(values: npt.ArrayLike, name: str, index: int) -> list[int]:
    try:
        array = np.asarray(values)
    except ValueError as exc:
        raise InvalidArgumentError(f"inputs[{index}].{name} is not rectangular; pass a 1-D list of ints") from exc
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise InvalidArgumentError(
            f"inputs[{index}] has {name} of dtype {array.dtype} and shape {array.shape}; pass {_WHAT_IS_ALLOWED}"
        )
    if array.size and not (int(array.min()) >= -(2**31) and int(array.max()) < 2**31):
        raise InvalidArgumentError(f"inputs[{index}].{name} has a value beyond 32 bits; ids are below vocab_size")
    numbers: list[int] = array.tolist()
    return numbers


def _type_name(value: object) -> str:
    return f"of type {type(value).__name__}"
