"""What one request returns: hidden states, words, mixes and pools, and their forms in other libraries."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from layertap import _repr
from layertap.results import export
from layertap.results.attentions import Attentions
from layertap.results.by_text import ByText
from layertap.results.hidden_states import HiddenStates
from layertap.results.spans import SpanVectors
from layertap.results.tokens import Tokens
from layertap.results.words import NO_MIX, MixedRows, Words, requested
from layertap.types import BoolArray, FloatArray, IntArray, ModelRef, Timings

if TYPE_CHECKING:
    import pandas
    import pyarrow


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Embedding(ByText):
    """The result of one request, under the names of transformers. Arrays are C-contiguous and writable.

    Attributes:
        hidden_states: The requested layers; see `HiddenStates`.
        pools: One array for each requested pooling, in the order of the request. Shape: [text_count, pool_size].
        token_counts: Shape: [text_count]; rows of each text.
        truncated: Shape: [text_count]; whether tokens were cut.
        window_counts: Shape: [text_count]; how many windows each text ran as; 1: it fits, or no windows were allowed.
        attention_mask: Shape: [text_count, length]; as sent for token ids, else 1 for each token.
        model: The model that answered.
        timings: How long the parts of the work took.
        request_id: The name of the call in the server's log; None: the server did not say, or it was a stream.
    """

    hidden_states: HiddenStates
    pools: tuple[FloatArray, ...]
    token_counts: IntArray
    truncated: BoolArray
    window_counts: IntArray
    attention_mask: IntArray
    model: ModelRef
    timings: Timings
    _pooler_output: FloatArray | None
    _tokens: Tokens | None
    _mixed: MixedRows | None = None
    _words: Words | None = None
    _attentions: Attentions | None = None
    _spans: SpanVectors | None = None
    request_id: str | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The held layers of hidden_states, absolute, ascending."""
        return self.hidden_states.layers

    @property
    def last_hidden_state(self) -> FloatArray:
        """The last layer, padded. Shape: [text_count, length, hidden_size].

        Raises:
            IndexError: if it was not requested.
        """
        return self.hidden_states[-1]

    @property
    def pooler_output(self) -> FloatArray:
        """The model's pooler. Shape: [text_count, hidden_size].

        Raises:
            LookupError: if it was not requested.
        """
        if self._pooler_output is None:
            raise LookupError("pooler_output was not requested; pass pooler_output=True")
        return self._pooler_output

    @property
    def pooled(self) -> FloatArray:
        """The vectors of the only pooling. Shape: [text_count, pool_size].

        Raises:
            LookupError: if there is not exactly one pooling.
        """
        if len(self.pools) != 1:
            hint = "read them from .pools" if self.pools else 'pass pooling="mean" or another strategy'
            raise LookupError(f"{len(self.pools)} poolings were requested; {hint}")
        return self.pools[0]

    @property
    def mixed(self) -> MixedRows:
        """The mix of layers, one row a token.

        Raises:
            LookupError: if it was not requested, or comes one row a word.
        """
        of_words = "no mix was requested one row a token; that of words is .words.mixed"
        return requested(self._mixed, NO_MIX if self._words is None else of_words)

    @property
    def words(self) -> Words:
        """The words of the texts, with a vector each.

        Raises:
            LookupError: if they were not requested.
        """
        return requested(self._words, 'words were not requested; pass words="mean" or another way to pool them')

    @property
    def attentions(self) -> Attentions:
        """The attention probabilities of the requested layers; see `Attentions`.

        Raises:
            LookupError: if they were not requested.
        """
        return requested(self._attentions, 'attentions were not requested; pass attentions="all" or layer numbers')

    @property
    def spans(self) -> SpanVectors:
        """The vectors of the spans of the texts.

        Raises:
            LookupError: if they were not requested.
        """
        return requested(self._spans, "span vectors were not requested; pass spans=[(start, end), …]")

    @property
    def tokens(self) -> Tokens:
        """The tokens of the texts.

        Raises:
            LookupError: if they were not requested.
        """
        return requested(self._tokens, "tokens were not requested; pass return_tokens=True")

    def ragged(self, layer: int) -> list[FloatArray]:
        """Returns views of one layer, one a text. Shape of each: [token_count, hidden_size].

        Raises:
            IndexError: if the layer is not held.
        """
        return self.hidden_states.ragged(layer)

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the requested ones of (last_hidden_state, pooler_output, hidden_states, attentions).

        As in transformers `hidden_states`, a tuple of the held layers, is there only if more than the last was
        requested: `hidden, pooled = client.embed(text, layers=-1, pooler_output=True).to_tuple()`. `attentions` is a
        tuple of its held layers.
        """
        last = self.hidden_states.layer_count
        parts: list[Any] = [self.last_hidden_state] if last in self.layers else []
        if self._pooler_output is not None:
            parts.append(self._pooler_output)
        if set(self.layers) - {last}:
            parts.append(tuple(self.hidden_states))
        if self._attentions is not None:
            parts.append(tuple(self._attentions))
        return tuple(parts)

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.token_counts)

    def _text(self, index: int) -> Embedding:
        one = slice(index, index + 1)
        rows: dict[str, Any] = {f"_{name}": own._text(index) for name, own in self._rows()}
        return dataclasses.replace(
            self,
            hidden_states=self.hidden_states._text(index),
            pools=tuple(pool[one] for pool in self.pools),
            token_counts=self.token_counts[one],
            truncated=self.truncated[one],
            window_counts=self.window_counts[one],
            attention_mask=self.attention_mask[one, : int(self.token_counts[index])],
            _pooler_output=None if self._pooler_output is None else self._pooler_output[one],
            _tokens=None if self._tokens is None else self._tokens._text(index),
            **rows,
        )

    def _repr_html_(self) -> str:
        html = _repr.table("Embedding", self._summary())
        return html if self._tokens is None else f"{html}\n{self._tokens._repr_html_()}"

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Returns the only array, if one output was requested. Shape: [text_count, …].

        Raises:
            TypeError: if there are several arrays.
            ValueError: if `copy` is False and the dtype is another.
        """
        return export.as_array(self._only(), dtype, copy)

    def __dlpack__(self, **options: Any) -> Any:
        """Gives the only array to a library that reads DLPack, without a copy.

        Raises:
            TypeError: if there are several arrays.
        """
        return self._only().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Returns the device of DLPack: the memory of the CPU."""
        return self._only().__dlpack_device__()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Gives the table of `to_arrow` to any library that reads Arrow's PyCapsule interface."""
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def to_torch(self) -> export.TorchEmbedding:
        """Returns the arrays as torch tensors that share their memory. The tensor of a read-only array is a copy.

        Those of words and mixes are not among them; `torch.from_numpy` takes each.

        Raises:
            ModuleNotFoundError: if torch is missing; `layertap[torch]` brings it.
        """
        hidden_states = self.hidden_states.to_torch()
        return export.TorchEmbedding(
            last_hidden_state=hidden_states[-1] if self.hidden_states.layer_count in self.layers else None,
            pooler_output=None if self._pooler_output is None else export.to_torch(self._pooler_output),
            hidden_states=hidden_states,
            attentions=None if self._attentions is None else self._attentions.to_torch(),
            pools=tuple(export.to_torch(pool) for pool in self.pools),
            attention_mask=export.to_torch(self.attention_mask),
        )

    def to_arrow(self) -> pyarrow.Table:
        """Returns an Arrow table with one row a text, whose numbers share the memory of the arrays.

        Columns: token_counts, truncated, layer_K for each held layer and mixed (a List of FixedSizeList), word_counts,
        word_offsets, words_layer_K and words_mixed (likewise), token_pair_counts and attentions_K (likewise: of each
        query and key, one value for each head), span_counts and spans_N (likewise), pool_N and pooler_output
        (FixedSizeList), and tokens (a List of strings), as far as they were requested. The schema's metadata has
        model_id and fingerprint.

        Raises:
            ModuleNotFoundError: if pyarrow is missing; `layertap[arrow]` brings it.
        """
        return export.to_arrow(self.columns(), dataclasses.asdict(self.model))

    def to_pandas(self) -> pandas.DataFrame:
        """Returns a frame with one row a text and the columns of `to_arrow`; cells are views of the arrays.

        Cells of layer_K have Shape: [token_count, hidden_size], of pool_N and pooler_output Shape: [size].

        Raises:
            ModuleNotFoundError: if pandas is missing; `layertap[pandas]` brings it.
        """
        return export.to_pandas(self.columns())

    def _vectors(self) -> list[tuple[str, FloatArray]]:
        vectors = [(f"pool_{n}", pool) for n, pool in enumerate(self.pools)]
        return vectors if self._pooler_output is None else [*vectors, ("pooler_output", self._pooler_output)]

    def columns(self) -> list[export.Column]:
        """Returns all requested outputs as columns of a table, one row for each text, counts first."""
        return [
            export.Column(name="token_counts", values=self.token_counts),
            export.Column(name="truncated", values=self.truncated),
            *self.hidden_states._columns(),
            *(column for _, own in self._rows() for column in own._columns()),
            *(export.Column(name=name, values=values) for name, values in self._vectors()),
            *([] if self._tokens is None else [export.Column(name="tokens", values=self._tokens.tokens)]),
        ]

    def _summary(self) -> list[tuple[str, str]]:
        vectors = [(name, _repr.array(values.shape, values.dtype)) for name, values in self._vectors()]
        rows = [(name, repr(own)) for name, own in self._rows()]
        model = ("model", repr(self.model.model_id))
        return [("text_count", str(len(self))), *self.hidden_states._summary(), *rows, *vectors, model]

    def _rows(self) -> list[tuple[str, MixedRows | Words | Attentions | SpanVectors]]:
        """Returns the requested ones of what has rows of its own, by their names."""
        names = ("mixed", "words", "attentions", "spans")
        return [(name, own) for name in names if (own := getattr(self, f"_{name}")) is not None]

    def _only(self) -> FloatArray:
        vectors = [values for _, values in self._vectors()]
        if self._rows() or len(vectors) + len(self.layers) != 1:
            names = [
                *(f"layer {layer}" for layer in self.layers),
                *(name for name, _ in (*self._rows(), *self._vectors())),
            ]
            raise TypeError(f"this embedding holds {', '.join(names) or 'no array'}; take the one array that is meant")
        return vectors[0] if vectors else next(iter(self.hidden_states))
