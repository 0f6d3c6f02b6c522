"""The endpoint under the clients that people have: `openai`, `litellm`, LangChain."""

import asyncio
import json
import os
import subprocess
import sys

# Read when litellm is imported: without it, it asks the internet for prices.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import httpx
import litellm
import openai
import psutil
import pytest
from endpoints import make_decided_run, peft_answer, serving, write_keys
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from tiny_run import COUNTING, EXPERTS, STORIES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from gradientspace_ray.models.loading import load_tokenizer
from gradientspace_ray.registry import read_registry

pytestmark = [pytest.mark.ray, pytest.mark.slow]
API_KEY, ONE_AT_A_TIME = "sk-of-a-client-0123456789", "sk-of-one-at-a-time-0123456789"
START_TIMEOUT_S = 15
"""Longer than any answer takes to start here; a test waits as long for experts that hang."""
TOKENS = 8
CONVERSATION = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "what is 2 + 2 and a dóor"},
]
# By the decided router alone: a story by less than the margin that makes a conversation change its expert.
UNDECIDED = "what upon a time"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    return make_decided_run(tmp_path_factory.mktemp("clients") / "run", tiny_model_dir, tiny_encoder_dir)


@pytest.fixture(scope="module")
def url(ray_cluster, run, tmp_path_factory):
    one = {"name": "one-at-a-time", "key": ONE_AT_A_TIME, "concurrent_requests": 1}
    keys = write_keys(tmp_path_factory.mktemp("keys") / "keys.yaml", keys=[{"name": "client", "key": API_KEY}, one])
    with serving(run, keys_file=keys, start_timeout_s=START_TIMEOUT_S) as url:
        yield url


@pytest.fixture(scope="module")
def greedy(run):
    """The text of each model's answer to the conversation, by PEFT."""
    return {model: peft_answer(run, model, CONVERSATION, TOKENS)[1] for model in ("base", *EXPERTS)}


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0, timeout=60)


def request(model="base", prompt=CONVERSATION, **settings):
    messages = user(prompt) if isinstance(prompt, str) else prompt
    return {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, **settings}


def user(text):
    return [{"role": "user", "content": text}]


def ask(client, *arguments, **settings):
    return client.chat.completions.create(**request(*arguments, **settings))


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.mark.parametrize("model", ["base", *EXPERTS])
def test_openai_gets_what_peft_generates(client, greedy, model):
    whole = ask(client, model)
    assert whole.choices[0].message.content == greedy[model]
    stream = list(ask(client, model, stream=True, stream_options={"include_usage": True}))
    assert text_of(stream) == greedy[model]
    assert stream[-1].usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    assert all(chunk.usage is None for chunk in stream[:-1])


def test_openai_async_asks_for_everything_at_once(url, greedy):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0, timeout=60) as client:

            async def streamed(model):
                stream = await client.chat.completions.create(**request(model, stream=True))
                return text_of([chunk async for chunk in stream])

            async def whole(model):
                answer = await client.chat.completions.create(**request(model))
                return answer.choices[0].message.content

            tasks = [ask(model) for model in greedy for ask in (whole, streamed)]
            return await asyncio.gather(*tasks)

    assert asyncio.run(ask_all()) == [text for text in greedy.values() for _ in range(2)]


def tokens_of(run, text):
    return load_tokenizer(read_registry(run).base_model)(text)["input_ids"]


def test_completions_continue_texts_and_token_ids(client, run):
    settings = {"model": EXPERTS[1], "max_tokens": TOKENS, "temperature": 0}
    text = "once upon a dóor"
    whole = client.completions.create(prompt=text, **settings)
    ids = tokens_of(run, text)
    by_ids = client.completions.create(prompt=ids, **settings)
    assert by_ids.choices[0].text == whole.choices[0].text
    assert by_ids.usage.prompt_tokens == whole.usage.prompt_tokens == len(ids)
    streamed = client.completions.create(prompt=text, stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    many = client.completions.create(prompt=[text, "what is"], n=2, **settings)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [many.choices[index].text for index in (0, 1)] == [whole.choices[0].text] * 2
    assert many.choices[2].text == many.choices[3].text != whole.choices[0].text
    assert many.usage.prompt_tokens == len(ids) + len("what is")


def test_choices_differ_and_seeds_repeat_them(client):
    settings = {"n": 3, "temperature": 1.0, "top_p": 0.9, "seed": 5}
    first, again = (ask(client, EXPERTS[0], **settings) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in again.choices] == texts
    assert 3 <= first.usage.completion_tokens <= 3 * TOKENS
    parts = {index: "" for index in range(3)}
    for chunk in ask(client, EXPERTS[0], stream=True, **settings):
        parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(parts.values()) == texts


def test_logprobs_are_those_of_the_chosen_tokens(client):
    answer = ask(client, EXPERTS[0], logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == (
        answer.choices[0].message.content
    )
    for token in tokens:
        likely = [other.logprob for other in token.top_logprobs]
        assert likely == sorted(likely, reverse=True)
        assert token.logprob == likely[0] <= 0, "a greedy token is the most likely one"
    streamed = [
        token
        for chunk in ask(client, EXPERTS[0], logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.bytes for token in streamed] == [token.bytes for token in tokens]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in tokens], abs=1e-4)


def test_stop_ends_before_the_text(client, greedy):
    whole = greedy["base"]
    stop = whole[2:4]
    for streams in (False, True):
        answer = ask(client, stop=[stop, "never in there"], stream=streams)
        if streams:
            chunks = list(answer)
            text, reason = text_of(chunks), chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == (whole.partition(stop)[0], "stop")


def test_logit_bias_decides_the_tokens(client, run):
    (token,) = tokens_of(run, "z")
    assert ask(client, logit_bias={str(token): 100}).choices[0].message.content == "z" * TOKENS
    assert "z" not in ask(client, logit_bias={str(token): -100}).choices[0].message.content


def test_raw_answers_have_the_route_in_their_headers(client, run):
    for prompt, expert in ((COUNTING[0], EXPERTS[0]), (STORIES[0], EXPERTS[1])):
        raw = client.chat.completions.with_raw_response.create(**request("auto", prompt, max_tokens=1))
        adapter = read_registry(run).resolve(expert)
        assert raw.headers["x-gradientspace-expert"] == expert
        assert raw.headers["x-gradientspace-reason"] == "routed"
        assert raw.headers["x-gradientspace-second-best"] == EXPERTS[1 - EXPERTS.index(expert)]
        assert 0.5 < float(raw.headers["x-gradientspace-confidence"]) < 1
        assert raw.request_id == raw.headers["x-request-id"]
        answer = raw.parse()
        assert answer.model == adapter.id
        assert answer.system_fingerprint == f"fp_{adapter.digest}"
        with client.chat.completions.with_streaming_response.create(**request("auto", prompt, stream=True)) as stream:
            assert stream.headers["x-gradientspace-expert"] == expert
            assert "[DONE]" in list(stream.iter_lines())[-2]


def test_an_explanation_comes_with_the_answer_that_asked_for_it(client):
    explain = {"extra_body": {"gradientspace": {"explain": True}}}
    answer = ask(client, "auto", COUNTING[0], **explain)
    told = answer.gradientspace
    assert (told["expert"], told["model"], told["reason"]) == (EXPERTS[0], answer.model, "routed")
    assert sum(told["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert told["confidence"] == told["probabilities"][EXPERTS[0]] == max(told["probabilities"].values())
    assert told["second_best"] == EXPERTS[1]
    first, *others = ask(client, "auto", COUNTING[0], stream=True, **explain)
    assert first.gradientspace | {"router_ms": 0} == told | {"router_ms": 0}
    assert not any(hasattr(chunk, "gradientspace") for chunk in others)
    assert not hasattr(ask(client, "auto", COUNTING[0]), "gradientspace")


def test_a_conversation_keeps_its_expert_until_another_is_clearly_better(client):
    def expert_of(messages):
        raw = client.chat.completions.with_raw_response.create(**request("auto", messages, max_tokens=4))
        return raw.headers["x-gradientspace-expert"], raw.parse().choices[0].message.content

    assert expert_of(user(UNDECIDED))[0] == EXPERTS[1], "alone, it is a story"
    for opening, follow_up, expert in [
        (COUNTING[0], UNDECIDED, EXPERTS[0]),
        (STORIES[0], UNDECIDED, EXPERTS[1]),
        (COUNTING[0], STORIES[0], EXPERTS[1]),
    ]:
        _, answer = expert_of(user(opening))
        conversation = [*user(opening), {"role": "assistant", "content": answer}, *user(follow_up)]
        assert expert_of(conversation)[0] == expert


def test_models_are_listed_and_named_with_or_without_their_digest(client, run):
    registry = read_registry(run)
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == [*registry.model_ids(), *(adapter.id for adapter in registry.adapters)]
    for name in EXPERTS:
        adapter = registry.resolve(name)
        assert listed[name].root == adapter.id
        assert client.models.retrieve(adapter.id).root == adapter.id
        assert ask(client, adapter.id, max_tokens=1).model == ask(client, name, max_tokens=1).model == adapter.id
    for unknown in (f"{EXPERTS[0]}@0000", "some/other"):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(client, unknown)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(unknown)


def test_errors_are_the_clients_own_types(client, url):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as caught:
        list(ask(client, prompt="long " * 1000, stream=True))
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(client.with_options(api_key="sk-of-nobody"))
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, user="x" * 2**20)
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.05), prompt="long " * 300, max_tokens=400)


def recording(url, key, refused):
    """A client that tries again, and the status of each answer that it gets; `refused` is called at each error."""
    statuses = []

    def record(answer):
        statuses.append(answer.status_code)
        if answer.is_error:
            refused()

    http_client = openai.DefaultHttpxClient(event_hooks={"response": [record]})
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=3, timeout=60, http_client=http_client
    ), statuses


def test_a_key_that_is_busy_is_tried_again_by_the_client_itself(url, greedy):
    once = openai.OpenAI(base_url=f"{url}/v1", api_key=ONE_AT_A_TIME, max_retries=0, timeout=60)
    held = once.chat.completions.create(**request(max_tokens=1500, stream=True, extra_body={"ignore_eos": True}))
    next(held)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(once)
    assert caught.value.code == "rate_limit_exceeded"
    assert float(caught.value.response.headers["retry-after"]) >= 1
    client, statuses = recording(url, ONE_AT_A_TIME, held.close)
    assert ask(client).choices[0].message.content == greedy["base"]
    assert statuses[0] == 429
    assert statuses[-1] == 200


def replica_of(deployment):
    """The one process of a deployment, among those of this test's own Ray."""
    (found,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if f"ServeReplica:gradientspace:{deployment}" in " ".join(process.cmdline())
    ]
    return found


def test_experts_that_hang_are_a_503_that_the_client_tries_again(url, greedy):
    experts = replica_of("Experts")
    client, statuses = recording(url, API_KEY, experts.resume)
    assert ask(client).choices[0].message.content == greedy["base"]
    statuses.clear()
    experts.suspend()
    try:
        assert ask(client).choices[0].message.content == greedy["base"]
    finally:
        experts.resume()
    assert statuses == [503, 200]


@pytest.fixture
def lite(url):
    return {"api_base": f"{url}/v1", "api_key": API_KEY, "max_retries": 0, "timeout": 60}


def test_litellm_whole_streamed_and_async(lite, greedy):
    for model in EXPERTS:
        named = request(f"openai/{model}") | lite
        whole = litellm.completion(**named)
        assert whole.choices[0].message.content == greedy[model]
        assert whole.usage.completion_tokens <= TOKENS
        assert text_of(litellm.completion(**named, stream=True)) == greedy[model]

    async def ask_async():
        whole = await litellm.acompletion(**request(f"openai/{EXPERTS[0]}") | lite)
        stream = await litellm.acompletion(**request(f"openai/{EXPERTS[1]}") | lite, stream=True)
        return [whole.choices[0].message.content, text_of([chunk async for chunk in stream])]

    assert asyncio.run(ask_async()) == [greedy[model] for model in EXPERTS]


def test_litellm_raises_its_own_errors(lite):
    with pytest.raises(litellm.NotFoundError, match="the model 'nobody' does not exist"):
        litellm.completion(**request("openai/nobody") | lite)
    with pytest.raises(litellm.AuthenticationError, match="the API key is not valid"):
        litellm.completion(**request("openai/base") | lite | {"api_key": "sk-of-nobody"})
    with pytest.raises(litellm.BadRequestError, match="tools is not supported"):
        litellm.completion(**request("openai/base", tools=[{"type": "function", "function": {"name": "f"}}]) | lite)


@pytest.fixture
def chat(url):
    settings = {"temperature": 0, "max_tokens": TOKENS, "max_retries": 0, "timeout": 60}
    return lambda model, **more: ChatOpenAI(base_url=f"{url}/v1", api_key=API_KEY, model=model, **settings | more)


def test_langchain_invokes_streams_and_batches(chat, greedy):
    model = chat(EXPERTS[0])
    answer = model.invoke(CONVERSATION)
    assert answer.content == greedy[EXPERTS[0]]
    assert answer.usage_metadata["output_tokens"] <= TOKENS
    assert answer.response_metadata["model_name"].startswith(f"{EXPERTS[0]}@")
    assert "".join(chunk.content for chunk in model.stream(CONVERSATION)) == greedy[EXPERTS[0]]
    assert [answer.content for answer in model.batch([CONVERSATION] * 3)] == [greedy[EXPERTS[0]]] * 3
    assert asyncio.run(model.ainvoke(CONVERSATION)).content == greedy[EXPERTS[0]]


def test_langchain_asks_for_several_answers(chat):
    result = chat(EXPERTS[0], n=3, temperature=1, seed=1).generate([[HumanMessage("once upon a dóor")]])
    assert len({generation.text for generation in result.generations[0]}) == 3


class Sum(BaseModel):
    """The sum of two numbers."""

    total: int


@pytest.mark.parametrize(
    ("method", "param"),
    [("json_schema", "response_format"), ("json_mode", "response_format"), ("function_calling", "tool_choice")],
)
def test_structured_output_is_refused_by_name(chat, method, param):
    with pytest.raises(openai.BadRequestError, match=f"{param} is not supported by this server") as caught:
        chat("base").with_structured_output(Sum, method=method).invoke("what is 2 + 2")
    assert caught.value.param == param


def test_many_clients_on_many_connections(url, greedy):
    """Each answer is its own, whatever else is in the batch."""

    async def ask_many():
        headers = {"authorization": f"Bearer {API_KEY}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as client:

            async def one(model):
                answer = await client.post("/v1/chat/completions", json=request(model))
                return answer.json()["choices"][0]["message"]["content"]

            models = list(greedy) * 8
            return models, await asyncio.gather(*map(one, models))

    models, texts = asyncio.run(ask_many())
    assert texts == [greedy[model] for model in models]


def test_ray_s_own_benchmark_of_endpoints_runs_and_no_request_fails(url, tmp_path):
    """At a fixed rate, routed, in conversations of two turns that begin with the same system prompt."""
    # It asks in random tokens: words here, for bytes would be control characters too, which are refused.
    words = Tokenizer(WordLevel({f"word{number}": number for number in range(50)}, unk_token="word0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    results = tmp_path / "results.json"
    endpoint = [f"--base-url={url}", f"--api-key={API_KEY}", "--model=auto"]
    workload = ["--request-rate=6", "--duration=6", "--num-turns=2", "--isl=30", "--hit-rate=0.5", f"--osl={TOKENS}"]
    files = [f"--tokenizer={tmp_path / 'words'}", f"--save-result={results}"]
    ended = subprocess.run(
        [sys.executable, "-m", "ray.llm._internal.serve.benchmark", *endpoint, *workload, *files, "--seed=0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "failed" not in ended.stderr, ended.stderr
    found = json.loads(results.read_text())
    assert found["benchmark"]["total_requests"] >= 30
    assert {turn["turn"] for turn in found["per_turn"]} == {1, 2}
    assert all(0 < answer["output_tokens"] <= TOKENS for answer in found["raw_metrics"])
    assert all(0 < answer["ttft_ms"] <= answer["e2e_latency_ms"] for answer in found["raw_metrics"])
