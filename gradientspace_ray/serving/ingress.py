"""The ingress deployment: OpenAI's HTTP interface in front of the router and the experts."""

import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.exceptions import HTTPException

from gradientspace_ray.registry import AUTO, BASE, Adapter, Registry, UnknownModelError
from gradientspace_ray.serving.messages import Choice, Delta, Generation, Refused, RunChangedError, Started
from gradientspace_ray.serving.openai_api import (
    DONE,
    Answer,
    ApiError,
    ChatRequest,
    event,
    model_object,
    parse_chat_request,
    server_error,
)

MAX_BODY_BYTES = 2**20
MAX_ONGOING_REQUESTS = 1000
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
Answers = DeploymentResponseGenerator[Any]
FAILURES = (RayError, RayServeException, RunChangedError)
logger = logging.getLogger("ray.serve")
app = FastAPI(title="gradientspace", docs_url=None, redoc_url=None, openapi_url=None)


@dataclass(frozen=True)
class Route:
    """Who answers a request, and why."""

    adapter: Adapter | None
    """None is the base model."""
    confidence: float
    reason: str
    """`routed`, `low_confidence` (the generalist answers) or `forced` (the request named the model)."""
    router_ms: float

    @property
    def model(self) -> str:
        """`name@digest`, or `base`."""
        return self.adapter.id if self.adapter else BASE

    @property
    def headers(self) -> dict[str, str]:
        """The decision, for the answer's headers."""
        return {
            "x-gradientspace-expert": self.adapter.name if self.adapter else BASE,
            "x-gradientspace-confidence": f"{self.confidence:.4f}",
            "x-gradientspace-reason": self.reason,
            "x-gradientspace-router-ms": f"{self.router_ms:.1f}",
        }


@app.exception_handler(ApiError)
async def _explain(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


@app.exception_handler(HTTPException)
async def _explain_http(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
    return await _explain(request, ApiError(error.status_code, message, headers=error.headers))


@app.exception_handler(Exception)
async def _explain_failure(request: Request, error: Exception) -> Response:
    return await _explain(request, server_error())


async def _read_body(request: Request) -> bytes:
    too_large = ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes; send less", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


def _generation(chat: ChatRequest) -> Generation:
    return Generation(
        messages=chat.conversation,
        max_tokens=chat.token_limit,
        temperature=1.0 if chat.temperature is None else chat.temperature,
        top_p=1.0 if chat.top_p is None else chat.top_p,
        seed=chat.seed,
        stop=chat.stop,
    )


async def _peek(answers: Answers) -> tuple[Started, Delta]:
    """Wait for the first piece, because no error can change the status once the answer has begun.

    Raises:
        ApiError: the request is refused.
    """
    started = await anext(answers)
    if isinstance(started, Refused):
        raise ApiError(400, started.message, code=started.code, param=started.param)
    return started, await anext(answers)


async def _rejoin(first: Delta, answers: Answers) -> AsyncIterator[Delta]:
    """The whole answer again. Leaving it early, as a client does that hangs up, ends the generation."""
    try:
        yield first
        async for delta in answers:
            yield delta
    finally:
        answers.cancel()


async def _events(
    chat: ChatRequest, answer: Answer, started: Started, deltas: AsyncIterator[Delta]
) -> AsyncIterator[str]:
    with_usage = chat.includes_usage
    yield event(answer.chunk({"role": "assistant", "content": ""}, with_usage=with_usage))
    completion_tokens = 0
    try:
        async for delta in deltas:
            completion_tokens = delta.completion_tokens
            if delta.text:
                yield event(answer.chunk({"content": delta.text}, with_usage=with_usage))
            if delta.finish_reason:
                yield event(answer.chunk({}, delta.finish_reason, with_usage=with_usage))
    except FAILURES as error:
        yield event(_as_api_error(error).body)
        return
    if with_usage:
        yield event(answer.usage_chunk(started.prompt_tokens, completion_tokens))
    yield DONE


def _as_api_error(error: Exception) -> ApiError:
    """What a client learns about a failure inside; the rest goes to the log."""
    if isinstance(error, BackPressureError):
        retry = {"retry-after": "1"}
        return ApiError(429, "too many requests wait", kind="rate_limit_error", code="overloaded", headers=retry)
    logger.error("a request failed", exc_info=error)
    if isinstance(error, RunChangedError):
        # The client library would try again, which cannot help.
        message = "the run has changed since this endpoint was started; it must be started again"
        return ApiError(503, message, kind="server_error", code="run_changed", headers={"x-should-retry": "false"})
    return server_error()


# Serve copies the app, with the globals that its routes use, at this point: everything else must be defined above.
@serve.ingress(app)
class Ingress:
    """Checks a request against the contract and the registry, has it routed, and passes the answer on.

    Serve's proxy puts `x-request-id` on every answer.
    """

    def __init__(
        self, registry: Registry, router: DeploymentHandle, experts: DeploymentHandle, api_key_sha256: str | None
    ) -> None:
        """Keep what requests need.

        Args:
            registry: what may be asked for.
            router: handle of `PromptRouter`.
            experts: handle of `Experts`.
            api_key_sha256: digest of the key that clients must send; None asks for none.
        """
        self._registry = registry
        self._router = router
        self._experts = experts
        # One handle for each adapter: making one starts a connection to the controller.
        self._handles: dict[str, DeploymentHandle] = {}
        self._api_key_sha256 = api_key_sha256
        self._started = int(time.time())

    @app.get("/health")
    async def health(self) -> Response:
        """Whether the endpoint takes requests; needs no API key."""
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        """What may be asked for: `auto`, the base model, the generalist and the experts."""
        self._authorise(request)
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._registry.model_ids()]})

    @app.get("/v1/models/{model_id:path}")
    async def model(self, request: Request, model_id: str) -> Response:
        """One model, by name or `name@digest`."""
        self._authorise(request)
        return JSONResponse(self._model(model_id))

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation: `model` is `auto`, or names who shall answer."""
        self._authorise(request)
        chat = parse_chat_request(await _read_body(request))
        try:
            route = await self._choose(chat)
            answers = cast(Answers, self._handle(route.adapter).generate.remote(_generation(chat)))
            started, first = await _peek(answers)
        except FAILURES as error:
            raise _as_api_error(error) from error
        answer = Answer(route.model, fingerprint=f"fp_{route.adapter.digest if route.adapter else BASE}")
        deltas = _rejoin(first, answers)
        if chat.stream:
            events = _events(chat, answer, started, deltas)
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS | route.headers)
        text, last = "", first
        try:
            async for last in deltas:
                text += last.text
        except FAILURES as error:
            raise _as_api_error(error) from error
        reason = last.finish_reason or "stop"
        body = answer.completion(text, reason, started.prompt_tokens, last.completion_tokens)
        return JSONResponse(body, headers=route.headers)

    def _authorise(self, request: Request) -> None:
        if self._api_key_sha256 is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._api_key_sha256):
            message = "no valid API key; send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _resolve(self, model_id: str) -> Adapter | None:
        try:
            return self._registry.resolve(model_id)
        except UnknownModelError as error:
            names = ", ".join(self._registry.model_ids())
            message = f"the model {model_id!r} does not exist; models are: {names}"
            raise ApiError(404, message, code="model_not_found", param="model") from error

    def _model(self, model_id: str) -> dict[str, Any]:
        adapter = None if model_id == AUTO else self._resolve(model_id)
        details: dict[str, Any] = {"root": self._registry.base_model}
        if adapter is not None:
            details = {"root": adapter.id, "parent": self._registry.base_model}
            details["metadata"] = {"title": adapter.title, "examples": adapter.examples}
        return model_object(model_id, self._started, **details)

    async def _choose(self, chat: ChatRequest) -> Route:
        if chat.model != AUTO:
            return Route(self._resolve(chat.model), 1.0, "forced", 0.0)
        asked = time.perf_counter()
        choice: Choice = await self._router.route.remote(chat.conversation)
        try:
            adapter = self._registry.resolve(choice.expert or self._registry.generalist.name)
        except UnknownModelError as error:  # a replica of the router that started after the run had changed
            raise RunChangedError(f"the router picked {choice.expert}, which the registry does not list") from error
        return Route(adapter, choice.confidence, choice.reason, (time.perf_counter() - asked) * 1000)

    def _handle(self, adapter: Adapter | None) -> DeploymentHandle:
        """The experts; Serve sends an adapter's requests to a replica that holds it.

        The adapter comes from the registry: an id that Serve cannot load would cost another adapter its place.
        """
        model_id = adapter.id if adapter else ""
        if model_id not in self._handles:
            self._handles[model_id] = self._experts.options(stream=True, multiplexed_model_id=model_id)
        return self._handles[model_id]
