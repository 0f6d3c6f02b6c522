"""Per-sample gradients against autograd on each example alone, unpadded, with transformers' own loss."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import random_causal_lm, tiny_llama_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, Qwen3Config

from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.models.attention import SEGMENTED

Rows = list[tuple[list[int], list[int]]]
VARIANTS: dict[str, dict] = {
    "plain": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"down_proj": 32},
    },
    "some layers": {"r": 3, "lora_alpha": 3, "target_modules": ["v_proj", "o_proj"], "layers_to_transform": [1]},
}


def adapted(base: torch.nn.Module | None = None, **config: object) -> PeftModel:
    """A tiny model with an adapter whose B is not zero; fresh adapters would make half of every test vacuous."""
    base = base if base is not None else random_causal_lm(tiny_llama_config())
    base.set_attn_implementation(SEGMENTED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        settings_ = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
        model = get_peft_model(base.requires_grad_(False), LoraConfig(**settings_)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def ragged(lengths: list[int], seed: int = 0, vocabulary: int = 250) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, length, (1,), generator=generator))
        rows.append((ids, [-100] * prompt + ids[prompt:]))
    return rows


# Types of the weights and of the matrix products, with the relative error that rounding may make. Without autocast,
# PEFT multiplies the LoRA weights in float32, so that little is left to chance whatever the base. Under autocast every
# product is rounded to bfloat16, and in another order than PEFT's.
DTYPES = {
    (torch.float32, torch.float32): 1e-5,
    (torch.float32, torch.bfloat16): 0.15,
    (torch.bfloat16, torch.bfloat16): 0.15,
    (torch.bfloat16, torch.float32): 0.01,
}


def autocast(compute_dtype: torch.dtype) -> torch.autocast:
    """As the recipe says: bfloat16 by autocast, float32 by leaving all as it is; weights may change while it lasts."""
    return torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype == torch.bfloat16, cache_enabled=False)


def oracle(
    model: PeftModel, examples: Rows, loss: str = "mean", compute_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Autograd, one example at a time, through PEFT's own forward pass."""
    weights = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    rows = []
    for ids, labels in examples:
        with autocast(compute_dtype):
            value = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False).loss
        if loss == "sum":
            value = value * sum(label != -100 for label in labels[1:])
        rows.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, weights)]))
    return torch.stack(rows)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest relative error of any example."""
    return float(((ours - reference).norm(dim=1) / reference.norm(dim=1)).max())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_equals_autograd_one_by_one(name: str, loss: str) -> None:
    model = adapted(**VARIANTS[name])
    examples = ragged([7, 40, 3, 18, 25, 2])
    engine = PerSampleGradients(model, loss=loss, tokens_per_batch=64)
    assert relative_error(engine.gradients(examples), oracle(model, examples, loss)) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, initializer_range=0.2, pad_token_id=None,
        ),
        GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    ],
    ids=["qwen3", "gpt2-conv1d"],
)  # fmt: skip
def test_other_architectures(config: object) -> None:
    model = adapted(random_causal_lm(config), r=4, lora_alpha=8)
    examples = ragged([9, 30, 4])
    assert relative_error(PerSampleGradients(model).gradients(examples), oracle(model, examples)) < 1e-5


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(2, 60), min_size=1, max_size=9), st.integers(0, 10**6), st.integers(1, 200))
def test_any_lengths_and_any_budget(lengths: list[int], seed: int, tokens_per_batch: int) -> None:
    model = adapted(**VARIANTS["plain"])
    examples = ragged(lengths, seed)
    engine = PerSampleGradients(model, tokens_per_batch=tokens_per_batch)
    assert relative_error(engine.gradients(examples), oracle(model, examples)) < 1e-5


def test_an_example_does_not_depend_on_its_company() -> None:
    model = adapted(**VARIANTS["plain"])
    examples = ragged([7, 40, 3, 18, 25, 2])
    together = PerSampleGradients(model, tokens_per_batch=1000).gradients(examples)
    order = [4, 2, 0, 5, 1, 3]
    permuted = PerSampleGradients(model, tokens_per_batch=30).gradients([examples[index] for index in order])
    assert relative_error(permuted, together[order]) < 1e-5


def test_label_policies() -> None:
    model = adapted(**VARIANTS["plain"])
    ids = ragged([20])[0][0]
    # two turns: prompt 0-4, response 5-9, prompt 10-13, response 14-17, and two tokens after it
    response = [-100] * 5 + ids[5:10] + [-100] * 4 + ids[14:18] + [-100] * 2
    instruction = ids[:5] + [-100] * 5 + ids[10:14] + [-100] * 6
    for policy, labels in {"response": response, "instruction": instruction, "all": ids}.items():
        ours = PerSampleGradients(model, labels=policy).gradients([(ids, response)])
        assert relative_error(ours, oracle(model, [(ids, labels)])) < 1e-5, policy


def test_columns_name_the_weights_of_the_saved_adapter() -> None:
    model = adapted(**VARIANTS["patterns"])
    engine = PerSampleGradients(model)
    weights = [(name, weight) for name, weight in model.named_parameters() if "lora_" in name]
    assert [column.name for column in engine.columns] == [name.replace(".default", "") for name, _ in weights]
    assert [column.shape for column in engine.columns] == [tuple(weight.shape) for _, weight in weights]
    sizes = [weight.numel() for _, weight in weights]
    assert [column.offset for column in engine.columns] == [sum(sizes[:index]) for index in range(len(sizes))]
    assert engine.dimension == sum(sizes)


def test_writes_into_out_and_leaves_the_model_as_it_was() -> None:
    model = adapted(**VARIANTS["plain"])
    examples = ragged([12, 5])
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with torch.no_grad():
        logits = model(torch.tensor([examples[0][0]])).logits
    engine = PerSampleGradients(model)
    buffer = torch.full((4, engine.dimension + 3), torch.nan)
    out = buffer[1:3, : engine.dimension]
    assert engine.gradients(examples, out=out) is out
    assert torch.isfinite(out).all()
    assert torch.isnan(buffer[0]).all()
    assert torch.isnan(buffer[:, engine.dimension :]).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([examples[0][0]])).logits, logits)


def test_restores_the_model_after_an_error() -> None:
    model = adapted(**VARIANTS["plain"])
    engine = PerSampleGradients(model)
    with pytest.raises(IndexError):
        engine.gradients([([3, 4, 10**6], [-100, 4, 5])])
    assert not any("forward" in module.__dict__ for module in model.modules())
    examples = ragged([12, 5])
    assert relative_error(engine.gradients(examples), oracle(model, examples)) < 1e-5


def test_frozen_adapters_have_gradients_too() -> None:
    model = adapted(**VARIANTS["plain"])
    examples = ragged([12, 5])
    reference = oracle(model, examples)
    model.requires_grad_(False)
    with torch.no_grad():
        assert relative_error(PerSampleGradients(model).gradients(examples), reference) < 1e-5


def test_a_layer_used_twice_adds_up() -> None:
    base = random_causal_lm(tiny_llama_config())
    base.model.layers[1].self_attn.o_proj = base.model.layers[0].self_attn.o_proj
    base.model.layers[1].mlp = base.model.layers[0].mlp
    model = adapted(base, r=4, lora_alpha=8, target_modules=["o_proj", "up_proj"])
    examples = ragged([12, 5, 30])
    assert relative_error(PerSampleGradients(model).gradients(examples), oracle(model, examples)) < 1e-5


def test_activation_checkpointing_changes_nothing() -> None:
    model = adapted(**VARIANTS["plain"])
    examples = ragged([12, 5, 30])
    reference = oracle(model, examples)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert relative_error(PerSampleGradients(model).gradients(examples), reference) < 1e-5


@pytest.mark.parametrize(("dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_precision_is_that_of_pefts_forward_pass(
    dtype: torch.dtype, compute_dtype: torch.dtype, seed: int
) -> None:
    model = adapted(random_causal_lm(tiny_llama_config(), seed).to(dtype), **VARIANTS["plain"])
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name} == {torch.float32}
    examples = ragged([12, 5, 30, 44], seed)
    reference = oracle(model, examples, compute_dtype=compute_dtype)
    ours = PerSampleGradients(model, compute_dtype=compute_dtype, tokens_per_batch=64).gradients(examples)
    assert ours.dtype == torch.float32
    assert relative_error(ours, reference) < DTYPES[dtype, compute_dtype]
    assert torch.cosine_similarity(ours, reference).min() > 0.99
    # No farther than PEFT's from the gradients without any rounding.
    exact = oracle(model.float(), examples)
    assert (ours - exact).norm() <= 1.2 * (reference - exact).norm() + 1e-5 * exact.norm()


def test_costs_no_more_arithmetic_than_the_ordinary_backward_pass() -> None:
    model = adapted(**VARIANTS["plain"])
    # With all labels, so that the head, which the ordinary pass computes everywhere, gives no slack.
    examples = [(ids, ids) for ids, _ in ragged([60])]
    with FlopCounterMode(display=False) as ours:
        PerSampleGradients(model).gradients(examples)
    with FlopCounterMode(display=False) as ordinary:
        oracle(model, examples)
    assert ours.get_total_flops() <= ordinary.get_total_flops()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (([3, 4, 5], [-100, -100, -100]), "example 1: no token counts"),
        (([3, 4, 5], [3, -100, -100]), "example 1: no token counts"),
        (([3, 4, 5], [-100, 4]), "3 input_ids but 2 labels"),
    ],
)
def test_examples_that_have_no_gradient_are_refused(example: tuple[list[int], list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerSampleGradients(adapted(r=2)).gradients([ragged([5])[0], example])


def test_an_out_that_does_not_fit_is_refused() -> None:
    engine = PerSampleGradients(adapted(r=2))
    with pytest.raises(ValueError, match="needed: float32"):
        engine.gradients(ragged([5]), out=torch.empty(1, engine.dimension, dtype=torch.bfloat16))
    assert engine.gradients([]).shape == (0, engine.dimension)
