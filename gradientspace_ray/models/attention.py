"""Attention within the segments of a packed row: the attention implementation called "segmented".

A packed row holds several examples one after another. Attention must not cross their borders, and a dense mask over the
row would cost the square of its length. Here each segment has its own causal attention.

Shapes: T tokens of the row, n segments, H query heads, K key-value heads, d width of a head.
"""

import importlib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gradientspace_ray.examples.packing import Packed

SEGMENTED = "segmented"
LAYER_TYPES = {"full_attention", "sliding_attention"}
UNSUPPORTED = {"softcap": "logit soft-capping", "s_aux": "attention sinks", "position_bias": "a position bias"}
VARLEN_MAX_HEAD_DIM = 256
VARLEN_CAPABILITY = (8, 0)


class UnsupportedModelError(ValueError):
    """A model whose attention cannot be kept within segments; the message names the reason."""


def segmented_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment; without segments, transformers' own SDPA attention.

    Args:
        module: the attention layer.
        query: [1, H, T, d] (any batch without segments).
        key: [1, K, T, d]; H is a multiple of K.
        value: [1, K, T, d].
        attention_mask: ignored when segments are given.
        dropout: probability of a dropped attention weight.
        scaling: factor of the scores; None is 1 / sqrt(d).
        is_causal: None reads it from the layer.
        sliding_window: number of latest tokens, itself included, that a token sees.
        cu_seq_lens_q: [n + 1] borders of the segments, from 0 to T; None when the input is not packed.
        **kwargs: whatever else the model passes on; `max_length_q` is the longest segment.

    Returns:
        Attention output [1, T, H, d], and None for the weights.

    Raises:
        UnsupportedModelError: the layer asks for something that this attention does not compute.
    """
    if cu_seq_lens_q is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} uses {meaning}, which packed rows do not support")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise UnsupportedModelError("a packed row is one row without a key-value cache; pass use_cache=False")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = sliding_window if causal else None
    if query.is_cuda and _varlen_fits(value, dropout):
        longest = int(kwargs.get("max_length_q") or torch.diff(cu_seq_lens_q).max())
        return _varlen(query, key, value, cu_seq_lens_q, longest, scaling, causal, window), None
    lengths = torch.diff(cu_seq_lens_q).tolist()
    segments = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [_one_segment(*segment, dropout, scaling, causal, window) for segment in segments]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make "segmented" known to transformers. Importing this module does it."""
    AttentionInterface.register(SEGMENTED, segmented_attention)
    AttentionMaskInterface.register(SEGMENTED, sdpa_mask)


def packed_arguments(packed: Packed, device: torch.device | str) -> dict[str, Any]:
    """Arguments with which a model of "segmented" attention reads a packed row.

    The borders do the work of a mask. The mask given here is a placeholder: because it has four dimensions,
    transformers passes it on as it is, and builds no T x T mask of its own from the restarting positions.
    """
    borders = packed.cu_seqlens.to(device)
    longest = int(torch.diff(packed.cu_seqlens).max())
    return {
        "input_ids": packed.input_ids.to(device),
        "position_ids": packed.position_ids.to(device),
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


def check_layer_types(config: PreTrainedConfig) -> None:
    """Refuse a model with layers that mix tokens by anything but full or sliding-window attention.

    Raises:
        UnsupportedModelError: names the kinds of layers.
    """
    other = sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES)
    if other:
        raise UnsupportedModelError(
            f"{config.model_type}: layers of kind {', '.join(other)} would mix the examples of a packed row"
        )


def _one_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Attention of one segment [1, H, length, d] to itself."""
    length = query.shape[2]
    band = None
    if window is not None and length > window:
        everything = torch.ones(length, length, dtype=torch.bool, device=query.device)
        band = everything.tril().triu(1 - window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=band,
        is_causal=causal and band is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _usable_varlen() -> Callable[..., torch.Tensor] | None:
    """PyTorch's variable-length attention, if this version has it with windows and grouped queries."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return function if {"window_size", "enable_gqa"} <= set(inspect.signature(function).parameters) else None


VARLEN_ATTENTION = _usable_varlen()


def _flash_dtype(value: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype


def _varlen_fits(value: torch.Tensor, dropout: float) -> bool:
    return (
        VARLEN_ATTENTION is not None
        and dropout == 0
        and value.shape[-1] <= VARLEN_MAX_HEAD_DIM
        and _flash_dtype(value) in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(value.device) >= VARLEN_CAPABILITY
    )


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """One flash-attention call for all segments (CUDA, half precision). Returns [1, T, H, d]."""
    assert VARLEN_ATTENTION is not None
    # A custom operator does not cast under autocast, and rotary embedding may have left the queries in float32.
    dtype = _flash_dtype(value)
    rows = [x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value)]
    left = -1 if window is None else window - 1
    output = VARLEN_ATTENTION(
        *rows,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0 if causal else -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]


register()
