"""The endpoint as clients see it: real Serve, real HTTP, the `openai` client."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import ray
from endpoints import assert_openai_error, peft_answer
from ray import serve
from this_machine import HAS_IPV6
from tiny_run import COUNTING, EXPERTS, STORIES, make_adapter, make_run

from gradientspace_ray.models.loading import WEIGHTS_FILE
from gradientspace_ray.registry import Adapter, adapter_digest, read_registry, router_digest, write_registry
from gradientspace_ray.releases import own_release
from gradientspace_ray.router.classifier import LinearHead, load_head, save_router
from gradientspace_ray.serving.app import build, endpoint, reserved_port
from gradientspace_ray.serving.arguments import ServeArguments
from gradientspace_ray.serving.messages import RunChangedError
from gradientspace_ray.serving.playground import HEADERS, PAGE

pytestmark = [pytest.mark.ray, pytest.mark.slow]
API_KEY = "sk-test-key"
# More adapters than a replica with two slots keeps in its memory.
UNFIT = tuple(f"unfit-{number}" for number in range(6))
START_TIMEOUT_S = 120
TOKENS = 12
CONVERSATION = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "what is 2 + 2"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "once upon a time a dóor"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    """The tiny run, and experts that no prompt is routed to and that do not fit the slots."""
    run = make_run(tmp_path_factory.mktemp("serving") / "run", tiny_model_dir, tiny_encoder_dir)
    make_adapter(tiny_model_dir, Path(run.path("experts/unfit")), 1, r=8)
    digest = adapter_digest(run.fetch("experts/unfit"))
    unfit = [Adapter(name=name, digest=digest, folder="experts/unfit") for name in UNFIT]
    router = Path(run.path("router"))
    head, settings = load_head(router)
    weight_KH = np.pad(head.weight_KH, [(0, len(UNFIT)), (0, 0)])
    bias_K = np.pad(head.bias_K, (0, len(UNFIT)), constant_values=-100)
    save_router(router, LinearHead(weight_KH, bias_K), settings.model_copy(update={"labels": (*EXPERTS, *UNFIT)}))
    registry = read_registry(run)
    changes = {"experts": (*registry.experts, *unfit), "router_digest": router_digest(router)}
    write_registry(run, registry.model_copy(update=changes))
    run.write_json("manifest.json", {"format": 1, "stages": {}})
    return run


@contextlib.contextmanager
def in_this_process(application):
    with reserved_port("127.0.0.1", 0) as port, endpoint(application, "127.0.0.1", port) as url:
        yield url


def test_an_endpoint_that_does_not_start_says_why_and_leaves_nothing(ray_cluster, monkeypatch):
    class Experts:  # in a function, so that it travels to the replica with its code
        def __init__(self):
            raise RunChangedError("the run is another")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    application = serve.deployment(Experts, max_constructor_retry_count=1).bind()
    with (
        pytest.raises(RuntimeError, match=r"^Experts does not start: the run is another$"),
        in_this_process(application),
    ):
        pass
    assert serve.status().applications == serve.status().proxies == {}


# `gradientspace serve`, with few slots so that adapters must make room for each other.
COMMAND = """
from gradientspace_ray.serving import app
build = app.build
app.build = lambda arguments: build(arguments.model_copy(update={"max_slots": 2, "max_tokens": 2000}))
from gradientspace_ray.cli import main
main()
"""


@pytest.fixture(scope="module")
def url(ray_cluster, run, tmp_path_factory):
    """The endpoint that the command serves on the tests' Ray, on IPv6 where there is one, until SIGTERM."""
    log = tmp_path_factory.mktemp("log") / "serve.log"
    settings = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "GRADIENTSPACE_API_KEY": API_KEY}
    host = "::" if HAS_IPV6 else "0.0.0.0"
    command = [sys.executable, "-c", COMMAND, "serve", run.uri, "--host", host, "--port", "0", "--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | settings)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (announced := re.search(r" at (http://\S+:\d+)/v1 ", log.read_text())):
            assert process.poll() is None, f"the endpoint ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"no endpoint in {START_TIMEOUT_S} s:\n{log.read_text()}"
            time.sleep(0.1)
        yield announced.group(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130, log.read_text()
        assert log.read_text().splitlines()[-1] == "interrupted; the endpoint has stopped"
    finally:
        process.kill()
        process.wait()
        actors = ray.util.list_named_actors(all_namespaces=True)
        # This process has a handle of the controller, which must not outlive it, even if the command left Serve there.
        serve.shutdown()
    assert [actor["name"] for actor in actors if actor["namespace"] == "serve"] == []


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0, timeout=60)


def ask(client, model="auto", prompt=CONVERSATION, **settings):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return client.chat.completions.create(
        **{"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, **settings}
    )


def leases():
    return serve.get_deployment_handle("Experts", "gradientspace").leases.remote().result(timeout_s=30)


def served_folder(run, name):
    """The folder of an adapter's copy, which is what the endpoint reads."""
    registry = read_registry(run)
    return Path(run.path(f"releases/{own_release(run, registry).id}/{registry.resolve(name).folder}"))


@pytest.mark.parametrize("model", ["base", "generalist", *EXPERTS])
def test_a_forced_model_answers_as_peft_does_on_the_training_prompt(client, run, model):
    answer = ask(client, model)
    prompt_tokens, text = peft_answer(run, model, CONVERSATION, TOKENS)
    assert answer.choices[0].message.content == text
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.total_tokens == prompt_tokens + answer.usage.completion_tokens
    assert answer.model == (model if model == "base" else read_registry(run).resolve(model).id)
    assert ask(client, answer.model).choices[0].message.content == text


def test_streams_carry_the_same_text(client):
    whole = ask(client, EXPERTS[0])
    chunks = list(ask(client, EXPERTS[0], stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert last.choices == []
    assert last.usage == whole.usage
    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1
    assert all(chunk.choices for chunk in ask(client, stream=True)), "a usage chunk came that nobody asked for"


def test_a_stream_is_server_sent_events_to_the_letter(url):
    body = {"model": "auto", "messages": CONVERSATION, "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {API_KEY}"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert [list(json.loads(event.removeprefix("data: "))["choices"][0]["delta"]) for event in events[:1]] == [
        ["role", "content"]
    ]


def test_auto_routes_and_the_headers_tell(client):
    for prompt, expert in [
        *((prompt, EXPERTS[0]) for prompt in COUNTING),
        *((prompt, EXPERTS[1]) for prompt in STORIES),
    ]:
        raw = client.chat.completions.with_raw_response.create(
            model="auto", messages=[{"role": "user", "content": prompt}], max_tokens=1
        )
        assert raw.headers["x-gradientspace-expert"] == expert
        assert raw.headers["x-gradientspace-reason"] == "routed"
        assert 0.5 <= float(raw.headers["x-gradientspace-confidence"]) <= 1
        assert float(raw.headers["x-gradientspace-router-ms"]) > 0
        assert raw.parse().model.startswith(f"{expert}@")
        assert len(raw.headers.get_list("x-request-id")) == 1
    forced = client.chat.completions.with_raw_response.create(model=EXPERTS[0], messages=CONVERSATION, max_tokens=1)
    assert forced.headers["x-gradientspace-reason"] == "forced"
    assert forced.headers["x-gradientspace-expert"] == EXPERTS[0]


def test_more_adapters_than_slots_at_once(client):
    """Three adapters and the base share two slots; each answer is what it is alone."""
    models = ["generalist", *EXPERTS, "base"]
    alone = [ask(client, model).choices[0].message.content for model in models]
    assert len(set(alone)) == len(models)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda model: ask(client, model).choices[0].message.content, models * 3))
    assert together == alone * 3


def test_seeds_repeat_an_answer(client):
    texts = [
        ask(client, EXPERTS[0], temperature=1.0, top_p=0.9, seed=seed).choices[0].message.content for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_models_are_listed(client, run):
    listed = {model.id: model for model in client.models.list()}
    registry = read_registry(run)
    assert list(listed) == [*registry.model_ids(), *(adapter.id for adapter in registry.adapters)]
    adapter = registry.resolve(EXPERTS[1])
    assert client.models.retrieve(EXPERTS[1]).root == adapter.id
    assert client.models.retrieve(adapter.id).id == adapter.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")


def test_errors_are_the_client_s_own_types(client, url):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, "nobody")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, prompt="long " * 1000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, max_tokens=2001)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert caught.value.param == "tools"
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0))
    assert caught.value.code == "invalid_api_key"
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/chat/completions", b"[1, 2]", 400),
        ("POST", "/v1/chat/completions", b'{"model": "auto"}', 400),
        ("POST", "/v1/chat/completions", b" " * (2**20 + 1), 413),
        ("GET", "/v1/chat/completions", None, 405),
        ("POST", "/v1/embeddings", b"{}", 404),
        ("PUT", "/", b"{}", 405),
    ],
)
def test_bad_requests_get_openai_shaped_errors(url, method, path, content, status):
    headers = {"authorization": f"Bearer {API_KEY}", "content-type": "application/json"}
    answer = httpx.request(method, f"{url}{path}", content=content, headers=headers)
    assert answer.status_code == status
    assert_openai_error(answer)
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_ends_the_request(url, client, stream):
    """Six long answers that nobody waits for would keep the model busy for about twenty seconds."""
    body = {"model": EXPERTS[1], "messages": CONVERSATION, "max_tokens": 1900, "temperature": 0, "stream": stream}
    headers = {"authorization": f"Bearer {API_KEY}"}

    def hang_up(_):
        timeout = httpx.Timeout(30, read=1.0)
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=timeout) as answer,
        ):
            next(answer.iter_lines())

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(hang_up, range(6)))
    left = time.monotonic()
    while any(leases().values()):
        assert time.monotonic() - left < 8, "the answers go on without a reader"
        time.sleep(0.05)
    assert ask(client, EXPERTS[1], max_tokens=1).usage.completion_tokens == 1


def test_the_page_for_people_needs_no_key(url):
    page = httpx.get(f"{url}/")
    assert (page.status_code, page.content) == (200, PAGE)
    assert {name: page.headers[name] for name in HEADERS} == HEADERS


@contextlib.contextmanager
def memory_filled_with_others(client):
    """The next request for the first expert must read its files, within the block; afterwards it is served again."""
    fitting = ["generalist", EXPERTS[1]]
    for name in (*UNFIT, *fitting):
        with contextlib.suppress(openai.InternalServerError):
            ask(client, name, max_tokens=1)
    yield
    for name in (*fitting, EXPERTS[0]):
        assert ask(client, name, max_tokens=1).usage.completion_tokens == 1


def assert_run_changed(client):
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="the endpoint's owner must release it again") as caught:
            list(ask(client, EXPERTS[0], stream=stream))
        assert (caught.value.status_code, caught.value.code) == (503, "run_changed")
        assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("change", ["other weights", "damaged weights"])
def test_weights_that_changed_under_the_endpoint_are_never_served_under_the_old_digest(client, run, change):
    weights, other = (served_folder(run, name) / WEIGHTS_FILE for name in EXPERTS)
    contents = weights.read_bytes()
    with memory_filled_with_others(client):
        changed = other.read_bytes() if change == "other weights" else contents[:100]
        weights.write_bytes(changed)
        try:
            assert_run_changed(client)
        finally:
            weights.write_bytes(contents)


@pytest.mark.parametrize("held", [False, True])
def test_a_folder_that_went_under_the_endpoint_says_so(client, run, held):
    """As after a later run of the experts stage; `held`: the replica knows the folder, but has not read its weights."""
    folder = served_folder(run, EXPERTS[0])
    weights = folder / WEIGHTS_FILE
    contents = weights.read_bytes()
    with memory_filled_with_others(client):
        if held:
            weights.write_bytes(b"")
            assert_run_changed(client)
            weights.write_bytes(contents)
        folder.rename(run.path("elsewhere"))
        try:
            assert_run_changed(client)
        finally:
            Path(run.path("elsewhere")).rename(folder)


def test_an_adapter_that_does_not_fit_fails_alone(client):
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            list(ask(client, UNFIT[0], stream=stream))
        assert (caught.value.status_code, caught.value.code) == (500, "internal_error")
        assert "rank" not in str(caught.value), "the inside of a failure is not the client's business"
    assert ask(client, EXPERTS[1], max_tokens=1).usage.completion_tokens == 1


def test_a_second_endpoint_does_not_replace_the_first(run, client):
    with (
        pytest.raises(RuntimeError, match=r"already runs an endpoint .* stop it with: serve shutdown"),
        in_this_process(build(ServeArguments(run_dir=run.uri))),
    ):
        pass
    assert ask(client, "base", max_tokens=1).usage.completion_tokens == 1
