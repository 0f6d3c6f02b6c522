"""What people would use instead: assignment at random, by length, and by randomly projected gradients.

Sentence embeddings need nothing of their own: `kmeans.spherical_kmeans` reads them as it reads coordinates. c-BTM
(arXiv 2303.14177) does so with its features of the text, but balances the sizes.

Shapes: N examples, L of them whose gradients are not zero, F of them in the sample that is fitted, P numbers of a
random projection, C clusters.
"""

import warnings

import numpy as np
from sklearn.cluster import Birch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from gradientspace_ray.clusters.kmeans import fit_kmeans
from gradientspace_ray.clusters.rows import blocks_of, check_count, row_lengths, sample, scaled, unit_rows

BIRCH_EXAMPLES = 5000
"""ELREA fits its clusters on this many examples."""
BIRCH_THRESHOLD = 0.5
"""Largest radius of a subcluster, scikit-learn's default. Two unit rows with the cosine c have the radius
sqrt((1 - c) / 2), so they share a subcluster when c is one half or more. With a threshold of sqrt(1/2) or more,
orthogonal rows would share one, as they happen to come. Gradients of one skill, with cosines of about 0.1, lie
between: groups of them have a radius near 1, so no threshold makes subclusters of skills."""


def random_labels(examples: int, count: int, seed: int) -> np.ndarray:
    """Clusters at random, of equal sizes up to one.

    Args:
        examples: N.
        count: number of clusters.
        seed: decides who is in which.

    Returns:
        [N] labels below `count`, every one present.

    Raises:
        ValueError: more clusters than examples, or fewer than one.
    """
    check_count(count, examples)
    return np.random.default_rng([seed, 10]).permutation(examples) % count


def length_labels(tokens_N: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Clusters of like length, a control: k-means on the logarithms of the numbers of tokens.

    Args:
        tokens_N: tokens of each example; none counts as one.
        count: number of clusters wanted.
        seed: decides the starts.

    Returns:
        [N] labels below `count`; some may be absent when there are fewer lengths.

    Raises:
        ValueError: more clusters than examples, or fewer than one.
    """
    check_count(count, len(tokens_N))
    logarithms_N1 = np.log(np.maximum(tokens_N, 1.0))[:, None]
    return fit_kmeans(logarithms_N1, count, seed).labels_.astype(int)


def birch_labels(projection_NP: np.ndarray, count: int, seed: int) -> np.ndarray:
    """ELREA's recipe (Li et al., arXiv 2502.00089): BIRCH on a sample, then each example to the nearest mean by cosine.

    Rows are scaled to unit length here. Gradients are near-orthogonal, so BIRCH's tree holds each row of the sample by
    itself, but for those that are nearly the same; its global step, Ward's method, makes the clusters. Zero rows join
    the largest cluster.

    Args:
        projection_NP: random projections of the gradients, of any length.
        count: number of clusters wanted.
        seed: decides the sample.

    Returns:
        [N] labels below `count`; some may be absent, as when the sample has fewer distinct directions.

    Raises:
        ValueError: more clusters than examples, or fewer than one; or a row that is not finite.
    """
    check_count(count, len(projection_NP))
    lengths_N = row_lengths(projection_NP)
    labels_N = np.zeros(len(projection_NP), dtype=int)
    live_L = np.flatnonzero(lengths_N)
    if count == 1 or not len(live_L):
        return labels_N
    fitted_F = live_L[sample(len(live_L), BIRCH_EXAMPLES, [seed, 11])]
    means_CP = _birch_means(scaled(projection_NP[fitted_F], lengths_N[fitted_F]).astype(np.float32), count)
    for rows in blocks_of(projection_NP):
        # The length of a row does not change which mean is the nearest.
        labels_N[rows] = (projection_NP[rows].astype(np.float32) @ means_CP.T).argmax(axis=1)
    labels_N[lengths_N == 0] = np.bincount(labels_N[live_L]).argmax()
    return labels_N


def _birch_means(unit_FP: np.ndarray, count: int) -> np.ndarray:
    """Unit means, [at most `count`, P] float32, of the clusters that BIRCH finds."""
    # Of several threads, last bits depend on their number.
    with warnings.catch_warnings(), threadpool_limits(1):
        # With fewer subclusters than wanted, each is a cluster: the caller sees it by the labels.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found_F = Birch(threshold=BIRCH_THRESHOLD, n_clusters=count).fit(unit_FP).labels_
    means_CP = [unit_FP[found_F == label].mean(axis=0, dtype=np.float64) for label in np.unique(found_F)]
    return unit_rows(np.stack(means_CP)).astype(np.float32)
