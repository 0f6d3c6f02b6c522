"""One worker's part of a finetune. The engine that averages gradients and updates weights is passed in.

An optimizer step minimises the mean loss over all label tokens of its examples, whichever worker and whichever packed
row they land in. Shapes: L label tokens of a packed row. Losses are in nats per label token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gradientspace_ray.examples.packing import IGNORED, Example, Packed, pack
from gradientspace_ray.models.losses import label_nll
from gradientspace_ray.training.schedule import learning_rate, plan_rows


class TrainingError(RuntimeError):
    """A finetune that cannot go on, and would fail again in the same way; one line that names the place."""


class Engine(Protocol):
    """What the loop needs of a DeepSpeed engine built with `managed_gradient_accumulation` off."""

    optimizer: Any
    """Has `param_groups`."""

    def __call__(self, packed: Packed) -> torch.Tensor:
        """Losses [L] of a packed row's label tokens, by the wrapped `TokenLosses`."""
        ...

    def backward(self, loss: torch.Tensor) -> Any:
        """Add the gradients of `loss` to those of the step."""
        ...

    def step(self) -> Any:
        """Average the gradients over the workers, clip, update the weights, and clear the gradients."""
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


@dataclass(frozen=True)
class Outcome:
    """What a finetune did, over all workers."""

    losses: list[float]
    """Mean loss of each step before its update, nats per label token."""
    tokens: int
    """Tokens seen, prompts included."""


def train(
    engine: Engine,
    examples: Sequence[Example],
    steps: Sequence[Sequence[int]],
    *,
    peak: float,
    warmup_share: float,
    tokens_per_batch: int,
    world_rank: int = 0,
    world_size: int = 1,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Outcome:
    """Run all optimizer steps of a finetune.

    Args:
        engine: see `Engine`; with several workers, `torch.distributed` is initialised.
        examples: all examples, the same on every worker.
        steps: the plan, from `plan_steps`, the same on every worker.
        peak: highest learning rate.
        warmup_share: see `learning_rate`.
        tokens_per_batch: tokens in one packed row.
        world_rank: this worker.
        world_size: number of workers.
        on_step: called after each step with (steps done, all steps, loss).

    Raises:
        TrainingError: the loss of a step is not finite; its update is not made.
    """
    lengths = [len(input_ids) for input_ids, _ in examples]
    # The first token of an example predicts nothing before it, so its label never counts.
    label_tokens = [sum(label != IGNORED for label in labels[1:]) for _, labels in examples]
    losses: list[float] = []
    for index, step_examples in enumerate(steps):
        rate = learning_rate(index, len(steps), peak, warmup_share)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        total = sum(label_tokens[i] for i in step_examples)
        if total == 0:
            raise TrainingError(f"step {index + 1} has no label tokens; run the prepare stage again")
        rows = plan_rows(step_examples, lengths, tokens_per_batch, world_rank, world_size)
        # Engines average the gradients over the workers; the loss is a mean over the label tokens of all of them.
        nll_sum = _accumulate(engine, examples, rows, world_size / total)
        if world_size > 1:
            torch.distributed.all_reduce(nll_sum)
        loss = float(nll_sum) / total
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {index + 1} of {len(steps)} (learning rate {rate:.2g}); "
                "give a lower learning_rate"
            )
        engine.step()
        losses.append(loss)
        if on_step:
            on_step(index + 1, len(steps), loss)
    return Outcome(losses, sum(lengths[i] for step_examples in steps for i in step_examples))


def _accumulate(
    engine: Engine, examples: Sequence[Example], rows: Sequence[tuple[Sequence[int], bool]], scale: float
) -> torch.Tensor:
    """Add the gradients of this worker's rows, each loss times `scale`. Returns the sum of the losses that count."""
    nll_sum: torch.Tensor | float = 0.0
    for indices, counts in rows:
        row_nll = engine(pack([examples[i] for i in indices])).sum()
        engine.backward(row_nll * (scale if counts else 0.0))
        nll_sum = nll_sum + row_nll.detach().double() * float(counts)
    return torch.as_tensor(nll_sum)
