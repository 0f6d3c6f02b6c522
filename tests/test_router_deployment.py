"""The router deployment, driven in this process without Serve's controller."""

import asyncio
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from ray import serve
from tiny_run import COUNTING, EXPERTS, STORIES, make_run

from gradientspace_ray.registry import Adapter, Registry, read_registry, router_digest
from gradientspace_ray.router.classifier import (
    HEAD_FILE,
    ROUTER_FILES,
    SETTINGS_FILE,
    Router,
    RouterError,
    load_head,
    save_router,
)
from gradientspace_ray.router.conversation import route_conversations
from gradientspace_ray.router.encoder import PromptEncoder
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.serving.messages import Place, RouteRequest, RunChangedError
from gradientspace_ray.serving.router import MAX_ONGOING_PROMPTS, MAX_ROUTERS, PromptRouter


def start(place):
    """A replica in an endpoint whose run has this router."""
    generalist = Adapter(name="generalist", digest="1", folder="generalist")
    registry = Registry(
        base_model="x", max_tokens=1, generalist=generalist, experts=(), router=place.folder, router_digest=place.id
    )
    return PromptRouter(place.run_uri, registry)


@pytest.fixture(autouse=True)
def replica(monkeypatch):
    """What `serve.batch` asks of a replica's process; it makes one queue for each, and every test has its own loop."""
    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=MAX_ONGOING_PROMPTS))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(PromptRouter._route_batch._is_batching_task_alive.__self__, "_queue", None)


@pytest.fixture(scope="module")
def made_run(tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    return make_run(tmp_path_factory.mktemp("routers") / "run", tiny_model_dir, tiny_encoder_dir)


@pytest.fixture
def run(made_run, tmp_path):
    """A run with a router alone, to change."""
    shutil.copytree(made_run.path("router"), tmp_path / "run" / "router")
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def encoded(monkeypatch):
    """What encoders are asked for: a list of prompts for each call; and how many there are."""
    calls, loads = [], []
    encode, load = PromptEncoder.encode, PromptEncoder.__init__

    def counted_encode(self, prompts):
        calls.append(list(prompts))
        return encode(self, prompts)

    def counted_load(self, *arguments):
        loads.append(arguments)
        load(self, *arguments)

    monkeypatch.setattr(PromptEncoder, "encode", counted_encode)
    monkeypatch.setattr(PromptEncoder, "__init__", counted_load)
    return calls, loads


def place_of(run, folder="router"):
    return Place(router_digest(run.fetch(folder)), run.uri, folder)


def another(run, folder, **changes):
    """A router as the run's own but for some settings, in a folder of its own."""
    head, settings = load_head(run.fetch("router"))
    with run.staged(folder) as staging:
        save_router(staging, head, settings.model_copy(update=changes))
    return place_of(run, folder)


def ask(place, *texts):
    """A request: what the user says, the assistant says, the user says ..."""
    roles = ("user", "assistant")
    return RouteRequest(place, [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)])


def test_a_choice_is_the_routers_decision(run):
    place = place_of(run)
    deployment, router = start(place), Router.load(run.fetch("router"))
    prompts = [*COUNTING, *STORIES, "something else"]

    async def choices():
        return await asyncio.gather(*(deployment.route(ask(place, prompt)) for prompt in prompts))

    for choice, decision in zip(asyncio.run(choices()), router.route(prompts), strict=True):
        assert (choice.expert, choice.reason) == (decision.expert, decision.reason)
        assert choice.confidence == pytest.approx(decision.confidence, abs=1e-5)
        assert choice.probabilities == pytest.approx(decision.probabilities, abs=1e-5)
        assert {choice.expert, choice.second_best} == set(EXPERTS)


def test_prompts_of_a_stranger_go_to_the_generalist(run):
    head, settings = load_head(run.fetch("router"))
    sample = PromptEncoder(settings.encoder, settings.max_tokens).encode(COUNTING).astype(np.float16)
    with run.staged("router") as staging:
        save_router(staging, head, settings.model_copy(update={"min_similarity": 0.999, "neighbours": 1}), sample)
    place = place_of(run)
    deployment = start(place)

    async def choices():
        return [await deployment.route(ask(place, text)) for text in (COUNTING[0], STORIES[0])]

    known, strange = asyncio.run(choices())
    assert (known.expert, known.reason) == (EXPERTS[0], "routed")
    assert (strange.expert, strange.reason) == (None, "out_of_distribution")
    assert strange.probabilities[strange.second_best] == strange.confidence == max(strange.probabilities.values())


def test_waiting_conversations_of_two_releases_are_encoded_in_one_call(run, encoded):
    calls, loads = encoded
    first, second = place_of(run), another(run, "next", labels=("a", "b"))
    deployment = start(first)

    async def choices():
        await deployment.prepare(second)
        requests = [ask(place, prompt, "yes", "go on") for prompt in COUNTING for place in (first, second)]
        return await asyncio.gather(*map(deployment.route, requests))

    found = asyncio.run(choices())
    assert len(loads) == 1, "the encoder is shared"
    assert [sorted(call) for call in calls] == [sorted([*COUNTING, "go on"])], "each prompt once"
    for old, new in zip(found[::2], found[1::2], strict=True):
        assert set(old.probabilities) == set(EXPERTS)
        assert list(new.probabilities.values()) == pytest.approx(list(old.probabilities.values()))
        assert new.expert == {EXPERTS[0]: "a", EXPERTS[1]: "b"}[old.expert]


def test_a_turn_costs_one_encoding_and_earlier_turns_are_decided_as_before(run, encoded):
    calls, _ = encoded
    place = another(run, "sure", temperature=1e-4)
    deployment = start(place)
    texts = [COUNTING[0], "4", "thanks", "welcome", STORIES[0], "a tale", "and then", "it ends", STORIES[1]]
    conversations = [ask(place, *texts[: 2 * turn + 1]) for turn in range(5)]

    async def choices():
        return [await deployment.route(conversation) for conversation in conversations]

    found = asyncio.run(choices())
    assert calls == [[text] for text in texts[::2]]
    router = Router.load(run.fetch("sure"))
    alike = route_conversations(router, [conversation.messages for conversation in conversations])
    assert [choice.expert for choice in found] == [decision.expert for decision in alike]
    assert [choice.confidence for choice in found] == pytest.approx([one.confidence for one in alike], abs=1e-5)
    assert (found[0].expert, found[2].expert) == EXPERTS


def test_a_router_says_how_fast_its_conversations_change_hands(run):
    quick, never = another(run, "quick", switch_margin=-1.0), another(run, "never", switch_margin=1.0)
    deployment = start(quick)

    async def choices():
        return [await deployment.route(ask(place, COUNTING[0], "4", STORIES[0])) for place in (quick, never)]

    moved, stayed = asyncio.run(choices())
    assert (stayed.expert, moved.expert) == EXPERTS
    assert (stayed.second_best, moved.second_best) == EXPERTS[::-1]
    assert (stayed.reason, stayed.confidence) == ("routed", moved.probabilities[EXPERTS[0]])


def test_half_a_character_does_not_fail_those_who_wait_with_it(run):
    place = place_of(run)
    deployment = start(place)

    async def choices():
        return await asyncio.gather(*(deployment.route(ask(place, text)) for text in ("\ud83d", COUNTING[0])))

    assert [choice.expert in EXPERTS for choice in asyncio.run(choices())] == [True, True]


@pytest.mark.parametrize("change", ["gone", HEAD_FILE, SETTINGS_FILE])
def test_another_router_in_its_place_is_refused(run, change):
    place = place_of(run)
    start(place)
    if change == "gone":
        run.delete("router")
    else:
        run.write_bytes(f"router/{change}", run.read_bytes(f"router/{change}") + b" ")
    message = f"^router no longer holds the router {place.id}; release {run.uri} again, or start the endpoint again$"
    with pytest.raises(RunChangedError, match=message):
        start(place)


def test_files_that_are_no_router_are_told_apart_from_another_router(run):
    run.write_bytes(f"router/{SETTINGS_FILE}", b"{}")
    with pytest.raises(RouterError, match=r"run the router stage again$"):
        start(place_of(run))


def test_a_request_for_a_router_that_is_gone_fails_alone(run):
    place = place_of(run)
    deployment = start(place)

    async def choices():
        requests = [ask(place, COUNTING[0]), ask(Place("0" * 12, run.uri, "gone"), STORIES[0]), ask(place, STORIES[0])]
        return await asyncio.gather(*map(deployment.route, requests), return_exceptions=True)

    first, failed, last = asyncio.run(choices())
    assert isinstance(failed, RunChangedError)
    assert (first.expert, last.expert) == EXPERTS


@pytest.mark.parametrize("store", ["folder", "objects"])
def test_a_folder_may_hold_another_router_later(run, store, object_store):
    if store == "objects":
        local, run = run, RunDirectory(object_store())
        for name in ROUTER_FILES:
            run.write_bytes(f"router/{name}", local.read_bytes(f"router/{name}"))
        old = Place(router_digest(local.fetch("router")), run.uri, "router")
    else:
        local, old = run, place_of(run)
    deployment = start(old)
    changed = another(local, "changed", labels=("a", "b"))
    for name in ROUTER_FILES:
        run.write_bytes(f"router/{name}", local.read_bytes(f"changed/{name}"))

    async def choices():
        return [await deployment.route(ask(Place(id_, run.uri, "router"), "hm")) for id_ in (old.id, changed.id)]

    kept, brought = asyncio.run(choices())
    assert set(kept.probabilities) == set(EXPERTS), "what is loaded goes on serving"
    assert set(brought.probabilities) == {"a", "b"}


def test_the_routers_asked_for_last_are_kept(run, monkeypatch):
    places = [another(run, f"router-{index}", threshold=index / 100) for index in range(MAX_ROUTERS + 1)]
    reads, read = [], RunDirectory.read_bytes
    monkeypatch.setattr(RunDirectory, "read_bytes", lambda self, name: reads.append(name) or read(self, name))
    deployment = start(places[0])

    async def ask_all():
        for place in (*places[1:MAX_ROUTERS], places[0], places[-1], places[0], places[1]):
            await deployment.route(ask(place, "hm"))

    asyncio.run(ask_all())
    loaded = [name.partition("/")[0] for name in reads if name.endswith(SETTINGS_FILE)]
    assert loaded == [place.folder for place in (*places, places[1])], "the second one had waited longest"


def test_loading_holds_nobody_up_and_happens_once(run, monkeypatch):
    first, second = place_of(run), another(run, "next", threshold=0.1)
    deployment = start(first)
    may_read, reads, read = threading.Event(), [], RunDirectory.read_bytes

    def slow_read(self, name):
        assert may_read.wait(timeout=20)
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(RunDirectory, "read_bytes", slow_read)

    async def choices():
        waiting = [asyncio.create_task(deployment.route(ask(second, "hm"))) for _ in range(5)]
        await asyncio.sleep(0)
        ready = await asyncio.wait_for(deployment.route(ask(first, COUNTING[0])), timeout=60)
        assert not any(task.done() for task in waiting)
        may_read.set()
        return ready, await asyncio.gather(*waiting)

    ready, others = asyncio.run(choices())
    assert ready.expert == EXPERTS[0]
    assert len({choice.confidence for choice in others}) == 1
    assert len(reads) == len(ROUTER_FILES)


def test_a_request_that_gives_up_while_a_router_loads_leaves_it_loadable(run, monkeypatch):
    first, second = place_of(run), another(run, "next", threshold=0.1)
    deployment = start(first)
    may_read, read = threading.Event(), RunDirectory.read_bytes
    monkeypatch.setattr(RunDirectory, "read_bytes", lambda self, name: may_read.wait(20) and read(self, name))

    async def choice():
        task = asyncio.create_task(deployment.route(ask(second, "hm")))
        await asyncio.sleep(0.01)
        task.cancel()
        may_read.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await deployment.route(ask(second, COUNTING[0]))

    assert asyncio.run(choice()).expert == EXPERTS[0]


def test_a_replica_is_sick_whose_batches_do_not_end(run, monkeypatch):
    place = place_of(run)
    deployment = start(place)
    entered, leave = threading.Event(), threading.Event()
    decide = Router.decide

    def slow(self, encodings):
        entered.set()
        leave.wait(30)
        return decide(self, encodings)

    async def check():
        deployment.check_health()
        monkeypatch.setattr(Router, "decide", slow)
        task = asyncio.create_task(deployment.route(ask(place, COUNTING[0])))
        await asyncio.to_thread(entered.wait, 30)
        deployment.check_health()
        with monkeypatch.context() as patience:
            patience.setattr("gradientspace_ray.serving.router.STUCK_S", 0.0)
            with pytest.raises(RuntimeError, match="a batch of conversations has not ended"):
                deployment.check_health()
        leave.set()
        await task
        deployment.check_health()

    asyncio.run(check())


def test_the_registry_names_the_place(made_run):
    registry = read_registry(made_run)
    place = Place(registry.router_digest, made_run.uri, registry.router)
    assert asyncio.run(start(place).route(ask(place, COUNTING[0]))).expert == EXPERTS[0]
