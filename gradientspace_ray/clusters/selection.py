"""How many clusters: the number that comes out again when examples are left out.

Shapes: N examples, K coordinates, C clusters, E eigenvectors.
"""

import numpy as np
from sklearn.metrics import adjusted_rand_score

from gradientspace_ray.clusters.graph import eigenmap_clusters, laplacian_eigenmap, neighbour_graph
from gradientspace_ray.clusters.kmeans import centroids, spherical_kmeans
from gradientspace_ray.clusters.methods import Method
from gradientspace_ray.clusters.quality import subsample_indices
from gradientspace_ray.clusters.rows import row_lengths, sample, unit_at

SELECTION_EXAMPLES = 4000
REPEATS = 10
EXAMPLES_PER_CLUSTER = 2
"""Counts that would leave fewer than this many examples to a cluster, on average, are not tried."""
ONE_CLUSTER_STABILITY = 0.5
Candidates = dict[int, dict[str, float]]
"""Number of clusters -> `score`, `stability` and `separation`."""


def choose_count(
    coordinates_NK: np.ndarray, max_count: int, method: Method, neighbours: int, seed: int
) -> tuple[int, Candidates]:
    """Choose the number of clusters by separation times stability.

    Stability is the mean adjusted Rand index between the method's clusters and those of ten random subsamples of 80 %:
    a number that is too small joins now these clusters and now those, one that is too large cuts now here and now
    there. Separation is the eigengap of the neighbour graph's normalised Laplacian, lambda_(C+1) - lambda_C (von
    Luxburg, "A tutorial on spectral clustering", 2007, section 8.3). Each alone errs: stability prefers coarse
    clusters, and the gap is wide somewhere even in noise. One cluster competes with the gap lambda_2 and, since its
    stability would say nothing, one half in its place. At most 4,000 examples are looked at; zero rows are not.

    Args:
        coordinates_NK: coordinates of the examples, scaled to unit length here.
        max_count: largest number tried.
        method: how the clusters will be made.
        neighbours: of an example in the graph.
        seed: decides the subsamples.

    Returns:
        (the number, all candidates). One cluster, and no candidates, where no more may be, or the examples are fewer
        than four, all alike or all zero.
    """
    live = np.flatnonzero(row_lengths(coordinates_NK))
    unit_NK = unit_at(coordinates_NK, live[sample(len(live), SELECTION_EXAMPLES, [seed, 3])])
    distinct = len(np.unique(unit_NK.round(9), axis=0))
    counts = range(2, min(max_count, distinct, len(unit_NK) // EXAMPLES_PER_CLUSTER) + 1)
    if not counts:
        return 1, {}
    whole = _clusterings(unit_NK, counts, method, neighbours, seed)
    agreements: dict[int, list[float]] = {count: [] for count in counts}
    for chosen in subsample_indices(len(unit_NK), REPEATS, [seed, 2]):
        for count, labels in _clusterings(unit_NK[chosen], counts, method, neighbours, seed).items():
            # What lies apart from all clusters, in one of the two, says nothing about them.
            both = (whole[count][chosen] >= 0) & (labels >= 0)
            agreements[count].append(adjusted_rand_score(whole[count][chosen][both], labels[both]))
    values_E, _ = laplacian_eigenmap(neighbour_graph(unit_NK, neighbours), counts[-1] + 1, seed)
    candidates = {}
    for count in (1, *counts):
        stability = ONE_CLUSTER_STABILITY if count == 1 else max(0.0, float(np.mean(agreements[count])))
        separation = float(values_E[count] - values_E[count - 1])
        candidates[count] = {"score": stability * separation, "stability": stability, "separation": separation}
    return max(candidates, key=lambda count: (candidates[count]["score"], -count)), candidates


def _clusterings(
    unit_NK: np.ndarray, counts: range, method: Method, neighbours: int, seed: int
) -> dict[int, np.ndarray]:
    """Labels [N] of every count, see `eigenmap_clusters` for those below 0; one eigenmap serves all."""
    if method == "kmeans":
        return {count: spherical_kmeans(unit_NK, count, seed) for count in counts}
    _, vectors_NE = laplacian_eigenmap(neighbour_graph(unit_NK, neighbours), counts[-1], seed)
    return {count: eigenmap_clusters(vectors_NE, count, seed) for count in counts}


def merge_small(coordinates_NK: np.ndarray, labels_N: np.ndarray, min_examples: int) -> np.ndarray:
    """Join clusters below `min_examples` to the one whose direction is nearest, the smallest first.

    Labels that no example has are closed up; the rest keep their order. One cluster may be left.

    Args:
        coordinates_NK: coordinates of the examples.
        labels_N: cluster of each.
        min_examples: smallest cluster that stays.
    """
    labels_N = np.unique(labels_N, return_inverse=True)[1]
    while True:
        sizes_C = np.bincount(labels_N)
        smallest = int(sizes_C.argmin())
        if len(sizes_C) == 1 or sizes_C[smallest] >= min_examples:
            return labels_N
        directions_CK = centroids(coordinates_NK, labels_N)
        closeness_C = directions_CK @ directions_CK[smallest]
        closeness_C[smallest] = -np.inf
        labels_N = np.where(labels_N == smallest, int(closeness_C.argmax()), labels_N)
        labels_N = np.unique(labels_N, return_inverse=True)[1]


def by_size(labels_N: np.ndarray) -> np.ndarray:
    """Labels renumbered 0, 1, ... by falling size; among equals, the cluster of the earlier example first."""
    found, first, inverse, sizes = np.unique(labels_N, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    rank = np.empty(len(found), dtype=int)
    rank[order] = np.arange(len(found))
    return rank[inverse]
