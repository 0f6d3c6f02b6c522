"""The OpenAI chat completions contract: requests, answers, server-sent events and errors.

Follows https://platform.openai.com/docs/api-reference/chat and what the `openai` client does. A parameter that
would change the answer and that this server does not implement is refused, never ignored.
"""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

DONE = "data: [DONE]\n\n"
# Parameter -> values that ask for nothing. Any other value is refused.
NOT_SERVED: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_k": (None, 0, -1),
    "top_logprobs": (None, 0),
    "web_search_options": (None,),
}
# Fields of a message that are refused unless empty.
NOT_SERVED_IN_MESSAGES = ("audio", "function_call", "tool_calls")


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the error.

        Args:
            status: HTTP status.
            message: for people; one line that says what to change.
            code: for programs, such as `model_not_found`.
            param: the request's field that is to blame.
            kind: OpenAI's `type`.
            headers: further headers of the answer.
        """
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def server_error(message: str = "the server failed to answer; try again") -> ApiError:
    """A failure that is not the client's."""
    return ApiError(500, message, kind="server_error", code="internal_error")


class TextPart(BaseModel):
    """A part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


def _as_text(content: Any) -> Any:
    if isinstance(content, list):
        return "".join(TextPart.model_validate(part).text for part in content)
    return content


class ChatMessage(BaseModel):
    """One message; what is not declared (such as `name`) is accepted and not used."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: bool = False


def _as_stops(stop: Any) -> Any:
    return () if stop is None else (stop,) if isinstance(stop, str) else stop


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions, without what `NOT_SERVED` lists."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=4), BeforeValidator(_as_stops)
    ] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages as training examples have them: a developer's message is a system message."""
        return [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in self.messages
        ]

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


def parse_chat_request(body: bytes) -> ChatRequest:
    """Check a request's body.

    Raises:
        ApiError: 400, with the field to blame.
    """
    try:
        tree = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(tree).__name__}")
    for name, neutral in NOT_SERVED.items():
        if tree.get(name) not in neutral:
            _refuse(name)
    try:
        request = ChatRequest.model_validate(tree)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        param = _path(detail["loc"])
        raise ApiError(400, f"{param}: {detail['msg'].lower()}", param=param) from error
    for index, message in enumerate(request.messages):
        for name in NOT_SERVED_IN_MESSAGES:
            if (message.model_extra or {}).get(name):
                _refuse(f"messages[{index}].{name}")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed when stream is true", param="stream_options")
    return request


def _refuse(param: str) -> NoReturn:
    raise ApiError(
        400, f"{param} is not supported by this server; leave it out", param=param, code="unsupported_parameter"
    )


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content")` -> `messages[0].content`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


@dataclass(frozen=True)
class Answer:
    """What stays the same through one answer, and its JSON."""

    model: str
    """The model that answers, which is not always the one that was asked for."""
    fingerprint: str
    """Changes when the model's weights do."""
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def completion(self, text: str, finish_reason: str, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The whole answer at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return self._frame("chat.completion", [choice]) | {"usage": usage(prompt_tokens, completion_tokens)}

    def chunk(
        self, delta: dict[str, str], finish_reason: str | None = None, with_usage: bool = False
    ) -> dict[str, Any]:
        """One part of a stream; when a usage chunk will come, every other one says so with a null."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._frame("chat.completion.chunk", [choice]) | ({"usage": None} if with_usage else {})

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for token counts."""
        return self._frame("chat.completion.chunk", []) | {"usage": usage(prompt_tokens, completion_tokens)}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts of one answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(payload: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"


def model_object(model_id: str, created: int, **details: Any) -> dict[str, Any]:
    """One entry of the list of models."""
    return {"id": model_id, "object": "model", "created": created, "owned_by": "gradientspace", **details}
