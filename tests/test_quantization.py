"""A base model in 4 bits: the same functions, and the same gradients, as a model of its de-quantised weights."""

from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from peft import PeftModel
from reference_training import flat_weights, plain_training, random_examples, trainable
from synthetic_run import synthetic_recipe, write_adapter, write_examples
from tiny_models import random_causal_lm
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PhiConfig, PreTrainedModel

from gradientspace_ray.examples.packing import pack
from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.models import loading
from gradientspace_ray.models.attention import SEGMENTED, UnsupportedModelError
from gradientspace_ray.models.loading import ModelError, add_lora, load_adapter, load_base, save_adapter
from gradientspace_ray.models.losses import label_nll
from gradientspace_ray.models.quantization import check_gradients, four_bit_layers
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages.extract import Extractor, plan
from gradientspace_ray.stages.score import _score_part

bitsandbytes = pytest.importorskip("bitsandbytes")
BLOCK = 64
"""Weights that share a scale."""


def dequantised(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of float32 that has the values which the 4-bit weights stand for."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    for name, layer in four_bit_layers(model).items():
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.get_submodule(name).weight.data = weight.float()
    return plain


def with_adapter(base: PreTrainedModel) -> PeftModel:
    model = add_lora(base, 4, 8, "all-linear", seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.2, generator=generator)
    return model


def gradients(model: PeftModel, examples: list, compute_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model.zero_grad()
    label_nll(model, pack(examples), compute_dtype).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in trainable(model)])


def test_linear_layers_are_held_in_4_bits(tiny_model_dir: Path) -> None:
    model = load_base(str(tiny_model_dir), "float32", "cpu", "nf4")
    assert model.config._attn_implementation == SEGMENTED
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    layers = four_bit_layers(model)
    assert len(layers) == 14
    assert not any("lm_head" in name for name in layers)
    full = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    plain = dequantised(tiny_model_dir, model)
    for name, layer in layers.items():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, BLOCK)
        assert layer.weight.numel() * layer.weight.element_size() * 2 == layer.in_features * layer.out_features
        weight, original = plain.get_submodule(name).weight, full.get_submodule(name).weight
        assert max(len(block.unique()) for block in weight.reshape(-1, BLOCK)) <= 16
        assert 0.01 < (weight - original).norm() / original.norm() < 0.12
    ids = torch.tensor([[5, 9, 30, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
        again = load_base(str(tiny_model_dir), "float32", "cpu", "nf4")
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "expected"),
    [("float32", "float32", torch.float32), ("float32", "bfloat16", torch.bfloat16)]
    + [("bfloat16", name, torch.bfloat16) for name in ("float32", "bfloat16")],
)
def test_products_are_of_the_compute_dtype(
    tiny_model_dir: Path, dtype: str, compute_dtype: str, expected: torch.dtype
) -> None:
    model = load_base(str(tiny_model_dir), dtype, "cpu", "nf4", compute_dtype)
    assert {layer.compute_dtype for layer in four_bit_layers(model).values()} == {expected}
    assert model.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    assert {weight.dtype for weight in trainable(add_lora(model, 4, 8, "all-linear", 0))} == {torch.float32}


def test_gradients_are_those_of_the_dequantised_model(tiny_model_dir: Path) -> None:
    model = load_base(str(tiny_model_dir), "float32", "cpu", "nf4")
    plain = with_adapter(dequantised(tiny_model_dir, model))
    model = with_adapter(model)
    examples = random_examples(5)
    wanted = torch.stack([gradients(plain, [example]) for example in examples])
    relative = (gradients(model, examples) - wanted.sum(dim=0)).norm() / wanted.sum(dim=0).norm()
    assert relative < 1e-5
    # A pass without gradients, as scoring makes, must not end them.
    with torch.no_grad():
        label_nll(model, pack(examples))
    assert (gradients(model, examples) - wanted.sum(dim=0)).norm() / wanted.sum(dim=0).norm() < 1e-5
    engine = PerSampleGradients(model, loss="sum")
    torch.testing.assert_close(engine.gradients(examples), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_of_bfloat16_products_point_the_same_way(tiny_model_dir: Path) -> None:
    model = load_base(str(tiny_model_dir), "float32", "cpu", "nf4", "bfloat16")
    plain = with_adapter(dequantised(tiny_model_dir, model))
    examples = random_examples(5)
    found = gradients(with_adapter(model), examples, torch.bfloat16)
    assert torch.cosine_similarity(found, gradients(plain, examples), dim=0) > 0.99


def test_a_finetune_learns_what_it_would_on_the_dequantised_model(tiny_model_dir: Path) -> None:
    model = load_base(str(tiny_model_dir), "float32", "cpu", "nf4")
    plain = add_lora(dequantised(tiny_model_dir, model), 4, 8, "all-linear", seed=0)
    model = add_lora(model, 4, 8, "all-linear", seed=0)
    examples = random_examples(4)
    losses, wanted = (
        plain_training(each, examples, [[0, 1, 2, 3]] * 20, peak=0.02, warmup_share=0.1) for each in (model, plain)
    )
    assert losses[-1] < 0.75 * losses[0]
    assert losses == pytest.approx(wanted, abs=1e-4)


def test_adapters_load_into_both_models(tiny_model_dir: Path, tmp_path: Path) -> None:
    trained = with_adapter(load_base(str(tiny_model_dir), "float32", "cpu", "nf4"))
    save_adapter(trained, tmp_path / "trained")
    full = load_adapter(load_base(str(tiny_model_dir)), tmp_path / "trained", trainable=True)
    assert torch.equal(flat_weights(full), flat_weights(trained))
    again = load_adapter(load_base(str(tiny_model_dir), "float32", "cpu", "nf4"), tmp_path / "trained", trainable=True)
    assert torch.equal(flat_weights(again), flat_weights(trained))
    save_adapter(full, tmp_path / "full")
    for file in (tmp_path / "trained").iterdir():
        assert (tmp_path / "full" / file.name).read_bytes() == file.read_bytes()


def test_an_adapter_for_a_wider_model_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    save_adapter(add_lora(random_causal_lm(PhiConfig(hidden_size=128, **sizes)), 4, 8, ["q_proj"], 0), tmp_path)
    with pytest.raises(ModelError, match=r"lora_A\.weight has in_features 128, this model has in_features 64"):
        load_adapter(load_base(str(tiny_model_dir), "float32", "cpu", "nf4"), tmp_path)


def test_large_biases_do_not_hide_the_product(tmp_path: Path) -> None:
    config = PhiConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = random_causal_lm(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=300)
    model.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        layers = four_bit_layers(load_base(str(tmp_path), dtype, "cpu", "nf4"))
        assert layers
        assert all(float(layer.bias.std()) > 200 for layer in layers.values())


def test_layers_that_cannot_be_served_are_known_in_4_bits(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=1)
    random_causal_lm(config).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), "float32", "cpu", "nf4")
    assert four_bit_layers(model)
    with pytest.raises(ModelError, match=r"transformer\.h\.0\..* \(Conv1D\) is not a linear layer"):
        add_lora(model, 4, 8, "all-linear", 0)


def test_a_model_that_is_stored_in_4_bits(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_base(str(tiny_model_dir), "float32", "cpu", "nf4")
    model.save_pretrained(tmp_path)
    stored = load_base(str(tmp_path))
    assert len(four_bit_layers(stored)) == 14
    examples = random_examples(3)
    assert torch.equal(gradients(with_adapter(stored), examples), gradients(with_adapter(model), examples))


def test_without_bitsandbytes(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError, match=r"pip install 'gradientspace-ray\[quantization\]'$") as caught:
        load_base(str(tiny_model_dir), "float32", "cpu", "nf4")
    assert "\n" not in str(caught.value)
    load_base(str(tiny_model_dir))


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="this processor's weights are never packed")
def test_packed_weights_are_refused(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "keep_differentiable", lambda model: None)
    with pytest.raises(ModelError, match="q_proj: bitsandbytes has no gradient for its 4-bit weight on this machine"):
        load_base(str(tiny_model_dir), "float32", "cpu", "nf4")


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, d: torch.Tensor) -> torch.Tensor:
        return 2 * d


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_gradients_that_do_not_fit_the_output_are_refused(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, compute_dtype: str
) -> None:
    model = load_base(str(tiny_model_dir), "float32", "cpu", "nf4", compute_dtype)
    layer = model.model.layers[1].mlp.up_proj
    right = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: _Doubled.apply(right(x)))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj: bitsandbytes' gradient .* is wrong"):
        check_gradients(model)
    monkeypatch.setattr(layer, "forward", lambda x: right(x.detach()))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj: bitsandbytes has no gradient"):
        check_gradients(model)
    monkeypatch.setattr(layer, "forward", right)
    check_gradients(model)


def test_the_recipe_decides_what_gradients_and_losses_are_taken_of(tiny_model_dir: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_adapter(run, "generalist", tiny_model_dir, 1)
    for split in ("train", "validation"):
        write_examples(run, tiny_model_dir, split, 6, True, 0)
    shards, losses = set(), []
    for quantization in ("none", "nf4"):
        model = {"name": str(tiny_model_dir), "quantization": quantization}
        recipe = synthetic_recipe(tiny_model_dir, tiny_model_dir, model=model, gradients={"preconditioner": "none"})
        shards |= {shard.name for shard in plan(recipe, run)}
        extractor = Extractor(recipe, run.uri, MagicMock(), MagicMock(), 6, refining=False)
        assert len(four_bit_layers(extractor._engine._model)) == (14 if quantization == "nf4" else 0)
        part = _score_part._function(
            recipe, run.uri, "validation", [0, 3, 5], {"generalist": "generalist"}, MagicMock(), "line"
        )
        losses.append(part)
    assert len(shards) == 2
    rows = run.read_table("examples/validation.parquet", ["input_ids", "labels"]).take([0, 3, 5]).to_pylist()
    for found, quantization in zip(losses, ("none", "nf4"), strict=True):
        base = load_base(str(tiny_model_dir), "float32", "cpu", quantization)
        wanted = [float(label_nll(base, pack([(row["input_ids"], row["labels"])])).mean()) for row in rows]
        np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-5)
    assert np.abs(losses[0] - losses[1]).min() > 1e-3
