"""What the loop asks of an engine, which holds weights and optimizer; and the plain one, of a single process."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn

from gradientspace_ray.examples.packing import Packed
from gradientspace_ray.models.losses import label_nll
from gradientspace_ray.models.moments import AdamMoments

ADAPTER = "default"
FIRST, SECOND = "exp_avg", "exp_avg_sq"
"""Adam's moments as PyTorch's optimizer names them."""


class TrainingError(RuntimeError):
    """A finetune that cannot go on, and would fail again in the same way; one line that names the place."""


class Engine(Protocol):
    """The adapted model with its optimizer. What is whole is gathered from all workers, and all of them ask for it."""

    @property
    def optimizer(self) -> Any:
        """Has `param_groups`."""
        ...

    def __call__(self, packed: Packed) -> torch.Tensor:
        """Losses [L] of a packed row's label tokens, by the wrapped `TokenLosses`."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss` to those of the step."""
        ...

    def step(self) -> float | None:
        """Average the gradients over the workers, clip, update the weights, and clear the gradients.

        Returns:
            Length of the averaged gradient before it was clipped; None where that is not known.
        """
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """The adapter, whole: name in PEFT's files -> a float32 copy on the CPU."""
        ...

    def moments(self) -> AdamMoments:
        """The optimizer's state, whole: copies on the CPU."""
        ...

    def restore(self, moments: AdamMoments) -> None:
        """Give an optimizer that has made no step this state; the weights were loaded before the engine was made."""
        ...


class TokenLosses(nn.Module):
    """A language model as a function from a packed row to the losses of its label tokens.

    The engine wraps this and not the model itself: the autocast of `compute_dtype` then lies inside of the engine,
    which switches off one that it finds outside.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype

    def forward(self, packed: Packed) -> torch.Tensor:
        """[L] float32, see `models.losses.label_nll`."""
        return label_nll(self.model, packed, self.compute_dtype)


class PlainEngine:
    """One process, and AdamW as PyTorch has it: where there is no DeepSpeed, and what its engines are compared with."""

    def __init__(
        self,
        model: PeftModel,
        compute_dtype: torch.dtype = torch.float32,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        self._losses = TokenLosses(model, compute_dtype)
        self._trained = dict(trained_weights(model))
        self._max_grad_norm = max_grad_norm
        self.optimizer = torch.optim.AdamW(self._trained.values(), weight_decay=weight_decay)

    def __call__(self, packed: Packed) -> torch.Tensor:
        """See `Engine`."""
        losses: torch.Tensor = self._losses(packed)
        return losses

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        loss.backward()

    def step(self) -> float:
        """See `Engine`."""
        norm = nn.utils.clip_grad_norm_(self._trained.values(), self._max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        return {name: copied(weight) for name, weight in self._trained.items()}

    def moments(self) -> AdamMoments:
        """See `Engine`."""
        states = {name: self.optimizer.state[weight] for name, weight in self._trained.items()}
        first, second = ({name: copied(state[key]) for name, state in states.items()} for key in (FIRST, SECOND))
        return moments_of(self.optimizer, first, second)

    def restore(self, moments: AdamMoments) -> None:
        """See `Engine`."""
        for name, weight in self._trained.items():
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(moments.step)),
                FIRST: moments.first[name].clone().to(weight.device),
                SECOND: moments.second[name].clone().to(weight.device),
            }


def trained_weights(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in PEFT's files, weight) of all that is trained.

    Raises:
        TrainingError: it is more than the adapter.
    """
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if not name.endswith(f".{ADAPTER}.weight"):
            raise TrainingError(f"{name} is trained, but is no weight of adapter {ADAPTER!r}; freeze it")
        yield name.removesuffix(f".{ADAPTER}.weight") + ".weight", weight


def set_weights(model: PeftModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Give the adapter these weights, by their names in PEFT's files.

    Raises:
        TrainingError: they are another adapter's.
    """
    own = dict(trained_weights(model))
    if {name: weight.shape for name, weight in own.items()} != {name: value.shape for name, value in weights.items()}:
        raise TrainingError("the checkpoint is of another adapter; delete the run's checkpoints/ and run again")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


def moments_of(
    optimizer: torch.optim.Optimizer, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> AdamMoments:
    """Moments with the settings of the Adam or AdamW of one group that they are of."""
    group = optimizer.param_groups[0]
    # All weights, and parts of weights, are stepped together: the counts agree.
    step = max((int(state["step"]) for state in optimizer.state.values() if state), default=0)
    return AdamMoments(first, second, step, tuple(group["betas"]), group["eps"])


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
