"""What an endpoint counts, through Ray's metrics: names and labels, and for each deployment who records them.

A label takes few values: an expert is `name@digest` or `base`, never what a client wrote. Ray puts `ray_` before every
name, and the labels `application`, `deployment` and `replica` beside these. Its agents count a histogram's buckets
exactly, but take each value for the middle of its bucket in the sum.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal, Protocol

from ray.serve import metrics

from gradientspace_ray.registry import BASE

PREFIX = "gradientspace_"
Rejection = Literal[
    "auth", "rate", "concurrency", "overload", "too_large", "invalid", "unknown_model", "left", "failed"
]
Labels = dict[str, str]
# Name without prefix -> what it is, and its labels.
COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "requests_total": ("Requests that an expert was found for, by HTTP status.", ("expert", "reason", "status")),
    "prompt_tokens_total": ("Tokens of the prompts of these requests.", ("expert",)),
    "rejected_total": ("Requests refused before an expert was found.", ("reason",)),
    "abstentions_total": ("Routed requests that the generalist answers.", ("reason",)),
    "generated_tokens_total": ("Tokens generated, those of answers that were given up too.", ("expert",)),
    "adapter_loads_total": ("Adapters loaded into a slot.", ()),
    "adapter_load_seconds_total": ("Seconds that these loads took.", ()),
    "evictions_total": ("Adapters put out of their slot for another.", ()),
    "prefix_cache_tokens_total": ("Tokens of prompts, by where their keys and values came from.", ("result",)),
}
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "release_info": ("Share of the routed requests that a release gets; 0 once it is replaced.", ("release",)),
    "active_rows": ("Answers being generated.", ()),
    "waiting_requests": ("Requests that wait for a row.", ("expert",)),
    "slot_resident": ("1 while an adapter is in a slot.", ("expert",)),
    "slot_users": ("Requests that hold an adapter's slot.", ("expert",)),
}
# Seconds from a millisecond to two minutes, about 2.2 apart.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)
SHARES = tuple(tenth / 10 for tenth in range(1, 11))
HISTOGRAMS: Mapping[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "router_seconds": ("From the question to the router until its answer.", (), SECONDS),
    "router_confidence": ("Calibrated probability of the router's best expert, by who answers.", ("expert",), SHARES),
    "queue_seconds": ("From the engine's acceptance of an answer until its first step.", ("expert",), SECONDS),
    "time_to_first_token_seconds": ("From the request's arrival until its first token.", ("expert",), SECONDS),
    "time_per_token_seconds": ("Mean time of an answer's further tokens.", ("expert",), SECONDS),
    "request_seconds": ("From the request's arrival until its last token.", ("expert",), SECONDS),
}


class Statistics(Protocol):
    """What an engine tells about itself. Totals run from its start; the base model's adapter is None."""

    @property
    def rows(self) -> int:
        """Answers being generated."""

    @property
    def waiting(self) -> Mapping[str | None, int]:
        """Requests without a row, by adapter."""

    @property
    def leases(self) -> Mapping[str, int]:
        """Adapters in slots, with the number of their users."""

    @property
    def loads(self) -> int:
        """Total."""

    @property
    def load_s(self) -> float:
        """Total."""

    @property
    def evictions(self) -> int:
        """Total."""

    @property
    def cached_tokens(self) -> int:
        """Total of the prompts' tokens whose keys and values were cached."""

    @property
    def prompt_tokens(self) -> int:
        """Total of the prompts' tokens, cached or not."""

    @property
    def generated_tokens(self) -> Mapping[str | None, int]:
        """Totals of tokens, by adapter."""


class IngressMetrics:
    """What the ingress records. To be made inside the replica, whose labels it takes."""

    def __init__(self) -> None:
        self._requests = _counter("requests_total")
        self._prompt_tokens = _counter("prompt_tokens_total")
        self._rejected = _counter("rejected_total")
        self._abstentions = _counter("abstentions_total")
        self._release = _gauge("release_info")
        self._router_s = _histogram("router_seconds")
        self._confidence = _histogram("router_confidence")
        self._queue_s = _histogram("queue_seconds")
        self._first_token_s = _histogram("time_to_first_token_seconds")
        self._token_s = _histogram("time_per_token_seconds")
        self._request_s = _histogram("request_seconds")
        self._releases: set[str] = set()

    def rejected(self, reason: Rejection) -> None:
        """A request is refused before it has an expert."""
        self._rejected.inc(tags={"reason": reason})

    def routed(self, expert: str, reason: str, confidence: float, router_s: float) -> None:
        """The router has decided. Not for requests that name their expert.

        Args:
            expert: who answers.
            reason: `routed`, or why the generalist answers.
            confidence: calibrated probability, 0 to 1.
            router_s: seconds.
        """
        self._router_s.observe(router_s)
        self._confidence.observe(confidence, {"expert": expert})
        if reason != "routed":
            self._abstentions.inc(tags={"reason": reason})

    def first_token(self, expert: str, elapsed_s: float, queued_s: float | None) -> None:
        """An answer has begun.

        Args:
            expert: who answers.
            elapsed_s: seconds since the request came in.
            queued_s: `Piece.queued_s`.
        """
        labels = {"expert": expert}
        self._first_token_s.observe(elapsed_s, labels)
        if queued_s is not None:
            self._queue_s.observe(queued_s, labels)

    def ended(
        self,
        expert: str,
        reason: str,
        status: int,
        elapsed_s: float,
        *,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        choices: int = 1,
        first_token_s: float | None = None,
    ) -> None:
        """A request that had an expert is over, well or not.

        Args:
            expert: who answered, or should have.
            reason: `forced`, or the router's.
            status: of the HTTP answer, or what it would be had it not begun; 499 where the client left first.
            elapsed_s: seconds since the request came in.
            prompt_tokens: read for it.
            completion_tokens: of all its choices, which are generated side by side.
            choices: how many answers it asked for.
            first_token_s: seconds from the request's arrival to the first token; None where there was none.
        """
        labels = {"expert": expert}
        self._requests.inc(tags=labels | {"reason": reason, "status": str(status)})
        self._request_s.observe(elapsed_s, labels)
        if prompt_tokens:
            self._prompt_tokens.inc(prompt_tokens, labels)
        further_tokens = completion_tokens / choices - 1
        if first_token_s is not None and further_tokens > 0:
            self._token_s.observe((elapsed_s - first_token_s) / further_tokens, labels)

    def released(self, shares: Mapping[str, float]) -> None:
        """Which releases are live.

        Args:
            shares: release -> its share of the routed requests, 0 to 1; those that are not in it have ended.
        """
        self._releases |= shares.keys()
        for release in self._releases:
            self._release.set(shares.get(release, 0.0), {"release": release})


class EngineMetrics:
    """What the experts record. To be made inside the replica, whose labels it takes."""

    def __init__(self) -> None:
        self._active_rows = _gauge("active_rows")
        self._waiting = _PerExpert(_gauge("waiting_requests"))
        self._resident = _PerExpert(_gauge("slot_resident"))
        self._users = _PerExpert(_gauge("slot_users"))
        self._generated = _RunningTotals(_counter("generated_tokens_total"))
        self._loads = _RunningTotals(_counter("adapter_loads_total"))
        self._load_s = _RunningTotals(_counter("adapter_load_seconds_total"))
        self._evictions = _RunningTotals(_counter("evictions_total"))
        self._prefix = _RunningTotals(_counter("prefix_cache_tokens_total"))

    def export(self, statistics: Statistics) -> None:
        """Record the engine's state. To be called every second or so, Ray collects every ten by default."""
        self._active_rows.set(statistics.rows)
        self._waiting.set(statistics.waiting)
        self._resident.set(dict.fromkeys(statistics.leases, 1))
        self._users.set(statistics.leases)
        for adapter, tokens in statistics.generated_tokens.items():
            self._generated.reach(tokens, {"expert": adapter or BASE})
        self._loads.reach(statistics.loads, {})
        self._load_s.reach(statistics.load_s, {})
        self._evictions.reach(statistics.evictions, {})
        hits = statistics.cached_tokens
        self._prefix.reach(hits, {"result": "hit"})
        self._prefix.reach(statistics.prompt_tokens - hits, {"result": "computed"})


class _RunningTotals:
    """A counter that follows totals which somebody else adds up."""

    def __init__(self, counter: metrics.Counter) -> None:
        self._counter = counter
        self._reached: defaultdict[tuple[tuple[str, str], ...], float] = defaultdict(float)

    def reach(self, total: float, labels: Labels) -> None:
        series = tuple(sorted(labels.items()))
        # A total below the last one has begun again, as after an engine's restart.
        added = total - self._reached[series] if total >= self._reached[series] else total
        self._reached[series] = total
        if added > 0:
            self._counter.inc(added, labels)


class _PerExpert:
    """A gauge for each adapter, which falls to 0 when the adapter is gone: Ray exports the last value for ever."""

    def __init__(self, gauge: metrics.Gauge) -> None:
        self._gauge = gauge
        self._seen: set[str] = set()

    def set(self, values: Mapping[str, int] | Mapping[str | None, int]) -> None:
        experts = {adapter or BASE: value for adapter, value in values.items()}
        for expert in self._seen | experts.keys():
            self._gauge.set(experts.get(expert, 0), {"expert": expert})
        self._seen |= experts.keys()


# Serve's annotations ask for labels as a tuple of one.
def _counter(name: str) -> metrics.Counter:
    description, labels = COUNTERS[name]
    return metrics.Counter(f"{PREFIX}{name}", description, labels)  # type: ignore[arg-type]


def _gauge(name: str) -> metrics.Gauge:
    description, labels = GAUGES[name]
    return metrics.Gauge(f"{PREFIX}{name}", description, labels)  # type: ignore[arg-type]


def _histogram(name: str) -> metrics.Histogram:
    description, labels, boundaries = HISTOGRAMS[name]
    return metrics.Histogram(f"{PREFIX}{name}", description, list(boundaries), labels)  # type: ignore[arg-type]
