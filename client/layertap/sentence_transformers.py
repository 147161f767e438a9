"""`encode`: what users of sentence-transformers type, as a request of the contract and an array made of its answers.

Pure. The server reports what the model's folder says about sentences (`SentenceConfig`); the options ask for exactly
that, and what cannot be requested (joining several pools, normalizing before cutting, fewer bits) is done here, in the
order of sentence-transformers: pool, normalize if the model does, cut, normalize if the caller wants it, quantize. With
folders that have Dense modules the server does all but the last, since the weights are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from layertap import quantization, sentence_vectors
from layertap._protocol import requests
from layertap._protocol.inputs import check_items, to_message, to_messages
from layertap._protocol.option_names import check_names
from layertap._protocol.options import count, embed_options
from layertap._protocol.responses import ModelPin
from layertap._protocol.stream_state import MAX_MESSAGE_COUNT, StreamState
from layertap.errors import FailedPreconditionError, InvalidArgumentError
from layertap.model_info import ModelInfo
from layertap.quantization import Precision
from layertap.results.embedding import Embedding
from layertap.types import FloatArray, Pooling, Windows

Array: TypeAlias = npt.NDArray[Any]

OutputValue: TypeAlias = Literal["sentence_embedding", "token_embeddings"]
"""What `encode` returns of each text: a vector, or the rows of its tokens."""

SENTENCE: Final = "sentence_embedding"
TOKENS: Final = "token_embeddings"

_FEW_TEXTS: Final = 32
_FEW_CHARACTERS: Final = 32 << 10
"""What is requested in one request: more go over a stream, which has no deadline."""

_TASK_PROMPTS: Final = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""The prompts that a task takes where none is named: the first that the model's folder has."""

_NAMED_ARGUMENTS: Final = ("prompt_name", "prompt", "batch_size", "show_progress_bar", "output_value", "precision")

Sentence: TypeAlias = str | tuple[str, str]
"""What `encode` makes one vector of: a text, or a pair."""

Sentences: TypeAlias = str | Iterable[Sentence]


class _FixedOptions(TypedDict, total=False):
    """What sentence-transformers takes and layertap has one value for."""

    convert_to_numpy: Literal[True]
    convert_to_tensor: Literal[False]
    device: None
    pool: None
    chunk_size: None


class EncodeOptions(_FixedOptions, total=False):
    """The options of `Client.encode`, which documents them."""

    normalize_embeddings: bool | None
    truncate_dim: int | None
    windows: Windows | None
    task: Literal["query", "document"] | None


class PromptedOptions(EncodeOptions, total=False):
    """The options of an `Encoding` that has its prompt among them."""

    prompt_name: str | None
    prompt: str | None


def check_options(options: Mapping[str, object]) -> None:
    """Checks the options that sentence-transformers takes and layertap cannot do.

    Raises:
        TypeError: if one is unknown, or asks for what layertap cannot do; the message says what to do instead.
    """
    if "inputs" in options:
        raise TypeError("encode takes the texts as its first argument: encode(texts, …), or sentences=texts")
    check_names(options, EncodeOptions, _NAMED_ARGUMENTS)
    if options.get("convert_to_tensor", False) or not options.get("convert_to_numpy", True):
        raise TypeError(
            "encode returns numpy arrays, so convert_to_tensor must be False and convert_to_numpy True; "
            "torch.from_numpy(vectors) makes a tensor of them without a copy"
        )
    for name in ("device", "pool", "chunk_size"):
        if options.get(name) is not None:
            raise TypeError(f"encode takes no {name}: the server computes, on the device of its --device; leave it out")


class Encoding:
    """One `encode`: what to ask, and what the answers make.

    Attributes:
        texts: The sentences.
        options: What is asked of each.
    """

    def __init__(
        self,
        sentences: Sentences,
        info: ModelInfo,
        *,
        output_value: OutputValue = SENTENCE,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        precision: Precision = "float32",
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        windows: Windows | None = None,
        task: Literal["query", "document"] | None = None,
        **_checked: Unpack[_FixedOptions],
    ) -> None:
        """Checks the arguments of `Client.encode`, which documents them; `info` is the served model.

        Raises:
            TypeError: if output_value is None, which layertap has nothing for.
            InvalidArgumentError: if an argument is wrong.
            FailedPreconditionError: if layertap cannot make the model's sentence vectors.
        """
        config = info.sentence_config
        _check(output_value, info)
        self._info = info
        self._single = isinstance(sentences, str)
        self.texts: list[Sentence] = [sentences] if isinstance(sentences, str) else _texts(sentences)
        self._message_count = count("batch_size", batch_size) or MAX_MESSAGE_COUNT
        self._precision = quantization.check(precision)
        self._normalize = bool(normalize_embeddings)
        self._width = count("truncate_dim", truncate_dim) or config.truncate_dim
        of_tokens = output_value == TOKENS
        if prompt is not None:
            prompt_name = None  # A prompt beside a name wins, as in sentence-transformers.
        elif prompt_name is None:
            names = _TASK_PROMPTS[task] if task is not None else ()
            prompt_name = next((name for name in names if name in config.prompts), config.default_prompt_name)
        self.options = embed_options(
            layers=[-1] if of_tokens else None,
            pooling=None if of_tokens else self._poolings(),
            truncation=config.truncation if windows is None else "error",
            windows=windows,
            max_length=config.max_length,
            prompt=prompt,
            prompt_name=prompt_name,
            lower_case=config.lower_case,
        )
        self._by_server = config.needs_sentence_modules
        if self._by_server:
            self._ask_for_modules(of_tokens)
        self._vectors: sentence_vectors.Vectors | None = None
        self._tokens: list[FloatArray | None] | None = [None] * len(self.texts) if of_tokens else None

    def state(self, pin: ModelPin) -> StreamState:
        """Returns the state of a stream of all texts."""
        return StreamState(self.options, ordered=False, message_count=self._message_count, pin=pin)

    def request(self) -> requests.Embed | None:
        """Returns all of it as one request if there are only few texts, else None."""
        count = len(self.texts)
        few = 0 < count <= min(_FEW_TEXTS, self._message_count, self._info.limits.max_text_count)
        if not few or sum(map(_length, self.texts)) > _FEW_CHARACTERS:
            return None
        size = self._info.sentence_config.vector_size if self._by_server else self._info.hidden_size
        vector_bytes = 64 + 4 * size * len(self.options.outputs)
        if self._tokens is None and count * vector_bytes > self._info.limits.max_response_bytes:
            return None
        return requests.Embed(to_messages(self.texts), self.options)

    def note(self, first: int, embedding: Embedding) -> int:
        """Keeps the answer to some texts, of which the first is at that place; returns how many they are."""
        count = len(embedding)
        if self._tokens is not None:
            self._tokens[first : first + count] = embedding.ragged(-1)
            return count
        if self._vectors is None:
            width = sum(pool.shape[1] for pool in embedding.pools)
            self._vectors = np.empty((len(self.texts), width), np.float32)
        np.concatenate(embedding.pools, axis=1, out=self._vectors[first : first + count])
        return count

    def answer(self) -> Array | list[Array]:
        """Returns what `encode` returns, once every text is answered."""
        if self._tokens is not None:
            matrices: list[Array] = [matrix for matrix in self._tokens if matrix is not None]
            if self._precision != "float32":
                matrices = quantization.quantize_matrices(matrices, precision=self._precision)
            return matrices[0] if self._single else matrices
        if self._vectors is None:
            return np.array([])
        vectors: Array = self._vectors
        if not self._by_server:
            vectors = sentence_vectors.finish(
                self._vectors,
                model_normalizes=self._info.sentence_config.normalize,
                dimensions=self._width or 0,
                normalize=self._normalize,
            )
        if self._precision != "float32":
            vectors = quantization.quantize_embeddings(vectors, precision=self._precision)
        return vectors[0] if self._single else vectors

    def _poolings(self) -> list[Pooling]:
        config, size = self._info.sentence_config, self._info.hidden_size
        if len(config.poolings) == 1 and (self._normalize or not config.normalize):
            # Cut before it travels. Not what a model normalizes before it is cut.
            return [Pooling(config.poolings[0], dimensions=min(self._width or size, size))]
        return [Pooling(strategy) for strategy in config.poolings]

    def _ask_for_modules(self, of_tokens: bool) -> None:
        """Asks for what the server makes with the modules of the folder, instead of layers and pools."""
        del self.options.outputs[:]
        asked = self.options.outputs.add()
        if of_tokens:
            asked.hidden_states.sentence_modules = True
            return
        vectors = asked.pooled_vectors
        vectors.sentence_modules, vectors.normalize, vectors.dimensions = True, self._normalize, self._width or 0


def _check(output_value: OutputValue | None, info: ModelInfo) -> None:
    config = info.sentence_config
    if config.unsupported is not None:
        raise FailedPreconditionError(
            f"encode cannot give what sentence-transformers gives with {info.model_id}: {config.unsupported}; ask "
            "embed for layers or a pooling instead"
        )
    if output_value is None:
        raise TypeError("encode has no output_value=None; ask embed for several outputs of one forward pass")
    if output_value not in (SENTENCE, TOKENS):
        raise InvalidArgumentError(f"output_value is {output_value!r}; pass {SENTENCE!r} or {TOKENS!r}")
    if output_value == SENTENCE and not config.poolings:
        raise FailedPreconditionError(
            f"the folder of {info.model_id} has no Pooling module, so it has no sentence vectors; pass "
            f"output_value={TOKENS!r}, or ask embed for a pooling"
        )


def _texts(sentences: Iterable[Sentence]) -> list[Sentence]:
    check_items(sentences)
    texts: list[Sentence] = []
    for index, text in enumerate(sentences):
        message = to_message(text, index)
        if message.HasField("pair"):
            texts.append((message.pair.first, message.pair.second))
        elif message.HasField("text"):
            texts.append(message.text)
        else:
            raise InvalidArgumentError(
                f"inputs[{index}] is {message.WhichOneof('kind')}; encode takes only str and tuples of two str, pass "
                "all else to embed"
            )
    return texts


def _length(sentence: Sentence) -> int:
    return len(sentence) if isinstance(sentence, str) else sum(map(len, sentence))
