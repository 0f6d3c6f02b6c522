"""DeepSpeed behind the training loop: its configuration, and what is whole gathered from all workers.

DeepSpeed picks its accelerator when it is imported, and only a worker's environment names the right one, so it is
imported where it is used.
"""

import logging
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional

from gradientspace_ray.examples.packing import Packed
from gradientspace_ray.models.moments import AdamMoments
from gradientspace_ray.recipe import RecipeError, TrainingSection
from gradientspace_ray.training.budget import TrainingSettings
from gradientspace_ray.training.engine import (
    FIRST,
    SECOND,
    TokenLosses,
    copied,
    moments_of,
    trained_weights,
)

AUTO = "auto"
"""In a DeepSpeed configuration: what the trainer decides, as other trainers have it."""
NEUTRAL = (False, None, "none")
"""Values that ask for nothing."""
OWNERS = {
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload",
    "zero_optimization.offload_param.device": "offload",
    "gradient_clipping": "max_grad_norm",
    "train_batch_size": "examples_per_step",
    "train_micro_batch_size_per_gpu": "tokens_per_batch",
    "gradient_accumulation_steps": "tokens_per_batch",
    "managed_gradient_accumulation": "tokens_per_batch",
    "optimizer": "learning_rate",
    "scheduler": "warmup_share",
    "activation_checkpointing": "checkpointing",
    "fp16.enabled": "model.compute_dtype",
    "bf16.enabled": "model.compute_dtype",
    "torch_autocast.enabled": "model.compute_dtype",
    "amp.enabled": "model.compute_dtype",
}
"""Dotted path of DeepSpeed's configuration -> the recipe's key that decides it, in the same section or as named."""
DEFAULTS: dict[str, Any] = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"overlap_comm": False}}
"""The optimizer is PyTorch's, wherever its state is; adapters are too small for communication to be overlapped."""


class DeepSpeedEngine:
    """See `training.engine.Engine`; all workers make it, and call each method, together."""

    def __init__(
        self, model: PeftModel, settings: TrainingSettings, compute_dtype: torch.dtype, section: str = "training"
    ) -> None:
        """Give the adapted model to DeepSpeed; `section` is the recipe's, for the errors."""
        self._deepspeed: Any = import_module("deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed compiles a shared-memory collective where it finds this op; gloo does the same without a compiler.
        self._deepspeed.ops.__compatible_ops__ = {}
        self._trained = dict(trained_weights(model))
        weights = list(self._trained.values())
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.deepspeed: Any = self._deepspeed.initialize(
            model=TokenLosses(model, compute_dtype),
            model_parameters=weights,
            optimizer=optimizer,
            config=configuration(settings, section),
        )[0]

    @property
    def optimizer(self) -> Any:
        """Has `param_groups`."""
        return self.deepspeed.optimizer

    def __call__(self, packed: Packed) -> torch.Tensor:
        """See `Engine`."""
        losses: torch.Tensor = self.deepspeed(packed)
        if self.zero_stage == 3 and not torch.is_grad_enabled():
            # It has kept, and is fetching, weights for a backward pass that does not come.
            self.deepspeed.optimizer.empty_partition_cache()
        return losses

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        self.deepspeed.backward(loss)

    def step(self) -> float | None:
        """See `Engine`."""
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        # Under ZeRO 3 a worker holds a part of every weight.
        with self._deepspeed.zero.GatheredParameters(list(self._trained.values()), enabled=self.zero_stage == 3):
            return {name: copied(weight) for name, weight in self._trained.items()}

    def moments(self) -> AdamMoments:
        """See `Engine`."""
        weights = self._trained.items()
        first, second = (
            {name: copied(self._state(weight, key)) for name, weight in weights} for key in (FIRST, SECOND)
        )
        return moments_of(self.deepspeed.basic_optimizer, first, second)

    def restore(self, moments: AdamMoments) -> None:
        """See `Engine`."""
        optimizer, zero = self.deepspeed.basic_optimizer, self.deepspeed.optimizer
        if self.zero_stage == 0:
            owners = optimizer.param_groups[0]["params"]
        elif self.zero_stage == 3:
            owners = zero.fp32_partitioned_groups_flat
        else:
            owners = zero.single_partition_of_fp32_groups
        for owner in owners:
            # As AdamW makes it in its first step.
            state = {key: torch.zeros_like(owner) for key in (FIRST, SECOND)}
            optimizer.state[owner] = {"step": torch.tensor(float(moments.step)), **state}
        if self.zero_stage in (1, 2):
            # After its first step, DeepSpeed links the parts of the state with the weights by this.
            zero._lazy_init_hp_params_optimizer_state()
        for name, weight in self._trained.items():
            for key, values in ((FIRST, moments.first), (SECOND, moments.second)):
                self._set_state(weight, key, values[name])

    def _set_state(self, weight: Any, key: str, whole: torch.Tensor) -> None:
        if self.zero_stage == 0:
            self.deepspeed.basic_optimizer.state[weight][key].copy_(whole)
        elif self.zero_stage == 3:
            # DeepSpeed's own function for whole tensors fails where they do not divide evenly by the workers.
            size = weight.ds_tensor.numel()
            padded = functional.pad(whole.flatten(), (0, size * self.deepspeed.world_size - whole.numel()))
            part = padded.narrow(0, size * self.deepspeed.global_rank, size)
            self._deepspeed.utils.safe_set_local_optimizer_state(weight, part.to(weight.device), key)
        else:
            self._deepspeed.utils.safe_set_full_optimizer_state(weight, whole.to(weight.device), key)

    def _state(self, weight: torch.nn.Parameter, key: str) -> torch.Tensor:
        whole = self._deepspeed.utils.safe_get_full_optimizer_state(weight, key)
        return self.deepspeed.basic_optimizer.state[weight][key] if whole is None else whole

    @property
    def zero_stage(self) -> int:
        """As DeepSpeed has it."""
        stage: int = self.deepspeed.zero_optimization_stage()
        return stage


def configuration(settings: TrainingSection, section: str) -> dict[str, Any]:
    """DeepSpeed's configuration: what the recipe decides, and what its `deepspeed` adds.

    Args:
        settings: of the finetune.
        section: their name in the recipe.

    Raises:
        RecipeError: `deepspeed` says otherwise than the recipe.
    """
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload and settings.zero_stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    decided: dict[str, Any] = {
        # Steps have as many backward passes as their examples need: the loop counts them, DeepSpeed must not.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
    }
    given = _asked(settings.deepspeed)
    # Where the loop counts the passes, DeepSpeed overlaps from ZeRO 2 on.
    owners = OWNERS if settings.zero_stage >= 2 else {**OWNERS, "zero_optimization.overlap_comm": "zero_stage"}
    conflicts = [
        f"{path} is decided by {key if '.' in key else f'{section}.{key}'}"
        for path, key in _conflicts(given, dict(_leaves(decided)), owners)
    ]
    if conflicts:
        raise RecipeError(f"{section}.deepspeed: {', and '.join(conflicts)}; leave it out there")
    return _merged(_merged(DEFAULTS, given), decided)


def _conflicts(given: dict[str, Any], own: dict[str, Any], owners: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(dotted path, the recipe's key that decides it) of what is given otherwise than decided."""
    for path, value in _leaves(given):
        # A value where a section belongs is above what is owned.
        keys = [key for name, key in owners.items() if f"{path}.".startswith(f"{name}.") or name.startswith(f"{path}.")]
        if path in own:
            allowed: tuple[Any, ...] = (own[path],)
        else:
            allowed = () if any(name.startswith(f"{path}.") for name in own) else NEUTRAL
        if keys and value not in allowed:
            yield path, keys[0]


def _asked(tree: dict[str, Any]) -> dict[str, Any]:
    """What a tree asks for: neither `auto`, nor what is empty without it."""
    pruned = {key: _asked(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in pruned.items() if value not in (AUTO, {})}


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Both trees in one; where they meet, the second one's value."""
    both = [key for key in low.keys() & high.keys() if isinstance(low[key], dict) and isinstance(high[key], dict)]
    return {**low, **high, **{key: _merged(low[key], high[key]) for key in both}}
