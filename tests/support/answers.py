"""Answers made up by the tests: random numbers in every shape that a server may send, and what must come of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from layertap import Embedding, wire
from layertap.types import FloatArray
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.tokenized import Tokenized
from layertap_server.protocol import responses
from layertap_server.scheduler.events import RowsReady
from layertap_server.types import (
    Mix,
    Mixing,
    Output,
    OutputKind,
    Plan,
    Pool,
    Rows,
    Strategy,
    Text,
    Unit,
    WordPooling,
    Words,
)

LAYER_COUNT = 4
IDENTITY = ModelFacts(
    model_id="made-up",
    fingerprint="f" * 64,
    layer_count=LAYER_COUNT,
    hidden_size=4,
    head_count=1,
    vocab_size=10,
    type_vocab_size=2,
    max_length=512,
    default_max_length=512,
    has_pooler_output=True,
    pad_token_id=0,
    special_token_ids=(0,),
    special_tokens={"pad_token": 0},
    padding_side="right",
    has_token_type_ids=True,
    model_type="bert",
)


@dataclasses.dataclass(kw_only=True, eq=False)
class Answer:
    """One answer: what was asked, and its tensors by output index and layer, as bytes and as arrays."""

    plan: Plan
    texts: list[Text]
    wanted: dict[tuple[int, int], FloatArray]
    data: dict[tuple[int, int], bytes]

    @property
    def counts(self) -> list[int]:
        return [text.token_count for text in self.texts]

    @property
    def tokenized(self) -> list[Tokenized]:
        return [Tokenized(text=text, truncated=n % 3 == 2) for n, text in enumerate(self.texts)]

    @property
    def messages(self) -> list[pb.Input]:
        return [pb.Input(token_ids=pb.TokenIds(input_ids=text.input_ids.tolist())) for text in self.texts]

    @property
    def header(self) -> pb.EmbedHeader:
        return responses.header(IDENTITY, self.plan, self.tokenized)

    @property
    def options(self) -> pb.EmbedOptions:
        return pb.EmbedOptions(
            outputs=[_asked(output) for output in self.plan.outputs],
            dtype=wire.DTYPES[self.plan.dtype],
            return_tokens=self.plan.return_tokens,
        )

    @property
    def word_counts(self) -> list[int]:
        return [text.word_count for text in self.texts]

    def row_starts(self, output: Output) -> np.ndarray:
        """Returns the first row of each text, and the row past the last."""
        return np.cumsum([0, *output.row_counts(self.texts)])

    def ready(self, first: int, last: int) -> Iterator[RowsReady]:
        """Yields what the batcher delivers for the texts from first up to last."""
        for (output_index, layer), data in self.data.items():
            output = self.plan.outputs[output_index]
            starts, row_bytes = self.row_starts(output), self.plan.row_bytes(output)
            part = memoryview(data)[starts[first] * row_bytes : starts[last] * row_bytes]
            rows = Rows(run_index=0, output_index=output_index, layer=layer, data=part, failures={})
            yield RowsReady(first, self.texts[first:last], rows)

    def check(self, found: Embedding, first: int = 0, last: int | None = None) -> None:
        """Fails unless an embedding is exactly that of the texts from first up to last."""
        last = len(self.texts) if last is None else last
        counts = self.counts[first:last]
        assert found.token_counts.tolist() == counts
        assert found.truncated.tolist() == [one.truncated for one in self.tokenized[first:last]]
        assert found.attention_mask.shape == (last - first, max(counts))
        assert found.attention_mask.sum(1).tolist() == counts
        assert found.model.model_id == "made-up" and found.model.fingerprint == "f" * 64
        if self.plan.has_words:
            assert found.words.word_counts.tolist() == self.word_counts[first:last]
            for text, pieces, offsets in zip(
                self.texts[first:last], found.words.piece_counts, found.words.offsets, strict=True
            ):
                same(pieces, text.words.piece_counts)
                same(offsets, text.words.offsets)
        pools = iter(found.pools)
        for (output_index, layer), whole in self.wanted.items():
            output = self.plan.outputs[output_index]
            starts = self.row_starts(output)
            same(_rows_of(found, output, layer, pools), whole[starts[first] : starts[last]])
        tokens = [one for one in self.plan.outputs if one.kind is OutputKind.HIDDEN_STATES and one.mix is None]
        assert found.layers == (tokens[-1].layers if tokens else ())
        for layer in found.layers:
            padded = found.hidden_states[layer]
            assert padded.shape == (last - first, max(counts), tokens[-1].row_size)
            for text, rows in zip(padded, found.ragged(layer), strict=True):
                same(text[: len(rows)], rows)
                assert not text[len(rows) :].any()
        assert next(pools, None) is None

    def check_one(self, found: Embedding, index: int) -> None:
        """Fails unless an embedding is exactly that of one text."""
        self.check(found, index, index + 1)


def _rows_of(found: Embedding, output: Output, layer: int, pools: Iterator[FloatArray]) -> np.ndarray:
    """Returns what an embedding has of one layer of an output; the next of the pools if it is one."""
    if output.mix is not None and output.unit is not Unit.TEXT:
        rows = found.mixed if output.unit is Unit.TOKEN else found.words.mixed
        assert rows.layers == output.mix.layers
        return np.concatenate(rows.ragged())
    if output.unit is Unit.WORD:
        return np.concatenate(found.words.ragged(layer))
    if output.unit is Unit.TOKEN:
        return np.concatenate(found.ragged(layer))
    return found.pooler_output if output.kind is OutputKind.POOLER_OUTPUT else next(pools)


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Fails unless two arrays agree in dtype, shape and every bit."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


def make(
    counts: Sequence[int], outputs: Sequence[Output], dtype: str, *, seed: int = 0, return_tokens: bool = False
) -> Answer:
    """Returns an answer full of random numbers."""
    random = np.random.default_rng(seed)
    texts = [
        Text(random.integers(0, 1000, count).astype(np.int32), words=words(random, count))
        if any(output.unit is Unit.WORD for output in outputs)
        else Text(random.integers(0, 1000, count).astype(np.int32))
        for count in counts
    ]
    answer = Answer(
        plan=Plan(outputs=tuple(outputs), dtype=dtype, return_tokens=return_tokens), texts=texts, wanted={}, data={}
    )
    for output_index, output in enumerate(outputs):
        shape = int(answer.row_starts(output)[-1]), output.row_size
        for layer in output.layers:
            values = random.standard_normal(shape, np.float32)
            if dtype == "float16":
                values = values.astype("<f2")
                data = values.tobytes()
            elif dtype == "bfloat16":
                halves = (values.view(np.uint32) >> 16).astype("<u2")
                values = (halves.astype(np.uint32) << 16).view(np.float32)
                data = halves.tobytes()
            else:
                data = values.astype("<f4").tobytes()
            answer.wanted[output_index, layer], answer.data[output_index, layer] = values, data
    return answer


def words(random: np.random.Generator, token_count: int) -> Words:
    """Returns some words of a text, or none, with any numbers."""
    count = int(random.integers(0, 2 * token_count))
    return Words(
        starts=np.zeros(count, np.int64),
        piece_counts=random.integers(0, 3, count),
        offsets=random.integers(0, 100_000, (count, 2)),
        first_word_count=int(random.integers(0, count + 1)),
    )


def _asked(output: Output) -> pb.Output:
    layers: dict[str, Any] = {"layers": output.layers}
    if output.mix is not None:
        layers = {"mix": pb.LayerMix(layers=output.mix.layers)}
    if output.kind is OutputKind.HIDDEN_STATES:
        return pb.Output(hidden_states=pb.HiddenStates(**layers))
    if output.kind is OutputKind.WORD_VECTORS:
        return pb.Output(word_vectors=pb.WordVectors(**layers))
    if output.kind is OutputKind.POOLER_OUTPUT:
        return pb.Output(pooler_output=pb.PoolerOutput())
    return pb.Output(pooled_vectors=pb.PooledVectors(**({} if output.mix is None else layers)))


def word_vectors(layers: Sequence[int], row_size: int) -> Output:
    return Output(kind=OutputKind.WORD_VECTORS, layers=tuple(layers), row_size=row_size, word_pooling=WordPooling.FIRST)


def as_mix(output: Output, layers: Sequence[int]) -> Output:
    """Returns an output of a mix instead of its own layers."""
    mix = Mix(mixing=Mixing.CONCAT, layers=tuple(layers))
    return dataclasses.replace(output, layers=(mix.top,), mix=mix)


def hidden_states(layers: Sequence[int], row_size: int) -> Output:
    return Output(kind=OutputKind.HIDDEN_STATES, layers=tuple(layers), row_size=row_size)


def pooler_output(row_size: int) -> Output:
    return Output(kind=OutputKind.POOLER_OUTPUT, layers=(LAYER_COUNT,), row_size=row_size)


def pooled_vectors(layer: int, row_size: int) -> Output:
    return Output(kind=OutputKind.POOLED_VECTORS, layers=(layer,), row_size=row_size, pool=Pool(strategy=Strategy.MEAN))


layer_sets = st.sets(st.integers(0, LAYER_COUNT), min_size=1).map(sorted)
row_sizes = st.integers(1, 5)
dtypes = st.sampled_from(list(wire.DTYPES))


@st.composite
def answers(draw: st.DrawFn, *, only_layers: bool = False, max_count: int = 6, max_texts: int = 5) -> Answer:
    """Answers with any outputs; `only_layers`: with token rows and nothing else."""
    counts = draw(st.lists(st.integers(1, max_count), min_size=1, max_size=max_texts))
    outputs = [hidden_states(draw(layer_sets), draw(row_sizes))]
    if not only_layers:
        outputs = outputs if draw(st.booleans()) else []
        if draw(st.booleans()):
            outputs.append(pooler_output(draw(row_sizes)))
        least = 0 if outputs else 1
        vectors = draw(st.lists(st.tuples(st.integers(0, LAYER_COUNT), row_sizes), min_size=least, max_size=2))
        outputs.extend(pooled_vectors(layer, row_size) for layer, row_size in vectors)
        if draw(st.booleans()):
            outputs.append(word_vectors(draw(layer_sets), draw(row_sizes)))
        for make_output in draw(st.sets(st.sampled_from([hidden_states, word_vectors, pooled_vectors]))):
            layers: Any = 0 if make_output is pooled_vectors else [0]
            outputs.append(as_mix(make_output(layers, draw(row_sizes)), draw(st.permutations(draw(layer_sets)))))
        outputs = draw(st.permutations(outputs))
    return make(counts, outputs, draw(dtypes), seed=draw(st.integers(0, 1000)))


Message = tuple[Any, bytes]


@st.composite
def cut_frames(draw: st.DrawFn, answer: Answer) -> list[Message]:
    """Every tensor of an answer cut anywhere, as EmbedLayers frames with their payloads, in any order."""
    frames: list[Message] = []
    for (output_index, layer), data in answer.data.items():
        output = answer.plan.outputs[output_index]
        starts, row_bytes = answer.row_starts(output), answer.plan.row_bytes(output)
        total = int(starts[-1])
        cuts = sorted({0, total, *draw(st.lists(st.integers(0, total), max_size=4))})
        for first, last in itertools.pairwise(cuts):
            text = int(np.searchsorted(starts, first, side="right")) - 1
            frame = pb.Frame(
                output_index=output_index,
                layer=layer,
                first_text=text,
                first_row=first - int(starts[text]),
                row_count=last - first,
            )
            frames.append((frame, data[first * row_bytes : last * row_bytes]))
    return draw(st.permutations(frames))
