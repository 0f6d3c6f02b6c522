"""How a checked request becomes an answer: release, route, generation, and the failures on the way."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import cast

from fastapi.responses import Response, StreamingResponse
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

from gradientspace_ray.registry import AUTO, UnknownModelError
from gradientspace_ray.releases import Release, listed, pick, resolve
from gradientspace_ray.serving.answering import (
    ATTEMPTS,
    REPLICA_LOST,
    Ask,
    Begun,
    Stream,
    begin,
    collect,
    merged,
    overloaded,
)
from gradientspace_ray.serving.api_errors import (
    ApiError,
    bad_request,
    rate_limited,
    server_error,
    unavailable,
    unknown_model,
)
from gradientspace_ray.serving.arguments import ServeArguments
from gradientspace_ray.serving.board import ReleaseBoard
from gradientspace_ray.serving.calls import CLIENT_LEFT, Call
from gradientspace_ray.serving.messages import (
    Choice,
    Generation,
    Message,
    Place,
    RouteRequest,
    RunChangedError,
    SickReplicaError,
    is_conversation,
)
from gradientspace_ray.serving.openai_answers import answer_to, as_json
from gradientspace_ray.serving.openai_parsing import RequestLimits, check_limits
from gradientspace_ray.serving.openai_requests import SamplingParameters
from gradientspace_ray.serving.openai_streams import HEADERS, MEDIA_TYPE, AnswerStream, error_event
from gradientspace_ray.serving.routes import FORCED, Route

FAILURES = (RayError, RayServeException, RunChangedError, SickReplicaError)
logger = logging.getLogger("ray.serve")


class RequestHandler:
    """Answers requests out of the router's and the experts' deployments."""

    def __init__(
        self, board: ReleaseBoard, router: DeploymentHandle, experts: DeploymentHandle, arguments: ServeArguments
    ) -> None:
        self._board = board
        self._router = router
        self._experts = experts
        # One handle for each adapter, made once.
        self._handles: dict[str, DeploymentHandle] = {}
        self._start_timeout_s = arguments.start_timeout_s
        self._limits = RequestLimits(max_tokens=arguments.max_tokens, max_choices=arguments.max_choices)

    async def answer(self, call: Call, request: SamplingParameters) -> Response:
        """The HTTP answer to a request.

        Raises:
            ApiError: any that is not 200.
        """
        try:
            return await self._answer(call, request)
        except FAILURES as error:
            raise as_api_error(error) from error

    async def _answer(self, call: Call, request: SamplingParameters) -> Response:
        check_limits(request, self._limits)
        route = await self._route(call, request)
        call.routed(route)
        answer = answer_to(request, route.model, route.fingerprint, route.explanation if request.explains else None)
        asks = [self._ask(route, request, choice) for choice in range(request.choices)]
        if request.streams:
            begun = await begin(asks, self._start_timeout_s)
            for index, one in enumerate(begun):
                call.first(index, one)
            return EventStream(_events(call, AnswerStream(answer, request), begun), begun, call, route.headers)
        choices = await collect(asks, self._start_timeout_s, call.first)
        for index, choice in enumerate(choices):
            call.add(index, choice.piece)
        body = answer.whole([one.piece for one in choices], [one.started.prompt_tokens for one in choices])
        return Response(as_json(body), media_type="application/json", headers=route.headers)

    async def _route(self, call: Call, request: SamplingParameters) -> Route:
        state = self._board.releases
        messages = _conversation(request)
        opening = _opening(messages) if messages else str(request.prompts[0])
        release = pick(state, f"{call.ticket.key.name if call.ticket.key else ''}\n{opening}")
        if request.model != AUTO:
            try:
                adapter = resolve(state, release, request.model)
            except UnknownModelError as error:
                raise unknown_model(request.model, [model.id for model in listed(state)]) from error
            return Route(release.id, self._board.place(adapter), FORCED)
        if messages is None:
            message = "the model auto routes one text or conversation at a time; name a model for lists and token ids"
            raise bad_request(message, param=request.prompt_field)
        asked = time.perf_counter()
        router = self._board.router(release)
        choice = await self._choice(RouteRequest(router, messages))
        router_ms = (time.perf_counter() - asked) * 1000
        return self._routed(release, choice, router_ms)

    async def _choice(self, request: RouteRequest) -> Choice:
        """Ask the router, and another replica of it where one dies: a question leaves nothing behind.

        Raises:
            ApiError: there is no answer in time.
        """

        async def ask() -> Choice:
            choice: Choice = await self._router.route.remote(request)
            return choice

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(REPLICA_LOST), stop=stop_after_attempt(ATTEMPTS), reraise=True
        )
        try:
            return await asyncio.wait_for(retrying(ask), self._start_timeout_s)
        except asyncio.TimeoutError as error:
            raise overloaded(self._start_timeout_s) from error

    def _routed(self, release: Release, choice: Choice, router_ms: float) -> Route:
        registry = release.registry
        second = choice.second_best if choice.second_best in {expert.name for expert in registry.experts} else None
        return Route(
            release.id,
            self._board.place(registry.resolve(choice.expert or registry.generalist.name)),
            choice.reason,
            confidence=choice.confidence,
            router_ms=router_ms,
            second_best=second,
            prefetch=self._board.place(registry.resolve(second)) if second else None,
            probabilities=choice.probabilities,
        )

    def _ask(self, route: Route, request: SamplingParameters, choice: int) -> Ask:
        prompt = request.prompts[choice // request.choices_per_prompt]
        sampling = request.sampling(self._limits.max_tokens, choice)
        generation = Generation(prompt, sampling, route.adapter, route.prefetch)
        handle = self._handle(route.adapter)
        return lambda: cast(Stream, handle.generate.remote(generation))

    def _handle(self, place: Place | None) -> DeploymentHandle:
        """The experts; Serve sends an adapter's requests to a replica that holds it.

        The adapter comes from a registry: an id that Serve cannot load would cost another adapter its place.
        """
        model_id = place.id if place else ""
        if model_id not in self._handles:
            self._handles[model_id] = self._experts.options(stream=True, multiplexed_model_id=model_id)
        return self._handles[model_id]


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, and even if it never begins, the generation ends with it."""

    def __init__(self, events: AsyncIterator[bytes], begun: list[Begun], call: Call, headers: dict[str, str]) -> None:
        super().__init__(events, media_type=MEDIA_TYPE, headers=HEADERS | headers)
        self._begun, self._call = begun, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events (ASGI)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._begun:
                answer.rest.cancel()
            self._call.end(CLIENT_LEFT)


async def _events(call: Call, stream: AnswerStream, begun: list[Begun]) -> AsyncIterator[bytes]:
    for index, answer in enumerate(begun):
        if opening := stream.start(index, answer.started.prompt_tokens):
            yield opening
    try:
        async for index, piece in merged(begun):
            call.add(index, piece)
            if events := stream.add(index, piece):
                yield events
    except Exception as failure:
        error = as_api_error(failure)
        call.end(error.status, error.code)
        yield error_event(error)
        if not isinstance(failure, FAILURES):
            raise
        return
    yield stream.end()
    call.end(200)


def _conversation(request: SamplingParameters) -> list[Message] | None:
    """What the router reads: the conversation, or a single text as a user's message; None for anything else."""
    if len(request.prompts) != 1:
        return None
    prompt = request.prompts[0]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return prompt if is_conversation(prompt) else None


def _opening(messages: list[Message]) -> str:
    """What stays the same through a conversation: its first message of a user."""
    return next((message["content"] for message in messages if message["role"] == "user"), "")


def as_api_error(error: Exception) -> ApiError:
    """What a client learns about a failure inside; the rest goes to the log."""
    if isinstance(error, BackPressureError):
        return rate_limited("too many requests wait; try again later", 1.0)
    logger.error("a request failed", exc_info=error)
    if isinstance(error, RunChangedError):
        message = "what this model is made of is no longer there; the endpoint's owner must release it again"
        return unavailable(message, None, code="run_changed")
    if isinstance(error, RayActorError | RayServeException | SickReplicaError):
        return unavailable("a part of the endpoint was lost; try again", 1.0, code="replica_lost")
    return server_error()
