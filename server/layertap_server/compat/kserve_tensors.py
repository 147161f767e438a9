"""The tensors of an answer of the Open Inference Protocol: rows of texts of any length, padded to one shape."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from layertap import wire
from layertap_server.compat import open_inference_pb2 as kserve
from layertap_server.compat.kserve_requests import DTYPES, SENTENCE, TOKEN_COUNTS, Asked
from layertap_server.model.tokenized import Tokenized
from layertap_server.scheduler.events import RowsReady
from layertap_server.types import Output, Plan, Unit

_COUNT_BYTES: Final = 8


def response_bytes(plan: Plan, tokenized: Sequence[Tokenized]) -> int:
    """Returns at least how many bytes the tensors of an answer take."""
    longest = max(one.text.token_count for one in tokenized)
    rows = sum(plan.row_bytes(output) * (longest if output.unit is Unit.TOKEN else 1) for output in plan.outputs)
    return len(tokenized) * (rows + _COUNT_BYTES)


def pack(
    request: kserve.ModelInferRequest,
    asked: Asked,
    plan: Plan,
    tokenized: Sequence[Tokenized],
    parts: Sequence[RowsReady],
) -> list[bytes | memoryview]:
    """Returns the answer to a request in pieces: a serialized ModelInferResponse once they are joined."""
    datatype = next(name for name, dtype in DTYPES.items() if dtype == plan.dtype)
    message = kserve.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    pieces: list[bytes | memoryview] = []
    token_counts = [one.text.token_count for one in tokenized]
    outputs = iter(enumerate(plan.outputs))
    for name, own in asked.outputs.items():
        arrays: list[npt.NDArray[Any]] = []
        for index, output in itertools.islice(outputs, len(own)):
            rows = sorted((part for part in parts if part.rows.output_index == index), key=lambda part: part.first_text)
            arrays.append(_padded(output, plan, rows, token_counts))
        if name == TOKEN_COUNTS:
            array: npt.NDArray[Any] = np.array(token_counts, "<i8")
        else:
            array = asked.sentence_vectors.finish(np.concatenate(arrays, axis=1)) if name == SENTENCE else arrays[0]
        message.outputs.add(name=name, datatype=datatype if own else "INT64", shape=array.shape)
        pieces += (wire.head(6, array.nbytes), array.reshape(-1).view(np.uint8).data)
    return [message.SerializeToString(), *pieces]


def _padded(output: Output, plan: Plan, parts: Sequence[RowsReady], token_counts: Sequence[int]) -> npt.NDArray[Any]:
    """Returns the rows of all texts as one tensor, with zeros where a text is shorter than the longest."""
    rows = [
        np.frombuffer(part.rows.data, np.dtype(plan.dtype).newbyteorder("<")).reshape(-1, output.row_size)
        for part in parts
    ]
    whole = rows[0] if len(rows) == 1 else np.concatenate(rows)
    if output.unit is Unit.TEXT:
        return whole
    longest = max(token_counts)
    if min(token_counts) == longest:
        return whole.reshape(len(token_counts), longest, output.row_size)
    padded = np.zeros((len(token_counts), longest, output.row_size), whole.dtype)
    start = 0
    for place, count in zip(padded, token_counts, strict=True):
        place[:count] = whole[start : start + count]
        start += count
    return padded
