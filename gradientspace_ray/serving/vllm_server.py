"""The experts deployment on vLLM. Importing this module needs vLLM; see `vllm` for what does not."""

import asyncio
import itertools
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment
from vllm import SamplingParams
from vllm.exceptions import VLLMError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from gradientspace_ray.engine.contract import Piece
from gradientspace_ray.examples.rendering import RenderingError
from gradientspace_ray.models.loading import ModelError, load_tokenizer, resolve_model
from gradientspace_ray.run import COPIES, RunError
from gradientspace_ray.serving.messages import AnswerItem, Generation, Place, Refused, Started
from gradientspace_ray.serving.metrics import EngineMetrics
from gradientspace_ray.serving.prompts import PromptReader, parameter_of
from gradientspace_ray.serving.vllm import VllmArguments, base_id, lora_name
from gradientspace_ray.serving.vllm_adapters import Shelf, check_fits, copy_verified, linear_layers, write_empty
from gradientspace_ray.serving.vllm_answers import Answer, sampling_fields
from gradientspace_ray.serving.vllm_statistics import AnswerCounts

NAME = "Experts"
"""Of the deployment, whatever engine it has."""
log = logging.getLogger(__name__)


def deployment(
    base_model: str,
    arguments: VllmArguments,
    engine_kwargs: Mapping[str, Any],
    *,
    device: str,
    cpus: float,
    max_tokens: int,
    options: Mapping[str, Any],
) -> Application:
    """The deployment, bound; see `vllm.vllm_experts`.

    Raises:
        ValueError: vLLM does not know an engine argument, or Serve an option.
    """
    on_cpu = device == "cpu"
    # vLLM's workers on GPUs are Ray actors beside the replica; on a CPU they are its own child processes.
    worker: dict[str, float] = {"CPU": cpus} if on_cpu else {"GPU": 1}
    config = LLMConfig(
        model_loading_config={"model_id": base_id(base_model), "model_source": base_model},
        engine_kwargs=dict(engine_kwargs),
        accelerator_type=arguments.accelerator_type,
        # One machine, because the adapters' files are on the replica's.
        placement_group_config={"bundle_per_worker": worker, "strategy": "STRICT_PACK"},
        deployment_config={**options, "ray_actor_options": {"num_cpus": 0 if on_cpu else cpus}},
    )
    return build_llm_deployment(
        config,
        deployment_cls=VllmExperts,
        bind_kwargs={"base_model": base_model, "max_tokens": max_tokens, "on_cpu": on_cpu},
        override_serve_options={"name": NAME},
    )


class VllmExperts(LLMServer):
    """Generates with the adapter that a request names; vLLM mixes adapters in a forward pass.

    Serve's multiplexing only steers requests to a replica that holds the adapter. It evicts what is in use and loads
    one adapter at a time, so what it holds here is a name, and the adapters are on a shelf that counts their users.
    """

    async def __init__(  # type: ignore[misc]
        self, llm_config: LLMConfig, *, base_model: str, max_tokens: int, on_cpu: bool
    ) -> None:
        """Load the base model.

        Args:
            llm_config: what `deployment` made.
            base_model: of the run.
            max_tokens: most tokens of one answer.
            on_cpu: whether this is vLLM for the CPU.

        Raises:
            ModelError: the base model has no usable tokenizer.
        """
        # Here and not in `deployment`: a bundled model's folder is this machine's.
        engine_config: Any = llm_config.get_engine_config()
        engine_config.hf_model_id = await asyncio.to_thread(resolve_model, base_model)
        self._base_model = base_model
        self._tokenizer = await asyncio.to_thread(load_tokenizer, base_model)
        self._reader = PromptReader(self._tokenizer)
        self._layers = await asyncio.to_thread(linear_layers, base_model)
        self._max_tokens = max_tokens
        self._max_lora_rank: int = llm_config.engine_kwargs["max_lora_rank"]
        capacity: int = llm_config.engine_kwargs["max_cpu_loras"]
        self._numbers = itertools.count(1)
        # By this name, the next process that fetches removes what a killed one left.
        self._copies = tempfile.TemporaryDirectory(prefix=f"{COPIES}{os.getpid()}-")
        self._shelf = Shelf(capacity, self._load, self._unload)
        self._prefetches: set[asyncio.Task[str | None]] = set()
        self._counts = AnswerCounts()
        self._metrics = EngineMetrics()

        @serve.multiplexed(max_num_models_per_replica=capacity)
        async def hold(adapter_id: str) -> str:
            return adapter_id

        self._hold = hold
        await super().__init__(llm_config)
        # vLLM's client for its engine's process. `LLMServer` itself has only OpenAI's methods, on top of it.
        engine: Any = self.engine
        self._client = engine._engine_client
        # On a CPU, vLLM gives rows without an adapter the one in its last slot (vllm-project/vllm#48421).
        self._empty = self._request("base") if on_cpu else None
        if self._empty is not None:
            write_empty(Path(self._empty.lora_path), self._layers)

    async def generate(self, request: Generation) -> AsyncGenerator[AnswerItem, None]:
        """One answer: `Started` and then pieces, or `Refused`. Closing the iterator ends the request.

        Raises:
            RunChangedError: the run no longer holds the adapter.
            RuntimeError: the adapter cannot be loaded, or the engine failed.
        """
        prompt_ids = await asyncio.to_thread(self._read, request)
        if isinstance(prompt_ids, Refused):
            yield prompt_ids
            return
        try:
            async with self._adapter(request.adapter) as lora:
                if request.prefetch is not None:
                    self._prefetch(request.prefetch)
                yield Started(len(prompt_ids))
                async with aclosing(self._pieces(request, prompt_ids, lora)) as pieces:
                    async for piece in pieces:
                        yield piece
        finally:
            self._export()

    async def prepare(self, places: list[Place]) -> list[str]:
        """Load adapters ahead of their first request.

        Returns:
            What is wrong with those that cannot be loaded, one line each.
        """
        problems = await asyncio.gather(*(self._problem(place) for place in places))
        return [problem for problem in problems if problem is not None]

    async def leases(self) -> dict[str, int]:
        """Adapter -> number of requests that use it now, for every adapter in memory."""
        return self._shelf.leases()

    async def check_health(self) -> None:
        """Serve asks every ten seconds, and starts another replica where this raises.

        Raises:
            Exception: vLLM's engine is dead.
        """
        self._export()
        await super().check_health()

    def _export(self) -> None:
        shelf = self._shelf
        self._metrics.export(
            self._counts.statistics(shelf.leases(), loads=shelf.loads, load_s=shelf.load_s, evictions=shelf.evictions)
        )

    def _prefetch(self, place: Place) -> None:
        """Load the router's second choice while the first one answers; no adapter goes for it."""
        if self._shelf.preload(place):
            prefetch = asyncio.create_task(self._problem(place))
            self._prefetches.add(prefetch)
            prefetch.add_done_callback(self._prefetches.discard)

    def _read(self, request: Generation) -> list[int] | Refused:
        """The prompt's tokens; or why the request cannot be served, which vLLM would say in its own words."""
        sampling, param = request.sampling, parameter_of(request.prompt)
        try:
            prompt_ids = self._reader.token_ids(request.prompt)
        except RenderingError as error:
            return Refused(str(error), None, param)
        model = self._client.model_config
        context, vocabulary = model.max_model_len, model.get_vocab_size()
        if not 1 <= len(prompt_ids) < context:
            message = f"the prompt has {len(prompt_ids)} tokens; this model reads 1 to {context - 1}"
            return Refused(message, "context_length_exceeded", param)
        for name, tokens in ((param, prompt_ids), ("logit_bias", list(sampling.logit_bias))):
            wrong = [token for token in tokens if not 0 <= token < vocabulary]
            if wrong:
                message = f"token {wrong[0]} does not exist; this model has 0 to {vocabulary - 1}"
                return Refused(message, "invalid_value", name)
        if sampling.max_tokens > self._max_tokens:
            asked = f"{sampling.max_tokens} were asked for"
            return Refused(f"this server answers with at most {self._max_tokens} tokens, {asked}", None, "max_tokens")
        return prompt_ids

    @asynccontextmanager
    async def _adapter(self, place: Place | None) -> AsyncIterator[LoRARequest | None]:
        """The adapter in vLLM, for the length of the block; Serve learns that this replica holds it."""
        if place is None:
            yield self._empty
            return
        async with self._shelf.lease(place) as lora:
            await self._hold(place.id)
            yield lora

    async def _pieces(
        self, request: Generation, prompt_ids: list[int], lora: LoRARequest | None
    ) -> AsyncGenerator[Piece, None]:
        sampling = request.sampling
        adapter_id = request.adapter.id if request.adapter is not None else None
        room = self._client.model_config.max_model_len - len(prompt_ids)
        fields = sampling_fields(replace(sampling, max_tokens=sampling.max_tokens or self._max_tokens), room)
        answer = Answer(self._tokenizer, sampling)
        prompt = tokens_input(prompt_ids)
        try:
            parameters = SamplingParams(**fields, output_kind=RequestOutputKind.DELTA)
            generating = self._client.generate(prompt, parameters, uuid.uuid4().hex, lora_request=lora)
            with self._counts.answer(adapter_id, len(prompt_ids)) as count:
                async with aclosing(generating) as outputs:
                    async for output in outputs:
                        count(output)
                        piece = answer.piece(output)
                        if piece is not None:
                            yield piece
                            if piece.finish_reason is not None:
                                return
        except VLLMError as error:
            # A built-in error, or the ingress would import vLLM to read it.
            raise RuntimeError(f"vLLM failed: {_first_line(error)}") from error

    async def _problem(self, place: Place) -> str | None:
        """Load an adapter; what is wrong with it, in one line."""
        try:
            async with self._adapter(place):
                return None
        except (RuntimeError, RunError, OSError) as error:
            log.warning("%s", error)
            return str(error)

    async def _load(self, place: Place) -> LoRARequest:
        lora = self._request(place.id)
        try:
            await asyncio.to_thread(self._copy, place, Path(lora.lora_path))
            await self._add(place, lora)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, lora.lora_path, ignore_errors=True)
            raise
        return lora

    def _request(self, adapter_id: str) -> LoRARequest:
        """What vLLM knows an adapter by: its name, a number that no other had, a folder for its files."""
        number = next(self._numbers)
        return LoRARequest(lora_name(self._base_model, adapter_id), number, f"{self._copies.name}/{number}")

    async def _add(self, place: Place, lora: LoRARequest) -> None:
        try:
            loaded = await self._client.add_lora(lora)
        except Exception as error:
            # What the engine's process raises arrives as a plain Exception. A part of the adapter may be there, unless
            # the engine is dead.
            with suppress(VLLMError):
                await self._client.remove_lora(lora.lora_int_id)
            raise RuntimeError(f"vLLM cannot load {place.id}: {_first_line(error)}") from error
        if not loaded:
            raise RuntimeError(f"vLLM did not load {place.id}")

    def _copy(self, place: Place, folder: Path) -> None:
        copy_verified(place, folder)
        try:
            check_fits(folder, self._layers, self._max_lora_rank)
        except ModelError as error:
            # A built-in error, or the ingress would import torch to read it.
            raise RuntimeError(f"{place.id} cannot be served: {error}") from error

    async def _unload(self, lora: LoRARequest) -> None:
        await self._client.remove_lora(lora.lora_int_id)
        await asyncio.to_thread(shutil.rmtree, lora.lora_path, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
