"""The router deployment: reads prompts in small batches and names an expert for each."""

import asyncio
from contextlib import suppress
from typing import cast

from ray import serve

from gradientspace_ray.examples.rendering import View, prompt_view
from gradientspace_ray.registry import Registry
from gradientspace_ray.router.classifier import Router, router_digest
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.serving.messages import Choice, Message, RunChangedError

MAX_BATCH = 32
MAX_ONGOING_PROMPTS = 4 * MAX_BATCH
BATCH_WAIT_S = 0.002


class PromptRouter:
    """Prompt -> expert. Prompts that wait at the same time are encoded together."""

    def __init__(self, run_uri: str, registry: Registry) -> None:
        """Load the router that the registry names.

        Args:
            run_uri: the run directory.
            registry: what it held when the endpoint was started.

        Raises:
            RunChangedError: the run has another router by now, or none.
            RouterError: the folder holds no router.
            ModelError: the router's encoder cannot be found.
        """
        digest = None
        with suppress(RunError, FileNotFoundError):  # a file is gone
            folder = RunDirectory(run_uri).fetch(registry.router)
            digest = router_digest(folder)
        if digest != registry.router_digest:
            raise RunChangedError(f"{registry.router} is no longer that of this endpoint; start the endpoint again")
        self._router = Router.load(folder)
        self._view = cast(View, self._router.view)

    async def route(self, messages: list[Message]) -> Choice:
        """The router's decision about one conversation."""
        return await self._route_batch(prompt_view(messages, self._view))

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _route_batch(self, prompts: list[str]) -> list[Choice]:
        decisions = await asyncio.to_thread(self._router.route, prompts)
        return [Choice(decision.expert, decision.confidence, decision.reason) for decision in decisions]
