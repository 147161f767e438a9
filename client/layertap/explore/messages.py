"""What the page receives: a header in JSON and arrays in their own bytes, so that no number is rounded.

A message is the length of its header and that of its arrays (both uint32), the header, and the arrays one after the
other. All is little-endian; the header ends with spaces up to a multiple of 4, so that the page can view the arrays in
place. `arrays` in the header has the name, dtype, shape and first byte of each. An answer is one or several messages.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from layertap.errors import LayertapError

_DTYPES: Final = {"f": "<f4", "i": "<i4", "u": "<i4", "b": "<i4"}
_NAMES: Final = {"<f4": "float32", "<i4": "int32"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A part of an answer.

    Attributes:
        header: What is no array, as JSON can say it.
        arrays: The arrays by their names; they are sent as float32 or int32.
    """

    header: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]] = dataclasses.field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Returns the message as it is sent."""
        described, parts, size = [], [], 0
        for name, values in self.arrays.items():
            dtype = _DTYPES[values.dtype.kind]
            data = np.ascontiguousarray(values, dtype).tobytes()
            described.append({"name": name, "dtype": _NAMES[dtype], "shape": values.shape, "offset": size})
            parts.append(data)
            size += len(data)
        header = json.dumps({**self.header, "arrays": described}, ensure_ascii=False, allow_nan=False).encode()
        header += b" " * (-len(header) % 4)
        return b"".join([struct.pack("<II", len(header), size), header, *parts])


def of_error(error: LayertapError) -> Message:
    """Returns the message that an error is, in its own words."""
    return Message(
        header={"error": {"code": error.code.name, "details": str(error), "retry_after_s": error.retry_after_s}}
    )
