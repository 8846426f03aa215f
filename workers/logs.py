"""Log lines as JSON: a constant message, and its facts as fields of their own."""

from __future__ import annotations

import json
import logging
import time

# For routers, which may not import it from there.
from kvtransfer.limited_log import LimitedLog as LimitedLog  # noqa: PLC0414

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; the rest came in as `extra`."""

OURS = ("router", "controller", "workers", "kvtransfer", "deploy")
"""Packages whose loggers keep a level of their own."""


class JsonLines(logging.Formatter):
    """One object a line: `at` (UTC), `level`, `logger`, `message`, then the record's `extra`."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"
    converter = time.gmtime  # type: ignore[assignment]  # As the documentation has it.

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {k: v for k, v in vars(record).items() if k not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """For a process's start: INFO and above, as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level="INFO", handlers=[handler])
    # The root's level is not ours for long: vLLM's front has imported what sets it to ERROR.
    for name in OURS:
        logging.getLogger(name).setLevel("INFO")
