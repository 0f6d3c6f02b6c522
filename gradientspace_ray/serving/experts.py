"""The experts deployment: one base model, and the experts in its slots."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import torch
from ray import serve

from gradientspace_ray.engine.sampling import Sampling
from gradientspace_ray.engine.scheduler import Engine, PromptTooLongError
from gradientspace_ray.engine.slots import AdapterFiles, Slots
from gradientspace_ray.examples.rendering import Renderer, RenderingError
from gradientspace_ray.models.loading import ModelError, load_base, load_tokenizer
from gradientspace_ray.registry import Adapter, Registry, adapter_digest
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.serving.messages import Delta, Generation, Refused, RunChangedError, Started


def verify(adapter: AdapterFiles) -> None:
    """Refuse a folder that does not hold the adapter's content: an endpoint never serves one digest under another.

    Raises:
        RunChangedError: a later run of the stage put other weights there, or removed the folder.
    """
    digest = None
    with suppress(OSError):  # a file is gone
        digest = adapter_digest(adapter.folder)
    if digest != adapter.id.rpartition("@")[2]:
        raise _changed(adapter.id, str(adapter.folder))


def _changed(adapter_id: str, folder: str) -> RunChangedError:
    return RunChangedError(f"{folder} no longer holds {adapter_id}; start the endpoint again")


def _compute_dtype(registry: Registry, device: str) -> torch.dtype:
    """Type of the matrix products: the run's own on a GPU, float32 on a CPU.

    Answers are made one token at a time, and on a CPU that takes as long as reading the weights does. Autocast would
    read them and also cast them anew for every token, even on a CPU that multiplies bfloat16 natively.
    """
    return torch.bfloat16 if device == "cuda" and registry.compute_dtype == "bfloat16" else torch.float32


class Experts:
    """Generates with the adapter that the request's multiplexed model id names (`name@digest`; none is the base).

    Serve's multiplexing only steers requests to a replica that holds the adapter: what it holds here is the adapter's
    folder. It evicts what is in use, so the weights belong to the engine's slots, which count their users.
    """

    def __init__(self, run_uri: str, registry: Registry, device: str, max_slots: int, max_tokens: int) -> None:
        """Load the base model.

        Args:
            run_uri: the run directory.
            registry: what it held when the endpoint was started.
            device: where the model computes.
            max_slots: adapters in memory at once.
            max_tokens: most tokens of one answer.

        Raises:
            ModelError: the base model or the generalist cannot be loaded.
            RunChangedError: the run has another generalist by now, or none.
        """
        run = RunDirectory(run_uri)

        def files(adapter: Adapter) -> AdapterFiles:
            try:
                return AdapterFiles(adapter.id, run.fetch(adapter.folder))
            except (RunError, FileNotFoundError) as error:
                raise _changed(adapter.id, adapter.folder) from error

        tokenizer = load_tokenizer(registry.base_model)
        model = load_base(registry.base_model, registry.dtype, device)
        generalist = files(registry.generalist)
        slots = Slots.like(model, generalist.folder, max_slots, verify)
        verify(generalist)
        self._engine = Engine(model, tokenizer, slots, _compute_dtype(registry, device))
        self._renderer = Renderer(tokenizer)
        self._max_tokens = max_tokens

        @serve.multiplexed(max_num_models_per_replica=max_slots)
        async def hold(adapter_id: str) -> AdapterFiles:
            adapter = registry.resolve(adapter_id)
            if adapter is None:
                raise ValueError(f"{adapter_id} is not an adapter")
            return await asyncio.to_thread(files, adapter)

        self._hold = hold

    async def generate(self, request: Generation) -> AsyncIterator[Started | Refused | Delta]:
        """One answer: `Started` and then deltas, or `Refused`. Closing the iterator ends the request.

        Raises:
            RunChangedError: the run no longer holds the adapter that the registry names.
            RuntimeError: the adapter cannot be loaded.
        """
        adapter_id = serve.get_multiplexed_model_id()
        adapter = await self._hold(adapter_id) if adapter_id else None
        if request.max_tokens is not None and request.max_tokens > self._max_tokens:
            message = f"this server answers with at most {self._max_tokens} tokens, {request.max_tokens} were asked for"
            yield Refused(message, None, "max_tokens")
            return
        try:
            prompt_ids = self._renderer.prompt(request.messages)
        except RenderingError as error:
            yield Refused(str(error), None, "messages")
            return
        sampling = Sampling(
            max_tokens=request.max_tokens or self._max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=request.stop,
        )
        try:
            self._engine.check(prompt_ids)
        except PromptTooLongError as error:
            yield Refused(str(error), "context_length_exceeded", "messages")
            return
        yield Started(len(prompt_ids))
        async with aclosing(self._engine.submit(prompt_ids, sampling, adapter)) as pieces:
            try:
                async for piece in pieces:
                    yield Delta(piece.text, piece.finish_reason, piece.completion_tokens)
            except ModelError as error:
                if adapter is not None:  # if the folder changed or went, say that instead
                    await asyncio.to_thread(verify, adapter)
                # A built-in error, or the ingress would import torch to read it.
                raise RuntimeError(str(error)) from error

    async def leases(self) -> dict[str, int]:
        """Adapter -> number of requests that use it now, for every adapter in memory."""
        return self._engine.leases()
