"""One request from its arrival to its end, told exactly once to its limits, to the metrics and to the log."""

import time
from dataclasses import dataclass, field

from gradientspace_ray.engine.contract import Piece
from gradientspace_ray.serving.answering import Begun
from gradientspace_ray.serving.keys import Ticket
from gradientspace_ray.serving.metrics import IngressMetrics, Rejection
from gradientspace_ray.serving.openai_requests import SamplingParameters
from gradientspace_ray.serving.request_log import RequestRecord, write
from gradientspace_ray.serving.routes import FORCED, Route

CLIENT_LEFT = 499
"""Status of a request whose client did not wait for the end, as nginx counts it; nobody receives it."""
# Status of a request that ends before its expert is known -> what the metrics call that.
REJECTIONS: dict[int, Rejection] = {
    400: "invalid",
    404: "unknown_model",
    408: "invalid",
    413: "too_large",
    415: "invalid",
    429: "overload",
    CLIENT_LEFT: "left",
    503: "overload",
}


@dataclass
class Call:
    """A request under way."""

    request_id: str
    path: str
    ticket: Ticket
    metrics: IngressMetrics
    log_prompts: bool
    request: SamplingParameters | None = None
    route: Route | None = None
    started_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    """Seconds from the arrival to the first token of any choice."""
    queued_s: float | None = None
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    """Of each prompt."""
    completion_tokens: dict[int, int] = field(default_factory=dict)
    cached_tokens: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    ended: bool = False

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request came in."""
        return time.perf_counter() - self.started_s

    def routed(self, route: Route) -> None:
        """It is decided who answers."""
        self.route = route
        if route.reason != FORCED:
            self.metrics.routed(route.model, route.reason, route.confidence, route.router_ms / 1000)

    def first(self, choice: int, begun: Begun) -> None:
        """A choice has its first piece."""
        prompt = choice // self.request.choices_per_prompt if self.request is not None else 0
        self.prompt_tokens[prompt] = begun.started.prompt_tokens
        if self.first_token_s is None and self.route is not None:
            self.first_token_s, self.queued_s = self.elapsed_s, begun.first.queued_s
            self.metrics.first_token(self.route.model, self.first_token_s, self.queued_s)

    def add(self, choice: int, piece: Piece) -> None:
        """A choice has a piece more, or all of them as one."""
        self.completion_tokens[choice] = piece.completion_tokens
        self.cached_tokens = max(self.cached_tokens, piece.cached_tokens)
        if self.log_prompts:
            self.texts[choice] = self.texts.get(choice, "") + piece.text

    def end(self, status: int, error_code: str | None = None) -> None:
        """The request is over; only the first call counts."""
        if self.ended:
            return
        self.ended = True
        self.ticket.release()
        elapsed_s = self.elapsed_s
        if self.route is None:
            self.metrics.rejected(REJECTIONS.get(status, "failed"))
        else:
            self.metrics.ended(
                self.route.model,
                self.route.reason,
                status,
                elapsed_s,
                prompt_tokens=sum(self.prompt_tokens.values()),
                completion_tokens=sum(self.completion_tokens.values()),
                choices=max(1, len(self.completion_tokens)),
                first_token_s=self.first_token_s,
            )
        write(self._record(status, error_code, elapsed_s), with_texts=self.log_prompts)

    def _record(self, status: int, error_code: str | None, elapsed_s: float) -> RequestRecord:
        record = RequestRecord(
            self.request_id,
            path=self.path,
            key=self.ticket.key.name if self.ticket.key else None,
            status=status,
            error=error_code,
            disconnected=status == CLIENT_LEFT,
            total_ms=1000 * elapsed_s,
        )
        if self.request is not None:
            record.model, record.stream = self.request.model, self.request.streams
            if self.log_prompts:
                record.prompt, record.answer = self.request.prompts, list(self.texts.values())
        if self.route is not None:
            record.expert, record.release, record.reason = self.route.model, self.route.release, self.route.reason
            record.confidence, record.router_ms = self.route.confidence, self.route.router_ms
        if self.first_token_s is not None:
            record.ttft_ms = 1000 * self.first_token_s
            record.queue_ms = None if self.queued_s is None else 1000 * self.queued_s
            record.prompt_tokens = sum(self.prompt_tokens.values())
            record.cached_tokens = self.cached_tokens
            record.completion_tokens = sum(self.completion_tokens.values())
        return record
