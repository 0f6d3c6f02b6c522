"""Errors of the HTTP interface, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

Types and codes are those of https://platform.openai.com/docs/guides/error-codes. The `openai` client tries 408, 409,
429 and 5xx again, after the time that `retry-after-ms` or `retry-after` names, unless `x-should-retry` is `false`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

_LONGEST_QUOTE = 100


class ApiError(Exception):
    """An answer other than 200."""

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
        self.code = code
        self.headers = dict(headers or {})
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def quote(text: str) -> str:
    """A client's own words for an error message: on one line, printable and short."""
    short = text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "..."
    return "".join(character if character.isprintable() else "?" for character in short)


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def unauthorised(message: str = "no valid API key; send the header Authorization: Bearer KEY") -> ApiError:
    """401: no key, or a wrong one."""
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def forbidden(message: str) -> ApiError:
    """403: the key is known and may not do this."""
    return ApiError(403, message, code="insufficient_permissions")


def unknown_model(model_id: str, known: Iterable[str]) -> ApiError:
    """404: a model that is not served."""
    message = f"the model '{quote(model_id)}' does not exist; models are: {', '.join(known)}"
    return ApiError(404, message, code="model_not_found", param="model")


def unknown_path(method: str, path: str) -> ApiError:
    """404: nothing is served there."""
    return ApiError(404, f"unknown address {quote(method)} {quote(path)}", code="unknown_url")


def method_not_allowed(method: str, path: str, allowed: Iterable[str]) -> ApiError:
    """405: the path takes other methods."""
    methods = ", ".join(sorted(allowed))
    message = f"{quote(method)} is not allowed for {quote(path)}; use {methods}"
    return ApiError(405, message, code="method_not_supported", headers={"allow": methods})


def too_large(most_bytes: int) -> ApiError:
    """413: the body is longer than the server reads."""
    return ApiError(413, f"the body has more than {most_bytes} bytes; send less", code="request_too_large")


def rate_limited(message: str, retry_after_s: float, *, kind: str = "requests") -> ApiError:
    """429: too much at once, of what `kind` names: `requests` or `tokens`."""
    return ApiError(429, message, kind=kind, code="rate_limit_exceeded", headers=_retry_headers(retry_after_s))


def server_error(message: str = "the server failed to answer; try again", *, retry: bool = True) -> ApiError:
    """500: a failure that is not the client's; `retry` says whether trying again can help."""
    headers = {} if retry else {"x-should-retry": "false"}
    return ApiError(500, message, kind="server_error", code="internal_error", headers=headers)


def unavailable(message: str, retry_after_s: float | None, *, code: str = "service_unavailable") -> ApiError:
    """503: the server cannot take the request now; `retry_after_s` None says that trying again cannot help."""
    headers = {"x-should-retry": "false"} if retry_after_s is None else _retry_headers(retry_after_s)
    return ApiError(503, message, kind="server_error", code=code, headers=headers)


def _retry_headers(retry_after_s: float) -> dict[str, str]:
    """`retry-after` has whole seconds (RFC 9110); the `openai` client prefers its own header in milliseconds."""
    milliseconds = max(1, math.ceil(retry_after_s * 1000))
    return {"retry-after": str(math.ceil(milliseconds / 1000)), "retry-after-ms": str(milliseconds)}
