"""The tensors of the Open Inference Protocol: those of a request as inputs of the contract, and rows as padded tensors.

Pure, but for protobuf and numpy. A fault is refused by the tensor's name, the limit and the next step, and the length
of a list is checked before an object is made of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from layertap import wire
from layertap.errors import InvalidArgumentError
from layertap.sentence_vectors import Vectors
from layertap.v1 import embedding_pb2 as pb
from layertap_server.compat import open_inference_pb2 as kserve
from layertap_server.model.facts import ModelFacts
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.model.tokenized import Tokenized
from layertap_server.scheduler.call import RowsReady
from layertap_server.types import Output, Plan, Unit

Tensor: TypeAlias = kserve.ModelInferRequest.InferInputTensor
Integers: TypeAlias = npt.NDArray[np.int64]

TEXT: Final = "text"
INPUT_IDS: Final = "input_ids"
TOKEN_COUNTS: Final = "token_counts"
SENTENCE: Final = "sentence_embedding"
BESIDE_IDS: Final = ("attention_mask", "token_type_ids")
INPUTS: Final = (TEXT, INPUT_IDS, *BESIDE_IDS)

DTYPES: Final = {"FP32": "float32", "FP16": "float16"}
"""Number formats of answers by the names that the protocol gives them."""

_INTEGERS: Final[Mapping[str, np.dtype[Any]]] = {"INT64": np.dtype("<i8"), "INT32": np.dtype("<i4")}
_LENGTH_BYTES: Final = 4
_LAST_LAYER: Final = "last_hidden_state"
_LAYER: Final = "hidden_state_{}"
_COUNT_BYTES: Final = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The texts of a request.

    Attributes:
        texts: Each as an input of the contract.
        label: What an error calls the list of them.
    """

    texts: Sequence[pb.Input]
    label: str


def outputs_of(model: ModelFacts, sentences: SentenceConfig) -> Mapping[str, Sequence[pb.Output]]:
    """Returns what a model can be asked for by name; poolings are those of the last layer."""
    outputs: dict[str, Sequence[pb.Output]] = {
        _LAYER.format(layer): [pb.Output(hidden_states=pb.HiddenStates(layers=[layer]))]
        for layer in range(model.layer_count + 1)
    }
    outputs[_LAST_LAYER] = outputs[_LAYER.format(model.layer_count)]
    if model.has_pooler_output:
        outputs["pooler_output"] = [pb.Output(pooler_output=pb.PoolerOutput())]
    for name, strategy in wire.POOLING_STRATEGIES.items():
        outputs[name] = [pb.Output(pooled_vectors=pb.PooledVectors(strategy=strategy))]
    if not sentences.vectors_unsupported:
        pools = [
            pb.PooledVectors(strategy=outputs[one.name.lower()][0].pooled_vectors.strategy)
            for one in sentences.strategies
        ]
        if sentences.has_modules:  # The encoder does the rest too.
            pools = [pb.PooledVectors(sentence_modules=True, dimensions=sentences.dimensions)]
        outputs[SENTENCE] = [pb.Output(pooled_vectors=pool) for pool in pools]
    outputs[TOKEN_COUNTS] = ()
    return outputs


def read_inputs(request: kserve.ModelInferRequest, *, max_text_count: int) -> Inputs:
    """Returns the texts of a request.

    Raises:
        InvalidArgumentError: if a tensor is at fault.
    """
    if len(request.inputs) > len(INPUTS):
        raise InvalidArgumentError(f"inputs has {len(request.inputs)} tensors; there are only {', '.join(INPUTS)}")
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidArgumentError(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; send one for each"
        )
    tensors: dict[str, tuple[Tensor, bytes | None]] = {}
    for n, tensor in enumerate(request.inputs):
        if tensor.name not in INPUTS or tensor.name in tensors:
            raise InvalidArgumentError(f"inputs[{n}] must have one of the names {', '.join(INPUTS)}, each at most once")
        if tensor.parameters:
            raise InvalidArgumentError(
                f"{tensor.name} has parameters, such as those of shared memory; this server knows none, send the values"
            )
        tensors[tensor.name] = tensor, raw[n] if raw else None
    if (TEXT in tensors) == (INPUT_IDS in tensors) or (TEXT in tensors and len(tensors) > 1):
        raise InvalidArgumentError(
            f"inputs must be either {TEXT} alone, or {INPUT_IDS} with or without {' and '.join(BESIDE_IDS)}"
        )
    _check_text_count(tensors[TEXT if TEXT in tensors else INPUT_IDS][0], max_text_count)
    if TEXT in tensors:
        return Inputs(texts=list(_texts(*tensors[TEXT])), label=TEXT)
    return Inputs(texts=list(_token_ids(tensors)), label="texts")


def _check_text_count(tensor: Tensor, most: int) -> None:
    if not tensor.shape or tensor.shape[0] < 1:
        raise InvalidArgumentError(f"{tensor.name} has no texts; send at least one")
    if tensor.shape[0] > most:
        raise InvalidArgumentError(
            f"{tensor.name} has {tensor.shape[0]} texts, the most is {most}; send them in several requests"
        )


def _texts(tensor: Tensor, raw: bytes | None) -> Iterator[pb.Input]:
    shape = list(tensor.shape)
    if tensor.datatype != "BYTES" or len(shape) > 2 or shape[1:] not in ([], [1]):
        raise InvalidArgumentError(f"{TEXT} must be BYTES of shape [text_count] or [text_count, 1]; send it so")
    values = tensor.contents.bytes_contents if raw is None else list(_split_bytes(raw, shape[0]))
    _check_count(tensor, len(values))
    for n, value in enumerate(values):
        try:
            yield pb.Input(text=value.decode())
        except UnicodeDecodeError as exc:
            raise InvalidArgumentError(f"{TEXT}[{n}] is not UTF-8 from byte {exc.start} on; encode it so") from exc


def _split_bytes(raw: bytes, most: int) -> Iterator[bytes]:
    """Yields values that each stand behind their length, at most one more than there may be."""
    position = count = 0
    while position < len(raw) and count <= most:
        start = position + _LENGTH_BYTES
        position = start + int.from_bytes(raw[position:start], "little")
        if position > len(raw) or start > len(raw):
            raise InvalidArgumentError(
                f"{TEXT}[{count}] is cut; each value needs its length before it, four bytes, the lowest first"
            )
        yield raw[start:position]
        count += 1


def _token_ids(tensors: Mapping[str, tuple[Tensor, bytes | None]]) -> Iterator[pb.Input]:
    ids = _integers(*tensors[INPUT_IDS])
    beside = {name: _integers(*tensors[name]) for name in BESIDE_IDS if name in tensors}
    for name, array in beside.items():
        if array.shape != ids.shape:
            raise InvalidArgumentError(f"{name} has another shape than {INPUT_IDS}; make them equal")
    for n, row in enumerate(ids):
        lists = {name: array[n].tolist() for name, array in beside.items()}
        yield pb.Input(token_ids=pb.TokenIds(input_ids=row.tolist(), **lists))


def _integers(tensor: Tensor, raw: bytes | None) -> Integers:
    shape = list(tensor.shape)
    if tensor.datatype not in _INTEGERS or len(shape) != 2 or min(shape) < 0:
        raise InvalidArgumentError(f"{tensor.name} must be INT64 or INT32 of shape [text_count, length]; send it so")
    if raw is not None:
        dtype = _INTEGERS[tensor.datatype]
        _check_count(tensor, len(raw) // dtype.itemsize, exact=len(raw) % dtype.itemsize == 0)
        values: Integers = np.frombuffer(raw, dtype).astype(np.int64)
    else:
        contents = tensor.contents
        listed = contents.int64_contents if tensor.datatype == "INT64" else contents.int_contents
        _check_count(tensor, len(listed))
        values = np.array(listed, np.int64)
    if len(values) and not (values.min() >= -(1 << 31) and values.max() < 1 << 31):
        raise InvalidArgumentError(f"{tensor.name} has an entry outside its range; entries must fit 32 bits")
    return values.reshape(shape)


def _check_count(tensor: Tensor, found: int, *, exact: bool = True) -> None:
    """Checks how many values have come."""
    wanted = math.prod(tensor.shape)
    if found != wanted or not exact:
        raise InvalidArgumentError(
            f"{tensor.name} has a shape of {wanted} values, and other than so many have come; make them fit"
        )


def response_bytes(plan: Plan, tokenized: Sequence[Tokenized]) -> int:
    """Returns at least how many bytes the tensors of an answer take."""
    longest = max(one.text.token_count for one in tokenized)
    rows = sum(plan.row_bytes(output) * (longest if output.unit is Unit.TOKEN else 1) for output in plan.outputs)
    return len(tokenized) * (rows + _COUNT_BYTES)


def pack(
    request: kserve.ModelInferRequest,
    asked: Mapping[str, Sequence[pb.Output]],
    plan: Plan,
    tokenized: Sequence[Tokenized],
    parts: Sequence[RowsReady],
    finish: Callable[[Vectors], Vectors],
) -> list[bytes | memoryview]:
    """Returns the answer to a request in pieces: a serialized ModelInferResponse once they are joined.

    Args:
        request: The request.
        asked: The outputs that it names, each with those of the plan that it is made of, in the plan's order.
        plan: What was asked of each text.
        tokenized: The texts.
        parts: All their rows.
        finish: Makes sentence vectors of their poolings.
    """
    datatype = next(name for name, dtype in DTYPES.items() if dtype == plan.dtype)
    message = kserve.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    pieces: list[bytes | memoryview] = []
    token_counts = [one.text.token_count for one in tokenized]
    outputs = iter(enumerate(plan.outputs))
    for name, own in asked.items():
        arrays: list[npt.NDArray[Any]] = []
        for index, output in itertools.islice(outputs, len(own)):
            rows = sorted((part for part in parts if part.rows.output_index == index), key=lambda part: part.first_text)
            arrays.append(_padded(output, plan, rows, token_counts))
        if name == TOKEN_COUNTS:
            array: npt.NDArray[Any] = np.array(token_counts, "<i8")
        else:
            array = finish(np.concatenate(arrays, axis=1)) if name == SENTENCE else arrays[0]
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
