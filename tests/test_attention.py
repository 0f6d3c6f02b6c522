"""Segmented attention against each example alone, and against transformers' own SDPA when nothing is packed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_causal_lm, tiny_llama_config
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gradientspace_ray.examples.packing import pack
from gradientspace_ray.models.attention import (
    SEGMENTED,
    UnsupportedModelError,
    check_layer_types,
    packed_arguments,
)
from gradientspace_ray.models.reading import check_packing

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": tiny_llama_config(),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**GROUPED),
    "qwen3-sliding": Qwen3Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "mistral-sliding": MistralConfig(**GROUPED, sliding_window=6),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "phi": PhiConfig(**SIZES, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3),
}


def segmented(config: PreTrainedConfig) -> torch.nn.Module:
    model = random_causal_lm(config)
    model.set_attn_implementation(SEGMENTED)
    return model


def ragged(lengths: list[int], seed: int = 0) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return [(row, row) for row in rows]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_row_equals_each_example_alone(name: str) -> None:
    model = segmented(CONFIGS[name])
    check_packing(model)
    examples = ragged([3, 17, 1, 9, 30])
    with torch.no_grad():
        packed = model(**packed_arguments(pack(examples), "cpu")).logits[0]
        model.set_attn_implementation("eager")
        alone = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids, _ in examples])
    assert (packed - alone).norm() / alone.norm() < 1e-5


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=6), st.integers(0, 1000))
def test_ragged_lengths_with_and_without_a_window(lengths: list[int], seed: int) -> None:
    examples = ragged(lengths, seed)
    for name in ("llama", "mistral-sliding"):
        model = segmented(CONFIGS[name])
        with torch.no_grad():
            packed = model(**packed_arguments(pack(examples), "cpu")).logits[0]
            alone = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids, _ in examples])
        assert (packed - alone).norm() / alone.norm() < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gpt-neox"])
def test_unpacked_use_is_transformers_sdpa(name: str) -> None:
    ours, reference = segmented(CONFIGS[name]), random_causal_lm(CONFIGS[name])
    reference.set_attn_implementation("sdpa")
    assert ours.config._attn_implementation == SEGMENTED
    ids = torch.tensor([ragged([12])[0][0], ragged([12], 1)[0][0]])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, reference(ids).logits, rtol=0, atol=0)
        padded = {"input_ids": ids, "attention_mask": mask}
        torch.testing.assert_close(ours(**padded).logits, reference(**padded).logits, rtol=0, atol=0)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        assert torch.equal(ours.generate(**padded, **options), reference.generate(**padded, **options))


def test_gradient_of_a_packed_row_is_the_sum_of_the_examples() -> None:
    examples = ragged([5, 11, 8])
    model = segmented(CONFIGS["mistral-sliding"])
    weight = model.model.layers[0].self_attn.k_proj.weight

    def gradient(rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        loss = model(**packed_arguments(pack(rows), "cpu")).logits.square().sum()
        return torch.autograd.grad(loss, weight)[0]

    alone = torch.stack([gradient([row]) for row in examples]).sum(0)
    assert (gradient(examples) - alone).norm() / alone.norm() < 1e-5


def test_soft_capping_is_refused_by_name() -> None:
    model = segmented(Gemma2Config(**GROUPED))
    with pytest.raises(UnsupportedModelError, match="Gemma2Attention uses logit soft-capping"):
        check_packing(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_the_examples_is_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = segmented(CONFIGS["llama"]).to(dtype)
    check_packing(model)
    monkeypatch.setitem(AttentionInterface._global_mapping, SEGMENTED, sdpa_attention_forward)
    with pytest.raises(UnsupportedModelError, match="llama models mix the examples of a packed row"):
        check_packing(model)


def test_another_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has sdpa attention, which mixes the examples"):
        check_packing(random_causal_lm(CONFIGS["llama"]))


def test_layers_that_are_not_attention_are_refused() -> None:
    config = tiny_llama_config()
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModelError, match="linear_attention would mix"):
        check_layer_types(config)


def test_a_key_value_cache_is_refused_in_a_packed_row() -> None:
    model = segmented(CONFIGS["llama"])
    cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    arguments = packed_arguments(pack(ragged([4])), "cpu") | {"use_cache": True, "past_key_values": cache}
    with pytest.raises(UnsupportedModelError, match="use_cache=False"):
        model(**arguments)
