"""One request's answers, from the experts' streams: begun, tried again where a replica died, merged, collected."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentResponseGenerator

from gradientspace_ray.engine.contract import Piece
from gradientspace_ray.serving.api_errors import ApiError, bad_request, unavailable
from gradientspace_ray.serving.messages import Refused, SickReplicaError, Started
from gradientspace_ray.serving.openai_answers import join_pieces

Stream = DeploymentResponseGenerator[Any]
Ask = Callable[[], Stream]
"""Sends the request to a replica of the experts."""
REPLICA_LOST = (RayActorError, ReplicaUnavailableError, SickReplicaError)
ATTEMPTS = 3
RETRY_AFTER_S = 5.0


@dataclass(frozen=True)
class Begun:
    """An answer whose first piece is there."""

    started: Started
    first: Piece
    rest: Stream


@dataclass(frozen=True)
class Whole:
    """An answer, its pieces joined."""

    started: Started
    piece: Piece


async def begin(asks: Sequence[Ask], timeout_s: float) -> list[Begun]:
    """Start the answers and wait for their first pieces; no error can change an HTTP answer's status afterwards.

    What a replica takes along when it dies is asked of another one: nothing of it has been sent.

    Raises:
        ApiError: a request is refused, or has no first piece within `timeout_s`.
        RayError: every attempt met a replica that died.
        Exception: what the experts raise.
    """
    tasks = [asyncio.create_task(_begin(ask)) for ask in asks]
    try:
        return await asyncio.wait_for(asyncio.gather(*tasks), timeout_s)
    except BaseException as error:
        for task in tasks:
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().rest.cancel()
            task.cancel()
        if isinstance(error, asyncio.TimeoutError):
            raise overloaded(timeout_s) from error
        raise


def overloaded(timeout_s: float) -> ApiError:
    """503: nothing came of a request in time."""
    return unavailable(f"no answer began within {timeout_s:g} s; try again later", RETRY_AFTER_S, code="overloaded")


async def collect(asks: Sequence[Ask], timeout_s: float, on_first: Callable[[int, Begun], None]) -> list[Whole]:
    """The whole answers; as `begin`, and an answer that a dying replica cut short is begun again.

    Args:
        asks: one for each answer.
        timeout_s: limit of the wait for the first pieces.
        on_first: called with the index of an answer when its first piece is there.
    """

    async def one(index: int, begun: Begun) -> Whole:
        for attempt in range(1, ATTEMPTS + 1):
            on_first(index, begun)
            try:
                return await _collect(begun)
            except REPLICA_LOST:
                if attempt == ATTEMPTS:
                    raise
                begun = (await begin([asks[index]], timeout_s))[0]
        raise AssertionError("the last attempt returns or raises")

    begun = await begin(asks, timeout_s)
    tasks = [asyncio.create_task(one(index, answer)) for index, answer in enumerate(begun)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def merged(answers: Sequence[Begun]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of all answers as they come, each with the index of its answer.

    Leaving the iterator early, as a client does that hangs up, ends the generation of all.
    """
    pieces: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def forward(index: int, stream: Stream) -> None:
        try:
            async for piece in stream:
                pieces.put_nowait((index, piece))
            pieces.put_nowait(None)
        except asyncio.CancelledError:
            # The reader has left, or the experts' side was cancelled, which must not look like the reader's own end.
            pieces.put_nowait(RayServeException("the generation was cancelled"))
            raise
        except Exception as error:  # noqa: BLE001 - the reader raises it
            pieces.put_nowait(error)

    for index, answer in enumerate(answers):
        pieces.put_nowait((index, answer.first))
    tasks = [asyncio.create_task(forward(index, answer.rest)) for index, answer in enumerate(answers)]
    try:
        running = len(tasks)
        while running:
            item = await pieces.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for answer, task in zip(answers, tasks, strict=True):
            answer.rest.cancel()
            task.cancel()


async def _begin(ask: Ask) -> Begun:
    for attempt in range(1, ATTEMPTS + 1):
        stream = ask()
        try:
            started = await anext(stream)
            if isinstance(started, Refused):
                raise bad_request(started.message, code=started.code, param=started.param)
            return Begun(started, await anext(stream), stream)
        except REPLICA_LOST:
            if attempt == ATTEMPTS:
                raise
        except BaseException:
            stream.cancel()
            raise
    raise AssertionError("the last attempt returns or raises")


async def _collect(begun: Begun) -> Whole:
    pieces = [begun.first]
    try:
        async for piece in begun.rest:
            pieces.append(piece)
    finally:
        begun.rest.cancel()
    return Whole(begun.started, join_pieces(pieces))
