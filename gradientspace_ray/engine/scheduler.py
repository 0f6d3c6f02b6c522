"""Generation for many requests at once on one model, each with its own adapter: continuous batching.

All work on the model happens on one thread, in rounds. Event loops hand it requests, and it hands them the pieces of
their answers.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradientspace_ray.engine import packing
from gradientspace_ray.engine.adapters import AdapterFiles, HostCache, Matrices
from gradientspace_ray.engine.batch import BatchedModel, context_tokens
from gradientspace_ray.engine.contract import Piece, Sampling
from gradientspace_ray.engine.prefix import PrefixCache
from gradientspace_ray.engine.request import Request
from gradientspace_ray.engine.rounds import EngineStatistics, Outcome, Rounds
from gradientspace_ray.engine.sampling import Sampler
from gradientspace_ray.engine.slots import Slots
from gradientspace_ray.engine.text import AnswerText, token_bytes

# Tokens of cache for each row, on average, where nothing else is asked for.
ROW_TOKENS = 2048
PREFIX_TOKENS = 8192
# A round is a part of a prompt or one token; a model that fails at every one, as after an error of a GPU, stays so.
STUCK_S = 120.0
MOST_FAILURES = 10
T = TypeVar("T")
log = logging.getLogger(__name__)


class PromptError(ValueError):
    """A request that this model cannot read."""


class PromptTooLongError(PromptError):
    """A prompt that leaves no room for an answer in the model's context."""


class UnknownTokenError(PromptError):
    """A token that the model does not have."""


class EngineClosedError(RuntimeError):
    """The engine was closed, or its thread ended."""


class Engine:
    """Generates with one base model and the adapters of its slots. Any number of event loops may use it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: Slots,
        *,
        host: HostCache | None = None,
        compute_dtype: torch.dtype = torch.float32,
        max_rows: int = 16,
        prefill_tokens: int = 256,
        cache_tokens: int | None = None,
        prefix_tokens: int = PREFIX_TOKENS,
    ) -> None:
        """Check that the model can be batched, and start the engine's thread.

        On a CPU, load the model and make its engine `in_passing_thread`; `engine.threads` says why.

        Args:
            model: the base model, its layers wrapped by `slots`. On a CPU its weights are packed, in place.
            tokenizer: the base model's.
            slots: where adapters are held; from now on the engine's thread alone acquires and releases.
            host: adapters in this machine's memory; None is one without verification.
            compute_dtype: type of the matrix products, by autocast; float32 leaves them in the type of the weights.
            max_rows: requests that generate at once.
            prefill_tokens: tokens of a prompt that are read between two tokens of the other requests.
            cache_tokens: rows in use x tokens of the longest of them, at most; None is `ROW_TOKENS` a row, or one row
                that fills the context, if that is more.
            prefix_tokens: tokens whose keys and values are kept for requests that begin alike; 0 is none.

        Raises:
            ModelError: a batch of rows would not give the model's own logits.
        """
        if cache_tokens is None:
            cache_tokens = max(max_rows * ROW_TOKENS, context_tokens(model.config))
        if compute_dtype is torch.float32:  # autocast would have to unpack them
            packing.pack(model)
        self._batched = BatchedModel(model, slots, max_rows, cache_tokens, compute_dtype)
        self.context_tokens = min(self._batched.context_tokens, cache_tokens)
        """Most tokens of a prompt and its answer together."""
        self._tokenizer = tokenizer
        self._slots, self._host = slots, host or HostCache()
        self._rounds = Rounds(
            self._batched,
            slots,
            PrefixCache(prefix_tokens),
            max_rows,
            prefill_tokens,
            _end_tokens(model, tokenizer),
            token_bytes(tokenizer),
        )
        self._statistics = self._rounds.statistics()
        # What other threads hand to the engine's, guarded by the condition.
        self._changed = threading.Condition()
        self._arrived: deque[Request] = deque()
        self._departed: deque[Request] = deque()
        self._prefetched: deque[tuple[AdapterFiles, Matrices]] = deque()
        self._closed = False
        self._round_since_s: float | None = None
        """When the round under way began."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def check(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens an answer to this prompt can have at most.

        Raises:
            PromptTooLongError: none.
            UnknownTokenError: the prompt has a token that the model does not.
        """
        room = self.context_tokens - len(prompt_ids)
        if room < 1 or not prompt_ids:
            raise PromptTooLongError(
                f"the prompt has {len(prompt_ids)} tokens; this model reads 1 to {self.context_tokens - 1}"
            )
        self._check_tokens("the prompt", prompt_ids)
        return room

    def _check_tokens(self, place: str, tokens: Collection[int]) -> None:
        unknown = [token for token in (min(tokens), max(tokens)) if not 0 <= token < self._batched.vocabulary]
        if unknown:
            raise UnknownTokenError(
                f"{place} has the token {unknown[0]}; this model's are 0 to {self._batched.vocabulary - 1}"
            )

    async def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterFiles | None = None
    ) -> AsyncGenerator[Piece, None]:
        """Generate one answer, piece by piece. Closing or cancelling the iterator ends the request and its lease.

        Args:
            prompt_ids: the rendered prompt.
            sampling: how to choose tokens and when to stop; at least one token is generated.
            adapter: None is the base model.

        Yields:
            Pieces whose joined text is the answer; only the last has a `finish_reason`.

        Raises:
            PromptTooLongError: the prompt fills the model's context.
            UnknownTokenError: the prompt or the logit bias has a token that the model does not.
            ModelError: the adapter cannot be loaded. Other requests go on.
            EngineClosedError: the engine was closed.
            Exception: what the host cache's `verify` raises, or a failed step of the model.
        """
        submitted_s = time.perf_counter()
        room = self.check(prompt_ids)
        if sampling.logit_bias:
            self._check_tokens("logit_bias", sampling.logit_bias)
        request = Request(
            prompt=list(prompt_ids),
            sampling=sampling,
            max_tokens=max(1, min(sampling.max_tokens, room)),
            adapter=adapter,
            matrices=await self._matrices(adapter),
            sampler=Sampler(sampling),
            text=AnswerText(self._tokenizer, sampling.stop),
            loop=asyncio.get_running_loop(),
            submitted_s=submitted_s,
        )
        self._tell(self._arrived, request)
        try:
            while True:
                piece = await request.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason:
                    return
        finally:
            with self._changed:
                self._departed.append(request)
                self._changed.notify()

    async def _matrices(self, adapter: AdapterFiles | None) -> Matrices:
        if adapter is None:
            return {}
        held = self._host.peek(adapter.id)
        return await asyncio.to_thread(self._host.get, adapter) if held is None else held

    def _tell(self, inbox: deque[T], item: T) -> None:
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise EngineClosedError("the engine has stopped; start the endpoint again")
            inbox.append(item)
            self._changed.notify()

    async def prefetch(self, adapter: AdapterFiles) -> None:
        """Read an adapter that may be asked for soon, and put it into a slot that was never used, if there is one.

        A failure is logged; whoever asks for the adapter will see it.
        """
        try:
            self._tell(self._prefetched, (adapter, await self._matrices(adapter)))
        except Exception as error:
            log.warning("%s cannot be prefetched: %s", adapter.id, error, exc_info=True)

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread waits for work, or does it and gets somewhere."""
        since_s = self._round_since_s
        stuck = since_s is not None and time.perf_counter() - since_s > STUCK_S
        return self._thread.is_alive() and not stuck and self._rounds.failed_in_a_row < MOST_FAILURES

    def leases(self) -> dict[str, int]:
        """Adapter -> number of requests that use it now, for every adapter that has a slot."""
        return self._slots.leases()

    def statistics(self) -> EngineStatistics:
        """What the engine does, as of its last round."""
        return self._statistics

    def close(self) -> None:
        """Finish the round under way and end the thread; requests still running fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        """The engine's thread."""
        try:
            while self._wait():
                self._round_since_s = time.perf_counter()
                outcomes = self._rounds.run()
                self._round_since_s = None
                self._statistics = self._rounds.statistics()
                _deliver(outcomes)
        finally:
            with self._changed:
                self._closed = True
                left = [*self._rounds.end(), *self._arrived]
            _deliver([(request, EngineClosedError("the engine has stopped")) for request in left])

    def _wait(self) -> bool:
        """Take what other threads brought; sleep when there is nothing to do. False when the engine is closed."""
        with self._changed:
            while not (self._closed or self._arrived or self._departed or self._prefetched or self._rounds.busy):
                self._changed.wait()
            while self._arrived:
                self._rounds.push(self._arrived.popleft())
            while self._departed:
                self._rounds.drop(self._departed.popleft())
            while self._prefetched:
                self._rounds.preload(*self._prefetched.popleft())
            return not self._closed


def _deliver(outcomes: list[tuple[Request, Outcome]]) -> None:
    """Hand a round's outcomes over, in one call to each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[Request, Outcome]]] = {}
    for request, outcome in outcomes:
        loops.setdefault(request.loop, []).append((request, outcome))
    for loop, items in loops.items():
        try:
            loop.call_soon_threadsafe(_hand_over, items)
        except RuntimeError:  # the loop is closed, so nobody waits for these answers
            for request, _ in items:
                request.gone = True


def _hand_over(items: list[tuple[Request, Outcome]]) -> None:
    for request, outcome in items:
        request.pieces.put_nowait(outcome)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the model's, and the chat template's end of turn."""
    configured: Any = model.generation_config.eos_token_id if model.generation_config else None
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ends, tokenizer.eos_token_id] if token is not None)
