"""The outputs that a request asks for, checked and resolved for one model: the options as a `Plan`.

A fault is refused by its field, the limit and the next step. The length of a list is checked before its entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from layertap import wire
from layertap.errors import FailedPreconditionError, InvalidArgumentError, counted
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.types import Mix, Mixing, Output, OutputKind, Plan, Pool, Strategy, WordPooling

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")

MAX_OUTPUT_COUNT: Final = 64
"""Outputs of one request."""

MAX_LAYER_ENTRIES: Final = 256
"""Entries of one list of layers, doubles counted; a deeper model takes as many as it has layers."""

MAX_WEIGHT: Final = 1e6
"""The largest magnitude of a weight; with it no mix of finite layers can leave float32's range."""

_STRATEGIES: Final = {number: Strategy[name.upper()] for name, number in wire.POOLING_STRATEGIES.items()}
_MIXINGS: Final = {number: Mixing[name.upper()] for name, number in wire.MIX_STRATEGIES.items()}
_WORD_POOLINGS: Final = {number: WordPooling[name.upper()] for name, number in wire.WORD_POOLINGS.items()}


def plan(options: pb.EmbedOptions, model: ModelFacts, sentences: SentenceConfig) -> Plan:
    """Returns what is asked of each text.

    Raises:
        InvalidArgumentError: if an option is at fault.
        FailedPreconditionError: if the model has no pooler, or no sentence vectors that can be made here.
    """
    if not options.outputs:
        raise InvalidArgumentError("options.outputs is empty; ask for at least one output")
    if len(options.outputs) > MAX_OUTPUT_COUNT:
        raise InvalidArgumentError(
            f"options.outputs has {len(options.outputs)} entries, the most is {MAX_OUTPUT_COUNT}; "
            "ask in several requests"
        )
    outputs = tuple(
        _output(output, model, sentences, f"options.outputs[{n}]") for n, output in enumerate(options.outputs)
    )
    dtype = known("options.dtype", options.dtype or pb.DTYPE_FLOAT32, wire.DTYPE_NAMES)
    named = sentences.prompts.get(options.prompt_name, "") if options.prompt_name else ""
    found = Plan(outputs=outputs, dtype=dtype, return_tokens=options.return_tokens, named_prompt=named)
    if not options.HasField("windows"):
        return found
    for n, output in enumerate(outputs):
        if output.kind is OutputKind.ATTENTIONS:
            raise InvalidArgumentError(
                f"options.outputs[{n}] is attentions, which texts that run as windows have not; leave out one of them"
            )
    return found.with_windows()


def known(field: str, value: KeyT, known: Mapping[KeyT, ValueT]) -> ValueT:
    """Returns what an enum value of the contract stands for.

    Raises:
        InvalidArgumentError: if the contract does not name it.
    """
    if value not in known:
        raise InvalidArgumentError(f"{field} has the unknown value {value}; use one that the contract names")
    return known[value]


def _output(output: pb.Output, model: ModelFacts, sentences: SentenceConfig, label: str) -> Output:
    kind = output.WhichOneof("kind")
    if kind == "hidden_states":
        if output.hidden_states.sentence_modules:
            return _token_embeddings(output.hidden_states, model, sentences, label)
        layers, mix, size = _layers(output.hidden_states, model, label)
        return Output(kind=OutputKind.HIDDEN_STATES, layers=layers, row_size=size, mix=mix)
    if kind == "word_vectors":
        return _word_vectors(output.word_vectors, model, label)
    if kind == "pooler_output":
        if not model.has_pooler_output:
            raise FailedPreconditionError("this model has no pooler weights; ask for a pooling such as cls instead")
        return Output(kind=OutputKind.POOLER_OUTPUT, layers=(model.layer_count,), row_size=model.hidden_size)
    if kind == "pooled_vectors":
        if output.pooled_vectors.sentence_modules:
            return _sentence_vectors(output.pooled_vectors, model, sentences, label)
        return _pools(OutputKind.POOLED_VECTORS, output.pooled_vectors, model, label)
    if kind == "span_vectors":
        return _pools(OutputKind.SPAN_VECTORS, output.span_vectors, model, label)
    if kind == "attentions":
        return _attentions(output.attentions, model, label)
    raise InvalidArgumentError(
        f"{label} has no kind; set hidden_states, pooler_output, pooled_vectors, word_vectors, span_vectors or "
        "attentions"
    )


def _layers(
    asked: pb.HiddenStates | pb.WordVectors, model: ModelFacts, label: str
) -> tuple[tuple[int, ...], Mix | None, int]:
    """Returns the layers after which rows leave, the mix that they are of, and how many values a token row has."""
    if asked.HasField("mix"):
        if asked.all_layers or asked.layers:
            raise InvalidArgumentError(f"{label} has both layers and a mix; ask for them as two outputs")
        mix, size = _mix(asked.mix, model, f"{label}.mix")
        return (mix.top,), mix, size
    return _chosen(asked, model.layer_count + 1, label), None, model.hidden_size


def _chosen(asked: pb.HiddenStates | pb.WordVectors | pb.Attentions, count: int, label: str) -> tuple[int, ...]:
    """Returns the layers that are asked for, of so many, ascending."""
    if asked.all_layers and asked.layers:
        raise InvalidArgumentError(f"{label} has both layers and all_layers; set one of them")
    most = max(MAX_LAYER_ENTRIES, count)
    if len(asked.layers) > most:
        raise InvalidArgumentError(
            f"{label}.layers has {len(asked.layers)} entries, the most is {most}; name each layer once, or set "
            "all_layers"
        )
    layers = range(count) if asked.all_layers else {_layer(k, count, f"{label}.layers") for k in asked.layers or (-1,)}
    return tuple(sorted(layers))


def _attentions(asked: pb.Attentions, model: ModelFacts, label: str) -> Output:
    count = model.head_count
    if len(asked.heads) > count:
        raise InvalidArgumentError(
            f"{label}.heads has {len(asked.heads)} entries, this model has {count} heads; name each once"
        )
    for head in asked.heads:
        if not 0 <= head < count:
            raise InvalidArgumentError(f"{label}.heads has {head}; this model's heads run from 0 to {count - 1}")
    heads = tuple(asked.heads or range(count))
    if len(set(heads)) < len(heads):
        raise InvalidArgumentError(f"{label}.heads names a head twice; name each once")
    layers = _chosen(asked, model.layer_count, label)
    return Output(kind=OutputKind.ATTENTIONS, layers=layers, row_size=len(heads), heads=heads)


def _mix(asked: pb.LayerMix, model: ModelFacts, label: str) -> tuple[Mix, int]:
    """Returns a mix, and how many values its rows have."""
    mixing = known(f"{label}.strategy", asked.strategy or pb.MIX_STRATEGY_MEAN, _MIXINGS)
    if bool(asked.layers) == asked.all_layers:
        raise InvalidArgumentError(f"{label} needs either layers or all_layers; set one of them")
    count = model.layer_count + 1
    if len(asked.layers) > count:
        raise InvalidArgumentError(
            f"{label}.layers has {len(asked.layers)} entries, the model {count} layers; name each once, and use "
            "weights to count it more"
        )
    layers = tuple(range(count) if asked.all_layers else (_layer(k, count, f"{label}.layers") for k in asked.layers))
    if len(set(layers)) < len(layers):
        raise InvalidArgumentError(
            f"{label}.layers names a layer twice; name each once, and use weights to count it more"
        )
    _check_weights(asked.weights, mixing, len(layers), f"{label}.weights")
    size = model.hidden_size * (len(layers) if mixing is Mixing.CONCAT else 1)
    return Mix(mixing=mixing, layers=layers, weights=tuple(asked.weights), row_size=size), size


def _check_weights(weights: Sequence[float], mixing: Mixing, layer_count: int, label: str) -> None:
    if mixing is not Mixing.WEIGHTED and weights:
        raise InvalidArgumentError(f"{label} belongs to the strategy weighted; use that, or leave the weights out")
    if mixing is Mixing.WEIGHTED and len(weights) != layer_count:
        raise InvalidArgumentError(
            f"{label} has {counted(len(weights), 'entry', 'entries')} for {counted(layer_count, 'layer')}; send "
            "one for each"
        )
    if not all(abs(weight) <= MAX_WEIGHT for weight in weights):  # NaN is no such number either.
        raise InvalidArgumentError(
            f"{label} has an entry outside its range; entries must be from {-MAX_WEIGHT:.0f} to {MAX_WEIGHT:.0f}"
        )


def _word_vectors(asked: pb.WordVectors, model: ModelFacts, label: str) -> Output:
    pooling = known(f"{label}.pooling", asked.pooling or pb.WORD_POOLING_MEAN, _WORD_POOLINGS)
    layers, mix, size = _layers(asked, model, label)
    if pooling is WordPooling.FIRST_LAST:
        size *= 2
    return Output(kind=OutputKind.WORD_VECTORS, layers=layers, row_size=size, word_pooling=pooling, mix=mix)


def _pools(kind: OutputKind, asked: pb.PooledVectors | pb.SpanVectors, model: ModelFacts, label: str) -> Output:
    """Returns the pools of whole texts, or of spans."""
    strategy = known(f"{label}.strategy", asked.strategy or pb.POOLING_STRATEGY_MEAN, _STRATEGIES)
    excludes = isinstance(asked, pb.PooledVectors) and asked.exclude_special_tokens
    if strategy is Strategy.CLS and excludes:
        raise InvalidArgumentError(
            f"{label} pools the first token by cls and excludes special tokens; include them, or pool otherwise"
        )
    if strategy is Strategy.CLS and kind is OutputKind.SPAN_VECTORS:
        raise InvalidArgumentError(f"{label} pools spans by cls, which is of a whole text; pool them otherwise")
    layer, mix, widest = model.layer_count, None, model.hidden_size
    if asked.HasField("mix"):
        if asked.HasField("layer"):
            raise InvalidArgumentError(f"{label} has both a layer and a mix; set one of them")
        mix, widest = _mix(asked.mix, model, f"{label}.mix")
        layer = mix.top
    elif asked.HasField("layer"):
        layer = _layer(asked.layer, model.layer_count + 1, f"{label}.layer")
    if strategy is Strategy.MEAN_MAX:
        widest *= 2
    if not 0 <= asked.dimensions <= widest:
        raise InvalidArgumentError(f"{label}.dimensions is {asked.dimensions}; it runs from 1 to {widest}, 0 means all")
    return Output(
        kind=kind,
        layers=(layer,),
        row_size=asked.dimensions or widest,
        pool=Pool(strategy=strategy, exclude_special_tokens=excludes, normalize=asked.normalize),
        mix=mix,
        pooled_size=widest,
    )


def _token_embeddings(asked: pb.HiddenStates, model: ModelFacts, sentences: SentenceConfig, label: str) -> Output:
    """Returns the token rows of the last layer after the modules of the model's folder."""
    last = (model.layer_count,)
    if asked.HasField("mix") or asked.all_layers or _chosen(asked, model.layer_count + 1, label) != last:
        raise InvalidArgumentError(f"{label} has sentence_modules, which apply to the last layer; name no other")
    _check_supported(sentences.unsupported)
    return Output(
        kind=OutputKind.HIDDEN_STATES,
        layers=last,
        row_size=sentences.token_size(model.hidden_size),
        applies_modules=True,
    )


def _sentence_vectors(asked: pb.PooledVectors, model: ModelFacts, sentences: SentenceConfig, label: str) -> Output:
    """Returns the vector that sentence-transformers makes by what the model's folder says."""
    if asked.strategy or asked.HasField("layer") or asked.HasField("mix") or asked.exclude_special_tokens:
        raise InvalidArgumentError(
            f"{label} has sentence_modules, with which the model's folder says what is pooled; leave strategy, layer, "
            "mix and exclude_special_tokens out"
        )
    if asked.dimensions < 0:
        raise InvalidArgumentError(f"{label}.dimensions is {asked.dimensions}; it starts at 1, 0 means all")
    _check_supported(sentences.vectors_unsupported)
    widest = sentences.vector_size(model.hidden_size)
    pool, *joined = (Pool(strategy=strategy, normalize=asked.normalize) for strategy in sentences.strategies)
    return Output(
        kind=OutputKind.POOLED_VECTORS,
        layers=(model.layer_count,),
        row_size=min(asked.dimensions or widest, widest),
        pool=pool,
        joined_pools=tuple(joined),
        applies_modules=True,
        pooled_size=sentences.token_size(model.hidden_size) * len(sentences.strategies),
    )


def _check_supported(reason: str) -> None:
    if reason:
        raise FailedPreconditionError(
            f"sentence_modules are not available with this model: {reason}; ask for layers or a pooling"
        )


def _layer(layer: int, count: int, label: str) -> int:
    """Returns the absolute number of a layer, of so many."""
    if not -count <= layer < count:
        raise InvalidArgumentError(
            f"{label} has {layer}; this model's layers run from 0 to {count - 1}, or -{count} to -1"
        )
    return layer if layer >= 0 else layer + count
