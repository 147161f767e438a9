"""The packing of a batch against a reference that loops: every row of every text is where the layout says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layertap_server.engine.packing import PackedBatch
from layertap_server.types import Mix, Mixing, Output, OutputKind, Plan, Pool, Run, Strategy, Text, WordPooling

MODEST = settings(max_examples=40, deadline=None)


@st.composite
def texts(draw: st.DrawFn) -> Text:
    length = draw(st.integers(1, 6))
    ids = draw(st.lists(st.integers(0, 9), min_size=length, max_size=length))
    mask = draw(st.none() | st.lists(st.integers(0, 1), min_size=length, max_size=length))
    types = draw(st.none() | st.lists(st.integers(0, 1), min_size=length, max_size=length))
    special = draw(st.none() | st.lists(st.integers(0, 1), min_size=length, max_size=length))
    return Text(
        np.array(ids, np.int32),
        special_tokens_mask=None if special is None else np.array(special, np.int32),
        attention_mask=None if mask is None or all(mask) else np.array(mask, np.int32),
        token_type_ids=None if types is None or not any(types) else np.array(types, np.int32),
    )


@st.composite
def runs(draw: st.DrawFn) -> Run:
    depth = draw(st.integers(0, 4))
    output = Output(kind=OutputKind.HIDDEN_STATES, layers=(depth,), row_size=2)
    return Run(plan=Plan(outputs=(output,), dtype="float32"), texts=draw(st.lists(texts(), min_size=1, max_size=5)))


batches = st.lists(runs(), min_size=1, max_size=5)
pools = st.builds(
    Pool,
    strategy=st.sampled_from(Strategy),
    exclude_special_tokens=st.booleans(),
)


def behind_padding(ids: list[int], padding_id: int) -> list[int]:
    """Returns the positions that RoBERTa gives to the tokens of a text."""
    positions, last = [], padding_id
    for token_id in ids:
        last += token_id != padding_id
        positions.append(padding_id if token_id == padding_id else last)
    return positions


def as_list(values: np.ndarray | None, length: int, rest: int) -> list[int]:
    return [rest] * length if values is None else values.tolist()


@MODEST
@given(batch=batches)
def test_every_row_of_every_text_is_where_the_layout_says(batch: list[Run]) -> None:
    packed_batch = PackedBatch(batch)
    taken: list[int] = []
    for run_index, run in enumerate(batch):
        rows, firsts = packed_batch.rows([run_index]).tolist(), packed_batch.first_rows([run_index]).tolist()
        assert len(firsts) == len(run.texts)
        taken.extend(rows)
        for text, first in zip(run.texts, firsts, strict=True):
            own, rows = rows[: text.token_count], rows[text.token_count :]
            assert own == list(range(first, first + text.token_count))
            assert packed_batch.input_ids[own].tolist() == text.input_ids.tolist()
            assert packed_batch.position_ids(None)[own].tolist() == list(range(text.token_count))
            assert packed_batch.position_ids(3)[own].tolist() == behind_padding(text.input_ids.tolist(), 3)
            found = [0] * len(own) if packed_batch.token_type_ids is None else packed_batch.token_type_ids[own].tolist()
            assert found == as_list(text.token_type_ids, text.token_count, 0)
        assert not rows
    assert sorted(taken) == list(range(len(packed_batch.input_ids)))
    assert len(packed_batch.position_ids(None)) == len(packed_batch.position_ids(3)) == len(taken)
    typed = any(text.token_type_ids is not None for run in batch for text in run.texts)
    assert (packed_batch.token_type_ids is not None) == typed


@MODEST
@given(batch=batches)
def test_the_rows_that_a_layer_needs_come_first_and_are_counted(batch: list[Run]) -> None:
    packed_batch = PackedBatch(batch)
    assert packed_batch.depth == max(run.plan.depth for run in batch)
    for layer in range(7):
        needed = [
            row for n, run in enumerate(batch) if run.plan.depth >= layer for row in packed_batch.rows([n]).tolist()
        ]
        assert packed_batch.row_count(layer) == len(needed)
        assert sorted(needed) == list(range(len(needed)))


@MODEST
@given(batch=batches)
def test_groups_cover_all_rows_with_texts_of_one_length_and_one_depth(batch: list[Run]) -> None:
    packed_batch = PackedBatch(batch)
    places = {
        int(first): (text, run.plan.depth)
        for n, run in enumerate(batch)
        for text, first in zip(run.texts, packed_batch.first_rows([n]), strict=True)
    }
    end = 0
    for group in packed_batch.groups:
        assert group.start == end and group.text_count > 0
        end = group.end
        assert end == group.start + group.text_count * group.length
        members = [places.pop(group.start + n * group.length) for n in range(group.text_count)]
        for position, (text, depth) in enumerate(members):
            assert text.token_count == group.length
            assert depth == group.depth
            assert (text.attention_mask is None) == (group.attention_mask is None)
            if group.attention_mask is not None:
                assert group.attention_mask[position].tolist() == text.attention_mask.tolist()
        if group.attention_mask is not None:
            assert group.attention_mask.shape == (group.text_count, group.length)
    assert end == len(packed_batch.input_ids) and not places
    assert [group.depth for group in packed_batch.groups] == sorted(
        (group.depth for group in packed_batch.groups), reverse=True
    )


@MODEST
@given(batch=batches)
def test_a_layer_is_needed_by_whole_groups(batch: list[Run]) -> None:
    packed_batch = PackedBatch(batch)
    for layer in range(packed_batch.depth + 1):
        whole = [group for group in packed_batch.groups if group.depth >= layer]
        assert packed_batch.row_count(layer) == sum(group.text_count * group.length for group in whole)


@MODEST
@given(batch=batches, pool=pools)
def test_a_bag_holds_the_pooled_rows_of_each_text(batch: list[Run], pool: Pool) -> None:
    packed_batch = PackedBatch(batch)
    for run_index, run in enumerate(batch):
        bags = packed_batch.bags([run_index], pool)
        rows = bags.rows.tolist()
        assert len(bags.counts) == len(run.texts)
        for text, first, count in zip(run.texts, packed_batch.first_rows([run_index]), bags.counts, strict=True):
            own, rows = rows[:count], rows[count:]
            assert own == [first + position for position in pooled(text, pool)]
        assert not rows


def pooled(text: Text, pool: Pool) -> list[int]:
    """The contract's words, one position at a time."""
    if pool.strategy is Strategy.CLS:
        return [0]
    mask = as_list(text.attention_mask, text.token_count, 1)
    special = as_list(text.special_tokens_mask, text.token_count, 0)
    positions = [
        n for n in range(text.token_count) if mask[n] == 1 and not (pool.exclude_special_tokens and special[n])
    ]
    return positions[-1:] if pool.strategy is Strategy.LAST else positions


def test_equal_texts_of_several_runs_share_a_group() -> None:
    text = Text(np.arange(4, dtype=np.int32))
    plan = Plan(outputs=(Output(kind=OutputKind.HIDDEN_STATES, layers=(2,), row_size=2),), dtype="float32")
    packed_batch = PackedBatch([Run(plan=plan, texts=[text] * 3), Run(plan=plan, texts=[text] * 2)])
    (group,) = packed_batch.groups
    assert (group.start, group.text_count, group.length, group.depth) == (0, 5, 4, 2)
    assert group.attention_mask is None


@pytest.mark.parametrize("layers", [(0,), (0, 3), (3,)])
def test_the_depth_of_a_plan_is_its_highest_layer(layers: tuple[int, ...]) -> None:
    output = Output(kind=OutputKind.HIDDEN_STATES, layers=layers, row_size=2)
    pool = Output(kind=OutputKind.POOLED_VECTORS, layers=(1,), row_size=2, pool=Pool(strategy=Strategy.MAX))
    plan = Plan(outputs=(pool, output), dtype="float16")
    assert plan.depth == max(1, *layers)
    words = Output(kind=OutputKind.WORD_VECTORS, layers=layers, row_size=3, word_pooling=WordPooling.FIRST)
    mix = Mix(mixing=Mixing.CONCAT, layers=(3, 0, 1))
    mixed = Output(kind=OutputKind.HIDDEN_STATES, layers=(mix.top,), row_size=6, mix=mix)
    plan = Plan(outputs=(pool, output, words, mixed), dtype="float16")
    sizes = plan.byte_counts
    assert (sizes.token, sizes.word, sizes.text) == (len(layers) * 2 * 2 + 6 * 2, len(layers) * 3 * 2, 2 * 2)
    assert plan.depth == 3
