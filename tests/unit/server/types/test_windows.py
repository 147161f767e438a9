"""How a text is divided into windows: each token once, from the best window, for every length and stride."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from layertap_server.types import Pool, Strategy, Text, Windows, Words


@st.composite
def windows(draw: st.DrawFn) -> Windows:
    prefix, suffix = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    size = draw(st.integers(1, 12))
    return Windows(
        token_count=prefix + suffix + draw(st.integers(size + 1, 60)),
        max_length=prefix + suffix + size,
        stride=draw(st.integers(0, size - 1)),
        prefix_count=prefix,
        suffix_count=suffix,
    )


def by_hand(plan: Windows) -> list[tuple[int, int]]:
    """Returns where the tokens of each window start and end, special tokens aside, as transformers' tokenizers do."""
    size = plan.max_length - plan.prefix_count - plan.suffix_count
    count = plan.token_count - plan.prefix_count - plan.suffix_count
    found = []
    for start in range(0, count, size - plan.stride):
        found.append((start, min(start + size, count)))
        if found[-1][1] == count:
            break
    return found


@given(windows())
def test_each_token_has_one_row_from_the_window_whose_nearer_edge_is_farthest(plan: Windows) -> None:
    spans = by_hand(plan)
    assert plan.count == len(spans)
    found = [plan[n] for n in range(plan.count)]
    assert [(window.start, window.stop) for window in found] == spans
    rows = [row for window in found for row in range(window.first_row, window.first_row + window.row_count)]
    assert rows == list(range(plan.token_count))
    for window in found:
        assert window.row_count > 0
        for row in range(window.first_row, window.first_row + window.row_count):
            token = row - plan.prefix_count
            if token < 0 or token >= plan.token_count - plan.prefix_count - plan.suffix_count:
                assert window.index == (0 if token < 0 else plan.count - 1)
                continue
            distances = [min(token - start, end - 1 - token) for start, end in spans]
            assert window.index == distances.index(max(distances))  # The first of equally good ones.


@given(windows())
def test_the_tokens_of_windows_are_counted_before_there_are_any(plan: Windows) -> None:
    text = Text(np.arange(plan.token_count, dtype=np.int32), windows=plan)
    parts = [text.part(n) for n in range(plan.count)]
    special = plan.prefix_count + plan.suffix_count
    assert [part.token_count for part in parts] == [end - start + special for start, end in by_hand(plan)]
    assert text.computed_token_count == sum(part.token_count for part in parts)
    assert max(part.token_count for part in parts) <= plan.max_length
    for part in parts:
        assert part.window is not None
        ids = part.input_ids[list(part.window.kept)]
        assert ids.tolist() == list(range(part.window.first_row, part.window.first_row + part.row_count))
        assert part.input_ids[: plan.prefix_count].tolist() == list(range(plan.prefix_count))
        last = range(plan.token_count - plan.suffix_count, plan.token_count)
        assert part.input_ids[part.token_count - plan.suffix_count :].tolist() == list(last)


@given(windows(), st.sampled_from(Strategy), st.booleans(), st.integers(0, 12))
def test_pools_take_the_same_tokens_as_from_the_whole(
    plan: Windows, strategy: Strategy, plain: bool, first_row: int
) -> None:
    mask = np.zeros(plan.token_count, np.int32)
    mask[: plan.prefix_count] = 1
    mask[plan.token_count - plan.suffix_count :] = 1
    text = Text(np.arange(plan.token_count, dtype=np.int32), special_tokens_mask=mask, windows=plan)
    pool = Pool(strategy=strategy, exclude_special_tokens=plain and strategy is not Strategy.CLS, first_row=first_row)
    taken = [part.input_ids[pool.positions(part)].tolist() for part in map(text.part, range(plan.count))]
    wanted = pool.positions(text).tolist()
    if strategy is Strategy.LAST:  # Each window has one; the last of them is that of the text.
        taken = [own for own in taken if own][-1:]
    assert [token for own in taken for token in own] == wanted


@given(windows(), st.lists(st.integers(0, 5), max_size=40))
def test_words_are_cut_where_windows_end(plan: Windows, sizes: list[int]) -> None:
    starts, counts, at = [], [], plan.prefix_count
    for size in sizes:
        size = min(size, plan.token_count - plan.suffix_count - at)
        starts.append(at if size else 0)
        counts.append(size)
        at += size
    words = Words(
        starts=np.array(starts, np.int64),
        piece_counts=np.array(counts, np.int64),
        offsets=np.zeros((len(starts), 2), np.int64),
        first_word_count=len(starts),
    )
    text = Text(np.arange(plan.token_count, dtype=np.int32), words=words, windows=plan)
    found: list[list[int]] = [[] for _ in sizes]
    for part in map(text.part, range(plan.count)):
        assert part.words is not None and part.word_indices is not None
        for word, start, count in zip(part.word_indices, part.words.starts, part.words.piece_counts, strict=True):
            assert count > 0
            found[word] += part.input_ids[start : start + count].tolist()
    assert found == [list(range(start, start + count)) for start, count in zip(starts, counts, strict=True)]
