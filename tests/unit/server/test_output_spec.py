"""The outputs of a request as a plan: each field has its effect, and each fault is refused by field, limit and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from support.answers import IDENTITY

from layertap.errors import FailedPreconditionError, InvalidArgumentError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.protocol import output_spec
from layertap_server.types import Mix, Mixing, Output, OutputKind, Plan, Pool, Strategy, WordPooling

MODEL = dataclasses.replace(IDENTITY, layer_count=3, hidden_size=32, head_count=4)
SENTENCES = SentenceConfig(max_length=512, strategies=(Strategy.CLS, Strategy.MAX))
JOINED = {"joined_pools": (Pool(strategy=Strategy.MAX),), "applies_modules": True}


def plan(*outputs: Mapping[str, Any], sentences: SentenceConfig = SENTENCES, **options: Any) -> Plan:
    """Returns the plan of outputs, each `{kind: fields}`."""
    return output_spec.plan(pb.EmbedOptions(outputs=outputs, **options), MODEL, sentences)


def pooled(strategy: Strategy = Strategy.MEAN, *, layer: int = 3, size: int = 32, kept: int = 0, **rest: Any) -> Output:
    """Returns pooled vectors: `size` values wide, of which `kept` are kept; 0: all."""
    pool = {name: rest.pop(name) for name in ("exclude_special_tokens", "normalize") if name in rest}
    rest = {"kind": OutputKind.POOLED_VECTORS, "pool": Pool(strategy=strategy, **pool)} | rest
    return Output(layers=(layer,), row_size=kept or size, pooled_size=size, **rest)


def mixed(mixing: Mixing, *layers: int, size: int = 32, weights: tuple[float, ...] = ()) -> dict[str, Any]:
    """Returns what an output says of its mix."""
    return {"mix": Mix(mixing=mixing, layers=layers, weights=weights, row_size=size)}


HIDDEN, POOL, MODULES = "hidden_states", "pooled_vectors", {"sentence_modules": True}
TOKENS, WORDS, ATTENTIONS = OutputKind.HIDDEN_STATES, OutputKind.WORD_VECTORS, OutputKind.ATTENTIONS
CONCAT = {"strategy": pb.MIX_STRATEGY_CONCAT, "layers": [3, 1]}
WEIGHTED = {"strategy": pb.MIX_STRATEGY_WEIGHTED, "layers": [0, 2], "weights": [-1e6, 1e6]}
RIGHT: list[tuple[dict[str, Any], Output]] = [
    ({"hidden_states": {}}, Output(kind=TOKENS, layers=(3,), row_size=32)),
    ({"hidden_states": {"layers": [-1, 0, -4, 1]}}, Output(kind=TOKENS, layers=(0, 1, 3), row_size=32)),
    ({"hidden_states": {"layers": [3] * 256}}, Output(kind=TOKENS, layers=(3,), row_size=32)),
    ({"hidden_states": {"all_layers": True}}, Output(kind=TOKENS, layers=(0, 1, 2, 3), row_size=32)),
    (
        {"hidden_states": {"mix": CONCAT}},
        Output(kind=TOKENS, layers=(3,), row_size=64, **mixed(Mixing.CONCAT, 3, 1, size=64)),
    ),
    (
        {"hidden_states": {"mix": {"all_layers": True}}},
        Output(kind=TOKENS, layers=(3,), row_size=32, **mixed(Mixing.MEAN, 0, 1, 2, 3)),
    ),
    (
        {"hidden_states": {"mix": WEIGHTED}},
        Output(kind=TOKENS, layers=(2,), row_size=32, **mixed(Mixing.WEIGHTED, 0, 2, weights=(-1e6, 1e6))),
    ),
    ({HIDDEN: MODULES}, Output(kind=TOKENS, layers=(3,), row_size=32, applies_modules=True)),
    ({"word_vectors": {}}, Output(kind=WORDS, layers=(3,), row_size=32, word_pooling=WordPooling.MEAN)),
    (
        {"word_vectors": {"pooling": pb.WORD_POOLING_FIRST_LAST, "mix": CONCAT}},
        Output(
            kind=WORDS,
            layers=(3,),
            row_size=128,
            word_pooling=WordPooling.FIRST_LAST,
            **mixed(Mixing.CONCAT, 3, 1, size=64),
        ),
    ),
    ({"pooler_output": {}}, Output(kind=OutputKind.POOLER_OUTPUT, layers=(3,), row_size=32)),
    ({"pooled_vectors": {}}, pooled()),
    (
        {"pooled_vectors": {"layer": -4, "normalize": True, "exclude_special_tokens": True, "dimensions": 32}},
        pooled(layer=0, normalize=True, exclude_special_tokens=True),
    ),
    (
        {"pooled_vectors": {"strategy": pb.POOLING_STRATEGY_MEAN_MAX, "mix": CONCAT, "dimensions": 128}},
        pooled(Strategy.MEAN_MAX, size=128, **mixed(Mixing.CONCAT, 3, 1, size=64)),
    ),
    ({"pooled_vectors": {"dimensions": 1}}, pooled(kept=1)),
    ({POOL: MODULES}, pooled(Strategy.CLS, size=64, **JOINED)),
    ({POOL: MODULES | {"dimensions": 3}}, pooled(Strategy.CLS, size=64, kept=3, **JOINED)),
    ({POOL: MODULES | {"dimensions": 999}}, pooled(Strategy.CLS, size=64, **JOINED)),
    ({"span_vectors": {"layer": 2}}, pooled(layer=2, kind=OutputKind.SPAN_VECTORS)),
    ({"attentions": {}}, Output(kind=ATTENTIONS, layers=(2,), row_size=4, heads=(0, 1, 2, 3))),
    (
        {"attentions": {"layers": [-3, 2], "heads": [3, 0]}},
        Output(kind=ATTENTIONS, layers=(0, 2), row_size=2, heads=(3, 0)),
    ),
]


@pytest.mark.parametrize(("asked", "wanted"), RIGHT, ids=lambda one: str(one) if isinstance(one, dict) else "")
def test_each_field_has_its_effect(asked: dict[str, Any], wanted: Output) -> None:
    assert plan(asked).outputs == (wanted,)


def test_the_plan_has_its_outputs_in_order_and_the_dtype_and_tokens_that_are_asked_for() -> None:
    both = plan({"hidden_states": {"layers": [1]}}, {"pooled_vectors": {"layer": 2}})
    assert [one.kind for one in both.outputs] == [OutputKind.HIDDEN_STATES, OutputKind.POOLED_VECTORS]
    assert (both.depth, both.dtype, both.return_tokens, both.of_windows) == (2, "float32", False, None)
    other = plan({"pooler_output": {}}, dtype=pb.DTYPE_BFLOAT16, return_tokens=True, windows={})
    assert (other.dtype, other.return_tokens, other.of_windows is None) == ("bfloat16", True, False)
    assert len(plan(*[{"pooled_vectors": {}}] * 64).outputs) == 64


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, r" has no kind; set hidden_states, .* or attentions"),
    *(({HIDDEN: {"layers": [k]}}, rf"\.layers has {k}; .* run from 0 to 3, or -4 to -1") for k in (4, -5)),
    ({HIDDEN: {"layers": [1] * 257}}, r"layers has 257 entries, the most is 256; name each layer once"),
    ({HIDDEN: {"layers": [1], "all_layers": True}}, r" has both layers and all_layers; set one"),
    ({HIDDEN: {"mix": CONCAT, "layers": [1]}}, "both layers and a mix; ask for them as two outputs"),
    ({HIDDEN: {"mix": CONCAT, "all_layers": True}}, "both layers and a mix"),
    ({"word_vectors": {"mix": CONCAT, "layers": [1]}}, "both layers and a mix"),
    ({"word_vectors": {"all_layers": True, "layers": [1]}}, "both layers and all_layers"),
    ({"word_vectors": {"pooling": 9}}, r"\.pooling has the unknown value 9"),
    ({HIDDEN: {"mix": {}}}, r"\.mix needs either layers or all_layers"),
    ({HIDDEN: {"mix": {"layers": [1], "all_layers": True}}}, "mix needs either layers or all_layers"),
    ({HIDDEN: {"mix": {"layers": [1], "strategy": 9}}}, "mix.strategy has the unknown value 9"),
    ({HIDDEN: {"mix": {"layers": [0, 4]}}}, r"mix.layers has 4; .* from 0 to 3"),
    ({HIDDEN: {"mix": {"layers": [3, 0, -1]}}}, "mix.layers names a layer twice; name each once"),
    ({HIDDEN: {"mix": {"layers": [0, 1, 2, 3, 0]}}}, "mix.layers has 5 entries, the model 4 layers"),
    ({HIDDEN: {"mix": {"layers": [1], "weights": [1.0]}}}, "weights belongs to the strategy weighted"),
    ({HIDDEN: {"mix": WEIGHTED | {"weights": []}}}, "weights has 0 entries for 2 layers; send one for each"),
    ({HIDDEN: {"mix": WEIGHTED | {"weights": [1, 2, 3]}}}, "weights has 3 entries for 2 layers"),
    *(
        ({HIDDEN: {"mix": WEIGHTED | {"weights": [1, w]}}}, "entries must be from -1000000 to 1000000")
        for w in (float("nan"), float("inf"), 1.1e6, -1.1e6)
    ),
    ({POOL: {"strategy": 99}}, r"\.strategy has the unknown value 99"),
    ({POOL: {"mix": CONCAT, "layer": 1}}, "both a layer and a mix; set one of them"),
    *(({POOL: {"layer": k}}, rf"\.layer has {k}; .* from 0 to 3") for k in (4, -5)),
    *(({POOL: {"dimensions": n}}, rf"\.dimensions is {n}; it runs from 1 to 32") for n in (-1, 33)),
    ({POOL: {"strategy": pb.POOLING_STRATEGY_MEAN_MAX, "mix": CONCAT, "dimensions": 129}}, "it runs from 1 to 128"),
    ({POOL: {"strategy": pb.POOLING_STRATEGY_CLS, "exclude_special_tokens": True}}, "include them, or pool otherwise"),
    ({"span_vectors": {"strategy": pb.POOLING_STRATEGY_CLS}}, "pools spans by cls, which is of a whole text"),
    *(
        ({POOL: MODULES | {name: value}}, "leave strategy, layer, mix and exclude_special_tokens out")
        for name, value in {"strategy": 1, "layer": 3, "mix": CONCAT, "exclude_special_tokens": True}.items()
    ),
    ({POOL: MODULES | {"dimensions": -1}}, r"\.dimensions is -1; it starts at 1"),
    *(
        ({HIDDEN: MODULES | {name: value}}, "apply to the last layer; name no other")
        for name, value in {"layers": [2], "mix": {"layers": [3]}, "all_layers": True}.items()
    ),
    ({"attentions": {"layers": [3]}}, r"layers has 3; .* from 0 to 2, or -3 to -1"),
    *(({"attentions": {"heads": [n]}}, f"heads has {n}; this model's heads run from 0 to 3") for n in (4, -1)),
    ({"attentions": {"heads": [1, 1]}}, "heads names a head twice"),
    ({"attentions": {"heads": [0, 1, 2, 3, 0]}}, "heads has 5 entries, this model has 4 heads"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda one: str(one) if isinstance(one, dict) else "")
def test_a_fault_is_refused_by_its_field_the_limit_and_the_next_step(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^options\.outputs\[1\].*{message}"):
        plan({"pooler_output": {}}, wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": []}, "options.outputs is empty; ask for at least one output"),
        ({"outputs": [pb.Output()] * 65}, "options.outputs has 65 entries, the most is 64; ask in several requests"),
        ({"outputs": [{"pooler_output": {}}], "dtype": 99}, "options.dtype has the unknown value 99"),
        ({"outputs": [{"attentions": {}}], "windows": {}}, r"options.outputs\[0\] is attentions, which .* as windows"),
    ],
    ids=["no outputs", "too many outputs", "unknown dtype", "attentions of windows"],
)
def test_faults_of_the_whole(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        output_spec.plan(pb.EmbedOptions(**options), MODEL, SENTENCES)


def test_what_the_model_has_not_is_a_failed_precondition() -> None:
    bare = dataclasses.replace(MODEL, has_pooler_output=False)
    with pytest.raises(FailedPreconditionError, match="no pooler weights; ask for a pooling such as cls"):
        output_spec.plan(pb.EmbedOptions(outputs=[{"pooler_output": {}}]), bare, SENTENCES)
    tokens_only = dataclasses.replace(SENTENCES, strategies=())
    assert plan({HIDDEN: MODULES}, sentences=tokens_only)
    with pytest.raises(FailedPreconditionError, match="its folder has no Pooling module; ask for layers or a pooling"):
        plan({POOL: MODULES}, sentences=tokens_only)
    for kind in (HIDDEN, POOL):
        with pytest.raises(FailedPreconditionError, match="not available with this model: it says so; ask for"):
            plan({kind: MODULES}, sentences=dataclasses.replace(SENTENCES, unsupported="it says so"))
