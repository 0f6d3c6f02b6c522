"""Thousands of requests, a third of them given up: what an endpoint holds afterwards."""

import asyncio
import os
import random
import re
import time
from collections import Counter

import aiohttp
import httpx
import pytest
from endpoint_load import DEPLOYMENTS, leases, replicas, report, served, wait_until
from tiny_run import EXPERTS, make_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
# 10,000 take three minutes and a half on two cores.
REQUESTS = int(os.environ.get("GRADIENTSPACE_SOAK_REQUESTS", "7500"))
WARM_UP = REQUESTS // 3
CLIENTS, PLACES, ROWS = 32, 128, 16
MODELS = ("auto", "base", "generalist", *EXPERTS)
# Shares of the requests: 30 % are given up, at three moments.
GIVEN_UP = {"before the first chunk": 0.1, "after the first chunk": 0.1, "in the middle": 0.1}
GROWTH = 1.05
QUIET_S = 60


@pytest.fixture(scope="module")
def url(ray_cluster, tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    """An endpoint whose slots and caches are soon full: two slots for three adapters."""
    run = make_run(tmp_path_factory.mktemp("serving-soak") / "run", tiny_model_dir, tiny_encoder_dir)
    limits = {"max_requests": PLACES, "max_ongoing_requests": PLACES, "max_rows": ROWS}
    with served(run, max_slots=2, prefix_cache_tokens=2048, **limits) as url:
        yield url


def body_of(number, rng, given_up):
    """Prompts that never repeat: nothing may be kept for each."""
    prompt = f"{rng.choice(('what is', 'once upon a'))} {number} + {rng.randrange(100)}"
    return {
        "model": rng.choice(MODELS),
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": rng.randint(1, 8) if given_up is None else rng.choice((8, 200)),
        "temperature": rng.choice((0, 1)),
        "stream": given_up not in (None, "before the first chunk") or rng.random() < 0.5,
    }


async def ask(session, url, number, rng):
    """One request, perhaps given up. Returns what became of it."""
    given_up = rng.choices([None, *GIVEN_UP], [1 - sum(GIVEN_UP.values()), *GIVEN_UP.values()])[0]
    body = body_of(number, rng, given_up)
    request = session.post(f"{url}/v1/chat/completions", json=body)
    if given_up == "before the first chunk":
        try:
            async with asyncio.timeout(rng.uniform(0, 0.05)), request:
                return "answered before it was given up"
        except TimeoutError:
            return given_up
    async with request as answer:
        if given_up is not None:
            for _ in range(2 if given_up == "after the first chunk" else rng.randint(4, 8)):
                await answer.content.readline()
            answer.close()
            return given_up
        content = await answer.read()
        whole = answer.status == 200 and content.endswith(b"[DONE]\n\n" if body["stream"] else b"}")
        return None if whole else f"{answer.status} {content[:200]!r}"


async def ask_all(url, numbers, rng):
    waiting, ends = iter(numbers), Counter()
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CLIENTS), timeout=timeout) as session:

        async def client():
            for number in waiting:
                ends[await ask(session, url, number, rng)] += 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return ends


def gauges(url, name):
    """Values of one of the endpoint's metrics."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    return [float(value) for value in re.findall(rf"^ray_gradientspace_{name}{{.*}} (\S+)$", text, re.MULTILINE)]


def memory_mb():
    """Resident memory of each deployment's replica, when nothing is under way: MB."""
    wait_until(lambda: not any(leases().values()), "end of the leases", QUIET_S)
    time.sleep(2)
    return {name: sum(p.memory_info().rss for p in replicas(name).values()) / 1e6 for name in DEPLOYMENTS}


async def first_and_last_token_s(session, url, number):
    """When a long answer began and ended: seconds."""
    body = {"model": MODELS[1 + number % 2], "prompt": f"row {number}", "max_tokens": 300, "ignore_eos": True}
    async with session.post(f"{url}/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.status == 200, await answer.text()
        await answer.content.readline()
        began_s = time.monotonic()
        await answer.read()
        return began_s, time.monotonic()


async def at_once(act, count):
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        return await asyncio.gather(*(act(session, number) for number in range(count)))


@pytest.mark.timeout(900)
def test_requests_that_are_given_up_leave_nothing_behind(url):
    rng = random.Random(0)
    asyncio.run(ask_all(url, range(WARM_UP), rng))
    warm = memory_mb()
    began_s = time.monotonic()
    ends = asyncio.run(ask_all(url, range(WARM_UP, REQUESTS), rng))
    seconds = time.monotonic() - began_s
    after = memory_mb()
    growth = {name: f"{warm[name]:.0f} -> {after[name]:.0f} MB" for name in warm}
    report(f"{ends.total()} requests in {seconds:.0f} s: {dict(ends)}; {growth}")
    assert ends.keys() <= {None, *GIVEN_UP, "answered before it was given up"}
    assert sum(ends[moment] for moment in GIVEN_UP) > 0.25 * ends.total()
    assert set(leases().values()) == {0}
    for name in DEPLOYMENTS:
        assert after[name] <= GROWTH * warm[name], growth
    for name in ("active_rows", "slot_users", "waiting_requests"):
        wait_until(lambda name=name: not any(gauges(url, name)), f"{name} at zero", QUIET_S)
    assert gauges(url, "active_rows"), "no such metric"


def test_every_row_is_free_again(url):
    times = asyncio.run(at_once(lambda session, number: first_and_last_token_s(session, url, number), ROWS))
    assert max(began_s for began_s, _ in times) < min(ended_s for _, ended_s in times), "some had to wait for a row"


def test_every_place_is_free_again(url):
    async def status(session, number):
        body = {"model": "base", "prompt": "all at once", "max_tokens": 60, "ignore_eos": True}
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            return answer.status

    # One more than there are places is refused, so the limit is what is measured.
    assert Counter(asyncio.run(at_once(status, PLACES))) == {200: PLACES}
    assert Counter(asyncio.run(at_once(status, PLACES + 20)))[429] > 0
