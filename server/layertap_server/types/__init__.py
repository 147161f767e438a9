"""The server's own words for what is to be done: texts as tokens, the outputs asked of them, and what comes out.

Pure data, with numpy as its only library. The tokenizer makes a `Text`, `protocol` a `Plan`, the batcher a `Run`, the
encoder `Rows`. Nothing here knows protobuf, gRPC or torch.
"""

from layertap_server.types.errors import (
    RETRY_ELSEWHERE_S,
    RETRY_FULL_S,
    RETRY_STOPPING_S,
    DeviceLostError,
    EngineLostError,
    OutOfMemoryError,
)
from layertap_server.types.output import Mix, Mixing, Output, OutputKind, Pool, Strategy, Unit, WordPooling
from layertap_server.types.plan import ByteCounts, Plan
from layertap_server.types.run import Allocator, ApplyModules, Encode, Rows, Run, Vectors
from layertap_server.types.text import Ids, Indices, Spans, Text, Words
from layertap_server.types.windows import Window, Windowing, Windows

__all__ = [
    "RETRY_ELSEWHERE_S",
    "RETRY_FULL_S",
    "RETRY_STOPPING_S",
    "Allocator",
    "ApplyModules",
    "ByteCounts",
    "DeviceLostError",
    "Encode",
    "EngineLostError",
    "Ids",
    "Indices",
    "Mix",
    "Mixing",
    "OutOfMemoryError",
    "Output",
    "OutputKind",
    "Plan",
    "Pool",
    "Rows",
    "Run",
    "Spans",
    "Strategy",
    "Text",
    "Unit",
    "Vectors",
    "Window",
    "Windowing",
    "Windows",
    "WordPooling",
    "Words",
]
