"""Keyword options of users, as the options of the contract.

Pure. An option of a wrong type or name is refused here; the server checks the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from layertap import wire
from layertap.errors import InvalidArgumentError
from layertap.types import (
    DtypeName,
    LayerMix,
    Pooling,
    PoolingName,
    SpanUnitName,
    TruncationName,
    Windows,
    WordPoolingName,
)
from layertap.v1 import embedding_pb2 as pb

Layers: TypeAlias = Literal["all"] | int | Iterable[int] | None
"""`"all"`, one layer number, several, or None for the default."""

Poolings: TypeAlias = PoolingName | Pooling | Sequence[PoolingName | Pooling] | None
"""One pooling, several, or None."""

OnError: TypeAlias = Literal["return", "raise"]
"""Whether the error of a stream's item is its result, or is raised."""


class LengthOptions(TypedDict, total=False):
    """How long a text may be; see `Client.embed`."""

    truncation: TruncationName
    max_length: int | None


class TokenizeOptions(LengthOptions, total=False):
    """The options of `Client.tokenize`, which documents them."""

    pad_to: int | None
    add_special_tokens: bool


class LayerOptions(LengthOptions, total=False):
    """The options of `Client.embed_layers`; `Client.embed` documents them."""

    layers: Layers
    dtype: DtypeName
    prompt: str | None
    prompt_name: str | None
    windows: Windows | None


class EmbedOptions(LayerOptions, total=False):
    """The options of `Client.embed`, which documents them."""

    pooler_output: bool
    pooling: Poolings
    words: WordPoolingName | None
    mix: LayerMix | None
    attentions: Layers
    attention_heads: int | Iterable[int] | None
    span_pooling: Poolings
    return_tokens: bool


class SpanOptions(EmbedOptions, total=False):
    """The options of `Client.embed`, those of its texts included."""

    spans: npt.ArrayLike | Sequence[npt.ArrayLike] | None
    span_unit: SpanUnitName


NumberT = TypeVar("NumberT", bound=int)


def embed_options(
    *,
    layers: Layers = None,
    pooler_output: bool = False,
    pooling: Poolings = None,
    words: WordPoolingName | None = None,
    mix: LayerMix | None = None,
    attentions: Layers = None,
    attention_heads: int | Iterable[int] | None = None,
    dtype: DtypeName = "float32",
    truncation: TruncationName = "error",
    max_length: int | None = None,
    return_tokens: bool = False,
    prompt: str | None = None,
    prompt_name: str | None = None,
    lower_case: bool = False,
    windows: Windows | None = None,
    span_pooling: Poolings = None,
) -> pb.EmbedOptions:
    """Returns the options that all three embed RPCs share."""
    poolings, of_spans = _poolings("pooling", pooling), _poolings("span_pooling", span_pooling)
    outputs: list[pb.Output] = []
    if layers is not None or (mix is None and (words is not None or not (pooler_output or poolings or of_spans))):
        outputs.append(_rows(words, **_layers("layers", -1 if layers is None else layers)))
    if mix is not None:
        outputs.append(_rows(words, mix=_mix("mix", mix)))
    if pooler_output:
        outputs.append(pb.Output(pooler_output=pb.PoolerOutput()))
    if attentions is not None:
        heads = [] if attention_heads is None else _several("attention_heads", attention_heads)
        outputs.append(pb.Output(attentions=pb.Attentions(heads=heads, **_layers("attentions", attentions))))
    elif attention_heads is not None:
        raise InvalidArgumentError('attention_heads belongs to attentions; pass attentions="all" or layers too')
    outputs.extend(pb.Output(pooled_vectors=_pooled_vectors("pooling", one)) for one in poolings)
    outputs.extend(pb.Output(span_vectors=_span_vectors(one)) for one in of_spans)
    return pb.EmbedOptions(
        outputs=outputs,
        truncation=named("truncation", truncation, wire.TRUNCATIONS),
        max_length=count("max_length", max_length),
        dtype=named("dtype", dtype, wire.DTYPES),
        return_tokens=return_tokens,
        prompt=_string("prompt", prompt),
        prompt_name=_string("prompt_name", prompt_name),
        lower_case=lower_case,
        windows=_windows(windows),
    )


def count(field: str, value: int | None) -> int:
    """Returns a number that starts at 1, and 0 for None."""
    if value is None:
        return 0
    if _integer(field, value) < 1:
        raise InvalidArgumentError(f"{field} is {value}; it starts at 1, None means the default")
    return value


def raises(on_error: OnError) -> bool:
    """Returns whether a bad item of a stream is raised."""
    if on_error not in ("raise", "return"):
        raise InvalidArgumentError(f'on_error is {on_error!r}; pass "raise" or "return"')
    return on_error == "raise"


def _windows(windows: Windows | None) -> pb.Windows | None:
    if windows is None:
        return None
    if not isinstance(windows, Windows):
        raise InvalidArgumentError(f"windows is of type {type(windows).__name__}; pass Windows(stride=…)")
    return pb.Windows(stride=_integer("windows.stride", windows.stride))


def _rows(words: WordPoolingName | None, **layers: Any) -> pb.Output:
    """Asks for rows of some layers: one a token, or one a word."""
    if words is None:
        return pb.Output(hidden_states=pb.HiddenStates(**layers))
    return pb.Output(word_vectors=pb.WordVectors(pooling=named("words", words, wire.WORD_POOLINGS), **layers))


def _layers(field: str, layers: str | int | Iterable[int]) -> dict[str, Any]:
    """Returns chosen layers as the two fields that every message has for them."""
    if isinstance(layers, str):
        if layers != "all":
            raise InvalidArgumentError(f'{field} is {layers!r}; pass "all", a layer number or a list of them')
        return {"all_layers": True}
    return {"layers": _several(field, layers)}


def _several(field: str, values: int | Iterable[int]) -> list[int]:
    """Returns one number or several as a list."""
    # A numpy scalar is of a type that could be iterated over, and has no shape.
    several: Iterable[Any] = values if isinstance(values, Iterable) and getattr(values, "shape", 0) != () else [values]
    numbers = [_integer(field, value) for value in several]
    if not numbers:
        raise InvalidArgumentError(f"{field} is empty; name at least one")
    return numbers


def _mix(field: str, mix: LayerMix) -> pb.LayerMix:
    if not isinstance(mix, LayerMix):
        raise InvalidArgumentError(f"{field} is of type {type(mix).__name__}; pass a LayerMix")
    return pb.LayerMix(
        strategy=named(f"{field}.strategy", mix.strategy, wire.MIX_STRATEGIES),
        weights=[] if mix.weights is None else _numbers(f"{field}.weights", mix.weights),
        **_layers(f"{field}.layers", mix.layers),
    )


def _numbers(field: str, values: npt.ArrayLike) -> list[float]:
    try:
        array = np.asarray(values)
    except ValueError as exc:
        raise InvalidArgumentError(f"{field} is not flat; pass one number for each layer") from exc
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise InvalidArgumentError(f"{field} has something else than numbers; pass one for each layer")
    numbers: list[float] = array.tolist()
    return numbers


def _poolings(field: str, pooling: Poolings) -> list[PoolingName | Pooling]:
    try:
        return [pooling] if isinstance(pooling, (str, Pooling)) else list(pooling or ())
    except TypeError as exc:
        raise InvalidArgumentError(
            f"{field} is of type {type(pooling).__name__}; pass a name, a Pooling, or several"
        ) from exc


def _pooled_vectors(field: str, pooling: PoolingName | Pooling) -> pb.PooledVectors:
    pooling = Pooling(pooling) if isinstance(pooling, str) else pooling
    if not isinstance(pooling, Pooling):
        raise InvalidArgumentError(f"{field} is of type {type(pooling).__name__}; pass a name or a Pooling")
    layer = pooling.layer
    source: dict[str, Any] = (
        {"mix": _mix(f"{field}.layer", layer)}
        if isinstance(layer, LayerMix)
        else {"layer": _integer(f"{field}.layer", layer)}
    )
    return pb.PooledVectors(
        strategy=named(f"{field}.strategy", pooling.strategy, wire.POOLING_STRATEGIES),
        exclude_special_tokens=not pooling.include_special_tokens,
        normalize=pooling.normalize,
        dimensions=count(f"{field}.dimensions", pooling.dimensions),
        **source,
    )


def _span_vectors(pooling: PoolingName | Pooling) -> pb.SpanVectors:
    asked = _pooled_vectors("span_pooling", pooling)
    if asked.exclude_special_tokens:
        raise InvalidArgumentError(
            "span_pooling excludes special tokens, which spans of characters never have; leave include_special_tokens "
            "out, and special tokens out of spans of tokens"
        )
    found = pb.SpanVectors(strategy=asked.strategy, normalize=asked.normalize, dimensions=asked.dimensions)
    if asked.HasField("mix"):
        found.mix.CopyFrom(asked.mix)
    else:
        found.layer = asked.layer
    return found


def _string(field: str, value: str | None) -> str:
    if not isinstance(value, str | None):
        raise InvalidArgumentError(f"{field} is of type {type(value).__name__}; pass a str")
    try:
        (value or "").encode()
    except UnicodeEncodeError as exc:
        raise InvalidArgumentError(f"{field} has a lone surrogate, which UTF-8 cannot carry; replace it") from exc
    return value or ""


def named(field: str, name: str, known: Mapping[str, NumberT]) -> NumberT:
    """Returns what a name stands for."""
    if name not in list(known):  # A list, because a name that is no str may have no hash.
        raise InvalidArgumentError(f"{field} is {name!r}; pass one of {', '.join(known)}")
    return known[name]


def _integer(field: str, value: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError("a bool is no number")
        number = operator.index(value)
    except TypeError as exc:
        raise InvalidArgumentError(f"{field} has a value of type {type(value).__name__}; pass ints") from exc
    if not -(2**31) <= number < 2**31:
        raise InvalidArgumentError(f"{field} has a value beyond 32 bits; pass smaller numbers")
    return number
