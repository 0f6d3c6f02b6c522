"""One request on its way: what it asks, where it is, and the pieces that it got."""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import Tensor

from gradientspace_ray.engine.adapters import AdapterFiles, Matrices
from gradientspace_ray.engine.contract import FinishReason, Piece, Sampling, TokenLogprob
from gradientspace_ray.engine.sampling import Sampler, token_logprob
from gradientspace_ray.engine.slots import Lease
from gradientspace_ray.engine.text import AnswerText


@dataclass(eq=False)
class Request:
    """A prompt and its answer so far. It belongs to the engine's thread, but for `pieces` and `gone`."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    """What the request asks for, or less: what the context has room for."""
    adapter: AdapterFiles | None
    matrices: Matrices
    """The adapter's, until it has a slot."""
    sampler: Sampler
    text: AnswerText
    loop: asyncio.AbstractEventLoop
    """Where the answer is awaited."""
    submitted_s: float
    """On the clock of `time.perf_counter`."""
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    gone: bool = False
    """Nobody waits for the answer any more."""
    lease: Lease | None = None
    read: int = 0
    """Tokens of the prompt in the cache."""
    cached: int = 0
    """Those of them that came out of the prefix cache."""
    queued_s: float | None = None
    """Told with the first piece."""
    answer: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def adapter_id(self) -> str | None:
        """None is the base model."""
        return self.adapter.id if self.adapter else None

    @property
    def longest(self) -> int:
        """Tokens that its row may hold in the end: the last one of the answer is never read."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def position(self) -> int:
        """Where the next token is written, which is the number of tokens that its row holds."""
        return len(self.prompt) + len(self.answer) - 1

    def add(
        self, token: int, logits_V: Tensor, end_tokens: Collection[int], bytes_of: Callable[[int], bytes]
    ) -> Piece | None:
        """Take the next token of the answer.

        Args:
            token: what was chosen.
            logits_V: what the model said of it.
            end_tokens: tokens that end an answer.
            bytes_of: see `token_bytes`.

        Returns:
            What can be shown now; the last piece has a finish reason.
        """
        self.answer.append(token)
        text = ""
        logprobs: tuple[TokenLogprob, ...] = ()
        if token in end_tokens and not self.sampling.ignore_eos:
            self.finish_reason = "stop"
        else:
            top = self.sampling.top_logprobs
            text, logprobs = self.text.push(
                token, None if top is None else token_logprob(logits_V, token, top, bytes_of)
            )
            if self.text.stopped:
                self.finish_reason = "stop"
            elif len(self.answer) >= self.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            rest, more = self.text.flush()
            text, logprobs = text + rest, logprobs + more
            if self.text.stopped:
                self.finish_reason = "stop"
        if not text and not self.finish_reason:
            return None
        return self._piece(text, logprobs)

    def _piece(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> Piece:
        queued_s, self.queued_s = self.queued_s, None
        return Piece(text, self.finish_reason, len(self.answer), logprobs, self.cached, queued_s)
