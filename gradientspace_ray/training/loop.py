"""One worker's optimizer steps. The engine that averages gradients and updates weights is passed in.

An optimizer step minimises the mean loss over all label tokens of its examples, whichever worker and whichever packed
row they land in. Shapes: L label tokens of a packed row. Losses are in nats per label token.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from gradientspace_ray.examples.packing import IGNORED, Example, pack
from gradientspace_ray.training.engine import Engine, TrainingError
from gradientspace_ray.training.schedule import WHOLE_COSINE, learning_rate, plan_rows


class Worker(NamedTuple):
    """Which of the workers of a finetune this is; with several, `torch.distributed` is initialised."""

    world_rank: int = 0
    world_size: int = 1


ALONE = Worker()


@dataclass(frozen=True)
class Step:
    """What one optimizer step did, over all workers."""

    number: int
    """From 1."""
    total: int
    loss: float
    """Mean before the update."""
    learning_rate: float
    grad_norm: float | None
    """Before clipping."""
    tokens: int
    """Seen, prompts included."""


def train(
    engine: Engine,
    examples: Sequence[Example],
    steps: Sequence[Sequence[int]],
    *,
    peak: float,
    warmup_share: float,
    cosine: tuple[float, float] = WHOLE_COSINE,
    tokens_per_batch: int,
    worker: Worker = ALONE,
    first: int = 0,
    seed: Sequence[int] = (0,),
) -> Iterator[Step]:
    """Make the optimizer steps of a finetune one by one; whoever takes them stops by taking no more.

    Args:
        engine: see `Engine`.
        examples: all examples, the same on every worker.
        steps: the plan, from `plan_steps`, the same on every worker.
        peak: of the cosine that the learning rate follows.
        warmup_share: share of the steps in which it rises.
        cosine: from where to where on the cosine, see `learning_rate`.
        tokens_per_batch: tokens in one packed row.
        worker: this one.
        first: steps that were made before, by the engine as it is; 0 begins.
        seed: each step draws what a model draws at random from this and from its number, so that one who begins
            amidst the steps draws the same.

    Raises:
        TrainingError: the loss of a step is not finite, or its gradient as far as the engine says, or it has no labels.
    """
    lengths = [len(input_ids) for input_ids, _ in examples]
    label_tokens = [_label_count(labels) for _, labels in examples]
    for index in range(first, len(steps)):
        rate = learning_rate(index, len(steps), peak, warmup_share, cosine)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(int(np.random.SeedSequence([*seed, index, worker.world_rank]).generate_state(1)[0]))
        total = sum(label_tokens[i] for i in steps[index])
        if total == 0:
            raise TrainingError(f"step {index + 1} has no label tokens; run the prepare stage again")
        rows = plan_rows(steps[index], lengths, tokens_per_batch, worker.world_rank, worker.world_size)
        # Engines average the gradients over the workers; the loss is a mean over the label tokens of all of them.
        nll_sum = _accumulate(engine, examples, rows, worker.world_size / total)
        loss = _summed(nll_sum, worker) / total
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {index + 1} of {len(steps)} (learning rate {rate:.2g}); "
                "give a lower learning_rate"
            )
        norm = engine.step()
        # DeepSpeed passes over such an update and goes on.
        if norm is not None and not math.isfinite(norm):
            raise TrainingError(
                f"the gradient is {norm} at step {index + 1} of {len(steps)} (learning rate {rate:.2g}); "
                "give a lower learning_rate"
            )
        yield Step(index + 1, len(steps), loss, rate, norm, sum(lengths[i] for i in steps[index]))


def heldout_loss(engine: Engine, examples: Sequence[Example], tokens_per_batch: int, worker: Worker = ALONE) -> float:
    """Mean loss over all label tokens of examples that are not trained on; all workers call it.

    Raises:
        TrainingError: they have no labels, or the loss is not finite.
    """
    total = sum(_label_count(labels) for _, labels in examples)
    if total == 0:
        raise TrainingError("the held-out part has no label tokens; give another heldout_share, or 0")
    lengths = [len(input_ids) for input_ids, _ in examples]
    rows = plan_rows(range(len(examples)), lengths, tokens_per_batch, worker.world_rank, worker.world_size)
    nll_sum = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for indices, counts in rows:
            row_nll = engine(pack([examples[i] for i in indices])).sum().double()
            nll_sum = nll_sum.to(row_nll.device) + row_nll * float(counts)
    loss = _summed(nll_sum, worker) / total
    if not math.isfinite(loss):
        raise TrainingError(f"the held-out loss is {loss}; give a lower learning_rate")
    return loss


def _label_count(labels: Sequence[int]) -> int:
    # The first token of an example predicts nothing before it, so its label never counts.
    return sum(label != IGNORED for label in labels[1:])


def _summed(nll_sum: torch.Tensor, worker: Worker) -> float:
    if worker.world_size > 1:
        torch.distributed.all_reduce(nll_sum)
    return float(nll_sum)


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
