"""The contenders under the same loads, in turns, and what their numbers come down to."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import serving_engines as engines
from serving_engines import Setup
from serving_load import (
    MORE_EXPERTS,
    ROUND_ROBIN,
    Answer,
    AnswerError,
    Prompt,
    Request,
    Trace,
    decode_rate,
    drawn_experts,
    made_requests,
    percentile,
    summary,
)
from serving_peers import transformers_serve
from serving_process import ContenderProcess, Open

from gradientspace_ray.engine.adapters import AdapterFiles, HostCache
from gradientspace_ray.engine.slots import Slots

ENGINE, BASE, PEFT, ENSEMBLE, WIDE_ENSEMBLE = "engine", "base_only", "peft_mixed", "ensemble", "ensemble_wide"
LOAD = 0.6
"""The open loop's rate, as a share of the requests per second that the base model answers when all wait."""
LIMIT_S = 300.0
WARM_TOKENS = 4
Tell = Callable[[str], None]


class Contender(NamedTuple):
    """One of those who are measured."""

    open: Open
    mixes: bool
    """Which experts are asked for may matter to it: it is measured under every workload, else once for all."""
    share: float = 1.0
    """The part of the requests that it gets, the first ones: a slow one shows its speed with fewer."""
    rounds: int | None = None
    """At most so many."""


def _wide_ensemble(setup: Setup) -> AbstractAsyncContextManager[Answer]:
    return engines.ensemble(setup, requests_at_once=setup.rows)


CONTENDERS = {
    BASE: Contender(partial(engines.engine, base_only=True), mixes=True),
    ENGINE: Contender(engines.engine, mixes=True),
    PEFT: Contender(engines.peft_mixed, mixes=True, rounds=2),
    ENSEMBLE: Contender(engines.ensemble, mixes=False, share=0.25, rounds=2),
    WIDE_ENSEMBLE: Contender(_wide_ensemble, mixes=False, share=0.5, rounds=1),
    "transformers_generate": Contender(engines.transformers_generate, mixes=False, rounds=1),
    "transformers_continuous_batching": Contender(engines.continuous_batching, mixes=False, rounds=1),
    "transformers_serve": Contender(transformers_serve, mixes=False, share=0.5, rounds=1),
    "transformers_serve_continuous_batching": Contender(
        partial(transformers_serve, flags=("--continuous-batching",)), mixes=False, rounds=1
    ),
}
"""The last five are there for reference. `ensemble` has no more rows than the others, `ensemble_wide` as many for each
of its experts: that much memory for keys and values would let the others answer more requests at once, too."""


class Plan(NamedTuple):
    """What is asked of everybody."""

    workloads: Sequence[str]
    experts: int
    many_experts: int
    """Of the workload with more experts than slots."""
    prompts: Sequence[Prompt]
    burst: int
    """Requests of one burst."""
    requests: int
    """Of the open loop."""
    tokens: tuple[int, int]
    """Shortest and longest answer."""
    rounds: int
    rate: float | None
    """Requests per second of the open loop; None is `LOAD` of what the base model can do."""
    seed: int

    def load(self, number: int, workload: str, rate: float | None) -> list[Request]:
        """The requests of one load. Workloads share prompts, lengths and times; only the experts differ.

        Each load has prompts of its own, so that no prefix cache knows them.

        Args:
            number: of the load: those below `rounds` are bursts, then comes the open loop.
            workload: decides the experts.
            rate: of the open loop; None is a burst.
        """
        start = number * self.burst
        count = self.requests if rate else self.burst
        experts = self.many_experts if workload == MORE_EXPERTS else self.experts
        return made_requests(
            self.prompts[start : start + count],
            drawn_experts(workload, experts, count, self.seed + number),
            self.tokens,
            rate,
            self.seed + number,
        )

    def warm_up(self, rows: int) -> list[Request]:
        """One full batch of short answers to the last prompts, which no load has."""
        prompts, experts = self.prompts[-rows:], drawn_experts(ROUND_ROBIN, self.experts, rows, self.seed)
        return made_requests(prompts, experts, (WARM_TOKENS, WARM_TOKENS), None, self.seed)


Load = dict[tuple[str, str], list[Trace]]
"""(contender, workload) -> what came of the requests of one load. `ALL` stands for every workload."""
ALL = "all"


def compare(setup: Setup, plan: Plan, names: Sequence[str], tell: Tell) -> dict[str, Any]:
    """Part of the report: `workloads`, `rate_per_second`, `ratios` and who was left out (`skipped`).

    Args:
        setup: what the contenders share.
        plan: what is asked.
        names: contenders.
        tell: is told what has been done.

    Raises:
        MethodError: a contender's process ended.
    """
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        contenders: dict[str, ContenderProcess] = {}
        warm = plan.warm_up(setup.rows)
        for name in names:
            started = perf_counter()
            try:
                contenders[name] = stack.enter_context(ContenderProcess(name, CONTENDERS[name].open, setup))
            except AnswerError as error:
                skipped[name] = str(error)
                continue
            contenders[name].play(warm, LIMIT_S)
            tell(f"{name}: ready after {perf_counter() - started:.0f} s")
        bursts = [turn(plan, contenders, number, None, tell) for number in range(plan.rounds)]
        rate = plan.rate or LOAD * capacity(bursts[0])
        tell(f"open loop: {rate:.2f} requests per second")
        opened = turn(plan, contenders, plan.rounds, rate, tell)
    found = {workload: summaries(setup, workload, [*contenders], bursts, opened) for workload in plan.workloads}
    compared = [ratio for workload in plan.workloads for ratio in ratios(setup, workload, bursts)]
    return {"rate_per_second": round(rate, 3), "workloads": found, "ratios": compared, "skipped": skipped}


def turn(plan: Plan, contenders: Mapping[str, ContenderProcess], number: int, rate: float | None, tell: Tell) -> Load:
    """One load for everybody, one after the other: those whom experts matter to have it next to each other.

    Args:
        plan: what is asked.
        contenders: by name.
        number: of the load.
        rate: of the open loop, which has all contenders; None is a burst, where some sit out later rounds.
        tell: is told what has been done.
    """
    load: Load = {}

    def measure(name: str, workload: str, key: str) -> None:
        requests = plan.load(number, workload, rate)
        own = requests[: max(1, round(CONTENDERS[name].share * len(requests)))]
        started = perf_counter()
        load[name, key] = contenders[name].play(own, LIMIT_S)
        tokens = sum(trace.events[-1][1] for trace in load[name, key] if trace.events)
        tell(
            f"{'open loop' if rate else f'burst {number + 1}'}: {name}, {key}: {tokens} tokens, "
            f"{perf_counter() - started:.1f} s"
        )

    names = [name for name in contenders if rate or number < (CONTENDERS[name].rounds or plan.rounds)]
    for place, workload in enumerate(plan.workloads):
        mixing = [name for name in names if CONTENDERS[name].mixes]
        first = (number + place) % max(1, len(mixing))
        for name in mixing[first:] + mixing[:first]:
            measure(name, workload, workload)
    for name in names:
        if not CONTENDERS[name].mixes:
            measure(name, plan.workloads[0], ALL)
    return load


def traces_of(load: Load, name: str, workload: str) -> list[Trace] | None:
    """What a contender did under a workload; None if it sat out."""
    return load.get((name, workload if CONTENDERS[name].mixes else ALL))


def capacity(burst: Load) -> float:
    """Requests per second that are answered when all wait: of the base model if it takes part, else of the first."""
    traces = next((traces for (name, _), traces in burst.items() if name == BASE), next(iter(burst.values())))
    ends = [trace.events[-1][0] for trace in traces if trace.events]
    return len(ends) / (max(ends) - min(trace.due for trace in traces))


def full_batch(setup: Setup, name: str) -> int:
    """Requests that fill a contender's batch."""
    return max(1, setup.rows // setup.ensemble) if name == ENSEMBLE else setup.rows


def summaries(
    setup: Setup, workload: str, names: Sequence[str], bursts: Sequence[Load], opened: Load
) -> dict[str, dict[str, Any]]:
    """Contender -> its numbers under a workload."""
    found = {}
    for name in names:
        own = [traces for load in bursts if (traces := traces_of(load, name, workload)) is not None]
        found[name] = summary(own, traces_of(opened, name, workload) or [], full_batch(setup, name))
        found[name]["measured"] = "under this workload" if CONTENDERS[name].mixes else "once for all workloads"
    return found


def ratios(setup: Setup, workload: str, bursts: Sequence[Load]) -> list[dict[str, Any]]:
    """The engine's speed of decoding beside that of others, taken within a round: medians over the rounds of both.

    Each is a `verdict`. The wide ensemble has no bar: it has the engine's number of requests, and K times its rows.
    """
    bars = {BASE: 0.85, PEFT: 2.0, ENSEMBLE: float(setup.ensemble), WIDE_ENSEMBLE: None}
    medians = {other: _ratio(setup, other, workload, bursts) for other in bars}
    return [
        verdict(f"engine / {other}, {workload}", median, bars[other], at_least=True)
        for other, median in medians.items()
        if median is not None
    ]


def _ratio(setup: Setup, other: str, workload: str, bursts: Sequence[Load]) -> float | None:
    speeds = [
        (_speed(setup, ENGINE, own), _speed(setup, other, its))
        for load in bursts
        if (own := traces_of(load, ENGINE, workload)) and (its := traces_of(load, other, workload))
    ]
    # Nobody is infinitely faster than one who fails.
    values = [own / its for own, its in speeds if its]
    return statistics.median(values) if values else None


def _speed(setup: Setup, name: str, traces: Sequence[Trace]) -> float:
    return decode_rate(traces, full_batch(setup, name)).tokens_per_second


def verdict(what: str, value: float, limit: float | None, at_least: bool) -> dict[str, Any]:
    """One bar: what is measured, its value, the limit, and whether it holds; no limit is for reference."""
    if limit is None:
        return {"what": what, "value": round(value, 3), "bar": None, "ok": None}
    passed = value >= limit if at_least else value <= limit
    return {"what": what, "value": round(value, 3), "bar": f"{'>=' if at_least else '<='} {limit:g}", "ok": passed}


def slot_loads(setup: Setup, rounds: int) -> dict[str, Any]:
    """Milliseconds to put another adapter into a slot that holds one, from this machine's memory and from its files.

    Files are in the operating system's cache, as they are after a download.
    """
    slots = Slots.like(engines.copy_of(setup.model), setup.folders[0], setup.slots)
    adapters = [AdapterFiles(f"{folder.name}@{number}", folder) for number, folder in enumerate(setup.folders)]
    held = HostCache(len(adapters))
    for adapter in adapters:
        held.get(adapter)
    found = {}
    for source in ("memory", "file"):
        taken_ms = []
        for number in range(rounds * len(adapters)):
            adapter = adapters[number % len(adapters)]
            host = held if source == "memory" else HostCache(1)
            before = slots.statistics().loads
            started = perf_counter()
            lease = slots.acquire(adapter, host.get(adapter))
            taken_ms.append((perf_counter() - started) * 1000)
            if lease is None or slots.statistics().loads == before:
                taken_ms.pop()
            if lease is not None:
                slots.release(lease)
        found[source] = {
            "p50": percentile(taken_ms, 50),
            "p99": percentile(taken_ms, 99),
            "max": percentile(taken_ms, 100),
            "first": round(taken_ms[0], 3),
            "loads": len(taken_ms),
        }
    return found
