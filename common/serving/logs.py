"""The server's log: one JSON object a line, on standard error."""

import datetime
import json
import logging
import sys


class JsonLines(logging.Formatter):
    """Message and level, and what `extra={"fields": {...}}` holds, such as the request's id."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up() -> None:
    """For our log and the libraries'; uvicorn's own line for each request is off, since ours says more."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    levels = {"folovllm.serving": logging.INFO, "uvicorn": logging.WARNING, "opentelemetry": logging.WARNING}
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)
