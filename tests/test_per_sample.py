"""Per-sample gradients against autograd on each example alone, unpadded, with transformers' own loss."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import random_causal_lm, tiny_llama_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from gradientspace_ray.gradients import packed as packed_path
from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.gradients.preconditioner import Preconditioner
from gradientspace_ray.models import reading
from gradientspace_ray.models.attention import SEGMENTED, UnsupportedModelError
from gradientspace_ray.models.moments import AdamMoments

PATHS = ["packed", "padded"]
SIZES = {
    "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=9),
    "gemma": GemmaConfig(**GROUPED),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
    "phi": PhiConfig(**SIZES, intermediate_size=48, num_key_value_heads=2),
    "gpt2-conv1d": GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
}
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


def adapted(
    base: torch.nn.Module | None = None, attention: str | None = SEGMENTED, b_std: float = 0.2, **config: object
) -> PeftModel:
    """A tiny model with an adapter whose B is not zero; fresh adapters would make half of every test vacuous."""
    base = base if base is not None else random_causal_lm(tiny_llama_config())
    if attention:
        base.set_attn_implementation(attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        settings_ = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
        model = get_peft_model(base.requires_grad_(False), LoraConfig(**settings_)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=b_std)
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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_equals_autograd_one_by_one(name: str, loss: str, path: str) -> None:
    model = adapted(**VARIANTS[name])
    examples = ragged([7, 40, 3, 18, 25, 2])
    engine = PerSampleGradients(model, loss=loss, tokens_per_batch=64, path=path)
    assert relative_error(engine.gradients(examples), oracle(model, examples, loss)) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_every_architecture(name: str, path: str, dtype: torch.dtype, bound: float) -> None:
    model = adapted(random_causal_lm(ARCHITECTURES[name]), **VARIANTS["rslora"]).to(dtype)
    engine = PerSampleGradients(model, tokens_per_batch=64, path=path, dtype=dtype)
    examples = ragged([9, 30, 4, 2, 55])
    assert relative_error(engine.gradients(examples), oracle(model, examples)) < bound


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-neox"])
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=9),
    seed=st.integers(0, 10**6),
    tokens_per_batch=st.one_of(st.integers(1, 200), st.just("auto")),
)
def test_any_lengths_and_any_budget(
    name: str, path: str, lengths: list[int], seed: int, tokens_per_batch: int | str
) -> None:
    model = adapted(random_causal_lm(ARCHITECTURES[name]), **VARIANTS["plain"])
    examples = ragged(lengths, seed)
    engine = PerSampleGradients(model, tokens_per_batch=tokens_per_batch, path=path)
    assert relative_error(engine.gradients(examples), oracle(model, examples)) < 1e-5


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(range(6)), st.integers(1, 100), st.sampled_from(PATHS))
def test_an_example_does_not_depend_on_its_company(order: list[int], tokens_per_batch: int, path: str) -> None:
    examples = ragged([7, 40, 3, 18, 25, 2])
    # In float64 all that is left is rounding; in float32 its size depends on the model: a B of 0.2 doubles it, in
    # autograd's own gradients too.
    for dtype, b_std, bound in ((torch.float64, 0.2, 1e-13), (torch.float32, 0.05, 1e-6)):
        model = adapted(**VARIANTS["plain"], b_std=b_std).to(dtype)
        together = PerSampleGradients(model, tokens_per_batch=1000, dtype=dtype).gradients(examples)
        engine = PerSampleGradients(model, tokens_per_batch=tokens_per_batch, path=path, dtype=dtype)
        permuted = engine.gradients([examples[index] for index in order])
        assert relative_error(permuted, together[order]) < bound


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**GROUPED, attn_logit_softcapping=2.0), "Gemma2Attention uses logit soft-capping"),
        (FalconConfig(**SIZES, alibi=False), "FalconForCausalLM does not take segmented attention"),
    ],
    ids=["gemma2", "falcon"],
)
def test_a_model_that_cannot_be_packed_is_read_in_padded_batches(
    config: PreTrainedConfig, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(random_causal_lm(config), attention=None, **VARIANTS["plain"])
    engine = PerSampleGradients(model)
    assert engine.path == "padded"
    assert f"per-sample gradients on the padded path: {reason}" in caplog.text
    examples = ragged([9, 30, 4])
    assert relative_error(engine.gradients(examples), oracle(model, examples)) < 1e-5
    with pytest.raises(UnsupportedModelError, match=reason):
        PerSampleGradients(model, path="packed")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_of_any_attention_is_packed_and_keeps_its_own(attention: str) -> None:
    model = adapted(attention=attention, **VARIANTS["plain"])
    examples = ragged([9, 30, 4])
    engine = PerSampleGradients(model)
    assert engine.path == "packed"
    assert model.config._attn_implementation == attention
    assert relative_error(engine.gradients(examples), oracle(model, examples)) < 1e-5
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_leak_between_examples_is_seen(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    # As initialised, a model's losses hardly depend on what it reads.
    base = random_causal_lm(tiny_llama_config(initializer_range=0.02)).to(dtype)
    assert PerSampleGradients(adapted(base, r=2, b_std=0.02)).path == "packed"
    for layer in base.model.layers:
        layer.mlp.register_forward_hook(lambda _module, _inputs, output: output + 0.5 * output.roll(1, 1))
        layer.self_attn.register_forward_hook(
            lambda _m, _i, output: (output[0] + 0.5 * output[0].roll(1, 1), output[1])
        )
    with pytest.raises(UnsupportedModelError, match="llama models mix the examples of a packed row"):
        PerSampleGradients(adapted(base, r=2, b_std=0.02), path="packed")


def test_memory_that_runs_out_while_probing_is_no_property_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(**VARIANTS["plain"])

    def label_logits(*_arguments: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reading, "label_logits", label_logits)
    with pytest.raises(torch.OutOfMemoryError):
        PerSampleGradients(model)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"labels": "responses"}, "labels='responses': give one of response, instruction, all"),
        ({"loss": "summ"}, "loss='summ'"),
        ({"normalisation": "modul"}, "normalisation='modul'"),
        ({"path": "pad"}, "path='pad'"),
        ({"preconditioner": "Adam"}, "preconditioner='Adam': give none, adam, less"),
        ({"tokens_per_batch": 0}, "tokens_per_batch=0: give a positive number, or auto"),
        ({"dtype": torch.float16}, "dtype=torch.float16: give one of torch.float32"),
        ({"compute_dtype": torch.float16}, "compute_dtype=torch.float16"),
    ],
)
def test_options_that_do_not_exist_are_refused(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerSampleGradients(adapted(r=2), **option)


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = adapted(**VARIANTS["plain"])
    for layer in model.get_base_model().model.layers:
        layer.self_attn.forward = partial(_reversed_attention, layer.self_attn.forward)
    with pytest.raises(UnsupportedModelError, match="llama models look at the padding after an example"):
        PerSampleGradients(model)


def _reversed_attention(forward: Callable[..., tuple], hidden_states: torch.Tensor, **kwargs: object) -> tuple:
    output, *rest = forward(hidden_states=hidden_states, **kwargs)
    return output + output.flip(1), *rest


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


@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple])
def test_examples_may_be_tensors_or_arrays_and_the_caller_in_inference_mode(kind: Callable) -> None:
    model = adapted(**VARIANTS["plain"])
    examples = ragged([12, 5])
    expected = PerSampleGradients(model).gradients(examples)
    with torch.inference_mode():
        ours = PerSampleGradients(model).gradients([(kind(ids), kind(labels)) for ids, labels in examples])
    torch.testing.assert_close(ours, expected)


def test_restores_the_model_after_an_error() -> None:
    model = adapted(**VARIANTS["plain"])
    engine = PerSampleGradients(model)
    with pytest.raises(ValueError, match="example 0: has token 1000000, the model knows 0 to 258"):
        engine.gradients([([3, 4, 10**6], [-100, 4, 5])])
    model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.data = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.gradients(ragged([12]))
    model = adapted(**VARIANTS["plain"])
    engine = PerSampleGradients(model)
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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_layer_used_twice_adds_up(path: str, reentrant: bool | None) -> None:
    base = random_causal_lm(tiny_llama_config())
    base.model.layers[1].self_attn.o_proj = base.model.layers[0].self_attn.o_proj
    base.model.layers[1].mlp = base.model.layers[0].mlp
    model = adapted(base, r=4, lora_alpha=8, target_modules=["o_proj", "up_proj"])
    examples = ragged([12, 5, 30])
    expected = oracle(model, examples)
    if reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
        model.train()
    assert relative_error(PerSampleGradients(model, path=path).gradients(examples), expected) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("own", [False, True])
def test_activation_checkpointing_changes_nothing(path: str, own: bool) -> None:
    model = adapted(**VARIANTS["plain"], lora_dropout=0.0 if own else 0.5)
    examples = ragged([12, 5, 30])
    reference = oracle(model, examples)
    forwards = []
    model.get_base_model().model.layers[0].self_attn.register_forward_hook(lambda *_: forwards.append(1))
    if own:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    engine = PerSampleGradients(model, checkpointing=not own, tokens_per_batch=100, path=path)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    forwards.clear()
    assert relative_error(engine.gradients(examples), reference) < 1e-5
    assert len(forwards) == 2
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_checkpointing_wakes_no_dropout() -> None:
    config = OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.5, max_position_embeddings=128)
    model = adapted(random_causal_lm(config), **VARIANTS["plain"])
    examples = ragged([12, 5, 30])
    engine = PerSampleGradients(model, checkpointing=True)
    assert relative_error(engine.gradients(examples), oracle(model, examples)) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalisation", ["none", "example", "module"])
def test_normalisation_and_type_of_the_result(path: str, dtype: torch.dtype, normalisation: str) -> None:
    model = adapted(**VARIANTS["plain"])
    examples = ragged([12, 5, 30])
    engine = PerSampleGradients(model, normalisation=normalisation, dtype=dtype, path=path)
    ours = engine.gradients(examples)
    assert ours.dtype == dtype
    expected = oracle(model, examples)
    if normalisation == "module":
        for a, b in zip(engine.columns[::2], engine.columns[1::2], strict=True):
            part = slice(a.offset, b.offset + b.shape[0] * b.shape[1])
            expected[:, part] /= expected[:, part].norm(dim=1, keepdim=True)
    if normalisation != "none":
        expected /= expected.norm(dim=1, keepdim=True)
    assert relative_error(ours.float(), expected) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_a_layer_without_gradient_stays_zero_in_every_normalisation() -> None:
    model = adapted(**VARIANTS["plain"])
    for name, parameter in model.named_parameters():
        if "layers.0.mlp.up_proj.lora_B" in name:
            torch.nn.init.zeros_(parameter)
    engine = PerSampleGradients(model, normalisation="module")
    gradients = engine.gradients(ragged([12, 5]))
    silent = next(column for column in engine.columns if "layers.0.mlp.up_proj.lora_A" in column.name)
    assert gradients[:, silent.offset : silent.offset + silent.shape[0] * silent.shape[1]].abs().max() == 0
    torch.testing.assert_close(gradients.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("kind", ["adam", "less"])
def test_the_preconditioner_comes_before_the_normalisation(kind: str) -> None:
    model = adapted(**VARIANTS["plain"])
    examples = ragged([12, 5, 30])
    plain = PerSampleGradients(model)
    shapes = {column.name: column.shape for column in plain.columns}
    generator = torch.Generator().manual_seed(0)
    first, second = ({name: torch.rand(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2))
    moments = AdamMoments(first, second, 7, (0.9, 0.999), 1e-8)
    expected = plain.gradients(examples)
    Preconditioner(kind, moments, plain.columns).apply(expected)
    expected /= expected.norm(dim=1, keepdim=True)
    engine = PerSampleGradients(model, preconditioner=kind, moments=moments, normalisation="example")
    torch.testing.assert_close(engine.gradients(examples), expected)
    with pytest.raises(ValueError, match=f"preconditioner '{kind}' needs the optimizer's moments"):
        PerSampleGradients(model, preconditioner=kind)


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
    engine = PerSampleGradients(model)
    with FlopCounterMode(display=False) as ours:
        engine.gradients(examples)
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


def test_grouped_products_are_those_of_the_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed_path._grouped_agrees(torch.device("cpu"))
    base = random_causal_lm(tiny_llama_config())
    base.model.layers[1].mlp = base.model.layers[0].mlp
    model = adapted(base, r=8, lora_alpha=8)
    examples = ragged([12, 5, 30, 2])
    sliced = PerSampleGradients(model).gradients(examples)
    grouped = []

    def fits(left: torch.Tensor, right: torch.Tensor) -> bool:
        grouped.append(left.shape)
        return True

    monkeypatch.setattr(packed_path, "_grouped_fits", fits)
    assert relative_error(PerSampleGradients(model).gradients(examples), sliced) < 1e-6
    assert grouped
