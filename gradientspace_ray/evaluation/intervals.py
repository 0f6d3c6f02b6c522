"""Bootstrap intervals of means over held-out examples.

Shapes: N examples, R resamples.
"""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
RESAMPLES_AT_ONCE = 256


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_intervals(values: dict[str, np.ndarray], confidence: float, seed: int) -> dict[str, Interval]:
    """Percentile bootstrap intervals of the mean of each column, all from the same resamples of the examples.

    Efron and Tibshirani 1993, chapter 13. Because the resamples are shared, the interval of a difference of two
    strategies is paired: give the difference as a column of its own.

    Args:
        values: name -> [N] numbers, row i of every column belonging to example i; N > 0.
        confidence: level, such as 0.95.
        seed: decides the resamples.
    """
    names = list(values)
    values_NC = np.stack([values[name] for name in names], axis=1).astype(np.float64)
    count = len(values_NC)
    generator = np.random.default_rng([seed, RESAMPLES])
    means_RC = np.concatenate(
        [
            generator.multinomial(count, np.full(count, 1 / count), size=min(RESAMPLES_AT_ONCE, RESAMPLES - start))
            @ values_NC
            / count
            for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE)
        ]
    )
    tail = (1 - confidence) / 2
    low_C, high_C = np.quantile(means_RC, [tail, 1 - tail], axis=0)
    mean_C = values_NC.mean(axis=0)
    return {
        name: Interval(mean=float(mean_C[i]), low=float(low_C[i]), high=float(high_C[i]))
        for i, name in enumerate(names)
    }


def paired_differences(values: dict[str, np.ndarray], pairs: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """`"a - b"` -> [N] differences, for the pairs whose two columns are both there."""
    return {f"{a} - {b}": values[a] - values[b] for a, b in pairs if a in values and b in values}
