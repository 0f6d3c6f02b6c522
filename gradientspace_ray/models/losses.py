"""The loss of a token and of an example: the one definition that training, gradients and scoring share.

Shapes: T tokens of a packed row, L label tokens of it, n examples in it, V vocabulary. Losses are in nats, and float32,
or float64 for a model in float64.
"""

from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from gradientspace_ray.examples.packing import Packed, pad
from gradientspace_ray.models.attention import SEGMENTED, UnsupportedModelError, packed_arguments

Reduction = Literal["mean", "sum"]
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Logits handled at once: as many as a processor's cache holds, or as keep a GPU busy."""


def label_nll(model: nn.Module, packed: Packed, compute_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Negative log-likelihood of every label token of a packed row.

    A model of "segmented" attention reads the row as it is, and its head is computed at the L positions that predict a
    label, not at all T. Any other causal model reads the same examples as a batch, padded on the right, without a mask:
    what follows a token cannot change it.

    Args:
        model: a causal LM, with or without a PEFT adapter.
        packed: the row; `packed.label_examples` tells whose each label token is.
        compute_dtype: bfloat16: matrix products run under autocast; float32: they run in the type of the weights.

    Returns:
        [L] in the order of the row, differentiable.

    Raises:
        UnsupportedModelError: the model does not select positions before its head.
    """
    logits_LV = label_logits(model, packed, compute_dtype)
    return _TokenNll.apply(logits_LV, packed.label_ids.to(logits_LV.device))


def label_logits(model: nn.Module, packed: Packed, compute_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[L, V]: the logits that predict the label tokens; see `label_nll`."""
    device = next(model.parameters()).device
    segmented = getattr(getattr(model, "config", None), "_attn_implementation", None) == SEGMENTED
    with torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
        return (_packed_logits if segmented else _padded_logits)(model, packed, device)


def _packed_logits(model: nn.Module, packed: Packed, device: torch.device) -> torch.Tensor:
    arguments = packed_arguments(packed, device)
    logits_LV = model(**arguments, logits_to_keep=packed.label_positions.to(device)).logits.squeeze(0)
    return _selected(model, logits_LV, len(packed.label_ids))


def _padded_logits(model: nn.Module, packed: Packed, device: torch.device) -> torch.Tensor:
    """As of the packed row, from a padded batch; the head is computed where any example predicts a label."""
    starts_L = packed.cu_seqlens[packed.label_examples]
    places, columns_L = torch.unique(packed.label_positions - starts_L, return_inverse=True)
    logits = model(input_ids=pad(packed).to(device), use_cache=False, logits_to_keep=places.to(device)).logits
    _selected(model, logits[0], len(places))
    return logits[packed.label_examples.to(device), columns_L.to(device)]


def _selected(model: nn.Module, logits: torch.Tensor, positions: int) -> torch.Tensor:
    if logits.shape[0] != positions:
        raise UnsupportedModelError(f"{type(model).__name__} ignores logits_to_keep, which selects the label positions")
    return logits


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
        [n]; the mean of an example without label tokens is nan.
    """
    examples_L = label_examples_L.to(nll_L.device)
    sums_N = nll_L.new_zeros(count).index_add(0, examples_L, nll_L)
    if reduction == "sum":
        return sums_N
    # Counted where the row is made: on a GPU counting would wait for everything before it.
    return sums_N / torch.bincount(label_examples_L, minlength=count).to(nll_L.device)


class _TokenNll(torch.autograd.Function):
    """Cross entropy of each token, in float32 whatever narrower type the logits have.

    Beside the logits only one number a token is kept, their log-sum-exp: the backward pass makes the softmax again, in
    the memory of its result, and both passes promote one chunk of tokens at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits_LV: torch.Tensor, label_ids_L: torch.Tensor) -> torch.Tensor:
        chunks = logits_LV.split(_tokens_at_once(logits_LV))
        log_totals_L = torch.cat([_promoted(chunk).logsumexp(dim=1) for chunk in chunks])
        ctx.save_for_backward(logits_LV, label_ids_L, log_totals_L)
        return log_totals_L - _promoted(logits_LV.gather(1, label_ids_L[:, None])[:, 0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_L: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_LV, label_ids_L, log_totals_L = ctx.saved_tensors
        d_logits_LV = torch.empty_like(logits_LV)
        tokens = _tokens_at_once(logits_LV)
        parts = (logits_LV, d_logits_LV, log_totals_L[:, None], d_L[:, None], label_ids_L[:, None])
        for logits, d_logits, log_totals, d, label_ids in zip(*(part.split(tokens) for part in parts), strict=True):
            wide = _promoted(logits)
            # A wide copy is ours to overwrite; without one, the result itself is wide.
            softmax = torch.sub(wide, log_totals, out=d_logits if wide is logits else wide).exp_().mul_(d)
            d_logits.copy_(softmax.scatter_add_(1, label_ids, -d))
        return d_logits_LV, None


def _promoted(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _tokens_at_once(logits_LV: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS.get(logits_LV.device.type, CHUNK_ELEMENTS["cuda"]) // logits_LV.shape[1])
