"""The request log: one line of JSON for each request, on the logger `gradientspace.requests`.

What a client wrote, and what it got, is left out unless asked for.
"""

import json
import logging
import math
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any, TextIO

LOGGER = "gradientspace.requests"
TEXTS = ("prompt", "answer")
# Of what a client sends as a model's name or the request's id, which may be anything.
LONGEST_NAME = 200
logger = logging.getLogger(LOGGER)


@dataclass
class RequestRecord:
    """What there is to say about one request; the ingress fills it in as it learns."""

    request_id: str
    path: str = ""
    """Of the URL, without what follows a `?`."""
    key: str | None = None
    """Name of the API key."""
    model: str | None = None
    """As the request named it."""
    expert: str | None = None
    """`name@digest` or `base`: who answered."""
    release: str | None = None
    reason: str | None = None
    """`forced`, or the router's."""
    confidence: float | None = None
    status: int | None = None
    """Of the HTTP answer; 499 where the client left first."""
    error: str | None = None
    """OpenAI's `code`, or the kind of the failure."""
    stream: bool = False
    disconnected: bool = False
    """The client left before the answer's end."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    """Tokens of the prompt out of the prefix cache."""
    router_ms: float | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    """From the request's arrival to its first token."""
    total_ms: float | None = None
    prompt: Any = field(default=None, repr=False)
    """The request's messages or prompt; written only where texts are asked for."""
    answer: Any = field(default=None, repr=False)


def configure(stream: TextIO | None = None) -> None:
    """Have requests logged to `stream`, stderr by default, which Ray keeps in the replica's log. Again replaces it."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_OneLine())
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    # The line is complete; a root logger would write it again, in its own format.
    logger.propagate = False


def write(record: RequestRecord, *, with_texts: bool = False) -> None:
    """Log a request that is over. What cannot be written is reported by `logging` on stderr, never raised.

    Args:
        record: the request.
        with_texts: also its prompt and answer.
    """
    logger.info("%s", record.request_id, extra={"request": record, "with_texts": with_texts})


class _OneLine(logging.Formatter):
    """JSON in ASCII, so that neither a newline nor a lone surrogate in a name breaks the line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = asdict(record.__dict__["request"])
        if not record.__dict__["with_texts"]:
            for name in TEXTS:
                del fields[name]
        for name in ("request_id", "model"):
            if isinstance(fields[name], str):
                fields[name] = fields[name][:LONGEST_NAME]
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        return json.dumps({"time": time} | _plain(fields), default=str)


def _plain(value: Any) -> Any:
    """Milliseconds and shares with what digits they deserve; JSON has no NaN."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None
