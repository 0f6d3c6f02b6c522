"""A base model in 4 bits: NormalFloat4 with quantised scales (QLoRA, arXiv 2305.14314), by bitsandbytes.

It is for where adapters are trained and measured. They are served, and merged, with the full weights.
"""

from typing import Any, Literal

import torch
from peft.utils.integrations import get_bnb_param_type
from torch import nn
from transformers import BitsAndBytesConfig

from gradientspace_ray.models.attention import UnsupportedModelError

Quantization = Literal["none", "nf4"]
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Relative difference that the rounding of a product makes, at most."""


def nf4_settings(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers loads a model with to hold its linear layers, but not its head, in 4 bits.

    Args:
        compute_dtype: type of the products of these layers, whose weights are de-quantised for each.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer, of those whose weight is held in 4 bits."""
    weights = {name: (module, module._parameters.get("weight")) for name, module in model.named_modules()}
    return {
        name: module
        for name, (module, weight) in weights.items()
        if weight is not None and get_bnb_param_type(weight) == "4bit"
    }


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights on CPUs, which it does in a layer's first pass without gradients.

    It has no gradient for packed weights: all layers below would learn nothing, without a sign.
    """
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def check_gradients(model: nn.Module) -> None:
    """Compare the gradient of every 4-bit layer with its output: of y = W x, (W^T y)^T x is y^T y.

    Raises:
        UnsupportedModelError: they differ.
    """
    for name, layer in four_bit_layers(model).items():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, layer.in_features, generator=generator)
        x = x.to(layer.weight.device, layer.compute_dtype).requires_grad_()
        # Beside a large bias, narrow types would round the product away.
        bias, layer.bias = layer.bias, None
        try:
            with torch.enable_grad():
                y = layer(x)
        finally:
            layer.bias = bias
        gradient = torch.autograd.grad(y, x, y.detach(), allow_unused=True)[0] if y.requires_grad else None
        if gradient is None:
            raise UnsupportedModelError(f"{name}: bitsandbytes has no gradient for its 4-bit weight on this machine")
        back, energy = (float(product.detach().sum(dtype=torch.float32)) for product in (gradient * x, y * y))
        if not abs(back - energy) <= TOLERANCE.get(layer.compute_dtype, TOLERANCE[torch.bfloat16]) * energy:
            raise UnsupportedModelError(f"{name}: bitsandbytes' gradient of its 4-bit weight is wrong on this machine")
