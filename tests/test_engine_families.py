"""Rows of lengths of their own, on the architectures that people serve, against transformers' generation of each."""

import asyncio

import pytest
import torch
from tiny_models import byte_tokenizer, random_causal_lm
from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from gradientspace_ray.engine.batch import context_tokens
from gradientspace_ray.engine.contract import Sampling
from gradientspace_ray.engine.scheduler import Engine
from gradientspace_ray.engine.slots import Slots
from gradientspace_ray.models.attention import SEGMENTED
from gradientspace_ray.models.loading import ModelError

SIZES = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
BOTH = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
    "qwen3-sliding": Qwen3Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "mistral-sliding": MistralConfig(**GROUPED, sliding_window=6),
    "gemma": GemmaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=6, layer_types=BOTH),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=6, layer_types=BOTH),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
    "phi": PhiConfig(**SIZES, intermediate_size=48, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3),
}
PROMPTS = [[(5 * i * i + seed) % 250 + 3 for i in range(length)] for seed, length in enumerate((3, 14, 1, 40, 9))]
TOKENS, TIE = 16, 1e-4


def expected(model, prompt):
    """Greedy tokens, each from a plain reading of all before it, and its lead over the second best."""
    tokens, leads = [*prompt], []
    for _ in range(TOKENS):
        best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
    return tokens[len(prompt) :], leads


@pytest.mark.parametrize("attention", [SEGMENTED, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_a_batch_are_read_as_each_text_alone(family, attention):
    model = random_causal_lm(FAMILIES[family])
    model.set_attn_implementation("eager" if family == "gemma2" else attention)
    engine = Engine(model, byte_tokenizer(), Slots(model, [], 1, 1), max_rows=4, prefill_tokens=8, prefix_tokens=128)
    requests = []
    push = engine._rounds.push
    engine._rounds.push = lambda request: (requests.append(request), push(request))[1]

    async def answers():
        async def one(prompt):
            sampling = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
            return [piece async for piece in engine.submit(prompt, sampling)][-1]

        await asyncio.gather(*(one(prompt) for prompt in PROMPTS))
        return await one(PROMPTS[3])

    assert asyncio.run(answers()).cached_tokens == 32
    engine.close()
    assert len(requests) == len(PROMPTS) + 1
    for request in requests:
        tokens, leads = expected(model, request.prompt)
        for got, wanted, lead in zip(request.answer, tokens, leads, strict=True):
            if got != wanted:
                assert lead < TIE
                break
    assert len({tuple(request.answer) for request in requests}) > 3, "the answers must depend on the prompts"


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4),
        FalconConfig(**SIZES, alibi=True),
        Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    ],
    ids=lambda config: config.model_type,
)
def test_other_models_are_refused_in_one_line(config):
    model = random_causal_lm(config)
    with pytest.raises(ModelError, match="serve a base model of another architecture") as caught:
        Engine(model, byte_tokenizer(), Slots(model, [], 1, 1))
    assert "\n" not in str(caught.value)


def test_longrope_is_read_up_to_where_its_frequencies_change():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = LlamaConfig(**GROUPED, rope_parameters={**rope, "original_max_position_embeddings": 64})
    assert context_tokens(config) == 64
    assert context_tokens(LlamaConfig(**GROUPED)) == 256
