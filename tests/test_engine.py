import asyncio
import dataclasses
import threading
from contextlib import aclosing

import pytest
import torch
from peft import PeftModel
from tiny_run import make_adapter

from gradientspace_ray.engine.adapters import AdapterFiles
from gradientspace_ray.engine.contract import Sampling
from gradientspace_ray.engine.fairness import MAX_OVERTAKES
from gradientspace_ray.engine.scheduler import (
    MOST_FAILURES,
    Engine,
    EngineClosedError,
    PromptTooLongError,
    UnknownTokenError,
)
from gradientspace_ray.engine.slots import Slots
from gradientspace_ray.models.loading import ModelError, load_base, load_tokenizer

PROMPTS = ["Tell me", "A longer prompt, for another row of the cache.", "2+2=", "ünïcode"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("engine-adapters")
    return [make_adapter(tiny_model_dir, root / f"expert-{seed}", seed) for seed in (1, 2, 3)]


@pytest.fixture
def engine(tiny_model_dir, tokenizer, adapters):
    model = load_base(str(tiny_model_dir))
    engine = Engine(model, tokenizer, Slots.like(model, adapters[0].folder, capacity=2))
    yield engine
    engine.close()


async def answer(engine, prompt_ids, sampling, adapter=None):
    pieces = [piece async for piece in engine.submit(prompt_ids, sampling, adapter)]
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return "".join(piece.text for piece in pieces), pieces[-1]


def peft_text(model_dir, tokenizer, adapter, prompt_ids, max_tokens):
    model = load_base(str(model_dir))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter.folder).eval()
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )[0, len(prompt_ids) :]
    return tokenizer.decode(output, skip_special_tokens=True), len(output)


def test_concurrent_greedy_answers_equal_peft_one_at_a_time(tiny_model_dir, tokenizer, adapters, engine):
    """Three adapters and the base on two slots: some requests wait for a slot, and all interleave."""
    jobs = [(prompt, adapter) for prompt in PROMPTS for adapter in (*adapters, None)]

    async def together():
        sampling = Sampling(max_tokens=12, temperature=0)
        return await asyncio.gather(
            *(answer(engine, tokenizer(prompt)["input_ids"], sampling, adapter) for prompt, adapter in jobs)
        )

    answers = asyncio.run(together())
    for (prompt, adapter), (text, last) in zip(jobs, answers, strict=True):
        expected, tokens = peft_text(tiny_model_dir, tokenizer, adapter, tokenizer(prompt)["input_ids"], 12)
        assert (text, last.completion_tokens) == (expected, tokens)
        assert last.finish_reason == ("length" if tokens == 12 else "stop")
    assert len({text for text, _ in answers[:4]}) == 4, "the adapters must differ for this test to mean anything"
    assert set(engine.leases().values()) == {0}


def test_a_row_is_freed_while_the_next_request_has_none_yet(tokenizer, engine):
    """The fifth is next to be read when the first ends, and memory was taken for four rows."""
    ids = tokenizer(PROMPTS[0])["input_ids"]

    async def texts(first_tokens):
        limits = [first_tokens, 20, 20, 20, 20]
        return await asyncio.gather(*(answer(engine, ids, Sampling(max_tokens=n, temperature=0)) for n in limits))

    alone, _ = asyncio.run(answer(engine, ids, Sampling(max_tokens=20, temperature=0)))
    for first_tokens in range(4, 8):
        first, *others = asyncio.run(texts(first_tokens))
        assert alone.startswith(first[0])
        assert [text for text, _ in others] == [alone] * 4
    assert engine.healthy


def test_requests_advance_in_turn(tokenizer, engine, monkeypatch):
    seen, run = [], engine._rounds.run

    def run_and_record():
        outcomes = run()
        seen.extend(chr(request.prompt[0]) for request, _ in outcomes)
        return outcomes

    monkeypatch.setattr(engine._rounds, "run", run_and_record)

    async def together():
        # A letter a token, so a piece a token.
        sampling = Sampling(max_tokens=30, seed=1, logit_bias={65: 100.0})
        await asyncio.gather(*(answer(engine, [ord(name)] * 3, sampling) for name in "abc"))

    asyncio.run(together())
    assert sorted(seen) == sorted("abc" * 30)
    together = seen[seen.index("c") : len(seen) - seen[::-1].index("a") - 1]
    assert len(together) > 60
    for start in range(len(together) - 2):
        assert len(set(together[start : start + 3])) == 3, "one request ran ahead of the others"


def test_end_tokens_and_stop_texts_end_an_answer(tiny_model_dir, tokenizer, engine):
    prompt_ids = tokenizer(PROMPTS[0])["input_ids"]
    greedy = Sampling(max_tokens=24, temperature=0)
    text, _ = asyncio.run(answer(engine, prompt_ids, greedy))
    start = next(start for start in range(2, len(text) - 2) if text.find(text[start : start + 3]) == start)
    stop = text[start : start + 3]
    stopped, last = asyncio.run(answer(engine, prompt_ids, Sampling(max_tokens=24, temperature=0, stop=(stop,))))
    assert (stopped, last.finish_reason) == (text[:start], "stop")

    first = int(load_base(str(tiny_model_dir))(torch.tensor([prompt_ids])).logits[0, -1].argmax())
    engine._rounds.end_tokens = frozenset({first})
    ended, last = asyncio.run(answer(engine, prompt_ids, greedy))
    assert (ended, last.finish_reason, last.completion_tokens) == ("", "stop", 1)


async def until(condition):
    """The engine's thread takes notice of what happened by its next round."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nothing changed within 5 s")


def test_leaving_an_answer_ends_its_lease(tokenizer, adapters, engine):
    async def leave():
        sampling = Sampling(max_tokens=500, temperature=0, ignore_eos=True)
        async with aclosing(engine.submit(tokenizer("a")["input_ids"], sampling, adapters[0])) as pieces:
            await anext(pieces)
            assert engine.leases() == {adapters[0].id: 1}
        await until(lambda: engine.leases() == {adapters[0].id: 0})

        task = asyncio.create_task(answer(engine, tokenizer("a")["input_ids"], sampling, adapters[1]))
        await until(lambda: engine.leases().get(adapters[1].id) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.leases()[adapters[1].id] == 0)
        assert engine.statistics().rows == 0

    asyncio.run(leave())


def test_whoever_waits_for_a_slot_gets_the_next_one(tokenizer, adapters, engine):
    """Requests for a resident adapter overtake it a few times at most."""

    async def wait():
        prompt_ids = tokenizer("a")["input_ids"]
        long = Sampling(max_tokens=1500, temperature=0, ignore_eos=True)
        short = Sampling(max_tokens=2, temperature=0, ignore_eos=True)
        first, second = (engine.submit(prompt_ids, long, adapter) for adapter in adapters[:2])
        await anext(first)
        await anext(second)
        third = asyncio.create_task(answer(engine, prompt_ids, short, adapters[2]))
        await until(lambda: engine.statistics().waiting == {adapters[2].id: 1})
        for _ in range(MAX_OVERTAKES):
            await answer(engine, prompt_ids, short, adapters[0])
        fourth = asyncio.create_task(answer(engine, prompt_ids, short, adapters[0]))
        await asyncio.sleep(0.1)
        assert not third.done()
        assert not fourth.done(), "a request for a resident adapter overtook the one that waits"
        await second.aclose()
        await asyncio.gather(third, fourth)
        await first.aclose()

    asyncio.run(wait())


def test_an_error_reaches_only_its_request(tokenizer, adapters, engine, tmp_path):
    async def mixed():
        prompt_ids, sampling = tokenizer("a")["input_ids"], Sampling(max_tokens=4, temperature=0)
        return await asyncio.gather(
            answer(engine, prompt_ids, sampling, adapters[0]),
            answer(engine, prompt_ids, sampling, AdapterFiles("missing@0", tmp_path)),
            answer(engine, [10**6], sampling),
            answer(engine, [1] * engine.context_tokens, sampling),
            answer(engine, [], sampling),
            return_exceptions=True,
        )

    good, missing, no_such_token, long, empty = asyncio.run(mixed())
    assert good[1].completion_tokens == 4
    assert isinstance(missing, ModelError)
    assert isinstance(no_such_token, UnknownTokenError)
    assert isinstance(long, PromptTooLongError)
    assert isinstance(empty, PromptTooLongError)
    assert set(engine.leases().values()) == {0}


def test_autocast_computes_as_training_does(tiny_model_dir, tokenizer, adapters):
    prompt_ids = tokenizer(PROMPTS[0])["input_ids"]
    model = load_base(str(tiny_model_dir))
    engine = Engine(model, tokenizer, Slots.like(model, adapters[0].folder, capacity=1), compute_dtype=torch.bfloat16)
    text, last = asyncio.run(answer(engine, prompt_ids, Sampling(max_tokens=6, temperature=0), adapters[0]))
    engine.close()
    with torch.autocast("cpu", torch.bfloat16):
        expected, tokens = peft_text(tiny_model_dir, tokenizer, adapters[0], prompt_ids, 6)
    assert (text, last.completion_tokens) == (expected, tokens)


def test_an_answer_ends_at_the_end_of_the_context(tokenizer, engine):
    prompt_ids = [5] * (engine.context_tokens - 3)
    _, last = asyncio.run(answer(engine, prompt_ids, Sampling(max_tokens=50, temperature=0)))
    assert (last.completion_tokens, last.finish_reason) == (3, "length")


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(tokenizer, adapters, engine, monkeypatch):
    """Two requests generate and a third one's prompt is being read; the third is none of the step's."""
    prompt_ids, sampling = tokenizer("a")["input_ids"], Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    long_prompt = tokenizer("b" * 600)["input_ids"]
    decode = engine._batched.decode
    alone = asyncio.run(answer(engine, long_prompt, sampling, adapters[1]))

    def fail_for_two(tokens, positions, slots):
        if len(tokens) == 2 and engine._rounds._reading is not None:
            raise RuntimeError("out of memory")
        return decode(tokens, positions, slots)

    engine._rounds._prefix.clear()
    monkeypatch.setattr(engine._batched, "decode", fail_for_two)

    async def together():
        long = Sampling(max_tokens=1000, temperature=0, ignore_eos=True)
        tasks = [asyncio.create_task(answer(engine, prompt_ids, long, adapters[0])) for _ in range(2)]
        await until(lambda: engine.statistics().rows == 2)
        return await asyncio.gather(*tasks, answer(engine, long_prompt, sampling, adapters[1]), return_exceptions=True)

    first, second, third = asyncio.run(together())
    assert str(first) == str(second) == "out of memory"
    assert third == (alone[0], dataclasses.replace(third[1], queued_s=None))
    assert engine.healthy
    assert set(engine.leases().values()) == {0}


def test_an_engine_whose_steps_all_fail_or_do_not_end_is_sick(tokenizer, engine, monkeypatch):
    prompt_ids, sampling = tokenizer("a")["input_ids"], Sampling(max_tokens=1)
    prefill = engine._batched.prefill
    entered, leave = threading.Event(), threading.Event()

    def fail(*_):
        raise RuntimeError("the device is lost")

    def wait(*arguments):
        entered.set()
        leave.wait(30)
        return prefill(*arguments)

    async def one():
        return await asyncio.gather(answer(engine, prompt_ids, sampling), return_exceptions=True)

    monkeypatch.setattr(engine._batched, "prefill", fail)
    for _ in range(MOST_FAILURES):
        assert engine.healthy
        asyncio.run(one())
    assert not engine.healthy

    async def stuck():
        task = asyncio.create_task(one())
        await asyncio.to_thread(entered.wait, 30)
        with monkeypatch.context() as patience:
            patience.setattr("gradientspace_ray.engine.scheduler.STUCK_S", 0.0)
            assert not engine.healthy
        leave.set()
        await task

    monkeypatch.setattr(engine._batched, "prefill", wait)
    asyncio.run(stuck())
    assert engine.healthy


def test_the_engine_tells_what_it_does(tokenizer, adapters, engine, tmp_path, caplog):
    prompt_ids, sampling = tokenizer("a" * 100)["input_ids"], Sampling(max_tokens=5, temperature=0, ignore_eos=True)

    async def requests():
        await engine.prefetch(adapters[0])
        await until(lambda: engine.leases() == {adapters[0].id: 0})
        await engine.prefetch(AdapterFiles("missing@0", tmp_path))
        await answer(engine, prompt_ids, sampling, adapters[0])
        _, again = await answer(engine, prompt_ids, sampling, adapters[0])
        _, other = await answer(engine, prompt_ids, sampling, adapters[1])
        await engine.prefetch(adapters[2])  # no slot is unused
        await answer(engine, prompt_ids, sampling)
        return again, other

    again, other = asyncio.run(requests())
    assert (again.cached_tokens, other.cached_tokens) == (96, 0)
    statistics = engine.statistics()
    assert statistics.generated_tokens == {adapters[0].id: 10, adapters[1].id: 5, None: 5}
    assert (statistics.prompt_tokens, statistics.cached_tokens) == (400, 96)
    assert (statistics.rows, statistics.waiting, statistics.evictions, statistics.loads) == (0, {}, 0, 2)
    assert statistics.leases == {adapters[0].id: 0, adapters[1].id: 0}
    assert "missing@0 cannot be prefetched" in caplog.text


def test_a_conversation_goes_on_from_its_last_answer(tokenizer, engine):
    async def turns():
        first = tokenizer("a" * 40)["input_ids"]
        _, last = await answer(engine, first, Sampling(max_tokens=60, seed=3, logit_bias={65: 100.0}))
        return await answer(engine, [*first, *[65] * last.completion_tokens, 66], Sampling(max_tokens=1))

    assert asyncio.run(turns())[1].cached_tokens == 96  # of 99 tokens that were read, whole blocks of 32


def test_a_closed_engine_says_so(tokenizer, engine):
    prompt_ids = tokenizer("a")["input_ids"]

    async def close():
        running = asyncio.create_task(answer(engine, prompt_ids, Sampling(max_tokens=2000, ignore_eos=True)))
        await until(lambda: engine.statistics().rows == 1)
        engine.close()
        with pytest.raises(EngineClosedError):
            await running
        with pytest.raises(EngineClosedError):
            await answer(engine, prompt_ids, Sampling(max_tokens=1))

    assert engine.healthy
    asyncio.run(close())
    assert not engine.healthy


def test_seeds_decide_whatever_else_is_in_the_batch(tokenizer, adapters, engine):
    prompt_ids = tokenizer("Tell me")["input_ids"]
    sampling = Sampling(max_tokens=10, temperature=1.3, top_p=0.9, seed=5, top_logprobs=2)

    async def among_others():
        others = [Sampling(max_tokens=15, seed=seed) for seed in range(3)]
        mixed = [answer(engine, prompt_ids, other, adapter) for other, adapter in zip(others, adapters, strict=True)]
        return (await asyncio.gather(*mixed, answer(engine, prompt_ids, sampling, adapters[0])))[-1]

    alone, last = asyncio.run(answer(engine, prompt_ids, sampling, adapters[0]))
    assert asyncio.run(among_others())[0] == alone
    assert last.completion_tokens == 10
