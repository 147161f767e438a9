"""Tokenize and Decode: requests of the tokenizer alone, which need no plan and no queue, and their answers.

Their texts are checked as those of Embed are, and tokenized in the same slices; see `preprocess`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from layertap.errors import InvalidArgumentError
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer_engine import Tokenizing
from layertap_server.observability.call_log import Record
from layertap_server.protocol import token_ids, validation
from layertap_server.protocol.offload import LARGE_BYTES, offload
from layertap_server.protocol.options import max_length_of, truncation_of
from layertap_server.protocol.preprocess import Hold, Preprocessor, all_good, held_bytes
from layertap_server.protocol.requests import sizes_of
from layertap_server.protocol.responses import TOKEN_BYTES, tokens
from layertap_server.types import Text

_SLICE_IDS: Final = 16 << 10
"""Token ids that are decoded at once."""
_LARGE_SLICE_IDS: Final = 256
"""Decoding of more leaves the event loop."""


class TokenizerRequests:
    """The requests of one tokenizer, that of the pipeline whose limits and slices they share."""

    def __init__(self, preprocessor: Preprocessor) -> None:
        self._preprocessor, self._tokenizer = preprocessor, preprocessor.tokenizer
        self._model, self._limits = preprocessor.model, preprocessor.limits

    async def tokenize(self, raw: bytes, record: Record, *, hold: Hold) -> bytes:
        """Returns the answer to a Tokenize request, serialized.

        Args:
            raw: The request, serialized.
            record: What is known of the call.
            hold: Counts what the texts take, as they are tokenized.

        Raises:
            LayertapError: if an option or a text is at fault, or the answer would be too large.
        """
        request, inputs = await self._preprocessor.parse(pb.TokenizeRequest, pb.Input, raw)
        limits = self._limits
        validation.check_text_count(len(inputs), limits)
        max_length = max_length_of(request.max_length, self._model, at_most=limits.max_character_count)
        validation.check_padding(request.pad_to, max_length, len(inputs), limits)
        how = Tokenizing(
            max_length=max_length,
            truncation=truncation_of(request.truncation),
            add_special_tokens=not request.omit_special_tokens,
            longest=limits.max_character_count,
        )
        labels = [f"inputs[{request.first_text + n}]" for n in range(len(inputs))]

        token_count = 0

        def work(part: slice) -> list[Tokenized]:
            items = validation.items(inputs[part], labels[part], self._model, self._limits)
            for label, item in zip(labels[part], items, strict=True):
                if isinstance(item, Text):
                    raise InvalidArgumentError(f"{label} is token ids already; send text, or ask Decode for its string")
            return all_good(self._tokenizer.encode(items, labels[part], how))

        def note(texts: list[Tokenized]) -> None:
            nonlocal token_count
            token_count += sum(max(one.text.token_count, request.pad_to) for one in texts)
            validation.check_answered_tokens(token_count, limits)
            hold(sum(map(held_bytes, texts)))

        texts = await self._preprocessor.run(work, inputs, record, note)
        record.take([one.text for one in texts])
        pack = functools.partial(self._tokenized, texts, pad_to=request.pad_to)
        answer = await offload(pack, in_thread=TOKEN_BYTES * token_count > LARGE_BYTES)
        if len(answer) > limits.max_response_bytes:
            raise InvalidArgumentError(
                f"the answer has {len(answer)} bytes, the most is {limits.max_response_bytes}; send fewer texts at once"
            )
        return answer

    async def decode(self, raw: bytes, record: Record) -> bytes:
        """Returns the answer to a Decode request, serialized.

        Args:
            raw: The request, serialized.
            record: What is known of the call.

        Raises:
            InvalidArgumentError: if the request is at fault, or the answer would be too large.
        """
        request, texts = await self._preprocessor.parse(pb.DecodeRequest, pb.TokenIds, raw)
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

        strings = await self._preprocessor.slices.run(
            work, counts, client=record.client, most=_SLICE_IDS, large=_LARGE_SLICE_IDS, note=note
        )
        model_id, fingerprint = self._model.model_id, self._model.fingerprint
        return pb.DecodeResponse(texts=strings, model_id=model_id, fingerprint=fingerprint).SerializeToString()

    def _tokenized(self, texts: Sequence[Tokenized], *, pad_to: int) -> bytes:
        return pb.TokenizeResponse(
            texts=(tokens(one, self._tokenizer, pad_to=pad_to) for one in texts),
            pad_token_id=self._tokenizer.pad_token_id,
            model_id=self._model.model_id,
            fingerprint=self._model.fingerprint,
        ).SerializeToString()
