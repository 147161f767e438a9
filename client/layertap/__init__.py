"""layertap: tokens, pooled vectors and every layer of a BERT over gRPC, as numpy arrays."""

from layertap._transport.tls import TLS
from layertap._version import __version__
from layertap.async_client import AsyncClient
from layertap.client import Client
from layertap.errors import (
    AbortedError,
    AlreadyExistsError,
    CancelledError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    LayertapError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    ResourceExhaustedError,
    StatusCode,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    UnknownError,
)
from layertap.model_info import ModelInfo, SentenceConfig
from layertap.quantization import quantize_embeddings
from layertap.results.attentions import Attentions
from layertap.results.embedding import Embedding
from layertap.results.export import TorchEmbedding
from layertap.results.hidden_states import HiddenStates
from layertap.results.spans import SpanVectors
from layertap.results.streamed import LayerRows, StreamResult
from layertap.results.tokens import Tokens
from layertap.results.words import MixedRows, Words
from layertap.types import (
    LayerMix,
    Limits,
    ModelRef,
    Pooling,
    Spanned,
    Timings,
    TokenIds,
    Windows,
)
from layertap.wire import keep_pages

__all__ = [
    "TLS",
    "AbortedError",
    "AlreadyExistsError",
    "AsyncClient",
    "Attentions",
    "CancelledError",
    "Client",
    "DataLossError",
    "DeadlineExceededError",
    "Embedding",
    "FailedPreconditionError",
    "HiddenStates",
    "InternalError",
    "InvalidArgumentError",
    "LayerMix",
    "LayerRows",
    "LayertapError",
    "Limits",
    "MixedRows",
    "ModelInfo",
    "ModelRef",
    "NotFoundError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "Pooling",
    "ResourceExhaustedError",
    "SentenceConfig",
    "SpanVectors",
    "Spanned",
    "StatusCode",
    "StreamResult",
    "Timings",
    "TokenIds",
    "Tokens",
    "TorchEmbedding",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnknownError",
    "Windows",
    "Words",
    "__version__",
    "keep_pages",
    "quantize_embeddings",
]
