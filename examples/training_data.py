"""Vectors as the data of a training: a column of a data set, and batches of a DataLoader. Needs datasets and torch.

layertap-server &
python examples/training_data.py --start-method spawn

A client travels to worker processes as its settings, whether they are forked or spawned, and connects there.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader

from layertap import Client

TEXTS = [f"{who} goes to {where}" for who in ("she", "he", "the dog", "everybody") for where in ("Paris", "bed", "sea")]


def add_vectors(batch: dict[str, list[Any]], client: Client) -> dict[str, Any]:
    """Returns the column of vectors for some rows."""
    return {"vector": client.encode(batch["text"])}


def collate(texts: list[str], client: Client) -> torch.Tensor:
    """Returns the last layer of some texts, padded. Shape: [text_count, length, hidden_size]."""
    return client.embed(texts).to_torch().last_hidden_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", help="the server; 127.0.0.1:50051 without it")
    parser.add_argument("--start-method", choices=["fork", "spawn"], default="fork")
    arguments = parser.parse_args()
    client = Client(arguments.target)

    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows = rows.map(add_vectors, batched=True, batch_size=4, num_proc=2, fn_kwargs={"client": client})
    vectors = rows.with_format("torch")["vector"][:]
    print(f"data set: {tuple(vectors.shape)}")

    loader = DataLoader(
        TEXTS,
        batch_size=4,
        num_workers=2,
        collate_fn=functools.partial(collate, client=client),
        multiprocessing_context=arguments.start_method,
    )
    for hidden_states in loader:
        print(f"batch: {tuple(hidden_states.shape)}")


if __name__ == "__main__":
    main()
