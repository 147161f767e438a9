"""Runs again in halves what a device has no memory for.

An `encode` that runs out of memory runs again for each half of its texts, and so on down to one text alone, which then
fails for itself and harms no neighbour. Tensors that the batch has yielded are not yielded again; those of its halves
are put together first, so that each comes once for its run, and whole, as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from layertap.errors import ResourceExhaustedError, counted
from layertap_server.types import Encode, OutOfMemoryError, Rows, Run

log = logging.getLogger(__name__)

_Place: TypeAlias = tuple[int, int, int]
"""Run index, output index, layer."""


def with_oom_retry(encode: Encode) -> Encode:
    """Returns an `encode` that goes on where the given one runs out of memory."""

    def encode_all(batch: Sequence[Run]) -> Iterator[Rows | None]:
        yielded: set[_Place] = set()
        try:
            for rows in encode(batch):
                if rows is not None:
                    yielded.add(_place(rows))
                yield rows
            return
        except OutOfMemoryError:
            # The error holds on to all that the batch had computed, until this block is left.
            text_count = counted(_text_count(batch), "text")
            log.warning("no memory for a batch of %s, %d tokens", text_count, _token_count(batch))
        # What the caller may be reading where it lies is not written again.
        bare = [dataclasses.replace(run, allocator=None) for run in batch]
        rest = _refused(bare[0]) if _text_count(bare) == 1 else _joined(encode_all, bare)
        yield from (rows for rows in rest if rows is None or _place(rows) not in yielded)

    return encode_all


def _joined(encode: Encode, batch: Sequence[Run]) -> Iterator[Rows | None]:
    """Runs a batch in two halves and yields the tensors of its own runs."""
    halves = _halves(batch)
    owners = [index for half in halves for index, _ in half]
    parts: defaultdict[_Place, list[Rows]] = defaultdict(list)
    for half in halves:
        for part in encode([run for _, run in half]):
            if part is None:
                yield None
                continue
            rows = dataclasses.replace(part, run_index=half[part.run_index][0])
            so_far = parts[_place(rows)]
            so_far.append(rows)
            if len(so_far) == owners.count(rows.run_index):
                yield _join(so_far, halves)
                so_far.clear()


def _halves(batch: Sequence[Run]) -> tuple[list[tuple[int, Run]], list[tuple[int, Run]]]:
    """Cuts a batch in two; each run comes with its index in the batch, and one of them may be in both halves."""
    left = _text_count(batch) // 2
    first: list[tuple[int, Run]] = []
    second: list[tuple[int, Run]] = []
    for index, run in enumerate(batch):
        cut = min(left, len(run.texts))
        left -= cut
        if cut:
            first.append((index, dataclasses.replace(run, texts=run.texts[:cut])))
        if cut < len(run.texts):
            rest = dataclasses.replace(run, texts=run.texts[cut:], first_text=run.first_text + cut)
            second.append((index, rest))
    return first, second


def _join(parts: Sequence[Rows], halves: Sequence[Sequence[tuple[int, Run]]]) -> Rows:
    """Puts together what the halves have of one tensor."""
    if len(parts) == 1:
        return parts[0]
    (cut,) = (len(part.texts) for index, part in halves[0] if index == parts[0].run_index)
    first, second = parts
    failures = {**first.failures, **{cut + position: error for position, error in second.failures.items()}}
    return dataclasses.replace(first, data=memoryview(b"".join((first.data, second.data))), failures=failures)


def _refused(run: Run) -> Iterator[Rows]:
    """Yields zeros and the refusal for a text that finds no memory even alone."""
    (text,) = run.texts
    error = ResourceExhaustedError(
        f"the device has no memory for a text of {text.token_count} tokens; cut it (truncation, max_length), "
        "or try again later"
    )
    for output_index, output in enumerate(run.plan.outputs):
        (row_count,) = output.row_counts([text])
        for layer in output.layers:
            data = memoryview(bytes(row_count * run.plan.row_bytes(output)))
            yield Rows(run_index=0, output_index=output_index, layer=layer, data=data, failures={0: error})


def _place(rows: Rows) -> _Place:
    return rows.run_index, rows.output_index, rows.layer


def _text_count(batch: Sequence[Run]) -> int:
    return sum(len(run.texts) for run in batch)


def _token_count(batch: Sequence[Run]) -> int:
    return sum(text.token_count for run in batch for text in run.texts)
