"""What a line of the log looks like: text for people, or one JSON object a line for programs.

Rules:
- A record may carry `fields` (`log.info(…, extra={"fields": {…}})`): text appends them as name=value, JSON has them as
  keys of their own.
- A record is one line; only a traceback in text adds more. Control characters are escaped.
- Nothing that gRPC's own loggers format reaches the log, since they format metadata, and metadata has tokens.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, Final, TextIO

from layertap.errors import printable

_PLAIN: Final = re.compile(r"[!#-<>-~]+", re.ASCII)
"""What needs no quotes: visible, and neither a quote nor an equals sign."""

_PEER_LOGGERS: Final = ("grpc", "asyncio", "opentelemetry")
"""The loggers whose errors a peer can cause with each call."""
_PEER_INTERVAL_S: Final = 60.0
"""How often an error of one of these loggers is logged."""

_SECRET_LOGGERS: Final = ("grpc", "opentelemetry.util")
"""The loggers whose messages may have metadata in them; opentelemetry.util's have OTEL_EXPORTER_OTLP_HEADERS."""


def set_up(*, level: str, form: str, process: int | None = None) -> None:
    """Sends all that is logged from a level on to stderr, each line with the number of the process if it has one."""
    handler = StandardErrorHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())

    def add_process(record: logging.LogRecord) -> bool:
        record.fields = {"process": process, **getattr(record, "fields", {})}
        return True

    if process is not None:
        handler.addFilter(add_process)
    handler.addFilter(hide_metadata)
    handler.addFilter(PeerFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


class StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to what is `sys.stderr` at the time, which is replaced once the process needs no forks any more."""

    @property
    def stream(self) -> TextIO:
        """Standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Does nothing."""


def hide_metadata(record: logging.LogRecord) -> bool:
    """Replaces what may have metadata in it by the place in the code that logs it; returns whether that is logged."""
    if not _is_of(record, _SECRET_LOGGERS):
        return True
    if record.levelno < logging.WARNING:
        return False
    record.msg, record.args = f"{record.name} reports a fault{_where(record)}", ()
    record.exc_info = record.exc_text = record.stack_info = None
    return True


class PeerFilter(logging.Filter):
    """Lets through one warning or error a minute of each logger that peers can make write, with the number left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._left_out: dict[str, int] = {}
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is logged."""
        if record.levelno < logging.WARNING or not _is_of(record, _PEER_LOGGERS):
            return True
        now, name = self._clock(), record.name.partition(".")[0]
        if now < self._next.get(name, now):
            self._left_out[name] = self._left_out.get(name, 0) + 1
            return False
        self._next[name] = now + _PEER_INTERVAL_S
        if count := self._left_out.pop(name, 0):
            record.fields = {**getattr(record, "fields", {}), "left_out_count": count}
        return True


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, then the fields."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the line without what may follow it, such as a traceback."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        line = printable(super().formatMessage(record))
        return line + "".join(f" {name}={_shown(value)}" for name, value in fields.items())

    def formatException(self, ei: Any) -> str:
        """Returns the lines of a traceback."""
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, the fields, a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _is_of(record: logging.LogRecord, names: tuple[str, ...]) -> bool:
    return any(record.name == name or record.name.startswith(f"{name}.") for name in names)


def _where(record: logging.LogRecord) -> str:
    """Returns the type of an exception and the place that raised it, without its message."""
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    kind, _, trace = record.exc_info
    frames = traceback.extract_tb(trace)
    place = f" in {frames[-1].name} ({PurePath(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f": {kind.__name__}{place}"


def _shown(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
