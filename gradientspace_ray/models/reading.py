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
from gradientspace_ray.models.losses import label_logits

PROBE_IDS = (tuple(range(3, 12)), tuple(range(5, 12)), tuple(range(4, 9)))
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Difference of the logits that rounding may make, relative to their spread."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
PLAIN_ATTENTION = "eager"
"""The one attention that every architecture has, whatever it adds to the scores."""


def check_packing(model: Any, compute_dtype: torch.dtype = torch.float32) -> None:
    """Compare a packed row of three short segments with each of them alone; the model has "segmented" attention.

    Args:
        model: a causal LM.
        compute_dtype: see `label_nll`; it may decide which attention kernel runs.

    Raises:
        UnsupportedModelError: the losses differ, or the model cannot be called so.
    """
    if attention_of(model) != SEGMENTED:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {attention_of(model)} attention, which mixes the examples of a packed row"
        )
    check_layer_types(model.config)
    _compare(model, compute_dtype, "mix the examples of a packed row", "packed rows")


def check_padding(model: Any, compute_dtype: torch.dtype = torch.float32) -> None:
    """Compare a padded batch of three short examples with each of them alone; the attention is not "segmented".

    Args:
        model: a causal LM.
        compute_dtype: see `label_nll`.

    Raises:
        UnsupportedModelError: the losses differ, or the model cannot be called so.
    """
    _compare(model, compute_dtype, "look at the padding after an example", "padded batches")


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
    own = _attentions(model)
    if attention_of(model) == attention:
        yield
        return
    try:
        set_attention(model, attention)
        yield
    finally:
        if _attentions(model) != own:
            model.set_attn_implementation(own)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of PyTorch says that memory ran out, on a GPU or on the machine."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)


def _attentions(model: Any) -> dict[str, Any]:
    """The model's attention, under "", and those of the parts of a model of several."""
    config = getattr(model, "config", None)
    parts = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", None) or ()}
    return {"": attention_of(model)} | {key: part._attn_implementation for key, part in parts.items() if part}


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


def _compare(model: nn.Module, compute_dtype: torch.dtype, fault: str, reading: str) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    examples = [(ids, ids) for ids in PROBE_IDS]
    try:
        with torch.no_grad():
            together_LV = label_logits(model, pack(examples), compute_dtype).float()
            alone_LV = torch.cat([label_logits(model, pack([example]), compute_dtype).float() for example in examples])
    except UnsupportedModelError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
        raise UnsupportedModelError(f"{kind} models cannot read {reading} ({reason})") from error
    # Losses would tell less: a model with small or random weights has nearly the same one whatever it reads.
    spread = float((alone_LV - alone_LV.mean(dim=0)).norm())
    difference = float((together_LV - alone_LV).norm()) / spread if spread else 0.0
    dtypes = (next(model.parameters()).dtype, compute_dtype)
    tolerance = max(PROBE_TOLERANCE.get(dtype, PROBE_TOLERANCE[torch.float32]) for dtype in dtypes)
    if not difference <= tolerance:
        raise UnsupportedModelError(f"{kind} models {fault} (logits differ by {difference:.1%})")
