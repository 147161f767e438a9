"""A text has the same bits alone and in any batch: random batches, outputs, lengths, masks and instances."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from layertap_server.engine import cpu_threads
from layertap_server.engine.encoder import Encoder
from layertap_server.model import checkpoint
from layertap_server.types import (
    Encode,
    Mix,
    Mixing,
    Output,
    OutputKind,
    Plan,
    Pool,
    Run,
    Strategy,
    Text,
    WordPooling,
    Words,
)

LAYERS = 2
SHAPES = {
    "32 wide": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
    "40 wide": {"hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 72},
    "40 wide, silu": {"hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 72, "hidden_act": "silu"},
    "electra": {
        "model_type": "electra",
        "embedding_size": 24,
        "hidden_size": 40,
        "num_attention_heads": 4,
        "intermediate_size": 72,
    },
    "embedded": {},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
BATCHES = 12


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "not packed"])
def packing(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def encoder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    real_folder: Path,
    dtype: str,
    packing: bool,
) -> Iterator[Encoder]:
    folder, load_format = real_folder, "safetensors"
    if request.param:
        folder, load_format = tmp_path_factory.mktemp("bert"), "dummy"
        settings = {
            "model_type": "bert",
            "vocab_size": 30522,
            "num_hidden_layers": LAYERS,
            "max_position_embeddings": 300,
            "initializer_range": 0.1,
        }
        (folder / "config.json").write_text(json.dumps(settings | request.param))
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            (folder / name).write_bytes((real_folder / name).read_bytes())
    found = checkpoint.find(model_id=str(folder), revision="", name="", load_format=load_format, seed=0)
    threads = cpu_threads.share(instance_count=2, thread_count=1)
    try:
        made = Encoder(
            found,
            device="cpu",
            dtype=dtype,
            packing=packing,
            thread_count=threads.thread_count,
            max_thread_count=threads.lone_thread_count,
        )
    except RuntimeError as exc:
        # oneDNN multiplies bfloat16 on some CPUs only; a server that is not forced does not pack there.
        assert packing and dtype == "bfloat16" and "cpu support" in str(exc)
        pytest.skip("this CPU does not pack bfloat16")
    yield made


def _texts(random: np.random.Generator, count: int) -> list[Text]:
    texts = []
    for _ in range(count):
        length = int(random.choice([1, 2, 3, random.integers(1, 12), random.integers(1, 40), random.integers(40, 90)]))
        mask = random.integers(0, 2, length).astype(np.int32) if random.random() < 0.3 else np.ones(length, np.int32)
        mask[0] = 1
        starts = np.arange(0, length, 2)
        words = Words(
            starts=starts,
            piece_counts=np.minimum(2, length - starts),
            offsets=np.zeros((len(starts), 2), np.int64),
            first_word_count=len(starts),
        )
        texts.append(
            Text(
                random.integers(5, 30_000, length).astype(np.int32),
                attention_mask=None if mask.all() else mask,
                words=words,
            )
        )
    return texts


def _plan(random: np.random.Generator, encoder: Encoder) -> Plan:
    size, last = encoder.hidden_size, encoder.layer_count
    deepest = int(random.integers(0, last + 1))
    chosen = tuple(sorted({int(random.integers(0, deepest + 1)), deepest}))
    mix = Mix(mixing=Mixing.WEIGHTED, layers=chosen, weights=(0.3, 1.7)[: len(chosen)])
    strategy = list(Strategy)[int(random.integers(len(Strategy)))]
    outputs = [
        Output(kind=OutputKind.HIDDEN_STATES, layers=chosen, row_size=size),
        Output(kind=OutputKind.HIDDEN_STATES, layers=(mix.top,), row_size=size, mix=mix),
        Output(
            kind=OutputKind.POOLED_VECTORS,
            layers=chosen,
            row_size=size * (2 if strategy is Strategy.MEAN_MAX else 1),
            pool=Pool(strategy=strategy, normalize=bool(random.integers(2))),
        ),
        Output(kind=OutputKind.WORD_VECTORS, layers=chosen, row_size=size, word_pooling=WordPooling.MEAN),
        *([Output(kind=OutputKind.POOLER_OUTPUT, layers=(last,), row_size=size)] if encoder.has_pooler else []),
        Output(kind=OutputKind.ATTENTIONS, layers=(min(deepest, last - 1),), row_size=2, heads=(1, 3)),
    ]
    picked = random.permutation(len(outputs))[: int(random.integers(1, 4))]
    return Plan(outputs=tuple(outputs[n] for n in picked), dtype="float32")


Bits: TypeAlias = list[list[dict[tuple[int, int], bytes]]]
"""The bytes of each text of each run, by output and layer."""


def _bits(encode: Encode, batch: list[Run], pause: Callable[[], None] = lambda: None) -> Bits:
    """Runs a batch; calls `pause` where it may pause."""
    found: Bits = [[{} for _ in run.texts] for run in batch]
    for rows in encode(batch):
        if rows is None:
            pause()
            continue
        assert not rows.failures
        run, end = batch[rows.run_index], 0
        output = run.plan.outputs[rows.output_index]
        for text, count in enumerate(output.row_counts(run.texts)):
            start, end = end, end + count * run.plan.row_bytes(output)
            found[rows.run_index][text][rows.output_index, rows.layer] = bytes(rows.data[start:end])
    return found


def test_a_text_has_the_same_bits_alone_and_in_any_batch(encoder: Encoder) -> None:
    assert encoder.batch_invariant
    random = np.random.default_rng(1)
    batches = [
        [Run(plan=_plan(random, encoder), texts=_texts(random, number)) for number in random.integers(1, 6, run_count)]
        for run_count in random.integers(1, 5, BATCHES).tolist()
    ]
    one_instance = cpu_threads.make([encoder], cpu_threads.share(instance_count=1, thread_count=1))
    two_instances = cpu_threads.make([encoder], cpu_threads.share(instance_count=2, thread_count=1))
    wanted: list[Bits] = [
        [[_bits(encoder.encode, [Run(plan=run.plan, texts=[text])])[0][0] for text in run.texts] for run in batch]
        for batch in batches
    ]
    # The lone instance computes small batches with all cores; two share them at once.
    for batch, bits in zip(batches, wanted, strict=True):
        assert _bits(one_instance[0], batch) == bits
    found: dict[int, Bits] = {}

    def work(instance: int) -> None:
        for n in random_order[instance]:
            found[n] = _bits(two_instances[instance], batches[n][::-1])[::-1]

    order = random.permutation(BATCHES).tolist()
    random_order = [order[::2], order[1::2]]
    threads = [threading.Thread(target=work, args=(instance,)) for instance in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(BATCHES)] == wanted


@pytest.mark.parametrize("kind", [OutputKind.POOLED_VECTORS, OutputKind.HIDDEN_STATES, OutputKind.ATTENTIONS])
def test_a_batch_that_pauses_and_those_in_its_pauses_keep_their_bits(encoder: Encoder, kind: OutputKind) -> None:
    random = np.random.default_rng(3)
    layers = {
        OutputKind.POOLED_VECTORS: (encoder.layer_count,),
        OutputKind.HIDDEN_STATES: tuple(range(encoder.layer_count + 1)),
        OutputKind.ATTENTIONS: tuple(range(encoder.layer_count)),
    }[kind]
    heads = (0, 1) if kind is OutputKind.ATTENTIONS else ()
    output = Output(
        kind=kind,
        layers=layers,
        row_size=len(heads) or encoder.hidden_size,
        heads=heads,
        pool=Pool(strategy=Strategy.MEAN) if kind is OutputKind.POOLED_VECTORS else None,
    )
    texts = [Text(random.integers(5, 30_000, length).astype(np.int32)) for length in (250, 90, 250)]
    long = [Run(plan=Plan(outputs=(output,), dtype="float32"), texts=texts)]
    short = [Run(plan=_plan(random, encoder), texts=_texts(random, 2))]
    (encode,) = cpu_threads.make([encoder], cpu_threads.share(instance_count=1, thread_count=1))
    wanted, wanted_short = _bits(encode, long), _bits(encode, short)
    found: list[Bits] = []
    assert _bits(encode, long, lambda: found.append(_bits(encode, short))) == wanted
    assert found == [wanted_short] * len(found)
    is_large = encoder.hidden_size > 100
    assert len(found) >= (encoder.layer_count if is_large or len(layers) > 1 else 1)


@pytest.mark.parametrize("shape", ["32 wide", "embedded"])
def test_several_threads_of_an_instance_are_used_only_if_they_give_the_same_bits(
    shape: str, real_folder: Path, tiny_folder: Path
) -> None:
    folder = real_folder if shape == "embedded" else tiny_folder
    found = checkpoint.find(model_id=str(folder), revision="", name="", load_format="safetensors", seed=0)
    threads = cpu_threads.share(instance_count=1, thread_count=2)
    encoder = Encoder(found, device="cpu", dtype="float32", packing=False, thread_count=2, max_thread_count=2)
    assert encoder.batch_invariant and (shape == "embedded" or encoder.thread_count == 1)
    (encode,) = cpu_threads.make([encoder], threads)
    random = np.random.default_rng(2)
    texts = _texts(random, 30)
    output = Output(kind=OutputKind.HIDDEN_STATES, layers=(2,), row_size=encoder.hidden_size)
    plan = Plan(outputs=(output,), dtype="float32")
    (together,) = _bits(encode, [Run(plan=plan, texts=texts)])
    assert together == [_bits(encode, [Run(plan=plan, texts=[text])])[0][0] for text in texts]
