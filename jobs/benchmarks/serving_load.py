"""An open-loop load on whatever answers requests, and the numbers that are read from it.

Requests are due at times that are fixed beforehand, whether or not earlier ones are answered, and their latencies count
from then: a slow server cannot hide its queue by holding the next request back (coordinated omission).
"""

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

Messages = list[dict[str, str]]
Answer = Callable[["Request"], AsyncGenerator[int, None]]
"""Answers one request: yields how many tokens have come so far, each time that some do."""
ZIPF_EXPONENT = 1.0
UNIFORM, ZIPF, ROUND_ROBIN, MORE_EXPERTS = "uniform", "zipf", "round_robin", "more_experts_than_slots"
WORKLOADS = (UNIFORM, ZIPF, ROUND_ROBIN, MORE_EXPERTS)


class AnswerError(RuntimeError):
    """A request without a whole answer; the message says why in one line."""


@dataclass(frozen=True)
class Prompt:
    """One conversation up to where an answer is wanted, and the same in tokens."""

    messages: Messages
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One greedy answer of exactly so many tokens, whatever they are."""

    number: int
    prompt: Prompt
    max_tokens: int
    expert: int
    due_s: float
    """Seconds after the start of the load."""


@dataclass
class Trace:
    """What came of a request."""

    request: Request
    due: float
    """When it was due, on the clock of `time.perf_counter`."""
    events: list[tuple[float, int]] = field(default_factory=list)
    """When tokens came, on the same clock, and how many had come by then."""
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.events[0][0] - self.due

    def gaps(self) -> list[tuple[float, float, int]]:
        """Start, end and number of tokens of the times between events."""
        return [(start, end, now - before) for (start, before), (end, now) in pairwise(self.events)]


@dataclass(frozen=True)
class DecodeRate:
    """How fast tokens come while many requests are past their first token."""

    tokens_per_second: float
    at_once: int
    """So many requests at the least."""
    seconds: float
    """How long there were so many."""


def drawn_experts(workload: str, experts: int, count: int, seed: int) -> list[int]:
    """Which expert each request asks for.

    Args:
        workload: one of `WORKLOADS`. Zipf: the expert of rank i is asked for with a probability in proportion to 1 / i.
        experts: how many there are.
        count: number of requests.
        seed: of the draws; in turn draws nothing.
    """
    if workload in (ROUND_ROBIN, MORE_EXPERTS):
        return [number % experts for number in range(count)]
    shares = np.arange(1, experts + 1, dtype=float) ** -(ZIPF_EXPONENT if workload == ZIPF else 0.0)
    return [int(expert) for expert in np.random.default_rng(seed).choice(experts, count, p=shares / shares.sum())]


def made_requests(
    prompts: Sequence[Prompt], experts: Sequence[int], tokens: tuple[int, int], rate: float | None, seed: int
) -> list[Request]:
    """One request for each prompt. Only its expert depends on the experts.

    Args:
        prompts: in the order of the requests.
        experts: of each.
        tokens: the shortest and the longest answer; lengths are uniform.
        rate: requests per second of a Poisson process; None has all due at once.
        seed: of lengths and times.
    """
    draw = np.random.default_rng(seed)
    lengths = draw.integers(tokens[0], tokens[1] + 1, len(prompts))
    gaps_s = draw.exponential(1 / rate, len(prompts)) if rate else np.zeros(len(prompts))
    # The first is due at once: before it there is nothing to measure.
    dues_s = np.cumsum(gaps_s) - gaps_s[:1]
    columns = range(len(prompts)), prompts, lengths.tolist(), experts, dues_s.tolist()
    return [Request(*row) for row in zip(*columns, strict=True)]


async def play(requests: Sequence[Request], answer: Answer, limit_s: float) -> list[Trace]:
    """Send every request when it is due, and write down what comes.

    Args:
        requests: what to ask, in the order of their times.
        answer: who answers; what it raises is the error of that request alone.
        limit_s: so many seconds after the last was due, requests that still run are cancelled; that is an error too.
    """
    start = time.perf_counter()
    traces = [Trace(request, start + request.due_s) for request in requests]
    tasks = []
    for trace in traces:
        if (early_s := trace.due - time.perf_counter()) > 0:
            await asyncio.sleep(early_s)
        # Tasks begin in the order of their making, so that requests that are due together keep theirs.
        tasks.append(asyncio.create_task(_follow(trace, answer)))
    _, pending = await asyncio.wait(tasks, timeout=limit_s)
    for task in pending:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for trace, task, outcome in zip(traces, tasks, outcomes, strict=True):
        came = trace.events[-1][1] if trace.events else 0
        if task in pending:
            trace.error = f"{came} of {trace.request.max_tokens} tokens within {limit_s:g} s"
        elif outcome is not None:
            trace.error = f"{type(outcome).__name__}: {str(outcome).partition(chr(10))[0]}"
        elif came != trace.request.max_tokens:
            trace.error = f"ended after {came} of {trace.request.max_tokens} tokens"
    return traces


async def _follow(trace: Trace, answer: Answer) -> None:
    async with aclosing(answer(trace.request)) as counts:
        async for count in counts:
            trace.events.append((time.perf_counter(), count))


def decode_rate(traces: Sequence[Trace], rows: int) -> DecodeRate:
    """Tokens per second while at least `rows` requests are between their first token and their last.

    A token counts in proportion to how much of the time since the one before it falls into such a period, so that the
    borders of periods neither gain nor lose tokens. Where there are never so many at once, the most that there are is
    what counts. It is 0 where no request got two tokens.
    """
    spans = [(trace.events[0][0], trace.events[-1][0]) for trace in traces if len(trace.events) > 1]
    if not spans:
        return DecodeRate(0.0, 0, 0.0)
    edges = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    periods, running = [], 0
    for (start, change), (end, _) in pairwise(edges):
        running += change
        periods.append((start, end, running))
    most = min(rows, max(number for *_, number in periods))
    full = [(start, end) for start, end, number in periods if number >= most and end > start]
    seconds = sum(end - start for start, end in full)
    gaps = [gap for trace in traces for gap in trace.gaps() if gap[1] > gap[0]]
    tokens = sum(
        count * max(0.0, min(end, until) - max(start, since)) / (end - start)
        for start, end, count in gaps
        for since, until in full
    )
    return DecodeRate(tokens / seconds, most, seconds)


def summary(bursts: Sequence[Sequence[Trace]], opened: Sequence[Trace], rows: int) -> dict[str, Any]:
    """The numbers of one contender under one workload.

    Args:
        bursts: for each round, what came of requests that were all due at once: the speed of decoding, a median.
        opened: what came of requests that came by and by: the latencies.
        rows: requests that are a full batch.
    """
    rates = [decode_rate(traces, rows) for traces in bursts]
    all_traces = [trace for traces in (*bursts, opened) for trace in traces]
    begun = [trace for trace in opened if trace.events]
    ttft_ms = [trace.ttft_s * 1000 for trace in begun]
    gaps = [gap for trace in begun for gap in trace.gaps()]
    itl_ms = [(end - start) * 1000 / count for start, end, count in gaps for _ in range(count)]
    errors = [trace.error for trace in all_traces if trace.error]
    return {
        "decode_tokens_per_second": _rounded(statistics.median(rate.tokens_per_second for rate in rates)),
        "ttft_p50_ms": percentile(ttft_ms, 50),
        "ttft_p99_ms": percentile(ttft_ms, 99),
        "itl_p50_ms": percentile(itl_ms, 50),
        "itl_p99_ms": percentile(itl_ms, 99),
        "errors": len(errors),
        "error_texts": sorted(set(errors)),
        "decode_tokens_per_second_by_round": [_rounded(rate.tokens_per_second) for rate in rates],
        "decoding_at_once": min(rate.at_once for rate in rates),
        "decoding_seconds": _rounded(sum(rate.seconds for rate in rates)),
        "burst_tokens_per_second": _rounded(statistics.median(burst_rate(traces) for traces in bursts)),
        "requests": len(all_traces),
    }


def burst_rate(traces: Sequence[Trace]) -> float:
    """Tokens per second from when requests are due to the last token, reading the prompts included."""
    ends = [trace.events[-1] for trace in traces if trace.events]
    if not ends:
        return 0.0
    return sum(count for _, count in ends) / (max(end for end, _ in ends) - min(trace.due for trace in traces))


def percentile(values: Sequence[float], percent: float) -> float | None:
    """By linear interpolation, to a thousandth; None of nothing."""
    return _rounded(float(np.percentile(values, percent))) if values else None


def _rounded(value: float) -> float:
    return round(value, 3)
