"""What an instance reports to a call: rows as they are computed, the end of a run, a failure, room in the queue."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from layertap.errors import LayertapError
from layertap_server.types import Rows, Text


@dataclasses.dataclass(slots=True)  # Not frozen: made for each batch, in half of the time.
class RowsReady:
    """One layer of one output of some texts is ready, or of one text that runs as windows some of its token rows.

    Attributes:
        first_text: The position of the first of the texts in the call.
        first_row: Which row of its text the first row is.
    """

    first_text: int
    texts: Sequence[Text]
    rows: Rows
    first_row: int = 0


@dataclasses.dataclass(slots=True)  # Not frozen: made for each batch, in half of the time.
class RunDone:
    """All outputs of some texts have been delivered.

    Attributes:
        first_text: The position of the first of the texts in the call.
        started_at_ns: When their batch began, by time.monotonic_ns.
        queue_time_ns: How long the first of them had waited.
        compute_time_ns: How long the batch took, with its pauses.
    """

    first_text: int
    texts: Sequence[Text]
    started_at_ns: int
    queue_time_ns: int
    compute_time_ns: int
    reserved_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class CallFailed:
    """The call has failed; no event follows."""

    error: LayertapError


@dataclasses.dataclass(frozen=True, slots=True)
class QueueRoom:
    """The queue may have room again for a call that waits for it."""


Event: TypeAlias = RowsReady | RunDone | CallFailed | QueueRoom
