"""Token ids of users with their masks, as the inputs of the contract: of one text, or of a batch in any form. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from google.protobuf.internal.containers import RepeatedScalarFieldContainer

from layertap.errors import InvalidArgumentError, counted
from layertap.results.tokens import Tokens
from layertap.types import TokenIds
from layertap.v1 import embedding_pb2 as pb

_MASKS: Final = ("attention_mask", "token_type_ids")
_NOT_COMPUTED: Final = frozenset(
    ("special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping", "num_truncated_tokens")
)
"""What a transformers tokenizer may add to its answer that changes no number of the model."""

WHAT_IS_ALLOWED = "a str, a tuple of two str, a list or 1-D array of str or of ints, TokenIds, or a mapping of them"


def of_tokens(tokens: Tokens) -> Iterator[pb.Input]:
    """Yields each text that was tokenized, without its padding."""
    for index, count in enumerate(tokens.token_counts):
        yield of_ids(
            tokens.input_ids[index, :count],
            tokens.attention_mask[index, :count],
            tokens.token_type_ids[index, :count],
            index,
        )


def of_batch(batch: TokenIds) -> Iterator[pb.Input]:
    """Yields each text of a batch, or the only one.

    Raises:
        InvalidArgumentError: if a mask has another number of rows than the ids.
    """
    if not _nested(batch.input_ids):
        yield of_ids(batch.input_ids, batch.attention_mask, batch.token_type_ids, 0)
        return
    rows = list(batch.input_ids)  # type: ignore[arg-type]
    beside: list[list[Any]] = []
    for name in _MASKS:
        given = getattr(batch, name)
        own = [None] * len(rows) if given is None else list(given) if _nested(given) else None
        if own is None or len(own) != len(rows):
            count = counted(1 if own is None else len(own), "row")
            raise InvalidArgumentError(f"{name} has {count}, input_ids {counted(len(rows), 'row')}; make them equal")
        beside.append(own)
    for index, (row, mask, types) in enumerate(zip(rows, *beside, strict=True)):
        yield of_ids(row, mask, types, index)


def _nested(values: Any) -> bool:
    """Returns whether these are the rows of several texts: a 2-D array, or a list of lists or arrays."""
    if hasattr(values, "ndim"):
        if values.ndim == 1 and getattr(values.dtype, "kind", "") == "O":
            return bool(len(values)) and np.ndim(values[0]) > 0
        return bool(values.ndim > 1)
    return isinstance(values, (list, tuple)) and any(
        isinstance(one, (list, tuple)) or getattr(one, "ndim", 0) for one in values
    )


def from_mapping(given: Mapping[str, Any], where: str) -> TokenIds:
    """Returns what a transformers tokenizer answers, which is a mapping of ids and masks, as token ids.

    Raises:
        InvalidArgumentError: if it is another mapping, or has an entry that the model would have to compute with.
    """
    others = sorted(str(key) for key in given if key not in ("input_ids", *_MASKS) and key not in _NOT_COMPUTED)
    if "input_ids" not in given:
        raise InvalidArgumentError(
            f"{where} is {type_name(given)} without input_ids; pass what a tokenizer answers, or texts"
        )
    if others:
        raise InvalidArgumentError(
            f"{where} is {type_name(given)} with {', '.join(others)}, which layertap does not compute with; pass "
            "input_ids, attention_mask and token_type_ids only"
        )
    return TokenIds(given["input_ids"], *(given.get(name) for name in _MASKS))


def of_ids(ids: npt.ArrayLike, mask: npt.ArrayLike | None, types: npt.ArrayLike | None, index: int) -> pb.Input:
    """Returns the ids of one text, and its masks where they are given.

    Raises:
        InvalidArgumentError: if one is not a row of 32-bit integers, or a mask is longer or shorter than the ids.
    """
    message = pb.Input()
    given = message.token_ids
    _fill(given.input_ids, ids, "input_ids", index)
    count = len(given.input_ids)
    if not count:
        raise InvalidArgumentError(f'inputs[{index}] has no input_ids; for the empty text pass ""')
    for name, values, field in (
        ("attention_mask", mask, given.attention_mask),
        ("token_type_ids", types, given.token_type_ids),
    ):
        if values is not None:
            _fill(field, values, name, index)
            if len(field) != count:
                raise InvalidArgumentError(
                    f"inputs[{index}].{name} has {len(field)} entries, input_ids {count}; make them equal"
                )
    return message


def _fill(field: RepeatedScalarFieldContainer[int], values: npt.ArrayLike, name: str, index: int) -> None:
    """Copies integers into a field; protobuf checks those of a list faster than an array could be made of it."""
    if isinstance(values, list) and values and type(values[0]) is int:
        try:
            field.extend(values)
            return
        except (TypeError, ValueError):
            del field[:]  # The oldest protobuf has no `clear`.
    field.extend(_integers(values, name, index))


def to_array(values: npt.ArrayLike, name: str) -> npt.NDArray[np.generic]:
    """Returns values as an array.

    Raises:
        InvalidArgumentError: if they are not rectangular, or lie where numpy cannot read them.
    """
    try:
        return np.asarray(values)
    except ValueError as exc:
        raise InvalidArgumentError(f"{name} is not rectangular; pass lists of equal length, or several texts") from exc
    except (TypeError, RuntimeError) as exc:  # A tensor of a GPU, for example.
        raise InvalidArgumentError(f"{name} cannot be read as a numpy array: {exc}") from exc


def _integers(values: npt.ArrayLike, name: str, index: int) -> list[int]:
    array = to_array(values, f"inputs[{index}].{name}")
    if not array.size:
        return []
    if array.ndim != 1 or array.dtype.kind not in ("iu" if name == "input_ids" else "iub"):
        wanted = WHAT_IS_ALLOWED if name == "input_ids" else "ints, one for each of the input_ids"
        raise InvalidArgumentError(
            f"inputs[{index}] has {name} of dtype {array.dtype} and shape {array.shape}; pass {wanted}"
        )
    if not (int(array.min()) >= -(2**31) and int(array.max()) < 2**31):
        raise InvalidArgumentError(f"inputs[{index}].{name} has a value beyond 32 bits; ids are below vocab_size")
    numbers: list[int] = array.astype(np.int64).tolist()
    return numbers


def type_name(value: object) -> str:
    """Returns what an error calls a value that it may not show."""
    return f"of type {type(value).__name__}"
