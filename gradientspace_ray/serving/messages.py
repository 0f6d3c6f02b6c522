"""What the deployments say to each other: plain values, so that the ingress loads neither torch nor transformers."""

from dataclasses import dataclass
from typing import Literal

Message = dict[str, str]
"""`role` and `content`, as in a training example."""


class RunChangedError(RuntimeError):
    """The run directory no longer holds what the endpoint was started with."""


@dataclass(frozen=True)
class Choice:
    """What the router decided about a prompt."""

    expert: str | None
    """None is the generalist."""
    confidence: float
    """Calibrated probability, 0 to 1."""
    reason: Literal["routed", "low_confidence"]


@dataclass(frozen=True)
class Generation:
    """What the ingress asks of an expert; see `engine.sampling.Sampling` for the fields."""

    messages: list[Message]
    max_tokens: int | None
    """None is as many as the server allows."""
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Started:
    """First item of every answer: the request is good, and generation begins."""

    prompt_tokens: int


@dataclass(frozen=True)
class Refused:
    """Only item of the answer to a request that cannot be served."""

    message: str
    code: str | None
    param: str


@dataclass(frozen=True)
class Delta:
    """The next part of an answer; `finish_reason` is set on the last."""

    text: str
    finish_reason: str | None
    completion_tokens: int
    """So far."""
