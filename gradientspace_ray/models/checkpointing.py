"""Activation checkpointing for a block of code: layers keep their inputs only, and run again in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gradientspace_ray.models.attention import UnsupportedModelError

CHANGED = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def activation_checkpointing(model: nn.Module) -> Iterator[None]:
    """While the block runs, every transformer layer of the model is checkpointed; afterwards it is as it was.

    Transformers checkpoints layers in training mode only, and that mode would draw dropout: here a layer is in it when
    it is asked whether to checkpoint, and in its own mode while it computes.

    Raises:
        UnsupportedModelError: the model has no layer that can be checkpointed.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no layers to checkpoint; set checkpointing to false")
    with ExitStack() as stack:
        for layer in layers:
            before = {name: vars(layer)[name] for name in CHANGED if name in vars(layer)}
            stack.callback(_restore, layer, before)
            changed = (True, True, partial(_checkpoint, layer, layer.training))
            vars(layer).update(zip(CHANGED, changed, strict=True))
        yield


def _checkpoint(layer: nn.Module, mode: bool, forward: Callable[..., Any], *args: Any) -> Any:
    def forward_in_own_mode(*args: Any) -> Any:
        layer.training = mode
        try:
            return forward(*args)
        finally:
            layer.training = True

    return checkpoint(forward_in_own_mode, *args, use_reentrant=False, preserve_rng_state=False)


def _restore(layer: nn.Module, before: dict[str, Any]) -> None:
    for name in CHANGED:
        vars(layer).pop(name, None)
    vars(layer).update(before)
