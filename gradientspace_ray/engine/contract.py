"""What a request asks of an engine, and what comes back: plain values, so that an HTTP server need not load torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How one answer is generated."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling (arXiv 1904.09751): the fewest most likely tokens that hold this much probability."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is all of them."""
    seed: int | None = None
    """Equal seeds give equal answers; None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token that the answer has already."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token as often as the answer has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    top_logprobs: int | None = None
    """How many alternatives come with each token's log-probability; 0 is none but the token, None none at all."""
    ignore_eos: bool = False
    """Go on at an end-of-text token, up to `max_tokens`."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer, and how likely the model held it before temperature, penalties and biases."""

    token: str
    logprob: float
    """Nats."""
    bytes: tuple[int, ...]
    """UTF-8; a token may hold a part of a character."""
    top: tuple["TokenLogprob", ...] = ()
    """The most likely tokens in its place, most likely first."""


@dataclass(frozen=True)
class Piece:
    """The next part of an answer."""

    text: str
    finish_reason: FinishReason | None
    """Set on the last piece: `stop` at an end-of-text token or a stop text, `length` at the limit."""
    completion_tokens: int
    """Tokens generated so far, an end-of-text token included."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens since the last piece, where the request asked for them; the end-of-text token has none."""
    cached_tokens: int = 0
    """Tokens of the prompt that came out of the prefix cache."""
    queued_s: float | None = None
    """Seconds from `submit` to the first step; on the first piece only."""
