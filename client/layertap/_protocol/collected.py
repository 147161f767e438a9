"""The answer of `embed` to more texts than one request may hold: the results of a stream, joined. Pure."""

from __future__ import annotations

from typing import Final

import numpy as np

from layertap._protocol.responses import ModelPin
from layertap._protocol.result_builder import Answer, attention_mask, build_embedding
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
        self._answers: dict[int, Answer] = {}
        self._byte_count = 0

    def _result(self, index: int, message: pb.Input, answer: Answer) -> StreamResult:
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
            Answer(
                arrays={key: np.concatenate([one.arrays[key] for one in answers]) for key in answers[0].arrays},
                token_counts=token_counts,
                truncated=np.concatenate([one.truncated for one in answers]),
                window_counts=np.concatenate([one.window_counts for one in answers]),
                span_counts=[count for one in answers for count in one.span_counts],
                attention_mask=attention_mask(self._messages, token_counts),
                timings=Timings(
                    queue_time_ns=max(one.timings.queue_time_ns for one in answers),
                    tokenize_time_ns=max(one.timings.tokenize_time_ns for one in answers),
                    compute_time_ns=max(one.timings.compute_time_ns for one in answers),
                ),
                tokens=[text for one in answers for text in one.tokens],
                words=[text for one in answers for text in one.words],
            ),
            self._messages,
        )
