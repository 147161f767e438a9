"""What to ask of the model for each text, and which rows of the answer to keep: `embed`'s choice, or `encode`'s."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Generator, Iterable, Mapping
from typing import Any, Final, TypeAlias, cast

import numpy as np

from layertap._encode import stream_sentences
from layertap._protocol.inputs import InputItem
from layertap._protocol.options import EmbedOptions, embed_options
from layertap.client import Client
from layertap.jobs.items import Item
from layertap.model_info import ModelInfo
from layertap.quantization import Precision
from layertap.results.embedding import Embedding
from layertap.results.export import Column
from layertap.results.streamed import StreamResult
from layertap.sentence_transformers import TOKENS, Encoding, OutputValue, PromptedOptions
from layertap.types import LayerMix, Pooling, PoolingName, Windows

Results: TypeAlias = Generator[StreamResult, None, None]


class Task:
    """What to do with each text.

    Attributes:
        precision: What all rows together are quantized to at the end.
    """

    precision: Precision = "float32"

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the rows, as JSON has it."""
        raise NotImplementedError

    def begin(self, model: ModelInfo) -> None:
        """Prepares for a model.

        Raises:
            LayertapError: if the model cannot do this.
        """

    def refusal(self, item: Item) -> str:
        """Returns why an item cannot be embedded, as a phrase; empty: it can, or the server judges."""
        return ""

    def stream(self, client: Client, contents: Iterable[InputItem], timeout_s: float) -> Results:
        """Embeds contents in their order."""
        raise NotImplementedError

    def columns(self, embedding: Embedding) -> list[Column]:
        """Returns the rows of one text."""
        raise NotImplementedError


_NOT_IN_FILES: Final = ("return_tokens", "span_pooling", "lower_case")
OPTIONS: Final[Mapping[str, Any]] = {
    name: one.default for name, one in inspect.signature(embed_options).parameters.items() if name not in _NOT_IN_FILES
}
"""The options of a file of vectors, with their defaults: those of `Client.embed` that a file has a place for."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EmbedTask(Task):
    """Layers, words, pooled vectors: what `Client.embed_stream` gives with these options."""

    options: Mapping[str, Any]

    @classmethod
    def of(cls, options: EmbedOptions) -> EmbedTask:
        """Returns the task that the command line makes of the same options, so that each resumes the other's jobs.

        Raises:
            TypeError: if there is no such option.
        """
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"got {name!r}; the options of a file are {', '.join(sorted(OPTIONS))}")
        whole: dict[str, Any] = {**OPTIONS, **options}
        for name in ("layers", "attentions", "attention_heads"):
            plain = _plain(whole[name])
            whole[name] = [plain] if isinstance(plain, int) else plain
        if (pooling := whole["pooling"]) is not None:
            several: Any = [pooling] if isinstance(pooling, (str, Pooling)) else pooling
            whole["pooling"] = [Pooling(cast("PoolingName", one)) if isinstance(one, str) else one for one in several]
        return cls(options=whole)

    @property
    def settings(self) -> dict[str, Any]:
        """The options, as JSON has them."""
        return {name: _plain(value) for name, value in self.options.items()}

    def stream(self, client: Client, contents: Iterable[InputItem], timeout_s: float) -> Results:
        """Embeds contents in their order."""
        return client.embed_stream(contents, **self.options, item_timeout_s=timeout_s, reconnect_timeout_s=timeout_s)

    def columns(self, embedding: Embedding) -> list[Column]:
        """Returns all that was requested."""
        return embedding.columns()


@dataclasses.dataclass(slots=True, kw_only=True)
class EncodeTask(Task):
    """Sentence vectors: what `Client.encode` gives with these arguments, the precision for all texts together."""

    options: PromptedOptions
    output_value: OutputValue
    precision: Precision
    _encoding: Encoding | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The options, as JSON has them."""
        options = {name: _plain(value) for name, value in self.options.items()}
        return {"output_value": self.output_value, "precision": self.precision, **options}

    def begin(self, model: ModelInfo) -> None:
        """Reads what the model's folder says about sentences."""
        self._encoding = Encoding([""], model, output_value=self.output_value, **self.options)

    def refusal(self, item: Item) -> str:
        """Returns why an item is no sentence."""
        return "" if isinstance(item.content, str) else "encode needs a string, this is a list of words; use embed"

    def stream(self, client: Client, contents: Iterable[InputItem], timeout_s: float) -> Results:
        """Embeds contents in their order."""
        assert self._encoding is not None
        return stream_sentences(client, self._encoding, contents, timeout_s)

    def columns(self, embedding: Embedding) -> list[Column]:
        """Returns the sentence vector, or the rows of the last layer."""
        assert self._encoding is not None
        self._encoding.note(0, embedding)
        (found,), counts, of_tokens = self._encoding.answer(), embedding.token_counts, self.output_value == TOKENS
        # A copy: the next text is written into the same array.
        rows = np.array(found if of_tokens else found[None])
        return [
            Column(name="token_counts", values=counts),
            Column(name="truncated", values=embedding.truncated),
            Column(name=self.output_value, values=rows, counts=counts if of_tokens else None),
        ]


def _plain(value: Any) -> Any:
    """Returns the value of an option as JSON gives it back, whatever sequence or number of numpy it is."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (LayerMix, Pooling, Windows)):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(one) for one in value] if isinstance(value, Iterable) and not isinstance(value, str) else value
