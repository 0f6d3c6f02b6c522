"""What a sketch kept of its gradients, in numbers.

Shapes: N examples, K rows.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

SHARES = (0.5, 0.8, 0.9)
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def describe_spectrum(
    singular_values_K: Sequence[float],
    energy_total: float,
    coordinates_NK: np.ndarray,
    row_energies_N: np.ndarray,
) -> dict[str, Any]:
    """Contents of `spectrum.json` that follow from the sketch.

    Args:
        singular_values_K: falling.
        energy_total: of all gradients.
        coordinates_NK: rows of U diag(s), the gradients as the sketch keeps them.
        row_energies_N: squared norms of the gradients.

    Returns:
        `singular_values`; `energy_total`, `energy_captured`, `captured_share`; `captured_share_of_example`, quantiles
        over the examples of the squared norm that the sketch keeps of each (it may pass 1 a little, for U U^T G is a
        projection of the columns of G); `rank_for_share`, the rows that hold a share of the energy: exactly, as far as
        they were kept, else `at_least` as many, if all that follow were as large as the last one kept.
    """
    energies_K = np.square(np.asarray(singular_values_K, dtype=np.float64))
    captured = float(energies_K.sum())
    kept_N = np.square(coordinates_NK, dtype=np.float64).sum(axis=1)
    shares_N = np.divide(kept_N, row_energies_N, out=np.ones_like(kept_N), where=row_energies_N > 0)
    quantiles = np.quantile(shares_N, QUANTILES)
    return {
        "singular_values": [float(value) for value in singular_values_K],
        "energy_total": energy_total,
        "energy_captured": captured,
        "captured_share": captured / energy_total if energy_total else 1.0,
        "captured_share_of_example": {
            "mean": float(shares_N.mean()),
            "quantiles": {f"{share:g}": float(value) for share, value in zip(QUANTILES, quantiles, strict=True)},
        },
        "rank_for_share": {f"{share:g}": _rank_for(share * energy_total, energies_K) for share in SHARES},
    }


def _rank_for(wanted: float, energies_K: np.ndarray) -> dict[str, int]:
    if not energies_K.size:
        return {}
    reached_K = np.cumsum(energies_K)
    if reached_K[-1] >= wanted:
        return {"rank": int(np.searchsorted(reached_K, wanted)) + 1}
    if not energies_K[-1]:
        return {}
    return {"at_least": len(energies_K) + math.ceil((wanted - reached_K[-1]) / energies_K[-1])}
