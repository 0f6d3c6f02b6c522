"""The experts deployment: one base model, and the experts in its slots."""

import asyncio
import math
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress

import torch
from ray import serve

from gradientspace_ray.engine.adapters import AdapterFiles, HostCache
from gradientspace_ray.engine.scheduler import Engine, EngineClosedError, PromptTooLongError, UnknownTokenError
from gradientspace_ray.engine.slots import Slots
from gradientspace_ray.engine.threads import in_passing_thread
from gradientspace_ray.examples.rendering import RenderingError
from gradientspace_ray.models.loading import ModelError, load_base, load_tokenizer
from gradientspace_ray.registry import Registry, adapter_digest
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.serving.arguments import ServeArguments
from gradientspace_ray.serving.messages import (
    AnswerItem,
    Generation,
    Place,
    Prompt,
    Refused,
    RunChangedError,
    SickReplicaError,
    Started,
)
from gradientspace_ray.serving.metrics import EngineMetrics
from gradientspace_ray.serving.prompts import PromptReader, parameter_of

# The current release, the one before and a canary, on a replica of eight slots.
HOST_ADAPTERS_PER_SLOT = 3
# Adapters that are read at once, on threads of their own: a store that hangs keeps no other request waiting.
READERS = 4


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
    return RunChangedError(
        f"{folder} no longer holds {adapter_id}; release the run again: gradientspace release RUN_DIR"
    )


def fetch(place: Place) -> AdapterFiles:
    """An adapter's folder on this machine; a run in an object store is copied.

    Raises:
        RunChangedError: the folder is gone.
    """
    try:
        return AdapterFiles(place.id, RunDirectory(place.run_uri).fetch(place.folder))
    except (RunError, FileNotFoundError) as error:
        raise _changed(place.id, place.folder) from error


def _compute_dtype(registry: Registry, device: str) -> torch.dtype:
    """Type of the matrix products: the run's own on a GPU, float32 on a CPU.

    Answers are made one token at a time, and on a CPU that takes as long as reading the weights does. Autocast would
    read them and also cast them anew for every token, even on a CPU that multiplies bfloat16 natively.
    """
    return torch.bfloat16 if device == "cuda" and registry.compute_dtype == "bfloat16" else torch.float32


class Experts:
    """Generates with the adapter that a request names; rows of different adapters share a forward pass.

    Serve's multiplexing only steers requests to a replica that had the adapter before: it evicts what is in use, so the
    weights belong to the engine's slots, which count their users.
    """

    def __init__(self, registry: Registry, arguments: ServeArguments) -> None:
        """Load the base model, with slots for adapters of the shape of this run's generalist.

        That of the run, and not that of a later release: all that are published are held to it, and all replicas must
        be able to hold what any of them holds.

        Args:
            registry: what the run directory held when the endpoint was started.
            arguments: of the application.

        Raises:
            ModelError: the base model or the generalist cannot be loaded.
            RunChangedError: the generalist is gone, or another one is in its place.
        """
        if arguments.device == "cpu":
            torch.set_num_threads(max(1, math.ceil(arguments.cpus_per_replica)))
        tokenizer = load_tokenizer(registry.base_model)
        generalist = fetch(Place(registry.generalist.id, arguments.run_dir, registry.generalist.folder))
        self._host = HostCache(HOST_ADAPTERS_PER_SLOT * arguments.max_slots, verify)

        def start() -> Engine:
            model = load_base(registry.base_model, registry.dtype, arguments.device)
            slots = Slots.like(model, generalist.folder, arguments.max_slots)
            verify(generalist)
            return Engine(
                model,
                tokenizer,
                slots,
                host=self._host,
                compute_dtype=_compute_dtype(registry, arguments.device),
                max_rows=arguments.max_rows,
                prefill_tokens=arguments.prefill_tokens,
                cache_tokens=arguments.cache_tokens,
                prefix_tokens=arguments.prefix_cache_tokens,
            )

        self._engine = in_passing_thread(start)
        self._reader = PromptReader(tokenizer)
        self._metrics = EngineMetrics()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="adapters")
        self._places: dict[Place, AdapterFiles] = {}
        self._reads: dict[Place, asyncio.Future[AdapterFiles]] = {}
        self._prefetches: set[asyncio.Task[None]] = set()

        @serve.multiplexed(max_num_models_per_replica=arguments.max_slots)
        async def hold(adapter_id: str) -> str:
            return adapter_id

        self._hold = hold

    async def generate(self, request: Generation) -> AsyncIterator[AnswerItem]:
        """One answer: `Started` and then pieces, or `Refused`. Closing the iterator ends the request.

        Raises:
            RunChangedError: the run no longer holds the adapter.
            SickReplicaError: the engine has stopped.
            RuntimeError: the adapter cannot be loaded.
        """
        prompt_ids = await asyncio.to_thread(self._checked_prompt, request.prompt)
        if isinstance(prompt_ids, Refused):
            yield prompt_ids
            return
        adapter = None
        if request.adapter is not None:
            await self._hold(request.adapter.id)
        try:
            if request.adapter is not None:
                adapter = await self._held(request.adapter)
            if request.prefetch is not None:
                self._prefetch(request.prefetch)
            async with aclosing(self._engine.submit(prompt_ids, request.sampling, adapter)) as pieces:
                first = await anext(pieces)
                yield Started(len(prompt_ids))
                yield first
                async for piece in pieces:
                    yield piece
        except UnknownTokenError as error:
            yield Refused(str(error), "invalid_value", "logit_bias")
        except EngineClosedError as error:
            raise SickReplicaError(str(error)) from error
        except ModelError as error:
            if adapter is not None:
                await asyncio.to_thread(verify, adapter)
            # A built-in error, or the ingress would import torch to read it.
            raise RuntimeError(str(error)) from error
        finally:
            self._metrics.export(self._engine.statistics())

    async def prepare(self, places: list[Place]) -> list[str]:
        """Read adapters into host memory before a release names them.

        Returns:
            What is wrong with them, a line each; nothing when all can be served.
        """
        problems = []
        for place in places:
            try:
                await asyncio.get_running_loop().run_in_executor(self._readers, self._read, place)
            except (ModelError, RunChangedError) as error:
                problems.append(str(error))
        return problems

    async def leases(self) -> dict[str, int]:
        """Adapter -> number of requests that use it now, for every adapter in memory."""
        return self._engine.leases()

    def check_health(self) -> None:
        """Serve asks every ten seconds, and starts another replica where this raises.

        Raises:
            RuntimeError: the engine's thread has ended or is stuck, or all of its steps fail.
        """
        self._metrics.export(self._engine.statistics())
        if not self._engine.healthy:
            raise RuntimeError("the engine answers nobody: its thread has ended or is stuck, or all of its steps fail")

    def _read(self, place: Place) -> AdapterFiles:
        files = fetch(place)
        self._host.get(files)
        return files

    def _checked_prompt(self, prompt: Prompt) -> list[int] | Refused:
        """The tokens of a prompt that the model can read; no adapter is fetched for another one."""
        parameter = parameter_of(prompt)
        try:
            prompt_ids = self._reader.token_ids(prompt)
            self._engine.check(prompt_ids)
        except RenderingError as error:
            return Refused(str(error), None, parameter)
        except PromptTooLongError as error:
            return Refused(str(error), "context_length_exceeded", parameter)
        except UnknownTokenError as error:
            return Refused(str(error), "invalid_value", parameter)
        return prompt_ids

    async def _held(self, place: Place) -> AdapterFiles:
        """An adapter in host memory, read once however many ask for it meanwhile."""
        if place in self._places and self._host.peek(place.id) is not None:
            return self._places[place]
        read = self._reads.get(place)
        if read is None:
            read = asyncio.get_running_loop().run_in_executor(self._readers, self._read, place)
            self._reads[place] = read
            read.add_done_callback(lambda ended: self._ended(place, ended))
        # Whoever leaves does not end it for the others.
        return await asyncio.shield(read)

    def _ended(self, place: Place, read: asyncio.Future[AdapterFiles]) -> None:
        del self._reads[place]
        if not read.cancelled() and read.exception() is None:
            self._places[place] = read.result()

    def _prefetch(self, place: Place) -> None:
        """Have the router's second choice read while the first one answers."""
        if place.id in self._host.held():
            return

        async def read() -> None:
            with suppress(RunChangedError, ModelError):  # said to whoever asks for it
                await self._engine.prefetch(await self._held(place))

        task = asyncio.create_task(read())
        self._prefetches.add(task)
        task.add_done_callback(self._prefetches.discard)
