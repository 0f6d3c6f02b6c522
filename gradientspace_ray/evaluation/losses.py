"""Losses of the same examples under every adapter: rows of the loss matrix.

Shapes: N examples, A adapters (the base model without one counts as the adapter "base").
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel

from gradientspace_ray.examples.packing import pack, plan_batches
from gradientspace_ray.models.losses import example_nll, label_nll

BASE = "base"
Example = tuple[Sequence[int], Sequence[int]]


def adapter_losses(
    model: PeftModel,
    adapters: Sequence[str],
    examples: Sequence[Example],
    tokens_per_batch: int,
    compute_dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Mean NLL of each example's label tokens under each adapter, in nats per label token.

    The same packed rows go through every adapter, so that columns differ by the adapter and by nothing else.

    Args:
        model: the base model with the adapters loaded under their names.
        adapters: columns of the result; "base" is the model with its adapters off.
        examples: (input_ids, labels), labels -100 where no loss is taken.
        tokens_per_batch: tokens of one packed row.
        compute_dtype: type of the matrix products; losses are float32 whatever it is.
        on_batch: called after each row with the number of (example, adapter) pairs that it finished.

    Returns:
        nll_NA, float32.
    """
    nll_NA = np.full((len(examples), len(adapters)), np.nan, dtype=np.float32)
    batches = plan_batches([len(input_ids) for input_ids, _ in examples], tokens_per_batch)
    rows = [(batch, pack([examples[index] for index in batch])) for batch in batches]
    for column, adapter in enumerate(adapters):
        with _active(model, adapter), torch.inference_mode():
            for batch, packed in rows:
                nll_L = label_nll(model, packed, compute_dtype)
                nll_NA[batch, column] = example_nll(nll_L, packed.label_examples, len(batch)).cpu().numpy()
                if on_batch:
                    on_batch(len(batch))
    return nll_NA


def balanced_parts(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Deal examples into at most `count` parts of about equal tokens: the longest first, each to the lightest part.

    Args:
        lengths: tokens of each example.
        count: number of workers.

    Returns:
        Indices of each part, ascending; no part is empty.
    """
    parts: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
    tokens = [0] * len(parts)
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        lightest = tokens.index(min(tokens))
        parts[lightest].append(index)
        tokens[lightest] += lengths[index]
    return [sorted(part) for part in parts]


@contextmanager
def _active(model: PeftModel, adapter: str) -> Iterator[None]:
    if adapter == BASE:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter, inference_mode=True)
        yield
