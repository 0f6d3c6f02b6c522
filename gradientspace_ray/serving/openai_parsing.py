"""From the bytes of a body to a request, or to an error that names the field to blame."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import jiter
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gradientspace_ray.serving.api_errors import ApiError, bad_request, quote
from gradientspace_ray.serving.messages import Prompt
from gradientspace_ray.serving.openai_requests import ChatRequest, CompletionRequest, SamplingParameters

Request = TypeVar("Request", bound=SamplingParameters)
# pydantic's type of an error -> OpenAI's code; `_type` at the end of the former is `invalid_type`.
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "string_too_long": "string_above_max_length",
    "string_too_short": "string_below_min_length",
}
MAX_UNKNOWN = 32
"""Names that nobody knows; each costs a comparison with every name that is known."""
LONGEST_NAME = 64
LIKENESS = 0.8
"""Of `difflib`: a name as like as this to a known one is that name, misspelt."""
_RANGES = {"greater_than_equal": "below_min_value", "less_than_equal": "above_max_value"}
_LENGTHS = {"too_long": "above_max_length", "too_short": "below_min_length"}


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for at most."""

    max_tokens: int
    """Of each answer."""
    max_choices: int
    """Answers: prompts times `n`."""
    max_prompt_characters: int = 2**18
    """Of each prompt; a token id counts as one. The context's length in tokens is the engine's to check."""


def parse_chat_request(body: bytes) -> ChatRequest:
    """Check the body of a chat completion request.

    Raises:
        ApiError: 400, with the field to blame.
    """
    request = _parse(ChatRequest, body)
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
    return request


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Check the body of a completion request.

    Raises:
        ApiError: 400, with the field to blame.
    """
    return _parse(CompletionRequest, body)


def check_limits(request: SamplingParameters, limits: RequestLimits) -> None:
    """Refuse what is too much for this server.

    Raises:
        ApiError: 400, with the field to blame.
    """
    request.token_limit(limits.max_tokens)
    prompts = request.prompts
    if len(prompts) > limits.max_choices:
        message = f"{request.prompt_field} should have at most {limits.max_choices} items on this server"
        raise bad_request(message, param=request.prompt_field, code="array_above_max_length")
    if request.choices > limits.max_choices:
        most = limits.max_choices // len(prompts)
        message = f"n should be at most {most} on this server for {len(prompts)} prompt(s)"
        raise bad_request(message, param="n", code="integer_above_max_value")
    for index, prompt in enumerate(prompts):
        if _size(prompt) > limits.max_prompt_characters:
            param = request.prompt_field + (f"[{index}]" if len(prompts) > 1 else "")
            message = f"{param} should have at most {limits.max_prompt_characters} characters or tokens on this server"
            raise bad_request(message, param=param, code="context_length_exceeded")


def _size(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(part["content"]) if isinstance(part, dict) else 1 for part in prompt)


def _parse(kind: type[Request], body: bytes) -> Request:
    try:
        # pydantic's own parser, for its `catch_duplicate_keys`. It refuses lone surrogates and nesting without end.
        tree = jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON ({quote(str(error))})") from error
    if not isinstance(tree, dict):
        raise bad_request("the body should be a JSON object")
    _refuse_misspelt(tree.keys() - kind.model_fields.keys(), kind)
    try:
        request = kind.model_validate(tree)
    except ValidationError as error:
        raise _as_api_error(error.errors(include_url=False)[0], tree) from error
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is only allowed when stream is true", param="stream_options")
    return request


def _refuse_misspelt(unknown: Iterable[str], kind: type[SamplingParameters]) -> None:
    names = sorted(unknown)
    if len(names) > MAX_UNKNOWN:
        raise bad_request(f"the body has {len(names)} unknown parameters; leave them out", code="unknown_parameter")
    served = [name for name, field in kind.model_fields.items() if field.annotation is not Any]
    # What is accepted whatever it holds, which has no check of its own, may as well be misspelt.
    unserved = [name for name, field in kind.model_fields.items() if field.annotation is Any and field.metadata]
    for name in names:
        if len(name) > LONGEST_NAME:
            continue
        word = name.lower()
        if near := difflib.get_close_matches(word, served, 1, LIKENESS) or difflib.get_close_matches(
            word, unserved, 1, LIKENESS
        ):
            param = quote(name)
            message = f"{param} is not known; did you mean {near[0]}?"
            raise bad_request(message, param=param, code="unknown_parameter")


def _as_api_error(detail: ErrorDetails, tree: dict[str, Any]) -> ApiError:
    param = quote(_path(detail["loc"], tree))
    return bad_request(f"{param} {_explanation(detail)}", param=param, code=_code(detail))


def _path(location: tuple[int | str, ...], tree: Any) -> str:
    """`("messages", 0, "content", "str")` -> `messages[0].content`: without pydantic's names of a union's members."""
    path = ""
    for part in location:
        if isinstance(part, str) and isinstance(tree, dict):
            path += f".{part}"
            tree = tree.get(part)
        elif isinstance(part, int) and isinstance(tree, list):
            path += f"[{part}]"
            tree = tree[part]
    return path.removeprefix(".")


def _code(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _RANGES:
        limit = context.get("le", context.get("ge"))
        return f"{'decimal' if isinstance(limit, float) else 'integer'}_{_RANGES[kind]}"
    if kind in _LENGTHS:
        return f"{'object' if context['field_type'] == 'Dictionary' else 'array'}_{_LENGTHS[kind]}"
    return _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")


def _explanation(detail: ErrorDetails) -> str:
    """What pydantic says, without Python's words: `Input should be a valid list` -> `should be a valid array`."""
    kind, message = detail["type"], detail["msg"]
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        return "is not known; leave it out"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "should be an object"
    if kind == "string_pattern_mismatch":
        return "should be named by a token id" if detail["loc"][-1] == "[key]" else "should not hold the character NUL"
    _, should, rest = message.partition("should ")
    return f"{should}{rest}".partition(" after validation")[0].replace("valid list", "valid array") or message
