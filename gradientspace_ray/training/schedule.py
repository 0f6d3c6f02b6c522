"""The plan of a finetune: which examples each optimizer step sees, and at which learning rate.

Everything here is a pure function of its arguments, so that every worker makes the same plan by itself.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from gradientspace_ray.examples.packing import plan_batches

FINAL_SHARE = 0.1
"""Share of the peak at which the cosine ends."""
WHOLE_COSINE = (0.0, 1.0)
"""From the peak to its tenth."""
MEASURED_RATE, MEASURED_WIDTH, MEASURED_STEP = 2e-3, 576, 8
"""A good peak for adapters of SmolLM2-135M, whose hidden states have so many numbers, at so many examples a step."""
WIDTH_EXPONENT = 0.781
"""Of Llama models, in Tinker cookbook's `get_lr`."""


def learning_rate(
    step: int, total_steps: int, peak: float, warmup_share: float, cosine: tuple[float, float] = WHOLE_COSINE
) -> float:
    """Learning rate of an optimizer step: a linear rise, then a cosine to a tenth of the peak (SGDR, arXiv 1608.03983).

    Finetunes that continue one another share a cosine: each begins where the one before ended.

    Args:
        step: 0 is the first.
        total_steps: the last step, `total_steps - 1`, is at the end of the cosine, unless it is the first after the
            rise.
        peak: of the cosine.
        warmup_share: share of the steps in which it rises, to the cosine's first value.
        cosine: from where to where it goes: 0 is the peak, 1 a tenth of it.
    """
    rising = round(total_steps * warmup_share)
    first, last = cosine
    progress = first + (last - first) * max(0, step - rising) / max(1, total_steps - 1 - rising)
    rate = peak * (FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * progress)) / 2)
    return rate * min(1.0, (step + 1) / (rising + 1))


def lora_rate(width: int, examples_per_step: int) -> float:
    """A learning rate for adapters of a model that nobody has tuned: less for wider ones, and for smaller steps.

    The rate is one measured on a small model, carried to other widths by the exponent that "LoRA Without Regret"
    (Schulman et al., 2025) led to for Llama models. Other families may depend on the width less.

    Args:
        width: numbers in a hidden state.
        examples_per_step: examples in a step.
    """
    rate = MEASURED_RATE * (MEASURED_WIDTH / width) ** WIDTH_EXPONENT
    return scaled_rate(rate, MEASURED_STEP, examples_per_step)


def scaled_rate(rate: float, step_examples: int, examples: int) -> float:
    """Adam's learning rate for steps of another size: times the root of the ratio (Malladi et al., arXiv 2205.10287).

    Steps above `MEASURED_STEP` count as that: adapters tolerate large ones less than whole models do ("LoRA Without
    Regret", Schulman et al., 2025), so that they do not raise the rate.

    Args:
        rate: for steps of `step_examples`.
        step_examples: examples in a step.
        examples: in a step of the other size.
    """
    return rate * math.sqrt(min(examples, MEASURED_STEP) / min(step_examples, MEASURED_STEP))


def plan_steps(
    count: int, examples_per_step: int, epochs: float, seed: int | Sequence[int], tokens: Sequence[int] | None = None
) -> list[list[int]]:
    """The examples of every optimizer step.

    Each epoch is shuffled anew and split into steps of nearly equal size, so that no small last step is as heavy as a
    whole one. The last epoch of a fractional number ends early, where the tokens seen are nearest to that many epochs'.

    Args:
        count: number of examples.
        examples_per_step: largest number of examples in a step, over all workers.
        epochs: passes over the examples; at least one example is seen.
        seed: decides the order.
        tokens: of every example; None takes them for equal.

    Returns:
        One list of example indices per step.

    Raises:
        ValueError: there are no examples.
    """
    if count < 1:
        raise ValueError("a finetune needs at least one example")
    lengths = np.ones(count) if tokens is None else np.asarray(tokens, dtype=np.float64)
    steps: list[list[int]] = []
    remaining = epochs * lengths.sum()
    for epoch in itertools.count():
        order = np.random.default_rng([*np.atleast_1d(seed).tolist(), epoch]).permutation(count)
        seen = np.cumsum([0.0, *lengths[order]])
        taken = max(int(np.abs(seen - remaining).argmin()), 0 if steps else 1)
        if taken:
            steps += [part.tolist() for part in np.array_split(order[:taken], math.ceil(taken / examples_per_step))]
        if taken < count:
            break
        remaining -= seen[-1]
    return steps


def step_size(count: int, epochs: float, examples_per_step: int, min_steps: int) -> int:
    """Examples in one step of a finetune on `count` of them: as given, or fewer where that makes too few steps."""
    if count * epochs >= examples_per_step * min_steps:
        return examples_per_step
    return max(1, math.floor(count * epochs / min_steps))


def plan_rows(
    step_examples: Sequence[int], lengths: Sequence[int], tokens_per_batch: int, world_rank: int, world_size: int
) -> list[tuple[list[int], bool]]:
    """The packed rows of one worker in one optimizer step.

    A worker takes every `world_size`-th example of the step. All workers make equally many backward passes, because
    under ZeRO 2 and 3 each pass is a collective operation: a worker that has fewer rows, or none, repeats the step's
    shortest example without counting it.

    Args:
        step_examples: example indices of the step, over all workers.
        lengths: tokens of every example.
        tokens_per_batch: tokens in one row.
        world_rank: this worker.
        world_size: number of workers.

    Returns:
        (example indices, whether they count) of each row.
    """
    shares = [step_examples[rank::world_size] for rank in range(world_size)]
    plans = [plan_batches([lengths[i] for i in share], tokens_per_batch) if share else [] for share in shares]
    rows = [([shares[world_rank][position] for position in row], True) for row in plans[world_rank]]
    spare = min(step_examples, key=lambda i: lengths[i])
    return rows + [([spare], False)] * (max(map(len, plans)) - len(rows))
