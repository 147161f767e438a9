"""What a request may not ask of its texts: each fault by its item, the limit and the next step, in one order."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.answers import IDENTITY

from layertap.errors import InvalidArgumentError, LayertapError
from layertap.types import Limits
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.sentence_config import SentenceConfig
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.observability.call_log import Record
from layertap_server.protocol.preprocess import Preprocessor, held_bytes
from layertap_server.types import Plan, Windowing

SECRET = "xyzzyplugh"
LIMITS = dataclasses.replace(
    Limits(**{field.name: 1 << 20 for field in pb.Limits.DESCRIPTOR.fields}),
    max_text_count=600,
    max_character_count=1000,
    max_call_output_bytes=100_000,
    max_window_count=4,
)
SENTENCES = SentenceConfig(max_length=512, prompts={"query": "find: ", "passage": "the text: "})
MEAN: Any = {"pooled_vectors": {}}
MIXED: Any = {"pooled_vectors": {"mix": {"layers": [2, 3], "strategy": pb.MIX_STRATEGY_CONCAT}}}
SPAN_VECTORS: Any = {"span_vectors": {}}
SPANS = {"outputs": [SPAN_VECTORS]}
CLS, SEP, WORD = 101, 102, 1045

Run = Callable[..., tuple[Plan, list[Tokenized]]]


@pytest.fixture(scope="module")
def tokenizer(real_folder: Path) -> Tokenizer:
    return Tokenizer(real_folder)


@pytest.fixture(scope="module")
def make(tokenizer: Tokenizer) -> Callable[..., Preprocessor]:
    """Makes the pipeline of a model of 3 blocks and 32 values a row, with 512 positions and by default 500 of them."""
    facts = dataclasses.replace(
        IDENTITY,
        layer_count=3,
        hidden_size=32,
        vocab_size=30522,
        default_max_length=500,
        special_token_ids=tokenizer.special_token_ids,
    )

    def one(**sentences: Any) -> Preprocessor:
        config = dataclasses.replace(SENTENCES, **sentences)
        return Preprocessor(model=facts, limits=LIMITS, sentences=config, tokenizer=tokenizer)

    return one


@pytest.fixture(scope="module")
def run(make: Callable[..., Preprocessor]) -> Run:
    """Returns the plan and the tokens of texts, each a str or the fields of an `Input`."""
    made = make()

    def embed(
        inputs: Sequence[Any], outputs: Sequence[Any] = (MEAN,), preprocessor: Preprocessor = made, **options: Any
    ) -> tuple[Plan, list[Tokenized]]:
        messages = [pb.Input(text=one) if isinstance(one, str) else pb.Input(**one) for one in inputs]
        record, held = Record(method="Embed", request_id="1", client="me"), list[int]()
        plan, results = asyncio.run(
            preprocessor.embed(messages, pb.EmbedOptions(outputs=outputs, **options), record, hold=held.append)
        )
        assert sum(held) == sum(map(held_bytes, results))
        return plan, results

    return embed


def refused(run: Run, *args: Any, **options: Any) -> str:
    """Returns the message of an InvalidArgumentError, which holds no text."""
    with pytest.raises(LayertapError) as caught:
        run(*args, **options)
    assert type(caught.value) is InvalidArgumentError
    assert SECRET not in caught.value.details
    return caught.value.details


def ids(*given: int, mask: Sequence[int] = (), types: Sequence[int] = ()) -> dict[str, Any]:
    return {"token_ids": {"input_ids": given, "attention_mask": mask, "token_type_ids": types}}


def spans(*bounds: int, unit: int = pb.SPAN_UNIT_TOKEN, **kind: Any) -> dict[str, Any]:
    return (kind or {"text": "I me"}) | {"spans": {"bounds": bounds, "unit": unit}}


def words(*given: str) -> dict[str, Any]:
    return {"words": {"words": given}}


BARE: Any = {"pooled_vectors": {"exclude_special_tokens": True}}
LAYERS: Any = {"hidden_states": {"all_layers": True}}
TEXTS: list[tuple[Any, dict[str, Any], str]] = [
    ({}, {}, "has no kind; set text, pair, words or token_ids"),
    (SECRET * 101, {}, "has 1010 characters, the most is 1000; split it into several texts"),
    ({"pair": {"first": SECRET * 50, "second": SECRET * 51}}, {}, "has 1010 characters, the most is 1000"),
    (words(*["x"] * 1001), {}, "has 1001 words, the most is 1000; split"),
    (words(*["xx"] * 334), {}, "has 1002 characters, the most is 1000"),
    ("x" * 998, {"prompt": "abc"}, "has 1001 characters, the most is 1000"),
    (words(SECRET), {"prompt": "find: "}, "is words, before which no prompt can be put; send a string or a pair"),
    (ids(CLS, SEP), {"prompt_name": "query"}, "is token ids, before which no prompt can be put"),
    ("a " * 499, {}, "max_length is 500; shorten it, raise max_length, which may be 512, cut it"),
    ("!" * 511, {"max_length": 512}, "has 513 tokens, max_length is 512; shorten it, cut it"),
    ("a a a", {"max_length": 4}, "has 5 tokens, max_length is 4"),
    (ids(*[WORD] * 513), {"truncation": pb.TRUNCATION_RIGHT}, "has 513 .*512"),
    ({"pair": {"first": "a", "second": "b"}}, {"max_length": 2, "truncation": pb.TRUNCATION_RIGHT}, "3 special tokens"),
    ("a " * 10, {"max_length": 4, "windows": {}}, "windows"),
    (ids(CLS, 30522), {}, r"input_ids\[1\] .*30521"),
    (ids(CLS), {"outputs": [{"word_vectors": {}}]}, "is token ids, which have no words; send text or words"),
    ("", {"outputs": [MEAN, BARE]}, "has nothing to pool over: every token is masked, special or a prompt's"),
    (ids(CLS, WORD, SEP, mask=[1, 0, 1]), {"outputs": [BARE]}, "has nothing to pool over"),
    *(
        (
            ids(CLS, WORD, SEP, mask=[0, 0, 0]),
            {"outputs": [{"pooled_vectors": {"strategy": n}}]},
            "nothing to pool over",
        )
        for n in set(pb.PoolingStrategy.values()) - {pb.POOLING_STRATEGY_CLS}
    ),
    (
        "a " * 194,
        {"outputs": [LAYERS]},
        r"the outputs of inputs\[1\] take 100352 bytes, the most is 100000; ask for few",
    ),
    (ids(*[WORD] * 391), {"outputs": [MIXED]}, r"the mixes of inputs\[1\] take 100096 bytes until they are complete"),
    (spans(0, 1), {}, "has spans, of which no output is made; ask for span_vectors"),
    (spans(0, 1, 2), SPANS, "spans.bounds has 3 entries; send two for each span"),
    (spans(*[0, 1] * 257), SPANS, "has 257 spans for 4 tokens, the most is 256; send fewer"),
    (spans(*[0, 4] * 65), SPANS, "hold more than 256 tokens together, 64 times those of the text"),
    (spans(0, 1, unit=9), SPANS, "spans.unit has the unknown value 9"),
    (spans(0, 1, 2, 2), SPANS, r"spans\[1\] is empty or out of bounds; 0 <= start < end <= 4 tokens"),
    (spans(0, 5), SPANS, r"spans\[0\] is empty or out of bounds; .*<= 4 tokens"),
    (spans(-1, 1), SPANS, r"spans\[0\] is empty or out of bounds"),
    (spans(0, 6, unit=pb.SPAN_UNIT_CHARACTER), SPANS, r"spans\[0\] is empty or out of bounds; .*<= 4 characters"),
    (spans(0, 1, 1, 2, unit=pb.SPAN_UNIT_CHARACTER), SPANS, r"spans\[1\] holds no token, after truncation and masks"),
    (spans(2, 4, unit=0), SPANS | {"max_length": 3, "truncation": 2}, r"spans\[0\] holds no token, after truncation"),
    (spans(0, 1, unit=pb.SPAN_UNIT_CHARACTER, **words("a")), SPANS, r"has spans of characters, .*SPAN_UNIT_TOKEN"),
    (spans(0, 1, 1, 2, **ids(CLS, WORD, mask=[1, 0])), SPANS, r"spans\[1\] holds no token, after truncation and masks"),
]


@pytest.mark.parametrize(("item", "options", "message"), TEXTS, ids=[one[2][:40] for one in TEXTS])
def test_a_text_at_fault_is_named_with_the_limit_and_the_next_step(
    run: Run, item: Any, options: dict[str, Any], message: str
) -> None:
    found = refused(run, ["good", item], **{"outputs": [MEAN]} | options)
    assert re.search(message, found) and "inputs[1]" in found, found


AT_THE_LIMIT: dict[str, tuple[Any, dict[str, Any], int]] = {
    "characters": ("x" * 1000, {}, 3),
    "characters with a prompt": ("x" * 993, {"prompt_name": "query"}, 5),
    "characters of a pair": ({"pair": {"first": "x" * 500, "second": "y" * 500}}, {}, 5),
    "characters of words": (words(*["x" * 9] * 100), {"truncation": pb.TRUNCATION_LEFT}, 500),
    "max_length by default": ("a " * 498, {}, 500),
    "max_length": ("a a", {"max_length": 4}, 4),
    "ids above the default": (ids(*[WORD] * 512), {}, 512),
    "a cut text": ("a " * 499, {"truncation": pb.TRUNCATION_RIGHT}, 500),
    "bytes": ("a " * 193, {"outputs": [LAYERS]}, 195),
    "bytes of a mix": (ids(*[WORD] * 390), {"outputs": [MIXED]}, 390),
    "spans": (spans(*[0, 1] * 256), SPANS, 4),
    "tokens of spans": (spans(*[0, 4] * 64), SPANS, 4),
    "no spans": (spans(), SPANS, 4),
}


@pytest.mark.parametrize("case", AT_THE_LIMIT)
def test_what_is_at_a_limit_is_within_it(run: Run, case: str) -> None:
    item, options, token_count = AT_THE_LIMIT[case]
    _, (result,) = run([item], **{"outputs": [MEAN]} | options)
    assert result.text.token_count == token_count


OPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({"max_length": n}, f"max_length is {n}; it runs from 2 to 512, 0 means the model's") for n in (1, -1, 513)),
    ({"truncation": 9}, "truncation has the unknown value 9"),
    ({"prompt": "x" * 10_001}, "options.prompt has 10001 characters, the most is 10000"),
    ({"prompt": SECRET, "prompt_name": "query"}, "options has both prompt and prompt_name; set one of them"),
    ({"prompt_name": SECRET}, "prompt_name is none of this model's prompts; it has passage, query; or send"),
    ({"windows": {}, "truncation": pb.TRUNCATION_LEFT}, "options has windows, with which no text is cut; leave trunc"),
    ({"windows": {"stride": -1}}, "windows.stride is -1; with max_length 500 it runs from 0 to 497"),
    ({"windows": {"stride": 6}, "max_length": 8}, "windows.stride is 6; with max_length 8 it runs from 0 to 5"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[one[1] for one in OPTIONS])
def test_an_option_at_fault_is_refused_before_any_text(run: Run, options: dict[str, Any], message: str) -> None:
    for inputs in (["good"], [], [{}], ["good"] * 601, [SECRET * 101]):
        assert re.search(message, refused(run, inputs, **options))


def test_faults_are_refused_in_one_order_options_count_first_text(run: Run) -> None:
    assert "outputs is empty" in refused(run, [{}] * 601, outputs=[])
    assert refused(run, []).startswith("inputs is empty; send at least one text")
    assert "inputs has 601 texts, the most is 600; use embed_stream" in refused(run, [{}] * 601)
    assert "inputs[1]" in refused(run, ["good", "a " * 499, {}])
    assert "inputs[1]" in refused(run, ["good", {}, "a " * 499])
    assert "inputs[599]" in refused(run, ["good"] * 599 + [{}])


def test_the_default_truncation_is_none_and_the_default_length_the_models(make: Any) -> None:
    options = make().options(pb.EmbedOptions(outputs=[MEAN]))
    how = options.tokenizing
    assert (how.truncation, how.max_length, how.windowing, options.prompt) == ("error", 500, None, "")
    options = make().options(pb.EmbedOptions(outputs=[MEAN], windows=pb.Windows(stride=497), max_length=0))
    assert options.tokenizing.windowing == Windowing(stride=497, max_count=4)
    shared = make().options(pb.EmbedOptions(outputs=[BARE], shared_memory=pb.SharedMemoryUse(call_number=1)))
    assert shared == make().options(pb.EmbedOptions(outputs=[BARE]))


@pytest.mark.parametrize("named", [{"prompt_name": "passage"}, {"prompt": "the text: "}], ids=str)
def test_a_prompt_stands_before_strings_and_is_pooled_unless_the_folder_says_otherwise(
    make: Any, run: Run, named: dict[str, str]
) -> None:
    pair = {"pair": {"first": "a good", "second": "one"}}
    plan, results = run(["a good", pair], **named)
    _, wanted = run(["the text: a good", {"pair": {"first": "the text: a good", "second": "one"}}])
    assert [one.text.input_ids.tolist() for one in results] == [one.text.input_ids.tolist() for one in wanted]
    assert plan.outputs[0].pool is not None and plan.outputs[0].pool.first_row == 0
    plan, _ = run(["a good"], preprocessor=make(include_prompt=False), **named)
    assert plan.outputs[0].pool is not None and plan.outputs[0].pool.first_row == 4  # [CLS] the text :
    empty = refused(run, [""], preprocessor=make(include_prompt=False), outputs=[BARE], **named)
    assert "nothing to pool over" in empty


def test_spans_are_the_tokens_that_hold_their_characters(run: Run) -> None:
    text = "I love xylophones"  # [CLS] i love x ##yl ##ophone ##s [SEP]
    given = (0, 1, 2, 6, 7, 17, 8, 9, 0, 17, 1, 3, 16, 17)
    for prompt, before in (("", 1), ("find: ", 3)):
        _, (result,) = run([spans(*given, unit=0, text=text)], [SPAN_VECTORS], prompt=prompt)
        found = result.text.spans
        assert found is not None and (found.starts - before).tolist() == [0, 1, 2, 3, 0, 1, 5]
        assert found.counts.tolist() == [1, 1, 4, 1, 6, 1, 1]


def test_the_special_tokens_of_ids_are_those_of_the_model(run: Run) -> None:
    _, (text, given) = run(["a", ids(CLS, WORD, SEP, 0)], [BARE])
    assert [np.array(one.text.special_tokens_mask).tolist() for one in (text, given)] == [[1, 0, 1], [1, 0, 1, 1]]


def test_many_texts_are_tokenized_in_slices_each_in_its_place(run: Run) -> None:
    numbers = ["a " * (n % 9) for n in range(600)]
    _, results = run(numbers)
    assert [one.text.token_count for one in results] == [2 + n % 9 for n in range(600)]
