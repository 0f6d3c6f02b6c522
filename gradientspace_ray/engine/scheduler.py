"""Generation for many requests at once on one model, each with its own adapter.

All work on the model happens on one thread. Each request has at most one step (one token) in that thread's queue, and
the queue is first come, first served: requests advance in turn, one token each, and no adapter can starve another.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from gradientspace_ray.engine.sampling import Sampler, Sampling, StopMatcher, TextDecoder
from gradientspace_ray.engine.slots import BASE_SLOT, AdapterFiles, Lease, Slots

FinishReason = Literal["stop", "length"]


class PromptTooLongError(ValueError):
    """A prompt that leaves no room for an answer in the model's context."""


@dataclass(frozen=True)
class Piece:
    """The next part of an answer."""

    text: str
    finish_reason: FinishReason | None
    """Set on the last piece: `stop` at an end-of-text token or a stop text, `length` at the limit."""
    completion_tokens: int
    """Tokens generated so far, an end-of-text token included."""


@dataclass
class _Request:
    tokens: list[int]
    """Not yet in the cache: the prompt at first, then the latest token."""
    lease: Lease
    max_tokens: int
    cache: DynamicCache
    sampler: Sampler
    decoder: TextDecoder
    stops: StopMatcher
    generated: int = 0
    finish_reason: FinishReason | None = field(default=None)


class Engine:
    """Generates with one base model and the adapters of its slots. Use it from one event loop."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: Slots,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Start the engine's thread.

        Args:
            model: the base model, its layers wrapped by `slots`.
            tokenizer: the base model's.
            slots: where adapters are held.
            compute_dtype: type of the matrix products, by autocast; float32 leaves them in the type of the weights.
        """
        self._model = model
        self._compute_dtype = compute_dtype
        self._tokenizer = tokenizer
        self._slots = slots
        self._end_tokens = _end_tokens(model, tokenizer)
        self.context_tokens: int = model.config.get_text_config().max_position_embeddings
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    def check(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens an answer to this prompt can have at most.

        Raises:
            PromptTooLongError: none.
        """
        room = self.context_tokens - len(prompt_ids)
        if room < 1 or not prompt_ids:
            raise PromptTooLongError(
                f"the prompt has {len(prompt_ids)} tokens; this model reads 1 to {self.context_tokens - 1}"
            )
        return room

    async def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterFiles | None = None
    ) -> AsyncGenerator[Piece, None]:
        """Generate one answer, piece by piece. Closing or cancelling the iterator ends the request and its lease.

        Args:
            prompt_ids: the rendered prompt.
            sampling: how to choose tokens and when to stop.
            adapter: None is the base model.

        Yields:
            Pieces whose joined text is the answer; only the last has a `finish_reason`.

        Raises:
            PromptTooLongError: the prompt fills the model's context.
            ModelError: the adapter cannot be loaded. Other requests go on.
        """
        room = self.check(prompt_ids)
        lease = await self._lease(adapter)
        try:
            request = _Request(
                tokens=list(prompt_ids),
                lease=lease,
                max_tokens=min(sampling.max_tokens, room),
                cache=DynamicCache(config=self._model.config),
                sampler=Sampler(sampling),
                decoder=TextDecoder(self._tokenizer),
                stops=StopMatcher(sampling.stop),
            )
            loop = asyncio.get_running_loop()
            while request.finish_reason is None:
                piece = await loop.run_in_executor(self._thread, self._step, request)
                if piece.text or piece.finish_reason:
                    yield piece
        finally:
            # A step that was under way when the request was cancelled may still read this slot. That is harmless: a new
            # adapter is loaded on the same thread, after it.
            self._slots.release(lease)
            self._freed.set()

    async def _lease(self, adapter: AdapterFiles | None) -> Lease:
        """Wait for a slot. Whoever waits is not overtaken, or requests for resident adapters could starve it."""
        if adapter is None:
            return Lease(BASE_SLOT, None)
        async with self._turn:
            while (lease := self._slots.acquire(adapter)) is None:
                self._freed.clear()
                await self._freed.wait()
        return lease

    @torch.inference_mode()
    def _step(self, request: _Request) -> Piece:
        """One token of one request: the first call reads the whole prompt."""
        self._slots.load(request.lease)
        input_ids = torch.tensor([request.tokens], device=self._model.device)
        autocasts = self._compute_dtype != torch.float32
        with (
            self._slots.rows([request.lease.index]),
            torch.autocast(input_ids.device.type, dtype=self._compute_dtype, enabled=autocasts),
        ):
            output = self._model(input_ids, past_key_values=request.cache, use_cache=True, logits_to_keep=1)
        token = request.sampler.choose(output.logits[0, -1])
        request.tokens = [token]
        request.generated += 1
        if token in self._end_tokens:
            request.finish_reason, text = "stop", ""
        else:
            text = request.stops.push(request.decoder.push(token))
            if request.stops.found:
                request.finish_reason = "stop"
            elif request.generated >= request.max_tokens:
                request.finish_reason = "length"
        if request.finish_reason and not request.stops.found:
            text += request.stops.push(request.decoder.flush())
            if request.stops.found:
                request.finish_reason = "stop"
            text += request.stops.flush()
        return Piece(text, request.finish_reason, request.generated)

    def leases(self) -> dict[str, int]:
        """Adapter -> number of requests that use it now, for every adapter that has a slot."""
        return self._slots.leases()

    def close(self) -> None:
        """Finish the step under way and end the thread; requests still running fail."""
        self._thread.shutdown(cancel_futures=True)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the model's, and the chat template's end of turn."""
    configured: Any = model.generation_config.eos_token_id if model.generation_config else None
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ends, tokenizer.eos_token_id] if token is not None)
