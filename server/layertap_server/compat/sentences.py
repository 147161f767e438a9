"""The one vector of a text that `Client.encode` makes of it, for protocols whose clients know no more than that vector.

The model's folder says how it is made; see `sentence_config`. Where the folder has modules the encoder makes all of it.
"""

from __future__ import annotations

import dataclasses

from layertap import sentence_vectors, wire
from layertap.sentence_vectors import Vectors
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.sentence_config import SentenceConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SentenceVectors:
    """The vectors that a request asks for.

    Attributes:
        config: What the model's folder says of them.
        dimensions: How many values of each are kept; 0: as the folder says.
        normalize: Whether what is kept then has length 1, also where the folder does not say so.
    """

    config: SentenceConfig
    dimensions: int = 0
    normalize: bool = False

    def options(self) -> pb.EmbedOptions:
        """Returns what the folder says of the options of a request, without outputs."""
        return pb.EmbedOptions(
            truncation=wire.TRUNCATIONS[self.config.truncation],
            max_length=self.config.max_length,
            prompt_name=self.config.default_prompt_name,
            lower_case=self.config.lower_case,
        )

    def outputs(self) -> list[pb.Output]:
        """Returns the outputs that `finish` makes the vectors of."""
        if self.config.has_modules:
            size = self.dimensions or self.config.dimensions
            pools = [pb.PooledVectors(sentence_modules=True, dimensions=size, normalize=self.normalize)]
        else:
            strategies = [wire.POOLING_STRATEGIES[one.name.lower()] for one in self.config.strategies]
            pools = [pb.PooledVectors(strategy=strategy) for strategy in strategies]
        return [pb.Output(pooled_vectors=pool) for pool in pools]

    def finish(self, vectors: Vectors) -> Vectors:
        """Returns the vectors made of the rows of all outputs, side by side. Shape: [text_count, dimensions]."""
        if self.config.has_modules:
            return vectors
        return sentence_vectors.finish(
            vectors,
            model_normalizes=self.config.normalize,
            dimensions=self.dimensions or self.config.dimensions,
            normalize=self.normalize,
        )
