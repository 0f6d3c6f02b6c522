"""The ingress deployment: OpenAI's HTTP interface in front of the router and the experts, and the admin's routes."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gradientspace_ray.publishing import stage_run
from gradientspace_ray.registry import Registry
from gradientspace_ray.releases import (
    Listed,
    Release,
    ReleaseConflictError,
    ReleaseError,
    Releases,
    commit,
    listed,
    promote,
    roll_back,
)
from gradientspace_ray.serving import playground, request_log
from gradientspace_ray.serving.api_errors import (
    ApiError,
    bad_request,
    forbidden,
    method_not_allowed,
    quote,
    rate_limited,
    server_error,
    too_large,
    unauthorised,
    unknown_model,
    unknown_path,
)
from gradientspace_ray.serving.arguments import ServeArguments
from gradientspace_ray.serving.board import ReleaseBoard
from gradientspace_ray.serving.calls import CLIENT_LEFT, Call
from gradientspace_ray.serving.exposition import CONTENT_TYPE, exposition
from gradientspace_ray.serving.exposure import GIVE_KEYS, is_from_here, listening_host, refuse_exposure
from gradientspace_ray.serving.handling import FAILURES, EventStream, RequestHandler, as_api_error
from gradientspace_ray.serving.keys import Admission, Key, Keys, Ticket, TooManyError, UnauthorisedError
from gradientspace_ray.serving.metrics import IngressMetrics
from gradientspace_ray.serving.openai_answers import model_list, model_object
from gradientspace_ray.serving.openai_parsing import parse_chat_request, parse_completion_request
from gradientspace_ray.serving.openai_requests import SamplingParameters
from gradientspace_ray.serving.openapi import openapi_document
from gradientspace_ray.serving.request_log import RequestRecord

# For replicas to hear of a release, for them to load it, and for a body, whose request has its place meanwhile.
ANNOUNCE_S, PREPARE_S, BODY_S = 30.0, 300.0, 60.0
JSON = "application/json"
OPENAPI = openapi_document(version("gradientspace-ray"))
Who = TypeVar("Who")
logger = logging.getLogger("ray.serve")
# No redirects: one would name the host that the client says it asks.
app = FastAPI(title="gradientspace", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)


class PublishRequest(BaseModel):
    """Body of POST /admin/releases."""

    model_config = ConfigDict(extra="forbid", strict=True)
    run_dir: str
    canary_share: float | None = None


@app.exception_handler(ApiError)
async def _explain(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


@app.exception_handler(HTTPException)
async def _explain_http(request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        return await _explain(request, unknown_path(request.method, request.url.path))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "").split(", ")
        return await _explain(request, method_not_allowed(request.method, request.url.path, allowed))
    return await _explain(request, ApiError(error.status_code, str(error.detail), headers=error.headers))


@app.exception_handler(ClientDisconnect)
async def _explain_to_nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_LEFT)


@app.exception_handler(Exception)
async def _explain_failure(request: Request, error: Exception) -> Response:
    return await _explain(request, server_error())


async def _read_body(request: Request, most_bytes: int, timeout_s: float = BODY_S) -> bytes:
    """The body, as JSON alone: what it is else, a page of any web site may send unasked, to a visitor's own machine."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != JSON:
        message = f"the body is {quote(kind) or 'of no type'}; send JSON, with the header Content-Type: {JSON}"
        raise ApiError(415, message, code="unsupported_media_type")
    try:
        return await asyncio.wait_for(_read_parts(request, most_bytes), timeout_s)
    except asyncio.TimeoutError as error:
        late = f"the body did not come within {timeout_s:g} s; send it again"
        raise ApiError(408, late, code="request_timeout") from error


async def _read_parts(request: Request, most_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most_bytes:
        raise too_large(most_bytes)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most_bytes:
            raise too_large(most_bytes)
    return bytes(body)


async def _announce() -> None:
    """Have all replicas of the ingress read the releases.

    One that dies meanwhile reads them when it starts again, one that does not answer at its next check of health.
    """
    handle = await asyncio.to_thread(serve.get_deployment_handle, "Ingress")  # it asks the controller, and waits
    try:
        answers = await handle.broadcast("refresh").results_async(timeout_s=ANNOUNCE_S, return_exceptions=True)
    except TimeoutError as error:
        answers = [error]
    for answer in answers:
        if isinstance(answer, BaseException):
            logger.warning("a replica has not read the changed releases yet", exc_info=answer)


@contextmanager
def _explained() -> Iterator[None]:
    """What an admin gets where releases cannot be read or changed."""
    try:
        yield
    except ReleaseConflictError as error:
        raise ApiError(409, str(error), code="release_conflict") from error
    except ReleaseError as error:
        raise bad_request(str(error), code="release_refused") from error
    except FAILURES as error:
        raise as_api_error(error) from error
    except OSError as error:
        logger.error("the releases cannot be read or written", exc_info=error)
        reason = error.strerror or "no reason given"
        raise server_error(f"the served run directory cannot be read or written ({reason})", retry=False) from error


def _state(state: Releases) -> Response:
    return Response(state.model_dump_json(), media_type=JSON)


# Serve copies the app, with the globals that its routes use, at this point: everything else must be defined above.
@serve.ingress(app)
class Ingress:
    """Checks who asks and how much, has requests answered, and changes releases.

    Serve's proxy puts `x-request-id` on every answer.
    """

    def __init__(
        self,
        registry: Registry,
        router: DeploymentHandle,
        experts: DeploymentHandle,
        keys: Keys,
        arguments: ServeArguments,
    ) -> None:
        """Keep what requests need.

        Args:
            registry: what the run directory held when the endpoint was started.
            router: handle of `PromptRouter`.
            experts: handle of `Experts`.
            keys: digests of the keys of clients and admins.
            arguments: of the application.

        Raises:
            ReleaseError: the releases cannot be read.
            ExposedError: other machines could ask without a key.
        """
        refuse_exposure(listening_host(), keys, arguments.allow_anonymous)
        self._arguments = arguments
        self._keys = keys
        self._admission = Admission(arguments.max_requests)
        self._board = ReleaseBoard(arguments.run_dir, registry)
        self._router, self._experts = router, experts
        self._handler = RequestHandler(self._board, router, experts, arguments)
        self._metrics = IngressMetrics()
        request_log.configure()
        self._started = int(time.time())
        self._rereading: asyncio.Task[None] | None = None

    @app.get("/")
    async def playground(self) -> Response:
        """A page to try the endpoint with."""
        return Response(playground.PAGE, headers=playground.HEADERS)

    @app.get("/health")
    async def health(self) -> Response:
        """Whether this process answers; needs no API key. Experts that are not there show in what requests get."""
        return JSONResponse({"status": "ok"})

    @app.get("/openapi.json")
    async def openapi(self) -> Response:
        """The description of this interface."""
        return JSONResponse(OPENAPI)

    @app.get("/metrics")
    async def metrics(self, request: Request) -> Response:
        """What Prometheus reads, with an admin's key where there is one."""
        if self._keys.admins:
            self._admin(request)
        else:
            self._client(request)
        return Response(await exposition(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        """What may be asked for: `auto`, the base model, the generalist and the experts."""
        self._client(request)
        return JSONResponse(model_list(self._model(entry) for entry in listed(self._board.releases)))

    @app.get("/v1/models/{model_id:path}")
    async def model(self, request: Request, model_id: str) -> Response:
        """One model, by name or `name@digest`."""
        self._client(request)
        known = {entry.id: entry for entry in listed(self._board.releases)}
        if model_id not in known:
            raise unknown_model(model_id, known)
        return JSONResponse(self._model(known[model_id]))

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation: `model` is `auto`, or names who shall answer."""
        return await self._answer(request, parse_chat_request)

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        return await self._answer(request, parse_completion_request)

    @app.get("/admin/releases")
    async def releases(self, request: Request) -> Response:
        """Which releases answer."""
        self._admin(request)
        with _explained():
            return _state(await asyncio.to_thread(self._board.refresh))

    @app.post("/admin/releases")
    async def publish(self, request: Request) -> Response:
        """Bring a run into the endpoint, for all requests or as a canary."""
        self._admin(request)
        try:
            wanted = PublishRequest.model_validate_json(await _read_body(request, self._arguments.max_body_bytes))
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            field = ".".join(map(str, detail["loc"])) or None
            raise bad_request(f"{field or 'the body'}: {detail['msg']}", param=field) from error
        return await self._change(lambda state: stage_run(self._board.run, state, wanted.run_dir, wanted.canary_share))

    @app.post("/admin/promote")
    async def promote(self, request: Request) -> Response:
        """Let the canary answer everything."""
        self._admin(request)
        return await self._change(promote)

    @app.post("/admin/rollback")
    async def rollback(self, request: Request) -> Response:
        """Withdraw the canary, or go back to the release before."""
        self._admin(request)
        return await self._change(roll_back)

    async def _change(self, change: Callable[[Releases], Releases]) -> Response:
        """Make, prepare, commit and announce a change of the releases; requests go on meanwhile.

        Of two changes at once the one committed first stays, so that a rollback waits for no publication.
        """
        with _explained():
            before = await asyncio.to_thread(self._board.refresh)
            after = await asyncio.to_thread(change, before)
            for release in (after.current, after.canary):
                if release is not None and release not in before.live:
                    await self._prepare(release)
            after = await asyncio.to_thread(commit, self._board.run, before, after)
        await self._reread()
        await _announce()
        return _state(after)

    async def _prepare(self, release: Release) -> None:
        """Load a release beside the others, in all replicas.

        Raises:
            ReleaseError: a replica cannot.
        """
        places = self._board.places(release)
        for handle, what in ((self._experts, places), (self._router, self._board.router(release))):
            try:
                found = await handle.broadcast("prepare", what).results_async(timeout_s=PREPARE_S)
            except DeploymentUnavailableError:  # no replica while nobody asks; the next one loads what it is asked for
                continue
            except TimeoutError as error:
                late = f"a replica has not loaded the release within {PREPARE_S:g} s"
                raise ReleaseError(f"{late}; try again, what is copied is kept") from error
            problems = [problem for replica in found for problem in replica]
            if problems:
                raise ReleaseError(problems[0])

    async def refresh(self) -> int:
        """Read the releases again; returns their revision."""
        state = await asyncio.to_thread(self._board.refresh)
        shares = {state.current.id: 1 - state.canary_share}
        self._metrics.released(shares | ({state.canary.id: state.canary_share} if state.canary else {}))
        return state.revision

    async def check_health(self) -> None:
        """A replica that missed a change of the releases reads it when Serve asks, every ten seconds.

        That is not waited for: a store that hangs takes no replica away, for another one could not even start.
        """
        if not self._rereading or self._rereading.done():
            self._rereading = asyncio.create_task(self._reread())

    async def _reread(self) -> None:
        """Read the releases again, or go on with what is known."""
        try:
            await self.refresh()
        except (ReleaseError, OSError) as error:
            logger.warning("the releases cannot be read; requests go on by those that are known", exc_info=error)

    async def _answer(self, request: Request, parse: Callable[[bytes], SamplingParameters]) -> Response:
        request_id, path = request.headers.get("x-request-id", ""), request.url.path
        ticket = self._admit(request, request_id, path)
        call = Call(request_id, path, ticket, self._metrics, self._arguments.log_prompts)
        try:
            call.request = parse(await _read_body(request, self._arguments.max_body_bytes))
            response = await self._handler.answer(call, call.request)
        except ApiError as error:
            call.end(error.status, error.code)
            raise
        except BaseException as error:
            call.end(CLIENT_LEFT if isinstance(error, asyncio.CancelledError | ClientDisconnect) else 500)
            raise
        if not isinstance(response, EventStream):
            call.end(200)
        return response

    def _admit(self, request: Request, request_id: str, path: str) -> Ticket:
        key = None
        try:
            key = self._client(request)
            return self._admission.admit(key)
        except ApiError as error:
            refused = error
        except TooManyError as error:
            self._metrics.rejected(error.limit)
            refused = rate_limited(str(error), error.retry_after_s)
        name = key.name if key else None
        request_log.write(RequestRecord(request_id, path=path, key=name, status=refused.status, error=refused.code))
        raise refused

    def _client(self, request: Request) -> Key | None:
        if not self._keys.required and not self._arguments.allow_anonymous:
            client = request.client.host if request.client else ""
            if not is_from_here(client, request.headers.get("host", "")):
                self._metrics.rejected("auth")
                raise forbidden("this endpoint has no API keys, so it answers its own machine only; " + GIVE_KEYS)
        return self._known(self._keys.client, request)

    def _admin(self, request: Request) -> Key:
        if not self._keys.admins:
            raise forbidden("this endpoint has no admin key and takes no releases; set GRADIENTSPACE_ADMIN_KEY")
        return self._known(self._keys.admin, request)

    def _known(self, find: Callable[[str | None], Who], request: Request) -> Who:
        try:
            return find(request.headers.get("authorization"))
        except UnauthorisedError as error:
            self._metrics.rejected("auth")
            raise unauthorised(str(error)) from error

    def _model(self, entry: Listed) -> dict[str, Any]:
        base_model, adapter = entry.release.registry.base_model, entry.adapter
        details: dict[str, Any] = {"root": base_model}
        if adapter is not None:
            details = {"root": adapter.id, "parent": base_model}
            details["metadata"] = {"title": adapter.title, "examples": adapter.examples}
        return model_object(entry.id, self._started, **details, release=entry.release.id)
