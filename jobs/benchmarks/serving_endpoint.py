"""Times to the first token of routed requests and of the base model's, over HTTP through the real application.

A process of its own, which starts a local Ray: `serving.py` runs it. Each prompt is asked twice, of `auto` and of
`base`, one after the other in an order that alternates; first one request at a time, then as a Poisson process.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import ray
from serving_load import AnswerError, Messages, percentile
from sketch_methods import answer as print_answer

from gradientspace_ray.serving.app import ServeArguments, build, endpoint, own_share, reserved_port

AUTO, BASE = "auto", "base"
ROUTER_HEADER = "x-gradientspace-router-ms"
EXPERT_HEADER = "x-gradientspace-expert"
TIMES = 1.1
"""How much longer than the base model's an expert's time to the first token may be, beside the router's."""
HOST = "127.0.0.1"
SEED = 0


class Job(NamedTuple):
    """The fields of a JSON file, whose name is the argument: prompts may be longer than an argument can be."""

    run_dir: str
    prompts: list[Messages]
    max_tokens: int
    slots: int
    threads: int
    rate: float


class Reply(NamedTuple):
    """What one request took."""

    model: str
    ttft_ms: float
    router_ms: float
    expert: str


def measure(job: Job) -> dict[str, Any]:
    """The report's part: `alone`, `open_loop` and their settings."""
    cpus = max(2, job.threads)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        arguments = own_share(ServeArguments(run_dir=job.run_dir, max_slots=job.slots), cpus)
        with reserved_port(HOST, 0) as port, endpoint(build(arguments), HOST, port) as url:
            return asyncio.run(_ask_all(job, url))
    finally:
        ray.shutdown()


async def _ask_all(job: Job, url: str) -> dict[str, Any]:
    # Most for the open loop, where times differ most.
    counts = len(job.prompts) // 10 + 1, len(job.prompts) // 4
    warm, lone, others = job.prompts[: counts[0]], job.prompts[counts[0] : sum(counts)], job.prompts[sum(counts) :]
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        experts = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        for model in experts:  # in a slot, and what all prompts begin with in the prefix cache, as the base model's is
            await ask(client, model, warm[0], 2)
        for messages in warm:
            for model in (AUTO, BASE):
                await ask(client, model, messages, 2)
        alone = [
            [await ask(client, model, messages, 2) for model in in_turn(number)] for number, messages in enumerate(lone)
        ]
        opened = await _open_loop(client, job, others)
    return {
        "alone": compared(alone),
        "open_loop": compared(opened) | {"rate_per_second": round(job.rate, 3)},
        "experts_asked": sorted({reply.expert for pair in alone + opened for reply in pair if reply.model == AUTO}),
    }


def in_turn(number: int) -> tuple[str, str]:
    """The order of a pair: neither always has the advantage of being second."""
    return (AUTO, BASE) if number % 2 else (BASE, AUTO)


async def _open_loop(client: httpx.AsyncClient, job: Job, prompts: Sequence[Messages]) -> list[list[Reply]]:
    draw, due = random.Random(SEED), time.perf_counter()
    tasks = []
    for number, messages in enumerate(prompts):
        pair = []
        for model in in_turn(number):
            pair.append(asyncio.create_task(ask(client, model, messages, job.max_tokens, due)))
            due += draw.expovariate(job.rate)
        tasks.append(pair)
    return [[await task for task in pair] for pair in tasks]


async def ask(
    client: httpx.AsyncClient, model: str, messages: Messages, max_tokens: int, due: float | None = None
) -> Reply:
    """One greedy streamed request. Its time counts from when it is due, to the first text.

    Raises:
        AnswerError: an error came, or no text.
    """
    if due is not None:
        await asyncio.sleep(due - time.perf_counter())
    started = due or time.perf_counter()
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if not response.is_success:
            raise AnswerError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        ttft_ms = None
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            if "error" in (chunk := json.loads(data)):
                raise AnswerError(str(chunk["error"]))
            if ttft_ms is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                ttft_ms = (time.perf_counter() - started) * 1000
        if ttft_ms is None:
            raise AnswerError(f"{model} answered without text")
        return Reply(model, ttft_ms, float(response.headers[ROUTER_HEADER]), response.headers[EXPERT_HEADER])


def compared(pairs: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """Percentiles, and the bar: the median of routed requests beside the router's and 1.1 of the base model's."""
    replies = [reply for pair in pairs for reply in pair]
    times_ms = {
        "router": [reply.router_ms for reply in replies if reply.model == AUTO],
        "routed_ttft": [reply.ttft_ms for reply in replies if reply.model == AUTO],
        "base_ttft": [reply.ttft_ms for reply in replies if reply.model == BASE],
    }
    medians = {name: statistics.median(values) for name, values in times_ms.items()}
    allowed_ms = medians["router"] + TIMES * medians["base_ttft"]
    percentiles = {
        f"{name}_p{percent}_ms": percentile(values, percent)
        for name, values in times_ms.items()
        for percent in (50, 99)
    }
    return percentiles | {
        "allowed_ms": round(allowed_ms, 3),
        "routed_to_allowed": round(medians["routed_ttft"] / allowed_ms, 4),
        "requests": len(replies),
    }


if __name__ == "__main__":
    print_answer(lambda: measure(Job(**json.loads(Path(json.loads(sys.argv[1])).read_text()))))
