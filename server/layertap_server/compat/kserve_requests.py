"""Requests of the Open Inference Protocol as those of the contract: their tensors as inputs, their outputs as options.

Pure, but for protobuf and numpy. A fault is refused by the tensor's name, the limit and the next step, and the length
of a list is checked before an object is made of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from layertap import wire
from layertap.errors import InvalidArgumentError, counted
from layertap.v1 import embedding_pb2 as pb
from layertap_server.compat import open_inference_pb2 as kserve
from layertap_server.compat.sentences import SentenceVectors
from layertap_server.model.facts import ModelFacts
from layertap_server.model.files import shortened
from layertap_server.model.sentence_config import SentenceConfig

Tensor: TypeAlias = kserve.ModelInferRequest.InferInputTensor
Integers: TypeAlias = npt.NDArray[np.int64]
ValueT = TypeVar("ValueT")

TEXT: Final = "text"
INPUT_IDS: Final = "input_ids"
TOKEN_COUNTS: Final = "token_counts"
SENTENCE: Final = "sentence_embedding"
BESIDE_IDS: Final = ("attention_mask", "token_type_ids")

DTYPES: Final = {"FP32": "float32", "FP16": "float16"}
"""Number formats of answers by the names that the protocol gives them."""

INPUTS: Final = (TEXT, INPUT_IDS, *BESIDE_IDS)
_PARAMETERS: Final = ("truncation", "max_length", "normalize", "dtype")
_INTEGERS: Final[Mapping[str, np.dtype[Any]]] = {"INT64": np.dtype("<i8"), "INT32": np.dtype("<i4")}
_LENGTH_BYTES: Final = 4
_LISTED_LENGTH: Final = 1000
"""Characters of the names of outputs in an error: gRPC loses one whose message is longer than its metadata may be."""
_LAST_LAYER: Final = "last_hidden_state"
_LAYER: Final = "hidden_state_{}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a request asks of each text.

    Attributes:
        outputs: The outputs of the protocol, by name, each with those of the contract that it is made of.
        options: The same as options of the contract.
        sentence_vectors: How sentence vectors are made, if they are among the outputs.
    """

    outputs: Mapping[str, Sequence[pb.Output]]
    options: pb.EmbedOptions
    sentence_vectors: SentenceVectors


def outputs_of(model: ModelFacts, config: SentenceConfig) -> Mapping[str, Sequence[pb.Output]]:
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
    if not config.vectors_unsupported:
        outputs[SENTENCE] = SentenceVectors(config=config).outputs()
    outputs[TOKEN_COUNTS] = ()
    return outputs


def read_inputs(request: kserve.ModelInferRequest, *, max_text_count: int) -> list[pb.Input]:
    """Returns the texts of a request: all strings, or all token ids.

    Raises:
        InvalidArgumentError: if a tensor is at fault.
    """
    if len(request.inputs) > len(INPUTS):
        raise InvalidArgumentError(f"inputs has {len(request.inputs)} tensors; there are only {', '.join(INPUTS)}")
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidArgumentError(
            f"raw_input_contents has {counted(len(raw), 'entry', 'entries')} for "
            f"{counted(len(request.inputs), 'input')}; send one for each"
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
    return list(_texts(*tensors[TEXT]) if TEXT in tensors else _token_ids(tensors))


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


def read_options(
    request: kserve.ModelInferRequest,
    known: Mapping[str, Sequence[pb.Output]],
    model: ModelFacts,
    config: SentenceConfig,
) -> Asked:
    """Returns what a request asks for. With sentence vectors, what it leaves open is as the model's folder says.

    What the model can be asked for, `known`, is what `outputs_of` returns.

    Raises:
        InvalidArgumentError: if an output or a parameter is at fault.
    """
    names = _output_names(request, known)
    values = _parameters(request)
    normalize = values.get("normalize", False)
    if not isinstance(normalize, bool):
        raise InvalidArgumentError("parameters.normalize must be true or false (bool_param)")
    vectors = SentenceVectors(config=config, normalize=normalize)
    options = vectors.options() if SENTENCE in names else pb.EmbedOptions(truncation=pb.TRUNCATION_ERROR)
    if "truncation" in values:
        options.truncation = _one_of("truncation", values["truncation"], wire.TRUNCATIONS)
    options.dtype = wire.DTYPES[_one_of("dtype", values.get("dtype", "FP32"), DTYPES)]
    if options.dtype != pb.DTYPE_FLOAT32 and SENTENCE in names:
        raise InvalidArgumentError(f"{SENTENCE} is made in FP32; leave parameters.dtype out")
    max_length = values.get("max_length", 0)
    if type(max_length) is not int or not 0 <= max_length <= model.max_length:
        raise InvalidArgumentError(
            f"parameters.max_length must be an integer (int64_param) from 2 to {model.max_length}, or 0 for the model's"
        )
    options.max_length = max_length or options.max_length
    outputs = {name: known[name] for name in names}
    if SENTENCE in names:
        outputs[SENTENCE] = vectors.outputs()
    for name, own in outputs.items():
        for output in own:
            options.outputs.append(output)
            if output.HasField("pooled_vectors") and name != SENTENCE:
                options.outputs[-1].pooled_vectors.normalize = normalize
    return Asked(outputs=outputs, options=options, sentence_vectors=vectors)


def _parameters(request: kserve.ModelInferRequest) -> dict[str, Any]:
    values = {}
    for name, parameter in request.parameters.items():
        if name not in _PARAMETERS:
            raise InvalidArgumentError(
                f"parameters has an unknown name; this server knows {', '.join(_PARAMETERS)}, and deadlines of "
                "calls in place of a timeout"
            )
        kind = parameter.WhichOneof("parameter_choice")
        values[name] = getattr(parameter, kind) if kind else None
    return values


def _output_names(request: kserve.ModelInferRequest, known: Collection[str]) -> list[str]:
    has = f"this model has {shortened(', '.join(known), _LISTED_LENGTH)}"
    if not request.outputs:
        raise InvalidArgumentError(f"outputs is empty; name at least one: {has}")
    if len(request.outputs) > len(known):
        raise InvalidArgumentError(f"outputs has {len(request.outputs)} entries; name each once: {has}")
    names: list[str] = []
    for n, output in enumerate(request.outputs):
        if output.name not in known:
            raise InvalidArgumentError(f"outputs[{n}] is unknown; {has}")
        if output.name in names:
            raise InvalidArgumentError(f"outputs[{n}] names {output.name} again; name each output once")
        if output.parameters:
            raise InvalidArgumentError(
                f"outputs[{n}] has parameters, such as those of shared memory or of a classification; this server "
                "knows none, leave them out"
            )
        names.append(output.name)
    if names == [TOKEN_COUNTS]:
        raise InvalidArgumentError(f"outputs is {TOKEN_COUNTS} alone; ask for rows too: {has}")
    return names


def _one_of(name: str, value: object, known: Mapping[str, ValueT]) -> ValueT:
    if not isinstance(value, str) or value not in known:
        raise InvalidArgumentError(f"parameters.{name} must be one of {', '.join(known)} (string_param)")
    return known[value]
