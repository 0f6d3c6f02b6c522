"""How a model reads several examples at once: as a packed row, or as a padded batch.

Packed rows waste nothing, but need attention that stays within segments. Architectures differ in what they do with
positions, masks and states, and a leak between examples is silent: so what a model can read is measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradientspace_ray.examples.packing import pack
from gradientspace_ray.models.attention import SEGMENTED, UnsupportedModelError, check_layer_types
from gradientspace_ray.models.losses import label_nll

PROBE_IDS = (tuple(range(3, 12)), tuple(range(5, 12)), tuple(range(4, 9)))
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}
"""Relative difference of the losses that rounding may make. Mixed examples change SmolLM2-135M's by 0.08 or more."""
PLAIN_ATTENTION = "eager"
"""The one attention that every architecture has, whatever it adds to the scores."""


def check_packing(model: Any) -> None:
    """Compare a packed row of three short segments with each of them alone; the model has "segmented" attention.

    Raises:
        UnsupportedModelError: the losses differ, or the model cannot be called so.
    """
    if attention_of(model) != SEGMENTED:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {attention_of(model)} attention, which mixes the examples of a packed row"
        )
    check_layer_types(model.config)
    _compare(model, "mix the examples of a packed row", "packed rows")


def check_padding(model: Any) -> None:
    """Compare a padded batch of three short examples with each of them alone; the attention is not "segmented".

    Raises:
        UnsupportedModelError: the losses differ, or the model cannot be called so.
    """
    _compare(model, "look at the padding after an example", "padded batches")


def attention_of(model: Any) -> str | None:
    """Name of the model's attention implementation."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def padded_attention(model: Any) -> str | None:
    """The attention in which a model reads padded batches: its own, unless that is made for packed rows."""
    own = attention_of(model)
    if own != SEGMENTED:
        return own
    return "sdpa" if getattr(model, "_supports_sdpa", False) else PLAIN_ATTENTION


@contextmanager
def with_attention(model: Any, attention: str | None) -> Iterator[None]:
    """While the block runs, the model has this attention; afterwards its own again.

    Raises:
        UnsupportedModelError: the model does not let itself be given another attention.
    """
    own = attention_of(model)
    if own == attention:
        yield
        return
    try:
        set_attention(model, attention)
        yield
    finally:
        if attention_of(model) != own:
            model.set_attn_implementation(own)


def set_attention(model: Any, attention: str | None) -> None:
    """Give a model another attention.

    Raises:
        UnsupportedModelError: it does not let itself be given one.
    """
    supported = hasattr(model, "set_attn_implementation") and model._can_set_attn_implementation()
    try:
        if supported:
            model.set_attn_implementation(attention)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(model).__name__} does not take {attention} attention") from error
    if attention_of(model) != attention:
        raise UnsupportedModelError(f"{type(model).__name__} does not take {attention} attention")


def _compare(model: nn.Module, fault: str, reading: str) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    examples = [(ids, ids) for ids in PROBE_IDS]
    try:
        with torch.no_grad():
            together_L = label_nll(model, pack(examples))
            alone_L = torch.cat([label_nll(model, pack([example])) for example in examples])
    except UnsupportedModelError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
        raise UnsupportedModelError(f"{kind} models cannot read {reading} ({reason})") from error
    difference = float((together_L - alone_L).norm() / alone_L.norm())
    tolerance = PROBE_TOLERANCE.get(next(model.parameters()).dtype, max(PROBE_TOLERANCE.values()))
    if not difference <= tolerance:
        raise UnsupportedModelError(f"{kind} models {fault} (losses differ by {difference:.1%})")
