"""What the deployments say to each other: plain values, so that the ingress loads neither torch nor transformers."""

from dataclasses import dataclass, field
from typing import Literal, TypeGuard

from gradientspace_ray.engine.contract import Piece, Sampling

Message = dict[str, str]
"""`role` and `content`, as in a training example."""
Prompt = list[Message] | str | list[int]
"""A conversation to render, a text to continue as it is, or token ids."""
Reason = Literal["routed", "low_confidence", "out_of_distribution"]


class SickReplicaError(RuntimeError):
    """The replica that was asked cannot answer anybody, and is about to be replaced; another one may."""


class RunChangedError(RuntimeError):
    """The run directory no longer holds what the endpoint was started with."""


def is_conversation(prompt: Prompt) -> TypeGuard[list[Message]]:
    """Whether a prompt is to be rendered."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


@dataclass(frozen=True)
class Place:
    """Content by its identity, and where its files are. Equal ids are equal content, wherever it is."""

    id: str
    """`name@digest` of an adapter, the digest of a router."""
    run_uri: str
    folder: str
    """Relative to the run directory."""


@dataclass(frozen=True)
class RouteRequest:
    """What the ingress asks of the router deployment."""

    router: Place
    messages: list[Message]


@dataclass(frozen=True)
class Choice:
    """What the router decided about a conversation."""

    expert: str | None
    """None is the generalist."""
    confidence: float
    """Calibrated probability of `best`, 0 to 1."""
    reason: Reason
    probabilities: dict[str, float] = field(default_factory=dict)
    """Expert -> calibrated probability."""
    second_best: str | None = None
    """The most probable expert beside the one that answers; None where there is no other."""


@dataclass(frozen=True)
class Generation:
    """What the ingress asks of the experts: one prompt, one answer."""

    prompt: Prompt
    sampling: Sampling
    adapter: Place | None
    """None is the base model."""
    prefetch: Place | None = None
    """An adapter that may be asked for next: the router's second choice."""


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


AnswerItem = Started | Refused | Piece
