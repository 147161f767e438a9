"""Tokenize and Decode: requests of the tokenizer alone, which need no plan and no queue, and their answers.

Their texts are checked as those of Embed are, and tokenized in the same slices; see `preprocess`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from layertap.errors import InvalidArgumentError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.observability.call_log import Record
from layertap_server.protocol import token_ids, validation
from layertap_server.protocol.offload import LARGE_BYTES, offload
from layertap_server.protocol.options import max_length_of, truncation_of
from layertap_server.protocol.preprocess import Hold, Preprocessor, all_good, held_bytes
from layertap_server.protocol.requests import sizes_of
from layertap_server.protocol.responses import tokens
from layertap_server.types import Text

_SLICE_IDS: Final = 16 << 10
"""Token ids that are decoded at once."""
_LARGE_SLICE_IDS: Final = 256
"""Decoding of more leaves the event loop."""


class TokenizerRequests:
    """The requests of one tokenizer.

    Args:
        preprocessor: The pipeline whose limits and slices they share.
        tokenizer: The tokenizer.
    """

    def __init__(self, preprocessor: Preprocessor, tokenizer: Tokenizer) -> None:
        self._preprocessor = preprocessor
        self._model, self._limits = preprocessor.model, preprocessor.limits
        self._tokenizer = tokenizer

    async def tokenize(
        self, request: pb.TokenizeRequest, inputs: Sequence[pb.Input], record: Record, *, hold: Hold
    ) -> list[Tokenized]:
        """Returns the texts of a Tokenize request.

        Args:
            request: The request; its own inputs are not looked at.
            inputs: Its texts.
            record: What is known of the call.
            hold: Counts what the texts take, as they are tokenized.

        Raises:
            LayertapError: if an option or a text is at fault, or the answer would be too large.
        """
        limits = self._limits
        validation.check_text_count(len(inputs), limits)
        max_length = max_length_of(request.max_length, self._model, at_most=limits.max_character_count)
        validation.check_padding(request.pad_to, max_length, len(inputs), limits)
        truncation = truncation_of(request.truncation)
        labels = [f"inputs[{request.first_text + n}]" for n in range(len(inputs))]

        token_count = 0

        def work(part: slice) -> list[Tokenized]:
            items = validation.items(inputs[part], labels[part], self._model, self._limits)
            for label, item in zip(labels[part], items, strict=True):
                if isinstance(item, Text):
                    raise InvalidArgumentError(f"{label} is token ids already; send text, or ask Decode for its string")
            return all_good(
                self._tokenizer.encode(
                    items,
                    labels=labels[part],
                    max_length=max_length,
                    truncation=truncation,
                    add_special_tokens=not request.omit_special_tokens,
                )
            )

        def note(texts: list[Tokenized]) -> None:
            nonlocal token_count
            token_count += sum(max(one.text.token_count, request.pad_to) for one in texts)
            validation.check_answered_tokens(token_count, limits)
            hold(sum(map(held_bytes, texts)))

        texts = await self._preprocessor.run(work, inputs, record, note)
        record.take([one.text for one in texts])
        return texts

    async def decode(self, request: pb.DecodeRequest, texts: Sequence[pb.TokenIds], record: Record) -> list[str]:
        """Returns the strings of a Decode request.

        Args:
            request: The request; its own texts are not looked at.
            texts: Its texts.
            record: What is known of the call.

        Raises:
            InvalidArgumentError: if the request is at fault, or the answer would be too large.
        """
        check = functools.partial(validation.check_decode, texts, self._limits)
        counts = await offload(check, in_thread=sum(sizes_of(texts)) > LARGE_BYTES)
        record.text_count += len(counts)
        record.token_count += sum(counts)

        byte_count, most = 0, self._limits.max_response_bytes

        def work(part: slice) -> list[str]:
            ids = [
                token_ids.ids(text, f"texts[{part.start + n}]", self._model).tolist()
                for n, text in enumerate(texts[part])
            ]
            return self._tokenizer.decode(ids, skip_special_tokens=request.skip_special_tokens)

        def note(found: list[str]) -> None:
            nonlocal byte_count
            byte_count += sum(len(text.encode()) + 6 for text in found)
            if byte_count > most:
                raise InvalidArgumentError(
                    f"the answer has more than {most} bytes, the most of one answer; send fewer texts at once"
                )

        return await self._preprocessor.slices.run(
            work, counts, client=record.client, most=_SLICE_IDS, large=_LARGE_SLICE_IDS, note=note
        )


def tokenized(model: ModelFacts, texts: Sequence[Tokenized], tokenizer: Tokenizer, *, pad_to: int) -> bytes:
    """Returns the answer to Tokenize, serialized."""
    return pb.TokenizeResponse(
        texts=(tokens(one, tokenizer, pad_to=pad_to) for one in texts),
        pad_token_id=tokenizer.pad_token_id,
        model_id=model.model_id,
        fingerprint=model.fingerprint,
    ).SerializeToString()


def decoded(model: ModelFacts, texts: Sequence[str]) -> bytes:
    """Returns the answer to Decode, serialized."""
    return pb.DecodeResponse(texts=texts, model_id=model.model_id, fingerprint=model.fingerprint).SerializeToString()
