"""Who answers a request, and why: the decision as an HTTP answer tells it."""

from dataclasses import dataclass, field
from typing import Any

from gradientspace_ray.registry import BASE
from gradientspace_ray.serving.messages import Place

FORCED = "forced"


@dataclass(frozen=True)
class Route:
    """The decision about one prompt."""

    release: str
    """The release whose names and router decided."""
    adapter: Place | None
    """None is the base model."""
    reason: str
    """`routed`, `low_confidence` or `out_of_distribution` (the generalist answers), or `forced` (the request named
    the model)."""
    confidence: float = 1.0
    router_ms: float = 0.0
    """From the question to the router until its answer, waiting and batching included."""
    second_best: str | None = None
    """Name of the next best expert."""
    prefetch: Place | None = None
    """Its adapter."""
    probabilities: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """`name@digest`, or `base`."""
        return self.adapter.id if self.adapter else BASE

    @property
    def expert(self) -> str:
        """The name alone."""
        return self.model.partition("@")[0]

    @property
    def fingerprint(self) -> str:
        """Changes when the weights that answer do."""
        return f"fp_{self.model.rpartition('@')[2]}"

    @property
    def headers(self) -> dict[str, str]:
        """The decision, for the answer's headers."""
        headers = {
            "x-gradientspace-expert": self.expert,
            "x-gradientspace-confidence": f"{self.confidence:.4f}",
            "x-gradientspace-reason": self.reason,
            "x-gradientspace-router-ms": f"{self.router_ms:.1f}",
            "x-gradientspace-release": self.release,
        }
        return headers | ({"x-gradientspace-second-best": self.second_best} if self.second_best else {})

    @property
    def explanation(self) -> dict[str, Any]:
        """The decision, for the answer's `gradientspace` field."""
        return {
            "expert": self.expert,
            "model": self.model,
            "confidence": round(self.confidence, 6),
            "reason": self.reason,
            "router_ms": round(self.router_ms, 3),
            "second_best": self.second_best,
            "probabilities": {name: round(value, 6) for name, value in self.probabilities.items()},
            "release": self.release,
        }
