"""The rounds of continuous batching: who has a row, whose prompt is read, and what becomes of a token.

A round is one step of the model: it reads a part of one prompt, or makes one token for every request whose prompt is
read, in turn when there is both to do. So requests join and leave between any two tokens, and a long prompt delays the
others by one part of it at most.

Shapes: N rows, V vocabulary.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradientspace_ray.engine.adapters import AdapterFiles, Matrices
from gradientspace_ray.engine.batch import BatchedModel
from gradientspace_ray.engine.contract import Piece
from gradientspace_ray.engine.fairness import FairQueue
from gradientspace_ray.engine.prefix import PrefixCache
from gradientspace_ray.engine.request import Request
from gradientspace_ray.engine.sampling import choose_tokens
from gradientspace_ray.engine.slots import Slots
from gradientspace_ray.models.loading import ModelError

Outcome = Piece | Exception
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStatistics:
    """What the engine did so far, and what it does now."""

    rows: int = 0
    """Requests with a row: their prompt is being read, or their answer made."""
    waiting: dict[str | None, int] = field(default_factory=dict)
    """Adapter (None is the base model) -> requests that wait to be admitted."""
    leases: dict[str, int] = field(default_factory=dict)
    """Adapter in a slot -> requests that use it."""
    loads: int = 0
    """Adapters copied into a slot."""
    evictions: int = 0
    """Adapters that gave their slot up."""
    load_s: float = 0.0
    """Seconds, of all loads together."""
    prompt_tokens: int = 0
    """Prompt tokens of admitted requests."""
    cached_tokens: int = 0
    """Those of them that came out of the prefix cache."""
    generated_tokens: dict[str | None, int] = field(default_factory=dict)
    """Adapter -> tokens generated."""


class Rounds:
    """The state of the engine's thread, which alone may use it, in inference mode."""

    def __init__(
        self,
        batched: BatchedModel,
        slots: Slots,
        prefix: PrefixCache,
        max_rows: int,
        prefill_tokens: int,
        end_tokens: frozenset[int],
        bytes_of: Callable[[int], bytes],
    ) -> None:
        """Begin without requests; see `Engine` for the arguments, and `token_bytes` for `bytes_of`."""
        self._batched, self._slots, self._prefix = batched, slots, prefix
        self._max_rows, self._prefill_tokens = max_rows, prefill_tokens
        self.end_tokens = end_tokens
        self._bytes_of = bytes_of
        self._queue: FairQueue[str | None, Request] = FairQueue()
        self._decoding: list[Request] = []
        """The request of each row, its prompt read."""
        self._reading: Request | None = None
        """The request whose prompt is being read, in the row after those."""
        self._has_read = False
        """Whether the last round read a part of a prompt."""
        self._preloads: deque[tuple[AdapterFiles, Matrices]] = deque()
        self._outcomes: list[tuple[Request, Outcome]] = []
        self._generated: Counter[str | None] = Counter()
        self.failed_in_a_row = 0
        """Steps of the model that failed since the last one that did not."""

    @property
    def busy(self) -> bool:
        """Whether another round has something to do."""
        return bool(self._decoding or self._reading or len(self._queue) or self._preloads)

    def push(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self._queue.push(request.adapter_id, request)

    def drop(self, request: Request) -> None:
        """Forget a request that nobody waits for. If it has a row, the next round frees it."""
        request.gone = True
        self._queue.remove(request.adapter_id, request)

    def preload(self, adapter: AdapterFiles, matrices: Matrices) -> None:
        """Put an adapter into a slot that was never used, if there is one, in the next round."""
        self._preloads.append((adapter, matrices))

    def run(self) -> list[tuple[Request, Outcome]]:
        """One round; gives what came of it, in order."""
        self._drop_gone()
        self._preload()
        self._admit()
        if self._reading is not None and not (self._decoding and self._has_read):
            self._has_read = True
            self._read(self._reading)
        elif self._decoding:
            self._has_read = False
            self._decode()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def end(self) -> list[Request]:
        """All requests, their leases ended, for there will be no further round."""
        requests = [*self._decoding] if self._reading is None else [*self._decoding, self._reading]
        self._decoding, self._reading = [], None
        while (request := self._queue.admit(lambda _: True)) is not None:
            requests.append(request)
        for request in requests:
            self._release(request)
        return requests

    def statistics(self) -> EngineStatistics:
        """What the rounds did so far."""
        slots = self._slots.statistics()
        return EngineStatistics(
            rows=len(self._decoding) + (self._reading is not None),
            waiting=self._queue.waiting(),
            leases=slots.leases,
            loads=slots.loads,
            evictions=slots.evictions,
            load_s=slots.load_s,
            prompt_tokens=self._prefix.looked_up,
            cached_tokens=self._prefix.hit,
            generated_tokens=dict(self._generated),
        )

    def _drop_gone(self) -> None:
        if self._reading is not None and self._reading.gone:
            self._release(self._reading)
            self._reading = None
        self._leave([row for row, request in enumerate(self._decoding) if request.gone])

    def _preload(self) -> None:
        if not self._preloads:
            return
        adapter, matrices = self._preloads.popleft()
        try:
            lease = self._slots.acquire(adapter, matrices, unused=True)
        except ModelError as error:
            log.warning("%s cannot be prefetched: %s", adapter.id, error)
            return
        if lease is not None:
            self._slots.release(lease)

    def _admit(self) -> None:
        """Give the next request a row and a slot, if there are any. One at a time reads its prompt."""
        while self._reading is None and len(self._decoding) < self._max_rows:
            request = self._queue.admit(self._admissible)
            if request is None:
                return
            if request.lease is None:  # it failed
                continue
            request.matrices = {}
            request.queued_s = time.perf_counter() - request.submitted_s
            self._reading = request

    def _admissible(self, request: Request) -> bool:
        if not self._batched.cache.fits(len(self._decoding) + 1, self._longest(request)):
            return False
        try:
            request.lease = self._slots.acquire(request.adapter, request.matrices)
        except ModelError as error:
            self._fail(request, error)
            return True
        return request.lease is not None

    def _longest(self, request: Request) -> int:
        return max(other.longest for other in (*self._decoding, request))

    def _read(self, request: Request) -> None:
        """A part of a prompt; after the last one the first token of the answer."""
        row, cache = len(self._decoding), self._batched.cache
        try:
            if not request.read:
                cache.reserve(row + 1, self._longest(request))
                request.cached = self._prefix.restore(cache, row, request.adapter_id, request.prompt)
                request.read = request.cached
            part = request.prompt[request.read : request.read + self._prefill_tokens]
            logits_V = self._batched.prefill(row, _slot(request), request.read, part)
            request.read += len(part)
            if request.read < len(request.prompt):
                return
            self.failed_in_a_row = 0
            self._prefix.save(cache, row, request.adapter_id, request.prompt)
            self._reading = None
            self._decoding.append(request)
            self._extend([request], logits_V[None])
        except Exception as error:
            log.exception("a prompt could not be read")
            self.failed_in_a_row += 1
            self._reading = None
            self._decoding = self._decoding[:row]
            self._fail(request, error)

    def _decode(self) -> None:
        """One token for every request whose prompt is read."""
        requests = [*self._decoding]
        try:
            logits_NV = self._batched.decode(
                [request.answer[-1] for request in requests],
                [request.position for request in requests],
                [_slot(request) for request in requests],
            )
            self.failed_in_a_row = 0
            self._extend(requests, logits_NV)
        except Exception as error:
            log.exception("a step failed for %d requests", len(requests))
            self.failed_in_a_row += 1
            self._outcomes.extend((request, error) for request in requests)
            self._leave(range(len(requests)))

    def _extend(self, requests: Sequence[Request], logits_NV: Tensor) -> None:
        """Add a token to the answers of the last rows' requests."""
        tokens = choose_tokens(logits_NV, [request.sampler for request in requests])
        for request, token, logits_V in zip(requests, tokens, logits_NV, strict=True):
            piece = request.add(token, logits_V, self.end_tokens, self._bytes_of)
            self._generated[request.adapter_id] += 1
            if piece is not None:
                self._outcomes.append((request, piece))
        ended = [row for row, request in enumerate(self._decoding) if request.finish_reason]
        for row in ended:
            request = self._decoding[row]
            self._prefix.save(self._batched.cache, row, request.adapter_id, (request.prompt + request.answer)[:-1])
        self._leave(ended)

    def _leave(self, rows: Sequence[int]) -> None:
        """Free rows. The last row fills the hole, so that those in use stay the first ones."""
        for row in reversed(rows):  # the last row is never one that leaves, too
            self._release(self._decoding[row])
            last = len(self._decoding) - 1
            if row < last:
                self._batched.cache.move(last, row, self._decoding[last].position)
                self._decoding[row] = self._decoding[last]
            self._decoding.pop()
            if self._reading is not None and self._reading.read:
                self._batched.cache.move(last + 1, last, self._reading.read)

    def _release(self, request: Request) -> None:
        if request.lease is not None:
            self._slots.release(request.lease)
            request.lease = None

    def _fail(self, request: Request, error: Exception) -> None:
        self._release(request)
        self._outcomes.append((request, error))


def _slot(request: Request) -> int:
    assert request.lease is not None
    return request.lease.index
