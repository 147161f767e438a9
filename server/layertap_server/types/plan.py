"""What a request asks of each text: its outputs, and the bytes that they take."""

from __future__ import annotations

import dataclasses

import numpy as np

from layertap.types import ITEM_BYTES
from layertap_server.types.output import Output, Unit
from layertap_server.types.text import Text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ByteCounts:
    """The bytes of an answer, all outputs and layers together, by what there is a row of."""

    token: int
    word: int
    text: int
    token_pair: int
    span: int

    def of(self, text: Text) -> int:
        """Returns the bytes of one text."""
        count = len(text.input_ids) if text.window is None else text.window.row_count
        found = (self.token + self.token_pair * count) * count + self.text
        if self.word or self.span:
            found += self.word * text.word_count + self.span * text.span_count
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is asked of each text of a call.

    Attributes:
        outputs: In request order.
        named_prompt: The prompt before each text, where the request has named it; empty: it has not.
        of_windows: What is asked of each window of a text that runs as several. None: no text does.
        byte_counts: The answer's bytes for each token, pair of tokens, word and text.
        mix_token_bytes: What its mixes take for each token until the answer is made of them.
        has_words: Whether an output has a row for each word.
        has_spans: Whether an output has a row for each span.
        depth: The highest layer that is needed.
    """

    outputs: tuple[Output, ...]
    dtype: str
    return_tokens: bool = False
    named_prompt: str = ""
    of_windows: Plan | None = None
    byte_counts: ByteCounts = dataclasses.field(init=False)
    mix_token_bytes: int = dataclasses.field(init=False)
    has_words: bool = dataclasses.field(init=False)
    has_spans: bool = dataclasses.field(init=False)
    excludes_special_tokens: bool = dataclasses.field(init=False)
    depth: int = dataclasses.field(init=False)
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        """Returns what was computed once: the hash of an enumeration is slow."""
        return self._hash

    def __post_init__(self) -> None:
        """Adds up the outputs, once for all texts."""
        sizes = dict.fromkeys(Unit, 0)
        for output in self.outputs:
            sizes[output.unit] += self.row_bytes(output) * len(output.layers)
        byte_counts = ByteCounts(**{unit.name.lower(): size for unit, size in sizes.items()})
        object.__setattr__(self, "byte_counts", byte_counts)
        object.__setattr__(self, "has_words", byte_counts.word > 0)
        object.__setattr__(self, "has_spans", byte_counts.span > 0)
        mixes = {output.mix for output in self.outputs if output.mix is not None}
        object.__setattr__(self, "mix_token_bytes", sum(4 * mix.row_size for mix in mixes))
        pools = [pool for output in self.outputs for pool in output.pools]
        object.__setattr__(self, "excludes_special_tokens", any(pool.exclude_special_tokens for pool in pools))
        object.__setattr__(self, "depth", max((output.layers[-1] for output in self.outputs), default=0))
        asked = self.outputs, self.dtype, self.return_tokens, self.named_prompt, self.of_windows
        object.__setattr__(self, "_hash", hash(asked))

    def pooling_from(self, row: int) -> Plan:
        """Returns the plan with pools that leave out the rows before one."""

        def moved(output: Output) -> Output:
            if not output.pools:
                return output
            pool, *joined = (dataclasses.replace(pool, first_row=row) for pool in output.pools)
            return dataclasses.replace(output, pool=pool, joined_pools=tuple(joined))

        of_windows = self.of_windows and self.of_windows.pooling_from(row)
        return dataclasses.replace(self, outputs=tuple(map(moved, self.outputs)), of_windows=of_windows)

    def with_windows(self) -> Plan:
        """Returns the plan for texts that may run as windows."""
        of_windows = dataclasses.replace(self, outputs=tuple(output.of_windows() for output in self.outputs))
        return dataclasses.replace(self, of_windows=of_windows)

    def of(self, text: Text) -> Plan:
        """Returns what is asked of a text, or of a window of one."""
        return self if text.window is None or self.of_windows is None else self.of_windows

    def held_bytes(self, text: Text) -> int:
        """Returns the bytes of the answer of a text, and of the parts that its windows make of it."""
        return self.byte_counts.of(text) + self.part_bytes(text)

    def part_bytes(self, text: Text) -> int:
        """Returns the bytes of the parts of rows that the windows of a text make; a word may be cut by each end."""
        if self.of_windows is None or text.windows is None:
            return 0
        sizes, count = self.of_windows.byte_counts, text.window_count
        found = sizes.text * count + sizes.word * (text.word_count + count)
        if text.spans is None:
            return found
        first_rows = [text.windows[n].first_row for n in range(count)]
        starts, ends = text.spans.starts, text.spans.starts + text.spans.counts
        cuts = np.searchsorted(first_rows, ends, side="left") - np.searchsorted(first_rows, starts, side="right")
        return found + sizes.span * (text.span_count + int(cuts.sum()))

    def dtype_of(self, output: Output) -> str:
        """Returns the number format of an output."""
        return "float32" if output.is_part else self.dtype

    def row_bytes(self, output: Output) -> int:
        """Returns the bytes of one row of an output."""
        return output.row_size * ITEM_BYTES[self.dtype_of(output)]
