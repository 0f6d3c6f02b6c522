"""The loss of a token and of an example: the one definition that training, gradients and scoring share.

Shapes: T tokens of a packed row, L label tokens of it, n examples in it, V vocabulary. Losses are in nats, float32.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gradientspace_ray.examples.packing import Packed
from gradientspace_ray.models.attention import SEGMENTED, UnsupportedModelError, packed_arguments

Reduction = Literal["mean", "sum"]
MAX_CHUNK_ELEMENTS = 2**25
"""Float32 logits held at once beside the model's own (128 MiB)."""


def label_nll(model: nn.Module, packed: Packed, compute_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Negative log-likelihood of every label token of a packed row.

    The head is computed at the L positions that predict a label, not at all T.

    Args:
        model: a causal LM with "segmented" attention, with or without a PEFT adapter.
        packed: the row; `packed.label_examples` tells whose each label token is.
        compute_dtype: bfloat16: matrix products run under autocast; float32: they run in the type of the weights.

    Returns:
        [L] float32, in the order of the row, differentiable.

    Raises:
        UnsupportedModelError: the model has another attention, or does not select positions before its head.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention != SEGMENTED:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {attention} attention, which mixes the examples of a packed row; "
            f"set it to {SEGMENTED}"
        )
    device = next(model.parameters()).device
    arguments = packed_arguments(packed, device)
    with torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
        logits_LV = model(**arguments, logits_to_keep=packed.label_positions.to(device)).logits[0]
    label_ids_L = packed.label_ids.to(device)
    if logits_LV.shape[0] != label_ids_L.shape[0]:
        raise UnsupportedModelError(f"{type(model).__name__} ignores logits_to_keep, which selects the label positions")
    return _cross_entropy(logits_LV, label_ids_L)


def example_nll(
    nll_L: torch.Tensor, label_examples_L: torch.Tensor, count: int, reduction: Reduction = "mean"
) -> torch.Tensor:
    """Loss of each example: the mean (or sum) over its own label tokens, whatever shares the row.

    Args:
        nll_L: [L] losses of label tokens.
        label_examples_L: [L] example of each, in 0 .. count - 1.
        count: number of examples n.
        reduction: `mean` divides by the example's number of label tokens.

    Returns:
        [n] float32; the mean of an example without label tokens is nan.
    """
    examples_L = label_examples_L.to(nll_L.device)
    sums_N = nll_L.new_zeros(count).index_add(0, examples_L, nll_L)
    if reduction == "sum":
        return sums_N
    return sums_N / torch.bincount(examples_L, minlength=count)


def _cross_entropy(logits_LV: torch.Tensor, label_ids_L: torch.Tensor) -> torch.Tensor:
    """Token losses in float32, chunk by chunk; the backward pass recomputes each chunk's softmax."""
    rows = max(1, MAX_CHUNK_ELEMENTS // logits_LV.shape[1])
    if logits_LV.shape[0] <= rows:
        return _float32_cross_entropy(logits_LV, label_ids_L)
    # split, not slicing: its backward pass is one concatenation instead of one full-size sum per chunk.
    chunks = zip(logits_LV.split(rows), label_ids_L.split(rows), strict=True)
    losses = [
        checkpoint(_float32_cross_entropy, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
    ]
    return torch.cat(losses)


def _float32_cross_entropy(logits_LV: torch.Tensor, label_ids_L: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits_LV.float(), label_ids_L, reduction="none")
