"""An answer as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from collections.abc import Mapping
from typing import Any

from gradientspace_ray.engine.contract import Piece
from gradientspace_ray.serving.api_errors import ApiError
from gradientspace_ray.serving.openai_answers import Answer, Counts, TextOffsets, as_json
from gradientspace_ray.serving.openai_requests import SamplingParameters

MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_DONE = b"data: [DONE]\n\n"
# Characters that end a line for some clients of event streams, though the standard says they do not.
_LINE_ENDS = {char.encode(): f"\\u{ord(char):04x}".encode() for char in "\x85\u2028\u2029"}


def event(payload: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    data = as_json(payload)
    for character, escape in _LINE_ENDS.items():
        data = data.replace(character, escape)
    return b"data: " + data + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """A failure after the stream has begun, when its status is 200 already; nothing follows, not even `[DONE]`."""
    return event(error.body)


class AnswerStream:
    """Turns what happens to the choices, in any order among them, into events: `start`, `add` each piece, `end`.

    Each call returns the bytes to send, which may be none.
    """

    def __init__(self, answer: Answer, request: SamplingParameters) -> None:
        """Begin.

        Args:
            answer: what stays the same in all chunks.
            request: says what token counts the stream is to have.
        """
        self._answer = answer
        self._includes_usage = request.includes_usage
        self._counts_continuously = request.counts_continuously
        self._counts = Counts(answer.choices_per_prompt)
        self._offsets: dict[int, TextOffsets] = {}
        self._extra = answer.extra

    def start(self, choice: int, prompt_tokens: int) -> bytes:
        """A choice's generation begins: for a chat, the chunk that says who speaks."""
        self._counts.prompt[choice] = prompt_tokens
        self._offsets[choice] = TextOffsets()
        return b"" if self._answer.opening is None else self._chunk(choice, self._answer.opening)

    def add(self, choice: int, piece: Piece) -> bytes:
        """The next piece of a choice that has started; the last one gets a chunk of its own for its reason."""
        self._counts.add(choice, piece)
        events = b""
        if piece.text or (piece.logprobs and self._answer.with_logprobs):
            logprobs = None
            if piece.logprobs and self._answer.with_logprobs:
                logprobs = self._answer.logprobs(piece.logprobs, self._offsets[choice])
            events = self._chunk(choice, self._answer.delta(piece.text), logprobs)
        if piece.finish_reason is not None:
            events += self._chunk(choice, self._answer.nothing, None, piece.finish_reason)
        return events

    def end(self) -> bytes:
        """All choices have ended: the token counts, if they were asked for, and the mark of a stream that is whole."""
        if not self._includes_usage:
            return _DONE
        return event(self._answer.frame(self._answer.chunk_object, []) | {"usage": self._counts.body}) + _DONE

    def _chunk(
        self,
        choice: int,
        content: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        body = {"index": choice, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._answer.frame(self._answer.chunk_object, [body]) | self._extra
        self._extra = {}
        if self._includes_usage:  # when a chunk of counts will come, every other one says so with a null
            chunk["usage"] = self._counts.body if self._counts_continuously else None
        return event(chunk)
