"""The router deployment: reads conversations in small batches and names an expert for each."""

import asyncio
import time
from collections import OrderedDict
from weakref import WeakValueDictionary

from ray import serve

from gradientspace_ray.models.loading import ModelError
from gradientspace_ray.registry import ROUTER_FILES, Registry, router_files_digest
from gradientspace_ray.router.classifier import Router, RouterError
from gradientspace_ray.router.conversation import Turns, decide_together, turn_prompts
from gradientspace_ray.router.encoder import PromptEncoder, RememberingEncoder
from gradientspace_ray.run import MissingFileError, RunDirectory
from gradientspace_ray.serving.board import ReleaseBoard
from gradientspace_ray.serving.messages import Choice, Place, RouteRequest, RunChangedError

MAX_BATCH = 32
MAX_ONGOING_PROMPTS = 4 * MAX_BATCH
BATCH_WAIT_S = 0.002
STUCK_S = 60.0
MAX_ROUTERS = 3
"""The one that serves, the one that a release may bring, the one that a rollback goes to."""
REMEMBERED_PROMPTS = 4096


class PromptRouter:
    """Conversation -> expert. Conversations that wait at the same time are encoded together, whatever their router."""

    def __init__(self, run_uri: str, registry: Registry) -> None:
        """Load the router that is released now; others are loaded when they are asked for.

        Args:
            run_uri: the run directory that is served.
            registry: what it held when the endpoint was started.

        Raises:
            ReleaseError: the releases cannot be read.
            RunChangedError: the router is not there, or another one is.
            RouterError: the files are not those of a router.
            ModelError: the router's encoder cannot be found.
        """
        board = ReleaseBoard(run_uri, registry)
        place = board.router(board.current)
        # An encoder lives as long as a router, or a batch under way, has it.
        self._encoders: WeakValueDictionary[tuple[str, int], RememberingEncoder] = WeakValueDictionary()
        self._routers = OrderedDict({place.id: self._load(place)})
        self._loading = asyncio.Lock()
        self._batch_since_s: float | None = None

    async def route(self, request: RouteRequest) -> Choice:
        """The router's decision about one conversation.

        Raises:
            RunChangedError, RouterError, ModelError: the router is not loaded, and cannot be; see the constructor.
        """
        router = await self._router(request.router)
        return await self._route_batch(Turns(router, turn_prompts(request.messages, router.view)))

    async def prepare(self, place: Place) -> list[str]:
        """Load a router before a release names it.

        Returns:
            What is wrong with it, in a line; nothing when it can be used.
        """
        try:
            await self._router(place)
        except (RunChangedError, RouterError, ModelError) as error:
            return [str(error)]
        return []

    def check_health(self) -> None:
        """Serve asks every ten seconds, and starts another replica where this raises.

        A busy replica is not a sick one: what counts is that its batches end.

        Raises:
            RuntimeError: a batch is stuck.
        """
        if self._batch_since_s is not None and time.monotonic() - self._batch_since_s > STUCK_S:
            raise RuntimeError(f"a batch of conversations has not ended for {STUCK_S:g} s")

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _route_batch(self, conversations: list[Turns]) -> list[Choice]:
        self._batch_since_s = time.monotonic()
        try:
            decisions = await asyncio.to_thread(decide_together, conversations)
        finally:
            self._batch_since_s = None
        return [
            Choice(
                expert=decision.expert,
                confidence=decision.confidence,
                reason=decision.reason,
                probabilities=decision.probabilities,
                second_best=decision.second_best,
            )
            for decision in decisions
        ]

    async def _router(self, place: Place) -> Router:
        if place.id not in self._routers:
            async with self._loading:
                if place.id not in self._routers:
                    self._routers[place.id] = await asyncio.to_thread(self._load, place)
        self._routers.move_to_end(place.id)
        router = self._routers[place.id]
        while len(self._routers) > MAX_ROUTERS:
            self._routers.popitem(last=False)
        return router

    def _load(self, place: Place) -> Router:
        # Read anew, not fetched: a folder of the same name may have held another router before.
        run, mend = RunDirectory(place.run_uri), f"release {place.run_uri} again, or start the endpoint again"
        try:
            files = {name: run.read_bytes(f"{place.folder}/{name}") for name in ROUTER_FILES}
        except MissingFileError as error:
            raise RunChangedError(f"{place.folder} no longer holds the router {place.id}; {mend}") from error
        if router_files_digest(files) != place.id:
            raise RunChangedError(f"{place.folder} no longer holds the router {place.id}; {mend}")
        return Router.of_files(files, run.path(place.folder), self._encoder)

    def _encoder(self, name: str, max_tokens: int) -> RememberingEncoder:
        encoder = self._encoders.get((name, max_tokens))
        if encoder is None:
            encoder = RememberingEncoder(PromptEncoder(name, max_tokens), REMEMBERED_PROMPTS)
            self._encoders[name, max_tokens] = encoder
        return encoder
