"""What users pass as texts, as the contract's inputs.

Pure. A `str` is one text; anything else is an iterable of items: str (text), tuple of two str (pair), list of str
(words), list or 1-D array of ints (ids), or `TokenIds`; or a whole `TokenIds` or `Tokens`, whose rows are texts. So
columns are iterables too: numpy arrays of str, pandas and polars Series, Arrow arrays.
Errors name the item by its position, never by its content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from layertap.errors import InvalidArgumentError
from layertap.results.tokens import Tokens
from layertap.types import IntArray, TokenIds
from layertap.v1 import embedding_pb2 as pb

InputItem: TypeAlias = "str | tuple[str, str] | list[str] | list[int] | npt.NDArray[np.integer] | TokenIds"
"""One text."""

Inputs: TypeAlias = "str | TokenIds | Tokens | Iterable[InputItem]"
"""One text, or several."""

_MISSING: Final = ("NAType", "NaTType")
"""What pandas calls a value that is not there, beside None and NaN."""

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
    else:
        check_items(inputs)
        messages = [to_message(item, index) for index, item in enumerate(inputs)]
    if not messages:
        raise InvalidArgumentError("inputs is empty; pass at least one text")
    return messages


def check_items(items: object) -> None:
    """Checks that something may be read item by item: that it is neither one text nor a table.

    Raises:
        InvalidArgumentError: It may not.
    """
    if hasattr(items, "columns"):
        raise InvalidArgumentError(f"inputs is {_type_name(items)}; pass one of its columns")
    if isinstance(items, str):
        raise InvalidArgumentError("inputs is one str; pass an iterable of texts, such as a list with this one")
    if isinstance(items, (bytes, dict)) or not isinstance(items, Iterable):
        raise InvalidArgumentError(
            f"inputs is {_type_name(items)}; pass a str, or an iterable whose items are {_WHAT_IS_ALLOWED}"
        )


def to_message(item: InputItem, index: int) -> pb.Input:
    """Returns one text as a message.

    Args:
        item: The text.
        index: Its position, for errors.

    Raises:
        InvalidArgumentError: The item is missing, or of another type.
    """
    item = _from_arrow(item)
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
    if isinstance(item, (list, np.ndarray)):
        return _token_ids(item, None, None, index)
    if _is_missing(item):
        raise InvalidArgumentError(f'inputs[{index}] is missing (None or NaN); drop it, or pass "" for an empty text')
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
    ids = _array(batch.input_ids, "input_ids")
    if ids.ndim != 2:
        yield _token_ids(ids, batch.attention_mask, batch.token_type_ids, 0)
        return
    beside: list[list[npt.ArrayLike | None]] = []
    for name in ("attention_mask", "token_type_ids"):
        given = getattr(batch, name)
        array = None if given is None else _array(given, name)
        if array is not None and array.shape != ids.shape:
            raise InvalidArgumentError(f"{name} has shape {array.shape}, input_ids {ids.shape}; make them equal")
        beside.append([None] * len(ids) if array is None else list(array))
    for index, (row, mask, types) in enumerate(zip(ids, *beside, strict=True)):
        yield _token_ids(row, mask, types, index)


def _token_ids(ids: npt.ArrayLike, mask: npt.ArrayLike | None, types: npt.ArrayLike | None, index: int) -> pb.Input:
    message = pb.TokenIds(input_ids=_integers(ids, "input_ids", index))
    count = len(message.input_ids)
    if not count:
        raise InvalidArgumentError(f'inputs[{index}] has no input_ids; for the empty text pass ""')
    for name, values, field in (
        ("attention_mask", mask, message.attention_mask),
        ("token_type_ids", types, message.token_type_ids),
    ):
        if values is not None:
            field.extend(_integers(values, name, index))
            if len(field) != count:
                raise InvalidArgumentError(
                    f"inputs[{index}].{name} has {len(field)} entries, input_ids {count}; make them equal"
                )
    return pb.Input(token_ids=message)


def _array(values: npt.ArrayLike, name: str) -> npt.NDArray[np.generic]:
    try:
        return np.asarray(values)
    except ValueError as exc:
        raise InvalidArgumentError(f"{name} is not rectangular; pass lists of equal length, or several texts") from exc


def _integers(values: npt.ArrayLike, name: str, index: int) -> list[int]:
    array = _array(values, f"inputs[{index}].{name}")
    if not array.size:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise InvalidArgumentError(
            f"inputs[{index}] has {name} of dtype {array.dtype} and shape {array.shape}; pass {_WHAT_IS_ALLOWED}"
        )
    if not (int(array.min()) >= -(2**31) and int(array.max()) < 2**31):
        raise InvalidArgumentError(f"inputs[{index}].{name} has a value beyond 32 bits; ids are below vocab_size")
    numbers: list[int] = array.astype(np.int64).tolist()
    return numbers


def _from_arrow(item: Any) -> Any:
    """Returns what a scalar of an Arrow array holds; anything else as it is."""
    return item.as_py() if hasattr(item, "as_py") else item


def _is_missing(item: Any) -> bool:
    return item is None or type(item).__name__ in _MISSING or (isinstance(item, float) and item != item)


def _type_name(value: object) -> str:
    return f"of type {type(value).__name__}"
