"""Prompts unlike all that the router was trained on, which no expert should answer by chance.

A prompt's similarity is its mean cosine to the nearest of the training prompts: the nearest-neighbour score of Sun et
al. 2022, "Out-of-Distribution Detection with Deep Nearest Neighbors" (arXiv 2204.06507), which assumes no distribution.
The mean stands for the k-th neighbour's alone, which says less where a skill has few examples.

Shapes: N prompts, V validation prompts, M prompts of the sample, D training prompts drawn for the bound, H width of the
encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 5
SAMPLE_PROMPTS = 2000
"""Training prompts kept, at most: 1.5 MB at a width of 384."""
BOUND_PROMPTS = 2000
"""Training prompts measured for the bound, at most."""
FALSE_ALARM_RATE = 0.01
"""Share of prompts like those of the training that may be taken for strangers."""
ROUNDING = 1e-4
"""A prompt's encoding depends on its batch by less than this."""


@dataclass(frozen=True)
class NoveltyFit:
    """What tells strangers from prompts like those of the training, and what it says of prompts that are none."""

    sample_MH: np.ndarray | None
    """float16 encodings of training prompts; None where too few prompts are known to call any a stranger."""
    min_similarity: float | None
    """Prompts of less similarity are strangers; None as above."""
    training_prompts: int
    """Drawn for the bound, each measured without its own group."""
    training_false_alarms: int
    validation_prompts: int
    validation_false_alarms: int


def fit_novelty(
    encodings_NH: np.ndarray, labels_N: np.ndarray, groups_N: Sequence[str], validation_VH: np.ndarray, seed: int
) -> NoveltyFit:
    """Draw the sample, and choose the similarity below which one in a hundred prompts like these would fall.

    The bound comes from the validation prompts and from training prompts, each measured without its own group. (Without
    itself alone is too little: near-duplicates stand beside it. On the quickstart mixture, 1.6 % of the test prompts
    then fall below the bound, and 1.0 % without the group.) The sample has as much of each cluster, so that rare skills
    are known too; the prompts of the bound come as often as they do in the mixture, so that the rate is the mixture's.

    Args:
        encodings_NH: unit-length encodings of the training prompts.
        labels_N: the cluster of each.
        groups_N: what keeps near-duplicates together: prompts of the same one are never in two splits.
        validation_VH: encodings of the validation prompts.
        seed: decides the sample and the draw.
    """
    chosen_M = balanced_sample(labels_N, SAMPLE_PROMPTS, seed)
    sample_MH = encodings_NH[chosen_M].astype(np.float16)
    drawn_D = np.random.default_rng((seed, 1)).permutation(len(labels_N))[:BOUND_PROMPTS]
    groups_D, groups_M = ([groups_N[index] for index in indices] for indices in (drawn_D, chosen_M))
    training_D = left_out_similarities(encodings_NH[drawn_D], groups_D, sample_MH, groups_M)
    validation_V = similarities(validation_VH, sample_MH)
    bound = lower_bound(np.concatenate([training_D, validation_V]), FALSE_ALARM_RATE)
    return NoveltyFit(
        sample_MH=None if bound is None else sample_MH,
        min_similarity=bound,
        training_prompts=len(training_D),
        training_false_alarms=0 if bound is None else int((training_D < bound).sum()),
        validation_prompts=len(validation_V),
        validation_false_alarms=0 if bound is None else int((validation_V < bound).sum()),
    )


def similarities(encodings_NH: np.ndarray, sample_MH: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Mean cosine of each encoding to its nearest ones in the sample, [N] float32; all of unit length, M at least 1."""
    return _mean_of_largest(_float32(encodings_NH) @ _float32(sample_MH).T, neighbours)


def left_out_similarities(
    encodings_NH: np.ndarray,
    groups_N: Sequence[str],
    sample_MH: np.ndarray,
    groups_M: Sequence[str],
    neighbours: int = NEIGHBOURS,
) -> np.ndarray:
    """`similarities` to the sample's prompts of other groups, [N] float32.

    Neighbours that are missing, where there are few other groups, count as opposites (a cosine of -1).
    """
    _, groups = np.unique(np.asarray([*groups_N, *groups_M], dtype=str), return_inverse=True)
    group_N, group_M = groups[: len(groups_N)], groups[len(groups_N) :]
    cosine_NM = _float32(encodings_NH) @ _float32(sample_MH).T
    return _mean_of_largest(np.where(group_N[:, None] == group_M, np.float32(-1), cosine_NM), neighbours)


def _float32(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def _mean_of_largest(values_NM: np.ndarray, count: int) -> np.ndarray:
    count = min(count, values_NM.shape[1])
    return np.partition(values_NM, -count, axis=1)[:, -count:].mean(axis=1)


def balanced_sample(labels_N: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted indices of at most `count` examples: as many of each label as of any other, as far as it has them."""
    shuffled_N = np.random.default_rng(seed).permutation(len(labels_N))
    turn_N = np.empty(len(labels_N), dtype=int)
    for label in np.unique(labels_N):
        own = shuffled_N[labels_N[shuffled_N] == label]
        turn_N[own] = np.arange(len(own))
    return np.sort(np.lexsort((labels_N, turn_N))[:count])


def lower_bound(similarities_N: np.ndarray, rate: float) -> float | None:
    """The value below which another prompt falls with a probability of at most `rate`; None where so few cannot say.

    The rank floor(rate (N + 1)) from below, which holds for any distribution if that prompt is exchangeable with these:
    Bates et al. 2023, "Testing for Outliers with Conformal p-values" (arXiv 2104.08279), equation 2. At a rate of 1 %,
    99 prompts are the fewest.
    """
    rank = int(rate * (len(similarities_N) + 1))
    return float(np.partition(similarities_N, rank - 1)[rank - 1]) - ROUNDING if rank else None
