"""The engine against PEFT's own one-at-a-time generation, whatever comes, goes, waits and is kept."""

import asyncio
import copy
import functools
from contextlib import aclosing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tiny_models import save_tiny_model
from tiny_run import make_adapter

from gradientspace_ray.engine.contract import Sampling
from gradientspace_ray.engine.scheduler import Engine
from gradientspace_ray.engine.slots import Slots
from gradientspace_ray.models.loading import load_base, load_tokenizer

ADAPTERS = 4
MAX_TOKENS = 14
TIE = 1e-4
# Prompts that begin alike, longer than a block of the prefix cache and than a part of a prefill.
TEXT = [(7 * i * i + 3 * i) % 250 for i in range(90)]
PROMPTS = [*(TEXT[:end] for end in (1, 2, 31, 32, 33, 64, 65, 90)), [*TEXT[:40], 1, 2, 3], [9]]


@functools.cache
def setting(root):
    """A model, its adapters (the last is none: the base), and each one's model in PEFT."""
    folder = save_tiny_model(root / "model")
    adapters = [make_adapter(folder, root / f"expert-{seed}", seed) for seed in range(1, ADAPTERS + 1)]
    references = [PeftModel.from_pretrained(load_base(str(folder)), adapter.folder).eval() for adapter in adapters]
    return load_tokenizer(str(folder)), [*adapters, None], [*references, load_base(str(folder))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


@functools.cache
def reference(root, prompt, adapter):
    """PEFT's greedy tokens, and by how much each won over the second best."""
    _, _, references = setting(root)
    ids = torch.tensor([PROMPTS[prompt]])
    output = references[adapter].generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(output.logits)[:, 0].topk(2).values
    return output.sequences[0, ids.shape[1] :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def assert_same(tokens, root, prompt, adapter, ended):
    expected, leads = reference(root, prompt, adapter)
    for got, wanted, lead in zip(tokens, expected, leads, strict=False):
        if got != wanted:
            assert lead < TIE, (tokens, expected)
            return
    assert len(tokens) == len(expected) or not ended


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, ADAPTERS),
        st.integers(0, 12),  # rounds, more or less, before it comes
        st.none() | st.integers(0, 3),  # pieces after which it goes
    ),
    min_size=1,
    max_size=14,
)
ENGINES = st.fixed_dictionaries(
    {
        "max_rows": st.integers(1, 5),
        "prefill_tokens": st.sampled_from([1, 7, 32, 64]),
        "cache_tokens": st.sampled_from([110, 250, None]),
        "prefix_tokens": st.sampled_from([0, 64, 500]),
    }
)


async def serve(engine, requests, adapters):
    async def one(prompt, adapter, delay, patience):
        for _ in range(delay):
            await asyncio.sleep(0.001)
        sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0, top_logprobs=0)
        pieces = []
        async with aclosing(engine.submit(PROMPTS[prompt], sampling, adapters[adapter])) as stream:
            if patience == 0:  # cancelled while it may still wait for its turn
                first = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0.002)
                first.cancel()
                await asyncio.wait([first])
                return None
            async for piece in stream:
                pieces.append(piece)
                if len(pieces) == patience:
                    break
        return pieces

    results = await asyncio.gather(*(one(*request) for request in requests))
    for _ in range(500):  # what was left is gone by the engine's next round
        statistics = engine.statistics()
        if not statistics.rows and not statistics.waiting and not any(statistics.leases.values()):
            return results
        await asyncio.sleep(0.01)
    raise AssertionError(f"something stayed behind: {statistics}")


def recorded(engine):
    """The tokens of every answer, in the order of admission, as the engine chose them."""
    answers, admit = [], engine._rounds._queue.admit

    def admit_and_record(admissible):
        request = admit(admissible)
        if request is not None:
            answers.append(request)
        return request

    engine._rounds._queue.admit = admit_and_record
    return answers


@settings(max_examples=60)
@given(REQUESTS, ENGINES, st.integers(1, 3))
def test_greedy_answers_are_peft_s_whatever_comes_and_goes(root, requests, options, capacity):
    tokenizer, adapters, references = setting(root)
    model = copy.deepcopy(references[-1])
    engine = Engine(model, tokenizer, Slots.like(model, adapters[0].folder, capacity), **options)
    answers = recorded(engine)
    try:
        results = asyncio.run(serve(engine, requests, adapters))
    finally:
        engine.close()
    ids = {adapter and adapter.id: number for number, adapter in enumerate(adapters)}
    for request in answers:
        prompt = PROMPTS.index(request.prompt)
        assert_same(request.answer, root, prompt, ids[request.adapter_id], request.finish_reason is not None)
    finished = 0
    for (prompt, adapter, _, patience), pieces in zip(requests, results, strict=True):
        if patience is None:
            finished += 1
            expected, leads = reference(root, prompt, adapter)
            assert pieces[-1].finish_reason
            assert pieces[0].queued_s is not None
            if min(leads) > TIE:
                text = tokenizer.decode(expected, skip_special_tokens=True)
                assert "".join(piece.text for piece in pieces) == text
                assert pieces[-1].completion_tokens == len(expected)
                ended = pieces[-1].finish_reason == "stop"
                assert sum(len(piece.logprobs) for piece in pieces) == len(expected) - ended
    assert len(answers) >= finished
    assert set(engine.leases().values()) <= {0}
