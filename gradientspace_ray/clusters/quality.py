"""What clusters are worth.

Coordinates are those of the gradients as the sketch sees them, in the directions it kept. A gradient's other energy is
left out, so that cosines are larger, positive or negative, than those of full gradients.

Shapes: N examples, K coordinates, C clusters. A label below 0 is an example that was left out of every cluster: it is
counted as such, and not judged.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from gradientspace_ray.clusters.neighbours import nearest_others
from gradientspace_ray.clusters.rows import row_lengths, sample, unit_at
from gradientspace_ray.clusters.sums import cluster_count, cluster_sums

PAIR_EXAMPLES = 2000
"""Pairs are counted among a sample of this many examples."""
NEIGHBOUR_EXAMPLES = 20_000
"""Nearest neighbours are sought within a sample of this many examples."""
STABILITY_EXAMPLES, STABILITY_REPEATS = 2000, 10
SUBSAMPLE_SHARE = 0.8
NEGLIGIBLE_VARIANCE = 1e-9
"""Of the squared lengths: below it, examples differ by rounding."""


def judge(
    coordinates_NK: np.ndarray,
    labels_N: np.ndarray,
    *,
    domains: Sequence[str | None],
    tokens_N: np.ndarray,
    response_tokens_N: np.ndarray,
    cluster_again: Callable[[np.ndarray], np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """Contents of `quality.json`, all but what the clusters are about.

    Time and memory are linear in N, without a second copy of the coordinates; what looks at pairs looks at samples.

    Args:
        coordinates_NK: float32 or float64; scaled to unit length here.
        labels_N: cluster of each example, 0 .. C - 1, every one present; below 0 where it was left out.
        domains: the data's own label of each example, None where it has none; decides nothing but the last four keys.
        tokens_N: tokens of each example.
        response_tokens_N: tokens of its answers.
        cluster_again: indices of examples -> labels that the same method gives them alone.
        seed: decides the samples.

    Returns:
        What `json` can write; lists have one entry for each cluster:
        `count`: C.
        `sizes`, `tokens`, `response_tokens`: examples of a cluster, their tokens, those of their answers.
        `left_out`: `examples`, `tokens` and `response_tokens` that are in no cluster.
        `coherence`, `conflicting_pairs` (`inside` and `between`), `variance_inside` (`share` and `at_random`): of the
        gradients in the directions that the sketch kept, see the functions of these names.
        `stability`: see `stability`; of at most 2,000 examples, 10 times. None where it says nothing.
        `length`: `explained` and `longer`, see `length`.
        `ari`, `nmi`, `purity`: see `agreement`; `nn_purity`: see `nearest_neighbour_purity`. Absent without labels.
    """
    places = sample(len(labels_N), STABILITY_EXAMPLES, [seed, 8])
    left_out = labels_N < 0
    purity = nearest_neighbour_purity(coordinates_NK, domains, seed)
    return {
        "count": cluster_count(labels_N),
        "sizes": _totals(labels_N, np.ones(len(labels_N))),
        "tokens": _totals(labels_N, tokens_N),
        "response_tokens": _totals(labels_N, response_tokens_N),
        "left_out": {
            "examples": int(left_out.sum()),
            "tokens": int(tokens_N[left_out].sum()),
            "response_tokens": int(response_tokens_N[left_out].sum()),
        },
        "coherence": coherence(coordinates_NK, labels_N),
        "conflicting_pairs": conflicting_pairs(coordinates_NK, labels_N, seed),
        "variance_inside": variance_inside(coordinates_NK, labels_N),
        "stability": stability(labels_N[places], lambda chosen: cluster_again(places[chosen]), STABILITY_REPEATS, seed),
        "length": length(labels_N, response_tokens_N),
        **agreement(labels_N, domains),
        **({} if purity is None else {"nn_purity": purity}),
    }


def coherence(coordinates_NK: np.ndarray, labels_N: np.ndarray) -> list[float]:
    """Mean cosine between the coordinates of two different examples of a cluster, for each; 1 for a cluster of one.

    From the length of the sum of the n unit vectors, (|sum|^2 - n) / (n (n - 1)), so no pair is formed.
    """
    counts_C, sums_CK, squares_C = cluster_sums(coordinates_NK, labels_N)
    pairs_C = counts_C * (counts_C - 1.0)
    totals_C = np.square(sums_CK).sum(axis=1) - squares_C
    return np.divide(totals_C, pairs_C, out=np.ones_like(pairs_C), where=pairs_C > 0).tolist()


def variance_inside(coordinates_NK: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """How much of the unit coordinates' variance is left inside the clusters.

    Returns:
        `share`: squared distances to the own cluster's mean over those to the mean of all, 0 .. 1; 1 for one cluster,
        and where the examples are all alike, so that there is nothing to explain. `at_random`: what to expect of
        clusters of the same sizes drawn at random, (N - C) / (N - 1): the degrees of freedom of a one-way analysis of
        variance.
    """
    counts_C, sums_CK, squares_C = cluster_sums(coordinates_NK, labels_N)
    examples = int(counts_C.sum())
    if examples < 2:
        return {"share": 1.0, "at_random": 1.0}
    of_mean = np.square(sums_CK.sum(axis=0)).sum() / examples
    total = squares_C.sum() - of_mean
    between = (np.square(sums_CK).sum(axis=1) / np.maximum(counts_C, 1)).sum() - of_mean
    explained = between / total if total > NEGLIGIBLE_VARIANCE * squares_C.sum() else 0.0
    return {
        "share": float(np.clip(1 - explained, 0, 1)),
        "at_random": (examples - len(counts_C)) / (examples - 1),
    }


def conflicting_pairs(coordinates_NK: np.ndarray, labels_N: np.ndarray, seed: int) -> dict[str, float | None]:
    """Share of pairs whose coordinates have a negative cosine: steps that undo each other in the kept directions.

    Args:
        coordinates_NK: coordinates of the examples.
        labels_N: cluster of each.
        seed: decides which examples are taken when there are many.

    Returns:
        `inside` clusters and `between` them; None where there is no pair.
    """
    placed = np.flatnonzero(labels_N >= 0)
    chosen = placed[sample(len(placed), PAIR_EXAMPLES, [seed, 1])]
    unit_SK, labels_S = unit_at(coordinates_NK, chosen), labels_N[chosen]
    upper = np.triu_indices(len(chosen), k=1)
    conflicts = (unit_SK @ unit_SK.T)[upper] < -1e-9
    inside = (labels_S[:, None] == labels_S)[upper]
    return {
        name: float(conflicts[pairs].mean()) if pairs.any() else None
        for name, pairs in (("inside", inside), ("between", ~inside))
    }


def length(labels_N: np.ndarray, response_tokens_N: np.ndarray) -> dict[str, Any]:
    """How much the clusters have to do with the length of the answers.

    Returns:
        `explained`: share of the variance of log tokens that lies between clusters (the correlation ratio eta^2), 0 for
        one cluster and where all answers are equally long. `longer`: for each cluster, the probability that an answer
        of it is longer than one of another, ties counted half (the area under the ROC curve, from the Mann-Whitney U);
        None for one cluster.
    """
    placed = labels_N >= 0
    labels, tokens = labels_N[placed], response_tokens_N[placed]
    sizes_C = np.bincount(labels)
    logs = np.log(np.maximum(tokens, 1))
    deviations = logs - (logs.mean() if len(logs) else 0.0)
    total = float(np.square(deviations).sum())
    between = float((np.bincount(labels, deviations) ** 2 / np.maximum(sizes_C, 1)).sum())
    above_C = np.bincount(labels, rankdata(tokens)) - sizes_C * (sizes_C + 1) / 2
    pairs_C = sizes_C * (len(labels) - sizes_C)
    is_varied = len(sizes_C) > 1 and total > NEGLIGIBLE_VARIANCE * max(float(np.square(logs).sum()), 1.0)
    return {
        "explained": min(between / total, 1.0) if is_varied else 0.0,
        "longer": [float(above / pairs) if pairs else None for above, pairs in zip(above_C, pairs_C, strict=True)],
    }


def stability(
    labels_N: np.ndarray, cluster_again: Callable[[np.ndarray], np.ndarray], repeats: int, seed: int
) -> float | None:
    """Mean adjusted Rand index between these labels and those of random subsamples, clustered anew.

    (von Luxburg, "Clustering stability: an overview", 2010; subsamples of 80 % without replacement.)

    Args:
        labels_N: cluster of each example; subsamples are drawn from those that have one.
        cluster_again: indices of a subsample -> its labels.
        repeats: number of subsamples.
        seed: decides the subsamples.

    Returns:
        About 0 for chance, 1 for the same clusters each time; None for fewer than 3 examples, and for fewer than 2
        clusters, which always come out again.
    """
    placed = np.flatnonzero(labels_N >= 0)
    if len(placed) < 3 or len(np.unique(labels_N[placed])) < 2:
        return None
    # Not the subsamples by which the number of clusters was chosen: these favour that number.
    subsamples = [placed[chosen] for chosen in subsample_indices(len(placed), repeats, [seed, 7])]
    return float(np.mean([adjusted_rand_score(labels_N[chosen], cluster_again(chosen)) for chosen in subsamples]))


def subsample_indices(examples: int, repeats: int, seeds: Sequence[int]) -> list[np.ndarray]:
    """Sorted indices of random subsamples of 80 % (at least two examples), without replacement.

    Args:
        examples: number to draw from.
        repeats: number of subsamples.
        seeds: decide them; other numbers for every purpose.
    """
    size = max(2, round(SUBSAMPLE_SHARE * examples))
    return [sample(examples, size, [*seeds, repeat]) for repeat in range(repeats)]


def agreement(labels_N: np.ndarray, truth: Sequence[str | None]) -> dict[str, float]:
    """ARI, NMI and purity against known labels, over the examples that have one and a cluster; empty when none has.

    Purity is the share of examples whose label is the most frequent one of their cluster.
    """
    truth_N = _numbered(truth)
    judged = (truth_N >= 0) & (labels_N >= 0)
    if not judged.any():
        return {}
    found, wanted = labels_N[judged], truth_N[judged]
    return {
        "ari": float(adjusted_rand_score(wanted, found)),
        "nmi": float(normalized_mutual_info_score(wanted, found)),
        "purity": float(contingency_matrix(wanted, found, sparse=True).max(axis=0).sum() / len(wanted)),
    }


def nearest_neighbour_purity(coordinates_NK: np.ndarray, truth: Sequence[str | None], seed: int) -> float | None:
    """Share of examples whose nearest neighbour by cosine has the same known label: worth of features, not of clusters.

    Zero rows, which have no direction, and examples without a label take no part; those left out of the clusters do.
    Of many examples a sample of 20,000 is looked at.

    Returns:
        0 .. 1; None for fewer than two such examples.
    """
    truth_N = _numbered(truth)
    known = np.flatnonzero((truth_N >= 0) & (row_lengths(coordinates_NK) > 0))
    if len(known) < 2:
        return None
    chosen = known[sample(len(known), NEIGHBOUR_EXAMPLES, [seed, 5])]
    _, nearest_S1 = nearest_others(unit_at(coordinates_NK, chosen), 1)
    truth_S = truth_N[chosen]
    return float((truth_S[nearest_S1[:, 0]] == truth_S).mean())


def _numbered(truth: Sequence[str | None]) -> np.ndarray:
    """Labels as numbers in order of appearance, -1 for None, [N] int64."""
    numbers: dict[str, int] = {}
    return np.array([-1 if name is None else numbers.setdefault(name, len(numbers)) for name in truth], dtype=np.int64)


def _totals(labels_N: np.ndarray, amounts_N: np.ndarray) -> list[int]:
    placed = labels_N >= 0
    return np.bincount(labels_N[placed], amounts_N[placed]).astype(int).tolist()
