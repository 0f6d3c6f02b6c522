"""A flat picture of gradient space.

Shapes: N examples, K coordinates.
"""

import numpy as np
from sklearn.manifold import TSNE

MIN_EXAMPLES_FOR_TSNE = 20
START_SPREAD, START_JITTER = 1e-4, 1e-6


def project(coordinates_NK: np.ndarray, seed: int) -> np.ndarray:
    """Places of the examples on the page, [N, 2], each axis scaled to 0 .. 1.

    Coordinates are scaled to unit length first, as they are for clustering. t-SNE from a PCA start keeps neighbours
    together (distances between groups mean little); below 20 examples, PCA alone.

    Args:
        coordinates_NK: coordinates of the gradients in the sketch.
        seed: decides t-SNE's random choices.
    """
    norms_N1 = np.linalg.norm(coordinates_NK, axis=1, keepdims=True)
    # A gradient of zero has coordinates of rounding noise, which have no direction.
    unit_NK = coordinates_NK / np.maximum(norms_N1, 1e-6 * norms_N1.max(initial=0) or 1.0)
    count, width = unit_NK.shape
    points_N2 = np.zeros((count, 2))
    if count == 0:
        return points_N2
    components = min(2, count, width)
    left, values, _ = np.linalg.svd(unit_NK - unit_NK.mean(axis=0), full_matrices=False)
    points_N2[:, :components] = left[:, :components] * values[:components]
    if count >= MIN_EXAMPLES_FOR_TSNE:
        # scikit-learn's own start divides by zero, and its tree then crashes, when all examples are equal.
        jitter_N2 = np.random.default_rng([seed, 13]).normal(scale=START_JITTER, size=points_N2.shape)
        start_N2 = START_SPREAD * points_N2 / (points_N2[:, 0].std() or 1.0) + jitter_N2
        perplexity = min(30.0, (count - 1) / 4)
        estimator = TSNE(perplexity=perplexity, init=start_N2.astype(np.float32), random_state=seed)
        points_N2 = estimator.fit_transform(unit_NK)
    low_2, high_2 = points_N2.min(axis=0), points_N2.max(axis=0)
    return (points_N2 - low_2) / np.where(high_2 > low_2, high_2 - low_2, 1.0)
