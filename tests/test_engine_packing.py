"""Packed weights against PyTorch's own linear layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradientspace_ray.engine import packing
from gradientspace_ray.engine.packing import PackedLinear, pack
from gradientspace_ray.models.loading import load_base

WIDTHS = st.integers(1, 130)


@given(WIDTHS, WIDTHS, st.integers(1, 5), st.integers(1, 40), st.booleans(), st.integers(0, 2**16))
@torch.inference_mode()
def test_a_packed_layer_computes_what_the_plain_one_does(inputs, outputs, rows, tokens, bias, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    x = torch.randn(rows, tokens, inputs)
    for shape in (x, x[0], x[0, 0], x.transpose(0, 1)):
        plain = nn.functional.linear(shape, model[0].weight, model[0].bias) if seed % 2 else model(shape)
        packed = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
        packed.load_state_dict(model.state_dict())
        assert pack(packed) == 1
        torch.testing.assert_close(packed(shape), plain, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_packed_model_gives_the_same_logits_and_keeps_its_embedding(tiny_model_dir):
    model, ids = load_base(str(tiny_model_dir)), torch.arange(2, 60).view(2, -1)
    embedding, plain = model.get_input_embeddings().weight.clone(), model(ids).logits
    layers = sum(type(layer) is nn.Linear for layer in model.modules())
    assert pack(model) == layers > 10
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert not any(type(layer) is nn.Linear for layer in model.modules())
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert pack(model) == 0


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 2, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.bfloat16), Doubled(3, 2)]
)
def test_what_packing_would_change_is_left_alone(layer):
    model = nn.Sequential(layer)
    assert pack(model) == 0
    assert model[0] is layer


@pytest.mark.parametrize("fault", ["no oneDNN", "no operator", "wrong numbers"])
def test_where_packing_does_not_work_nothing_is_packed(monkeypatch, fault):
    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    if fault == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif fault == "no operator":
        monkeypatch.setattr(packing, "_multiply", missing)
    else:
        multiply = packing._multiply
        monkeypatch.setattr(packing, "_multiply", lambda *arguments: multiply(*arguments) + 1)
    model = nn.Sequential(nn.Linear(3, 2))
    assert pack(model) == 0
    assert type(model[0]) is nn.Linear
