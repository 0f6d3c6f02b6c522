"""Token and example losses against plain PyTorch on each example alone."""

import numpy as np
import pytest
import torch
from test_per_sample import DTYPES, adapted, autocast, ragged
from tiny_models import random_causal_lm, tiny_llama_config
from torch.nn import functional

from gradientspace_ray.evaluation.losses import adapter_losses
from gradientspace_ray.examples.packing import pack
from gradientspace_ray.models import losses
from gradientspace_ray.models.attention import SEGMENTED, UnsupportedModelError
from gradientspace_ray.models.losses import example_nll, label_nll


def reference(model: torch.nn.Module, examples: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    rows = []
    for ids, labels in examples:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        nll = functional.cross_entropy(logits.float(), torch.tensor(labels[1:]), reduction="none", ignore_index=-100)
        rows.append(nll[torch.tensor(labels[1:]) != -100])
    return rows


@pytest.mark.parametrize("peft", [False, True])
def test_label_and_example_nll(peft: bool) -> None:
    model = adapted(r=2) if peft else random_causal_lm(tiny_llama_config())
    examples = ragged([9, 31, 4, 2])
    with torch.no_grad():
        expected = reference(model, examples)
        (model.get_base_model() if peft else model).set_attn_implementation(SEGMENTED)
        packed = pack(examples)
        nll_L = label_nll(model, packed)
    assert nll_L.dtype == torch.float32
    torch.testing.assert_close(nll_L, torch.cat(expected), rtol=1e-5, atol=1e-6)
    for reduction in ("mean", "sum"):
        ours = example_nll(nll_L, packed.label_examples, len(examples), reduction)
        torch.testing.assert_close(ours, torch.stack([getattr(row, reduction)() for row in expected]))


def test_example_without_labels_is_nan_or_zero() -> None:
    nll_L, owners_L = torch.tensor([1.0, 3.0]), torch.tensor([2, 2])
    assert example_nll(nll_L, owners_L, 3, "sum").tolist() == [0, 0, 4]
    assert example_nll(nll_L, owners_L, 3).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("chunk_elements", [1, 50 * 4, 2**20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_losses_are_pytorchs_cross_entropy(
    chunk_elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(23, 50, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(50, (23,), generator=generator)
    weights = torch.rand(23, generator=generator)

    def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wide = logits if dtype == torch.float64 else logits.float()
        return functional.cross_entropy(wide, labels, reduction="none")

    ours, expected = (
        (nll := function(logits, labels), torch.autograd.grad((nll * weights).sum(), logits)[0])
        for function in (losses._TokenNll.apply, reference)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("peft", [False, True])
def test_padded_batches_give_the_losses_of_the_packed_row(peft: bool) -> None:
    model = adapted(r=2) if peft else random_causal_lm(tiny_llama_config())
    packed = pack(ragged([9, 31, 4, 2]))
    base = model.get_base_model() if peft else model
    with torch.no_grad():
        base.set_attn_implementation(SEGMENTED)
        expected_L = label_nll(model, packed)
        base.set_attn_implementation("sdpa")
        torch.testing.assert_close(label_nll(model, packed), expected_L, rtol=1e-5, atol=1e-6)


def test_head_runs_at_label_positions_only() -> None:
    model = adapted(r=2)
    rows = []
    model.get_base_model().lm_head.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[1]))
    packed = pack(ragged([20, 30]))
    label_nll(model, packed)
    assert rows == [len(packed.label_ids)]
    assert rows[0] < 48
    # Of a padded batch: at the places where any of its examples predicts a label.
    model.get_base_model().set_attn_implementation("sdpa")
    label_nll(model, packed)
    assert rows[1] < 30


@pytest.mark.parametrize(("dtype", "compute_dtype"), DTYPES)
def test_every_precision_is_that_of_pefts_forward_pass(dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    model = adapted(random_causal_lm(tiny_llama_config()).to(dtype), r=2)
    examples = ragged([9, 31, 4, 2])
    with torch.no_grad(), autocast(compute_dtype):
        expected = reference(model, examples)
        with model.disable_adapter():
            base = reference(model, examples)
    packed = pack(examples)
    nll_L = label_nll(model, packed, compute_dtype).detach()
    assert nll_L.dtype == torch.float32
    rounding = 1e-5 if dtype == compute_dtype == torch.float32 else 0.01
    assert float((nll_L - torch.cat(expected)).norm() / nll_L.norm()) < rounding
    nll_NA = adapter_losses(model, ["base", "default"], examples, 40, compute_dtype)
    means_NA = torch.stack([torch.stack([row.mean() for row in rows]) for rows in (base, expected)], dim=1)
    np.testing.assert_allclose(nll_NA, means_NA, rtol=rounding)
    rounded = dtype == torch.bfloat16 or compute_dtype == torch.bfloat16
    assert bool((nll_L != label_nll(model.float(), packed)).any()) == rounded


def test_a_model_that_computes_all_logits_is_refused() -> None:
    model = adapted(r=2)
    base = model.get_base_model()
    forward = base.forward
    base.forward = lambda *args, logits_to_keep=None, **kwargs: forward(*args, **kwargs)
    for attention in (SEGMENTED, "sdpa"):
        base.set_attn_implementation(attention)
        with pytest.raises(UnsupportedModelError, match="ignores logits_to_keep"):
            label_nll(model, pack(ragged([20, 30])))
