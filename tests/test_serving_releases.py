"""Releases on a live endpoint of two ingresses: the real command, real HTTP, PEFT's `generate` beside the answers."""

import itertools
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from endpoint_load import DEPLOYMENTS, Ask, Load, check, greedy_texts, kill, report, served, wait_until_whole
from tiny_models import save_tiny_model
from tiny_run import COUNTING, EXPERTS, STORIES, make_run

from gradientspace_ray import cli
from gradientspace_ray.models.loading import WEIGHTS_FILE
from gradientspace_ray.registry import read_registry
from gradientspace_ray.releases import Releases

pytestmark = [pytest.mark.ray, pytest.mark.slow]
OTHER_EXPERTS = ("tally", "saga")
PROMPTS = [*COUNTING, *STORIES]
ADMIN_KEY = "the-admin-key"
COUNTS = {"Experts": 1, "PromptRouter": 1, "Ingress": 2}
LONG = 1900


@pytest.fixture(scope="module")
def live(ray_cluster, tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    """An endpoint, a second run with other experts under other names, and the texts of both runs' models."""
    folder = tmp_path_factory.mktemp("serving-releases")
    run = make_run(folder / "run", tiny_model_dir, tiny_encoder_dir)
    other = make_run(folder / "other", tiny_model_dir, tiny_encoder_dir, OTHER_EXPERTS, seed=31)
    texts = greedy_texts(run, PROMPTS) | greedy_texts(other, PROMPTS)
    ids = {adapter.name: adapter.id for source in (other, run) for adapter in read_registry(source).adapters}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIENTSPACE_ADMIN_KEY", ADMIN_KEY)
        with served(run, ingress_replicas=COUNTS["Ingress"], cpus_per_replica=0.5) as url:
            yield SimpleNamespace(url=url, run=run, other=other, texts=texts, ids=ids, first=state(url).current.id)


@pytest.fixture
def release(live, capsys, monkeypatch):
    """Runs the command against the endpoint; gives its exit code and standard error. Takes back what was released."""
    monkeypatch.setenv("GRADIENTSPACE_ADMIN_KEY", ADMIN_KEY)

    def command(*arguments):
        words = ["gradientspace", "release", *map(str, arguments), "--endpoint", live.url]
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, capsys.readouterr().err

    yield command
    while (found := state(live.url)).canary or found.current.id != live.first:
        assert command("--rollback") == (0, "")


def state(url):
    answer = httpx.get(f"{url}/admin/releases", headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60)
    return Releases.model_validate_json(answer.content)


def asks():
    """Requests without end that the models of every release can answer."""
    return itertools.cycle(Ask(*parts) for parts in itertools.product(("auto", "generalist"), PROMPTS, (False, True)))


def answers(live):
    """Outcomes of requests that all begin now, checked."""
    with Load(live.url, asks(), 8) as load:
        load.more(2 * 2 * len(PROMPTS))
    assert check(load.outcomes, live.texts).keys() == {None}
    return load.outcomes


def test_answers_under_way_end_as_they_began_while_others_come_from_the_release(live, release):
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=120)

    def long_answer(begun):
        body = Ask("auto", COUNTING[0], True, LONG).body
        parts, models = [], set()
        for chunk in client.chat.completions.create(**body, extra_body={"ignore_eos": True}):
            parts.append(chunk.choices[0].delta.content or "")
            models.add(chunk.model)
            begun.set()
        return "".join(parts), models

    quiet, models = long_answer(threading.Event())
    assert models == {live.ids[EXPERTS[0]]}
    assert quiet.startswith(live.texts[live.ids[EXPERTS[0]], COUNTING[0]])
    begun = [threading.Event() for _ in range(6)]
    with ThreadPoolExecutor(len(begun)) as pool:
        futures = [pool.submit(long_answer, event) for event in begun]
        assert all(event.wait(60) for event in begun)
        assert release(live.other.path("")) == (0, "")
        fresh = answers(live)
        assert not any(future.done() for future in futures), "the release came after the answers"
        for future in futures:
            assert future.result(timeout=300) == (quiet, models)
    current = state(live.url).current
    assert current.id != live.first
    assert {outcome.release for outcome in fresh} == {current.id}
    routed = {outcome.ask.prompt: outcome.model for outcome in fresh if outcome.ask.model == "auto"}
    expected = dict.fromkeys(COUNTING, live.ids[OTHER_EXPERTS[0]]) | dict.fromkeys(STORIES, live.ids[OTHER_EXPERTS[1]])
    assert routed == expected


def test_a_rollback_holds_from_the_command_s_end(live, release):
    assert release(live.other.path("")) == (0, "")
    withdrawn = state(live.url).current.id
    with Load(live.url, asks(), 8) as load:
        load.more(60)
        began_s = time.monotonic()
        assert release("--rollback") == (0, "")
        ended_s = time.monotonic()
        load.more(120)
    assert check(load.outcomes, live.texts).keys() == {None}
    before = {outcome.release for outcome in load.outcomes if outcome.ended_s < began_s}
    after = [outcome for outcome in load.outcomes if outcome.began_s > ended_s]
    assert before == {withdrawn}
    assert {outcome.release for outcome in after} == {live.first}
    first_s = min(outcome.ended_s for outcome in after) - ended_s
    report(f"rollback: {ended_s - began_s:.2f} s, first answer of the release before {first_s:.3f} s later")


def test_a_canary_keeps_its_conversations_until_it_is_promoted(live, release):
    openings = [f"what is {number} + 1" for number in range(40)]

    def releases_of_each():
        """Opening -> the releases that answered it, at its first turn and at a later one."""
        found = {}
        with httpx.Client(base_url=live.url, timeout=60) as client:
            for opening in openings:
                first = [{"role": "user", "content": opening}]
                later = [*first, {"role": "assistant", "content": "so"}, {"role": "user", "content": STORIES[0]}]
                for messages in (first, later, first):
                    body = {"model": "auto", "messages": messages, "max_tokens": 1}
                    answer = client.post("/v1/chat/completions", json=body)
                    found.setdefault(opening, set()).add(answer.headers["x-gradientspace-release"])
        return found

    assert release(live.other.path(""), "--canary", "50%") == (0, "")
    canary = state(live.url).canary.id
    split = releases_of_each()
    counts = Counter(release_id for found in split.values() for release_id in found)
    assert counts.total() == len(openings), "a conversation changed its release"
    assert counts.keys() == {live.first, canary}
    assert counts[canary] == pytest.approx(20, abs=10)  # 3 standard deviations
    assert release("--promote") == (0, "")
    assert set(itertools.chain(*releases_of_each().values())) == {canary}
    assert release("--rollback") == (0, "")
    assert {outcome.release for outcome in answers(live)} == {live.first}


def test_releases_outlive_their_runs_and_all_replicas(live, release, tmp_path, tiny_model_dir, tiny_encoder_dir):
    copy = shutil.copytree(live.other.path(""), tmp_path / "copy")
    assert release(copy) == (0, "")
    current = state(live.url).current.id
    for seed, folder in ((51, copy), (61, Path(live.run.path("")))):  # both are run again in place
        for part in ("experts", "generalist", "router"):
            shutil.rmtree(folder / part)
        make_run(folder, tiny_model_dir, tiny_encoder_dir, seed=seed)
    dead = {name: kill(name, COUNTS[name]) for name in DEPLOYMENTS}
    for name in DEPLOYMENTS:
        wait_until_whole(name, COUNTS[name], dead[name])
    found = answers(live)
    assert {outcome.release for outcome in found} == {current}
    assert {outcome.model for outcome in found} <= {live.ids[name] for name in OTHER_EXPERTS} | {
        adapter.id for adapter in state(live.url).current.registry.adapters
    }
    assert release("--rollback") == (0, "")
    assert {outcome.release for outcome in answers(live)} == {live.first}


@pytest.mark.parametrize("fault", ["another base model", "damaged weights", "a pickle"])
def test_what_cannot_be_served_is_refused_in_one_line_and_nothing_goes_live(
    live, release, tmp_path, tiny_model_dir, tiny_encoder_dir, fault
):
    model_dir = save_tiny_model(tmp_path / "model", seed=1) if fault == "another base model" else tiny_model_dir
    run = make_run(tmp_path / "run", model_dir, tiny_encoder_dir, seed=41)
    folder = Path(run.path(read_registry(run).experts[1].folder))
    if fault == "damaged weights":
        weights = folder / WEIGHTS_FILE
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    if fault == "a pickle":
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    before = state(live.url)
    code, errors = release(run.path(""))
    assert code == 1
    assert len(errors.splitlines()) == 1, errors
    named = {"another base model": str(model_dir), "a pickle": "adapter_model.bin", "damaged weights": folder.name}
    assert named[fault] in errors
    assert state(live.url) == before
    assert {outcome.release for outcome in answers(live)} == {live.first}
