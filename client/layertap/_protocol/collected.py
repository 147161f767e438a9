"""The answer of `embed` to more texts than one request may hold: the results of a stream, joined. Pure."""

from __future__ import annotations

from typing import Final

import numpy as np

from layertap._protocol.responses import ModelPin
from layertap._protocol.result_builder import attention_mask, build_embedding
from layertap._protocol.stream_results import TextAnswer
from layertap._protocol.stream_state import StreamState
from layertap.errors import DataLossError, ResourceExhaustedError
from layertap.results.embedding import Embedding
from layertap.results.streamed import StreamResult
from layertap.types import Timings
from layertap.v1 import embedding_pb2 as pb

MAX_BYTES: Final = 8 << 30
"""The largest answer that is collected; `embed_stream` yields larger ones text by text."""


class CollectedStream(StreamState):
    """A stream whose results are kept, and joined at its end."""

    def __init__(self, messages: list[pb.Input], options: pb.EmbedOptions, pin: ModelPin) -> None:
        super().__init__(options, ordered=False, pin=pin)
        self._messages = messages
        self._answers: dict[int, TextAnswer] = {}
        self._byte_count = 0

    def _result(self, index: int, message: pb.Input, answer: TextAnswer) -> StreamResult:
        self._answers[index] = answer
        self._byte_count += sum(array.nbytes for array in answer.arrays.values())
        if self._byte_count > MAX_BYTES:
            raise ResourceExhaustedError(
                f"the answer is larger than {MAX_BYTES >> 30} GiB; use embed_stream, which yields each text"
            )
        return StreamResult(index=index, error=None, _embedding=None)

    def whole(self) -> Embedding:
        """Returns the embedding of all texts, once the stream has ended. Its times are the largest of any text.

        Raises:
            DataLossError: if a text has no result.
        """
        if self._plan is None or len(self._answers) != len(self._messages):
            raise DataLossError(f"{len(self._answers)} of {len(self._messages)} results came; ask again")
        answers = [self._answers[index] for index in range(len(self._messages))]
        token_counts = np.concatenate([answer.token_counts for answer in answers])
        return build_embedding(
            self._plan,
            arrays={key: np.concatenate([answer.arrays[key] for answer in answers]) for key in answers[0].arrays},
            messages=self._messages,
            token_counts=token_counts,
            truncated=np.concatenate([answer.truncated for answer in answers]),
            span_counts=[answer.span_count for answer in answers],
            window_counts=np.concatenate([answer.window_counts for answer in answers]),
            attention_mask=attention_mask(self._messages, token_counts),
            timings=Timings(
                queue_time_ns=max(answer.timings.queue_time_ns for answer in answers),
                tokenize_time_ns=max(answer.timings.tokenize_time_ns for answer in answers),
                compute_time_ns=max(answer.timings.compute_time_ns for answer in answers),
            ),
            tokens=[text for answer in answers for text in answer.tokens],
            words=[text for answer in answers for text in answer.words],
        )
