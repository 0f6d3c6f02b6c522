"""Examples unlike all others.

Shapes: N examples, F of them in the sample, P places that these have, K coordinates, M neighbours.
"""

import numpy as np
from sklearn.neighbors import LocalOutlierFactor

from gradientspace_ray.clusters.neighbours import threads_for
from gradientspace_ray.clusters.rows import FIT_EXAMPLES, sample, unit_rows

DECIMALS = 6
"""Of unit coordinates: what is equal to here counts as one."""
OUTLIER_FACTOR = 1.5
"""The threshold of scikit-learn's `contamination="auto"`."""


def outliers(coordinates_NK: np.ndarray, neighbours: int, seed: int) -> np.ndarray:
    """Which examples are farther from their neighbours than these are from each other.

    That is the local outlier factor (Breunig, Kriegel, Ng and Sander, SIGMOD 2000): about 1 within any group, however
    loose it is. An example is an outlier from a factor of 1.5 on; a zero gradient always is one.

    Args:
        coordinates_NK: coordinates of the examples, scaled to unit length here.
        neighbours: M.
        seed: decides the `FIT_EXAMPLES` among which neighbours are looked for, where there are more.

    Returns:
        [N] bool.
    """
    unit_NK = unit_rows(coordinates_NK)
    live = np.flatnonzero(unit_NK.any(axis=1))
    found_N = np.ones(len(unit_NK), dtype=bool)
    found_N[live] = False
    fitted_F = live[sample(len(live), FIT_EXAMPLES, [seed, 9])]
    # Beside examples that are all the same, any other would be far.
    distinct_PK, place_F = np.unique(unit_NK[fitted_F].round(DECIMALS), axis=0, return_inverse=True)
    if len(distinct_PK) < 3:
        return found_N
    model = LocalOutlierFactor(min(neighbours, len(distinct_PK) - 1), algorithm="brute", novelty=True)
    factors_N = np.ones(len(unit_NK))
    with threads_for(len(distinct_PK)):
        factors_N[fitted_F] = -model.fit(distinct_PK).negative_outlier_factor_[place_F]
    others = np.setdiff1d(live, fitted_F, assume_unique=True)
    if len(others):
        with threads_for(len(others)):
            factors_N[others] = -model.score_samples(unit_NK[others])
    found_N[live] = factors_N[live] > OUTLIER_FACTOR
    return found_N
