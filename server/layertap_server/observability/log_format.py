"""What a line of the log looks like: text for people, or one JSON object a line for programs.

A record may carry `fields` (`log.info(…, extra={"fields": {…}})`): text appends them as name=value, JSON has them as
keys of their own.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
from typing import Any, Final

_PLAIN: Final = re.compile(r"[!#-<>-~]+", re.ASCII)
"""What needs no quotes: visible, and neither a quote nor an equals sign."""


def set_up(*, level: str, form: str) -> None:
    """Sends all that is logged to stderr.

    Args:
        level: The least that is shown: "debug", "info", "warning" or "error".
        form: "text" or "json".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, then the fields."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the line without what may follow it, such as a traceback."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        return super().formatMessage(record) + "".join(f" {name}={_shown(value)}" for name, value in fields.items())


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


def _shown(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
