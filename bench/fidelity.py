"""How far each output of each model type is from what transformers and sentence-transformers compute, in float32.

Prints the table of docs/benchmarks.md. Each type is a random model with the sizes of the embedded one, served to the
SDK over a socket; it is asked for texts, pairs, words and token ids under masks, alone and together.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from support import family
from support.in_process import serving
from support.oracle import POOLINGS, Oracle, WordsReference
from support.windows import WindowsReference, tokens_of

from layertap import Client, Spanned, TokenIds, Windows

SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "max_position_embeddings": 514}
LONGEST = 500
LONG = " ".join(family.CORPUS * 5)
SPANS = [(0, 40), (50, 900), (901, len(LONG))]
ITEMS: list[Any] = [
    *family.CORPUS,
    "",
    " ".join(family.CORPUS),
    ("I love Paris, <pad>", "and so does she"),
    ["words", "", "that", "were", "split", "before"],
]
OUTPUTS = (
    "layers",
    "attentions",
    "pooler output",
    "words",
    "poolings",
    "windows",
    "spans",
    "`encode`",
    "`encode`, Dense",
    "`encode`, token Dense",
)


def far(found: Any, wanted: Any) -> float:
    wanted = np.asarray(wanted)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.abs(found - wanted).max(initial=0.0))


def measured(kind: str, plain: Path) -> Iterator[tuple[str, float]]:
    """Yields differences with the name of their output."""
    oracle = Oracle.load(plain)
    random = np.random.default_rng(0)
    with serving(plain) as address, Client(address) as client:
        info = client.model_info()
        ids = random.integers(0, info.vocab_size, 60)
        ids[[3, 20]] = info.pad_token_id
        masked = TokenIds(ids, random.integers(0, 2, 60))
        items = [*ITEMS, masked]
        encoded = [oracle.ids(item) for item in ITEMS]
        given = [(one["input_ids"], None, one.get("token_type_ids")) for one in encoded]
        given.append((masked.input_ids, masked.attention_mask, None))
        for some in [list(range(len(items))), *([n] for n in range(len(items)))]:
            found = client.embed(
                [items[n] for n in some],
                layers="all",
                pooler_output=info.has_pooler_output,
                attentions="all",
                max_length=LONGEST,
            )
            for place, n in enumerate(some):
                layers, pooler_output = oracle.run(*given[n])
                yield from (("layers", far(found.ragged(k)[place], rows)) for k, rows in enumerate(layers))
                blocks = oracle.attentions(*given[n])
                yield from (("attentions", far(found.attentions.ragged(k)[place], one)) for k, one in enumerate(blocks))
                if pooler_output is not None:
                    yield "pooler output", far(found.pooler_output[place], pooler_output)
        words = client.embed(ITEMS, words="mean", layers="all", max_length=LONGEST).words
        pools = client.embed(ITEMS, pooling=list(POOLINGS), max_length=LONGEST).pools
        for n, item in enumerate(ITEMS):
            reference = WordsReference(oracle, item)
            for k, rows in enumerate(reference.layers):
                yield "words", far(words.ragged(k)[n], reference.pooled("mean", rows))
            for pool, strategy in zip(pools, POOLINGS, strict=True):
                yield "poolings", far(pool[n], POOLINGS[strategy](reference.layers[-1]))
        cut = {"max_length": 128, "windows": Windows(stride=32)}
        long = client.embed([Spanned(LONG, SPANS)], layers="all", pooling="mean", span_pooling="mean", **cut)
        windows = WindowsReference(oracle, LONG, max_length=128, stride=32)
        yield from (("windows", far(long.ragged(k)[0], rows)) for k, rows in enumerate(windows.layers))
        yield "windows", far(long.pooled[0], windows.layers[-1].mean(0))
        for vector, span in zip(long.spans.ragged()[0], SPANS, strict=True):
            yield "spans", far(vector, windows.layers[-1][tokens_of(oracle, LONG, span)].mean(0))


def sentences(plain: Path, folder: Path) -> Iterator[tuple[str, float]]:
    """Yields differences of sentence vectors and token rows with the name of their output."""
    texts = [item for item in ITEMS if isinstance(item, str)]
    size = SIZES["hidden_size"]
    token_dense = Dense(size, 128, bias=False, activation_function=None, module_input_name="token_embeddings")
    kinds = {
        "`encode`": [Pooling(size, pooling_mode="mean"), Normalize()],
        "`encode`, Dense": [Pooling(size, pooling_mode="mean"), Dense(size, 256), Normalize()],
        "`encode`, token Dense": [token_dense, Normalize(module_input_name="token_embeddings")],
    }
    for number, (name, modules) in enumerate(kinds.items()):
        torch.manual_seed(number)
        judge = SentenceTransformer(modules=[Transformer(str(plain)), *modules], device="cpu")
        judge.save(str(folder / str(number)), create_model_card=False)
        value = "token_embeddings" if "token" in name else "sentence_embedding"
        with serving(folder / str(number)) as address, Client(address) as client:
            found, wanted = (one.encode(texts, output_value=value) for one in (client, judge))
            yield from ((name, far(own, other)) for own, other in zip(found, wanted, strict=True))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    transformers.utils.logging.disable_progress_bar()
    worst: dict[tuple[str, str], float] = {}
    kinds = sorted(family.TOKENIZERS)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            hidden = {"hidden_dim": 1536} if kind == "distilbert" else {"intermediate_size": 1536}
            embedded = {"embedding_size": 128} if kind == "electra" else {}
            plain = family.save(kind, folder / "plain", spread=0.05, **SIZES, **hidden, **embedded)
            for differences in (measured(kind, plain), sentences(plain, folder)):
                for name, difference in differences:
                    worst[name, kind] = max(worst.get((name, kind), 0.0), difference)
    print("| output |", *(f"`{kind}` |" for kind in kinds))
    print("|---" * (1 + len(kinds)) + "|")
    for name in OUTPUTS:
        cells = (f"{worst[name, kind]:.1e} |" if (name, kind) in worst else "has none |" for kind in kinds)
        print(f"| {name} |", *cells)


if __name__ == "__main__":
    main()
