"""Examples unlike all others.

Shapes: N examples, L of them whose coordinates are not zero, K coordinates, M neighbours.
"""

import numpy as np
from scipy.stats import median_abs_deviation

from gradientspace_ray.clusters.neighbours import Search, mean_cosines
from gradientspace_ray.clusters.rows import FIT_EXAMPLES, sample, unit_rows

DEVIATIONS = 3.0
"""Below the median; of a normal distribution one in about 700 examples is."""


def outliers(coordinates_NK: np.ndarray, neighbours: int, seed: int, search: Search = "exact") -> np.ndarray:
    """Which examples have no neighbourhood, by the distance to their nearest neighbours.

    An example's closeness is its mean cosine with its M nearest others (Ramaswamy, Rastogi and Shim, SIGMOD 2000, rank
    outliers so). It is an outlier where this is more than three standard deviations, estimated by the median absolute
    deviation, below the median: Hampel's rule, which outliers themselves do not move. A zero gradient always is one.

    Args:
        coordinates_NK: coordinates of the examples, scaled to unit length here.
        neighbours: M.
        seed: decides the `FIT_EXAMPLES` among which neighbours are looked for, where there are more.
        search: see `nearest_others`.

    Returns:
        [N] bool.
    """
    unit_NK = unit_rows(coordinates_NK)
    live = np.flatnonzero(unit_NK.any(axis=1))
    found_N = np.ones(len(unit_NK), dtype=bool)
    if len(live) < 2:
        found_N[live] = False
        return found_N
    chosen = sample(len(live), FIT_EXAMPLES, [seed, 5])
    closeness_L = mean_cosines(unit_NK[live], chosen, neighbours, search)
    spread = float(median_abs_deviation(closeness_L, scale="normal"))
    found_N[live] = closeness_L < np.median(closeness_L) - DEVIATIONS * spread - 1e-9
    return found_N
