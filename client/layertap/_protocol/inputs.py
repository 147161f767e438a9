"""Texts of users, as the inputs of the contract.

Pure. A `str` is one text; `TokenIds`, `Tokens` and mappings such as transformers' `BatchEncoding` are token ids, one
row a text; anything else is an iterable of items: str (text), tuple of two str (pair), list or 1-D array of str
(words), list or 1-D array of ints (ids), `TokenIds` or a mapping. Columns are iterables too: numpy arrays of str,
pandas and polars Series, Arrow arrays. Errors name the item by its position, never by its content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from layertap import wire
from layertap._protocol.token_ids import (
    WHAT_IS_ALLOWED,
    from_mapping,
    of_batch,
    of_ids,
    of_tokens,
    to_array,
    type_name,
)
from layertap.errors import InvalidArgumentError, counted
from layertap.results.tokens import Tokens
from layertap.types import Spanned, SpanUnitName, TokenIds
from layertap.v1 import embedding_pb2 as pb

Words: TypeAlias = "list[str] | npt.NDArray[np.str_] | npt.NDArray[np.object_]"
"""The words of one text."""

InputItem: TypeAlias = (
    "str | tuple[str, str] | Words | list[int] | npt.NDArray[np.integer] | TokenIds | Mapping[str, Any] | Spanned"
)
"""One text."""

Inputs: TypeAlias = "str | TokenIds | Tokens | Mapping[str, Any] | Spanned | Iterable[InputItem]"
"""One text, or several."""

_MISSING: Final = ("NAType", "NaTType")
"""What pandas calls a value that is not there, beside None and NaN."""

_IS_MISSING: Final = 'is missing (None or NaN); drop it, or pass "" for an empty text'


def to_messages(inputs: Inputs) -> list[pb.Input]:
    """Returns one message for each text.

    Raises:
        InvalidArgumentError: if there is no text, or an item is of another type.
    """
    if isinstance(inputs, Mapping):
        inputs = from_mapping(inputs, "inputs")
    if isinstance(inputs, (str, Spanned)):
        messages = [to_message(inputs, 0)]
    elif isinstance(inputs, Tokens):
        messages = list(of_tokens(inputs))
    elif isinstance(inputs, TokenIds):
        messages = list(of_batch(inputs))
    else:
        check_items(inputs)
        messages = [to_message(item, index) for index, item in enumerate(inputs)]
    if not messages:
        raise InvalidArgumentError("inputs is empty; pass at least one text")
    return messages


def check_items(items: object) -> None:
    """Checks that something may be read item by item: that it is neither one text, a batch nor a table.

    Raises:
        InvalidArgumentError: if it may not.
    """
    if hasattr(items, "columns"):
        raise InvalidArgumentError(f"inputs is {type_name(items)}; pass one of its columns")
    if isinstance(items, str):
        raise InvalidArgumentError("inputs is one str; pass an iterable of texts, such as a list with this one")
    if isinstance(items, (Mapping, TokenIds, Tokens, Spanned)):
        raise InvalidArgumentError(
            f"inputs is {type_name(items)}; pass an iterable of texts, or the whole batch to embed"
        )
    if isinstance(items, bytes) or not isinstance(items, Iterable) or getattr(items, "ndim", 1) == 0:
        of_shape = " and has no dimensions" if getattr(items, "ndim", 1) == 0 else ""
        raise InvalidArgumentError(
            f"inputs is {type_name(items)}{of_shape}; pass a str, or an iterable whose items are {WHAT_IS_ALLOWED}"
        )


def to_message(item: InputItem, index: int) -> pb.Input:
    """Returns one text as a message.

    Args:
        item: The text.
        index: Its position, for errors.

    Raises:
        InvalidArgumentError: if the item is missing, or of another type.
    """
    if isinstance(item, pb.Input):
        return item
    if not isinstance(item, str):  # What most items are takes the shortest way.
        item = _plain(item)
        if isinstance(item, Spanned):
            return _spanned(item, index)
        if isinstance(item, Mapping):
            item = from_mapping(item, f"inputs[{index}]")
    try:
        if isinstance(item, str):
            return pb.Input(text=item)
        if isinstance(item, tuple) and all(isinstance(part, str) for part in item) and len(item) == 2:
            return pb.Input(pair=pb.TextPair(first=item[0], second=item[1]))
        if (words := _words(item, index)) is not None:
            return pb.Input(words=pb.Words(words=words))
    except (UnicodeEncodeError, ValueError) as exc:
        raise InvalidArgumentError(
            f"inputs[{index}] has a lone surrogate, which UTF-8 cannot carry; replace it before embedding"
        ) from exc
    if isinstance(item, TokenIds):
        return of_ids(item.input_ids, item.attention_mask, item.token_type_ids, index)
    if isinstance(item, list) or (isinstance(item, np.ndarray) and item.ndim):
        return of_ids(item, None, None, index)
    if _is_missing(item):
        raise InvalidArgumentError(f"inputs[{index}] {_IS_MISSING}")
    is_id = isinstance(cast("object", item), (int, np.integer)) or getattr(item, "shape", None) == ()
    wanted = "the ids of one text as one item, [[101, 102]]" if is_id else WHAT_IS_ALLOWED
    raise InvalidArgumentError(f"inputs[{index}] is {type_name(item)}; pass {wanted}")


def spanned(inputs: Inputs, spans: Any, unit: SpanUnitName) -> list[Spanned]:
    """Returns texts with their spans: of one str a list of (start, end), of several texts one such list each.

    Raises:
        InvalidArgumentError: if there is not one list for each text.
    """
    if isinstance(inputs, str):
        return [Spanned(inputs, spans, unit)]
    check_items(inputs)
    items, lists = list(cast("Iterable[Any]", inputs)), list(spans) if isinstance(spans, Iterable) else []
    if len(items) != len(lists):
        raise InvalidArgumentError(
            f"spans has {counted(len(lists), 'list')} for {counted(len(items), 'text')}; pass one list for each text"
        )
    return [Spanned(item, own, unit) for item, own in zip(items, lists, strict=True)]


def _spanned(item: Spanned, index: int) -> pb.Input:
    if isinstance(item.text, Spanned):
        raise InvalidArgumentError(f"inputs[{index}] is a Spanned of a Spanned; pass all spans in one")
    message = pb.Input()
    message.CopyFrom(to_message(item.text, index))
    if item.unit not in list(wire.SPAN_UNITS):
        raise InvalidArgumentError(f"inputs[{index}].unit is {item.unit!r}; pass one of {', '.join(wire.SPAN_UNITS)}")
    bounds = to_array(item.spans, f"inputs[{index}].spans")
    if bounds.size and (bounds.ndim != 2 or bounds.shape[1] != 2 or bounds.dtype.kind not in "iu"):
        raise InvalidArgumentError(
            f"inputs[{index}] has spans of dtype {bounds.dtype} and shape {bounds.shape}; pass (start, end) pairs"
        )
    if bounds.size and not (int(bounds.min()) >= -(2**31) and int(bounds.max()) < 2**31):
        raise InvalidArgumentError(f"inputs[{index}].spans has a value beyond 32 bits; pass smaller numbers")
    message.spans.unit = wire.SPAN_UNITS[item.unit]
    message.spans.bounds.extend(bounds.astype(np.int64).ravel().tolist())
    message.spans.SetInParent()
    return message


def _words(item: Any, index: int) -> list[str] | None:
    """Returns the words of a text if an item is a list or an array of them, else None."""
    if isinstance(item, np.ndarray):
        if item.ndim != 1 or item.dtype.kind not in "OUT":
            return None
        item = item.tolist()
    if not isinstance(item, list) or not any(isinstance(word, str) for word in item):
        return None
    for place, word in enumerate(item):
        if not isinstance(word, str):
            what = "is missing (None or NaN)" if _is_missing(word) else f"is {type_name(word)}"
            raise InvalidArgumentError(f"inputs[{index}] is a list of words whose entry {place} {what}; pass only str")
    return item


def _plain(item: Any) -> Any:
    """Returns what an Arrow scalar, a Series or a tensor holds; anything else as it is."""
    if hasattr(item, "as_py"):
        return item.as_py()
    if isinstance(item, (str, bytes, list, tuple, np.ndarray, Mapping)) or not getattr(item, "shape", ()):
        return item
    return to_array(item, "an item") if hasattr(item, "__array__") else item


def _is_missing(item: Any) -> bool:
    return item is None or type(item).__name__ in _MISSING or (isinstance(item, float) and item != item)
