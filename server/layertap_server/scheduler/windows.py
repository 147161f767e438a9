"""The events of texts that run as windows: what the instances report of windows, as what a call expects of texts.

Windows of one text may be in several batches, and those on several instances. Rows of tokens go on as they come, or
are kept until the text is complete; parts of rows are kept until they are whole. What is kept is counted: the bytes of
a text, and of the parts of its rows, are reserved with its first window. Knows neither torch nor gRPC nor protobuf.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from layertap.errors import InternalError, LayertapError
from layertap_server.scheduler.events import Event, RowsReady, RunDone
from layertap_server.scheduler.window_rows import narrowed, whole_rows
from layertap_server.types import ApplyModules, DeviceLostError, Plan, Rows, Text, Unit, Vectors, Window

log = logging.getLogger(__name__)

_Place = tuple[int, int]
"""Output index, layer."""


@dataclasses.dataclass(slots=True, eq=False)
class _OpenText:
    """A text of which some windows are done.

    Attributes:
        left: Windows that are not done.
        rows: Its token rows, as far as they have come, where they are kept.
        parts: The windows that have made a part of rows, and these parts.
        started_at_ns: When the first of its batches began.
        queue_time_ns: How long it had waited then.
        compute_time_ns: The time of all its batches.
    """

    text: Text
    left: int
    rows: dict[_Place, npt.NDArray[np.uint8]] = dataclasses.field(default_factory=dict)
    parts: defaultdict[_Place, dict[int, tuple[Text, Vectors]]] = dataclasses.field(
        default_factory=lambda: defaultdict(dict)
    )
    error: LayertapError | None = None
    started_at_ns: int = 0
    queue_time_ns: int = 0
    compute_time_ns: int = 0

    def take_error(self) -> dict[int, LayertapError]:
        """Returns the failures that rows of this text carry."""
        return {} if self.error is None else {0: self.error}


class TextEvents:
    """Turns the events of one call's windows into those of its texts. Called by any instance."""

    def __init__(
        self,
        plan: Plan,
        release: Callable[..., None],
        deliver: Callable[[Event], None],
        *,
        keeps_rows: bool,
        apply_modules: ApplyModules,
    ) -> None:
        """Starts without any open text; `release` is that of the call."""
        self._plan, self._release = plan, release
        self._deliver = deliver
        self._keeps_rows = keeps_rows
        self._apply_modules = apply_modules
        self._open: dict[int, _OpenText] = {}
        self._lock = threading.Lock()

    def deliver(self, event: Event) -> None:
        """Delivers what follows from an event; those of texts without windows go on as they are."""
        if not isinstance(event, RowsReady | RunDone) or event.texts[0].whole is None:
            self._deliver(event)
            return
        with self._lock:  # Also around what it causes: the rows of a text come before its end.
            whole = event.texts[0].whole
            opened = self._open.setdefault(event.first_text, _OpenText(whole, whole.window_count))
            events = self._rows(opened, event) if isinstance(event, RowsReady) else self._done(opened, event)
            for found in events:
                self._deliver(found)

    def _rows(self, opened: _OpenText, event: RowsReady) -> Iterator[RowsReady]:
        rows = event.rows
        if rows.failures and opened.error is None:
            opened.error = rows.failures[min(rows.failures)]
        place = rows.output_index, rows.layer
        output = self._plan.outputs[rows.output_index]
        if output.unit is Unit.TOKEN:
            first_row = _window(event.texts[0]).first_row
            if not self._keeps_rows:
                yield self._ready(opened, event.first_text, place, rows.data, first_row=first_row)
                return
            row_bytes = self._plan.row_bytes(output)
            if place not in opened.rows:
                opened.rows[place] = np.empty(opened.text.token_count * row_bytes, np.uint8)
            start = first_row * row_bytes
            opened.rows[place][start : start + len(rows.data)] = np.frombuffer(rows.data, np.uint8)
            return
        of_windows = self._plan.of_windows
        assert of_windows is not None
        part_output = of_windows.outputs[rows.output_index]
        values = np.frombuffer(rows.data, np.float32).reshape(-1, part_output.row_size)
        parts, start = opened.parts[place], 0
        for window, count in zip(event.texts, part_output.row_counts(event.texts), strict=True):
            parts[_window(window).index] = window, values[start : start + count]
            start += count
        if len(parts) == opened.text.window_count:
            yield self._whole(opened, event.first_text, place)

    def _whole(self, opened: _OpenText, first_text: int, place: _Place) -> RowsReady:
        """Returns rows of which all parts have come."""
        index, layer = place
        own = opened.parts.pop(place)
        windows, parts = zip(*(own[n] for n in range(len(own))), strict=True)
        output = self._plan.outputs[index]
        error: LayertapError | None
        try:
            found = whole_rows(output, opened.text, windows, parts, self._apply_modules)
            data, error = narrowed(found, self._plan.dtype, layer)
        except DeviceLostError:
            raise
        except Exception:  # Other calls of the batch must not fail with it.
            log.exception("the parts of a text could not be put together")
            (row_count,) = output.row_counts([opened.text])
            data = memoryview(bytes(row_count * self._plan.row_bytes(output)))
            error = InternalError("the encoder failed; the server's log has the reason")
        opened.error = opened.error or error
        return self._ready(opened, first_text, place, data)

    def _done(self, opened: _OpenText, done: RunDone) -> Iterator[Event]:
        if not opened.started_at_ns or done.started_at_ns < opened.started_at_ns:
            opened.started_at_ns, opened.queue_time_ns = done.started_at_ns, done.queue_time_ns
        opened.compute_time_ns += done.compute_time_ns
        opened.left -= len(done.texts)
        if opened.left:
            self._release(0, run_done=True)
            return
        del self._open[done.first_text]
        for place, data in sorted(opened.rows.items()):
            yield self._ready(opened, done.first_text, place, data.data)
        opened.rows.clear()
        self._release(self._plan.part_bytes(opened.text))
        yield RunDone(
            first_text=done.first_text,
            texts=[opened.text],
            started_at_ns=opened.started_at_ns,
            queue_time_ns=opened.queue_time_ns,
            compute_time_ns=opened.compute_time_ns,
            reserved_bytes=self._plan.byte_counts.of(opened.text),
        )

    def _ready(
        self, opened: _OpenText, first_text: int, place: _Place, data: memoryview, *, first_row: int = 0
    ) -> RowsReady:
        index, layer = place
        rows = Rows(run_index=0, output_index=index, layer=layer, data=data, failures=opened.take_error())
        return RowsReady(first_text, [opened.text], rows, first_row)


def _window(text: Text) -> Window:
    assert text.window is not None
    return text.window
