"""Replicas that die, adapters that go and releases that change, under load on an endpoint of several replicas.

No request may get another expert's answer, none may hang, and an error must be one that trying again overcomes.
"""

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from endpoint_load import (
    BOUND_S,
    DEPLOYMENTS,
    PATIENCE_S,
    RUN_CHANGED,
    Ask,
    Load,
    check,
    greedy_texts,
    kill,
    leases,
    report,
    served,
    wait_until,
    wait_until_whole,
)
from tiny_run import COUNTING, EXPERTS, STORIES, make_run

from gradientspace_ray.models.loading import WEIGHTS_FILE
from gradientspace_ray.registry import read_registry
from gradientspace_ray.releases import Releases

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REPLICAS = 2
CLIENTS, LONG = 12, 1000
PROMPTS = [*COUNTING, *STORIES]
MODELS = ["auto", "auto", "auto", "base", "generalist", *EXPERTS]
ADMIN = {"authorization": "Bearer the-admin-key"}


@pytest.fixture(scope="module")
def live(ray_cluster, tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    """An endpoint with two replicas of everything, a second run to release, and the texts of both runs' models."""
    folder = tmp_path_factory.mktemp("serving-chaos")
    run = make_run(folder / "run", tiny_model_dir, tiny_encoder_dir)
    other = make_run(folder / "other", tiny_model_dir, tiny_encoder_dir, seed=31)
    texts = greedy_texts(run, PROMPTS) | greedy_texts(other, PROMPTS)
    assert len(set(texts.values())) > 0.9 * len(texts), "the models cannot be told apart"
    counts = {"min_replicas": REPLICAS, "max_replicas": REPLICAS, "router_replicas": REPLICAS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIENTSPACE_ADMIN_KEY", "the-admin-key")
        with served(run, **counts, ingress_replicas=REPLICAS, cpus_per_replica=0.5) as url:
            yield SimpleNamespace(url=url, run=run, other=other, texts=texts)


def mix(seed=0):
    """Requests without end, routed and forced, streaming or not, in random order."""
    asks = [Ask(*parts) for parts in itertools.product(MODELS, PROMPTS, (False, True))]
    random.Random(seed).shuffle(asks)
    return itertools.cycle(asks)


@contextlib.contextmanager
def patient_clients(live, count=2):
    """`openai` clients that ask all the time, and whose own retries must be enough."""
    stop = threading.Event()

    def ask_on(seed):
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=8, timeout=BOUND_S)
        for ask in mix(seed):
            if stop.is_set():
                return
            answer = client.chat.completions.create(**(ask.body | {"stream": False}))
            assert answer.choices[0].message.content == live.texts[answer.model, ask.prompt]

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(ask_on, seed) for seed in range(1, count + 1)]
        try:
            yield
        finally:
            stop.set()
    for future in futures:
        future.result()


def assert_serves_all(live):
    with Load(live.url, mix(7), CLIENTS) as load:
        load.more(len(MODELS) * len(PROMPTS) * 2)
    assert check(load.outcomes, live.texts).keys() == {None}


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_a_killed_replica(live, deployment):
    with Load(live.url, mix(), CLIENTS) as load, patient_clients(live):
        load.more(60)
        killed_after = len(load.outcomes)
        dead = kill(deployment)
        load.more(20)
        seconds = wait_until_whole(deployment, REPLICAS, without=dead)
        load.more(60)
    ends = check(load.outcomes, live.texts)
    report(f"{deployment}: whole again after {seconds:.0f} s; {len(load.outcomes)} requests: {dict(ends)}")
    assert {outcome.error for outcome in load.outcomes[: killed_after - CLIENTS]} == {None}
    # What was inside the replica that died, at most, and what was sent to it before that was known.
    assert sum(ends.values()) - ends[None] <= 3 * CLIENTS
    assert_serves_all(live)


def long_asks():
    """Streams and whole answers that take seconds."""
    return [Ask(EXPERTS[0], prompt, stream, LONG, True) for prompt in COUNTING for stream in (False, True)]


def strike(live, deployment):
    """Outcomes of long requests, while all of whose replicas of a deployment die, and are whole again."""
    with Load(live.url, long_asks(), len(long_asks())) as load:
        wait_until(lambda: any(any(leases().values()) for _ in range(4)), "answer under way")
        time.sleep(0.5)
        assert not load.outcomes, "the answers are too short"
        dead = kill(deployment, REPLICAS)
        wait_until(lambda: len(load.outcomes) == len(long_asks()), "end of the answers")
    seconds = wait_until_whole(deployment, REPLICAS, without=dead)
    ends = Counter(("stream" if outcome.ask.stream else "whole", outcome.error) for outcome in load.outcomes)
    report(f"all {deployment} back after {seconds:.0f} s: {dict(ends)}")
    return load.outcomes


def test_long_answers_of_experts_that_died_are_made_again_or_say_that_they_are_not_whole(live):
    with Load(live.url, long_asks(), 2) as load:
        load.more(len(long_asks()))
    texts = {(outcome.model, outcome.ask.prompt): outcome.text for outcome in load.outcomes if not outcome.ask.stream}
    assert check(load.outcomes, texts).keys() == {None}
    assert all(text.startswith(live.texts[key]) for key, text in texts.items())
    outcomes = strike(live, "Experts")
    check(outcomes, texts)
    for outcome in outcomes:
        assert outcome.error == ("stream replica_lost" if outcome.ask.stream else None), outcome


def test_long_answers_of_ingresses_that_died_may_be_asked_for_again_and_leave_nothing_behind(live):
    for outcome in strike(live, "Ingress"):
        assert outcome.error, outcome
        assert outcome.may_retry, outcome
    # Each time, another replica may answer.
    wait_until(lambda: not any(any(leases().values()) for _ in range(6)), "end of the leases", 30)


def test_adapters_that_are_deleted_or_damaged_fail_alone_and_by_name(live):
    registry = read_registry(live.run)
    deleted, damaged = (registry.resolve(name) for name in EXPERTS)
    state = Releases.model_validate_json(httpx.get(f"{live.url}/admin/releases", headers=ADMIN).content)
    copies = {adapter.id: live.run.path(adapter.folder) for adapter in state.current.registry.experts}
    files = [Path(copies[adapter.id]) / WEIGHTS_FILE for adapter in (deleted, damaged)]
    contents = [file.read_bytes() for file in files]
    assert "/releases/" in str(files[0])
    try:
        with Load(live.url, mix(), CLIENTS) as load:
            load.more(60)
            files[0].unlink()
            files[1].write_bytes(contents[0])  # a good adapter, but another one
            load.more(60)
            dead = kill("Experts", REPLICAS)
            seconds = wait_until_whole("Experts", REPLICAS, without=dead)
            whole_s = time.monotonic()
            load.more(200)
    finally:
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
    ends = check(load.outcomes, live.texts, refused=True)
    report(f"both replicas back after {seconds:.0f} s; {len(load.outcomes)} requests: {dict(ends)}")
    for outcome in load.outcomes:
        spared = outcome.ask.model in ("base", "generalist")
        assert not (spared and outcome.error == RUN_CHANGED), outcome
        if outcome.began_s > whole_s:
            assert outcome.error == (None if spared else RUN_CHANGED), outcome
            assert spared or not outcome.may_retry
    assert_serves_all(live)


def test_a_release_and_a_rollback_drop_no_request(live):
    def change(path, body=None):
        """Id of the release that is current afterwards, and the time."""
        answer = httpx.post(f"{live.url}/admin/{path}", json=body, headers=ADMIN, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        return Releases.model_validate_json(answer.content).current.id, time.monotonic()

    with Load(live.url, mix(), CLIENTS) as load, patient_clients(live):
        load.more(100)
        second, released_s = change("releases", {"run_dir": live.other.path("")})
        load.more(100)
        withdrawn_s = time.monotonic()
        first, rolled_back_s = change("rollback")
        load.more(100)
    assert check(load.outcomes, live.texts).keys() == {None}
    between = [outcome for outcome in load.outcomes if released_s < outcome.began_s <= outcome.ended_s < withdrawn_s]
    assert {outcome.release for outcome in between} == {second}
    assert {outcome.release for outcome in load.outcomes if outcome.began_s > rolled_back_s} == {first}
    others = {adapter.id for adapter in read_registry(live.other).adapters}
    assert {outcome.model for outcome in load.outcomes if outcome.release == second} == others | {"base"}
