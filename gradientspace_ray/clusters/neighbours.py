"""Nearest neighbours by cosine.

Shapes: L places, Q queries, K coordinates, M neighbours, C clusters.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

Search = Literal["exact", "faiss"]
QUERIES_AT_ONCE = 50_000
"""Queries whose neighbours are in memory together."""
FEW_QUERIES = 20_000
LEAST_WEIGHT = 1e-9


def nearest_others(unit_LK: np.ndarray, neighbours: int, search: Search = "exact") -> tuple[np.ndarray, np.ndarray]:
    """Of every row the nearest other rows, nearest first.

    Args:
        unit_LK: rows of unit length.
        neighbours: M, below L.
        search: `exact` is scikit-learn's, `faiss` that of FAISS; both look at all rows, and differ by rounding.

    Returns:
        (cosines [L, M] float64, indices [L, M]).

    Raises:
        ValueError: FAISS is not installed.
    """
    if search == "faiss":
        cosines_LM, indices_LM = _faiss(unit_LK, unit_LK, neighbours + 1)
        # A row is its own nearest, but for equal rows, of which any may come first, or push it off the list.
        own_LM = indices_LM == np.arange(len(unit_LK))[:, None]
        own_LM[~own_LM.any(axis=1), -1] = True
        shape = (len(unit_LK), neighbours)
        return cosines_LM[~own_LM].reshape(shape), indices_LM[~own_LM].reshape(shape)
    with threads_for(len(unit_LK)):
        # Asked without arguments, a row is not its own neighbour. On unit rows, distance^2 = 2 - 2 cosine.
        distances_LM, indices_LM = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(unit_LK).kneighbors()
    return 1 - distances_LM**2 / 2, indices_LM


def label_by_neighbours(
    unit_QK: np.ndarray, places_LK: np.ndarray, labels_L: np.ndarray, neighbours: int, search: Search = "exact"
) -> np.ndarray:
    """Label of each query: the one whose places among its nearest have the largest sum of cosines.

    Args:
        unit_QK: queries of unit length.
        places_LK: rows of unit length with a label.
        labels_L: label of each place, 0 or above.
        neighbours: of a query; at most all places are used.
        search: see `nearest_others`.

    Returns:
        [Q] labels; of equal sums the lowest.
    """
    used = min(neighbours, len(places_LK))
    index = None if search == "faiss" else NearestNeighbors(n_neighbors=used, algorithm="brute").fit(places_LK)
    labels_Q = np.empty(len(unit_QK), dtype=int)
    for start in range(0, len(unit_QK), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        if index is None:
            cosines_QM, indices_QM = _faiss(places_LK, unit_QK[part], used)
        else:
            with threads_for(len(unit_QK[part])):
                distances_QM, indices_QM = index.kneighbors(unit_QK[part])
            cosines_QM = 1 - distances_QM**2 / 2
        # Neighbours that point away count only where no other does.
        weights_QM = np.maximum(cosines_QM, LEAST_WEIGHT)
        votes_QC = np.zeros((len(cosines_QM), int(labels_L.max()) + 1))
        np.add.at(votes_QC, (np.arange(len(cosines_QM))[:, None], labels_L[indices_QM]), weights_QM)
        labels_Q[part] = votes_QC.argmax(axis=1)
    return labels_Q


def threads_for(queries: int) -> AbstractContextManager[Any]:
    """One thread for few queries.

    There scikit-learn would split the places, and which of equally near ones comes first would depend on the number of
    threads. Of many queries it splits these.
    """
    return threadpool_limits(1) if queries <= FEW_QUERIES else nullcontext()


def _faiss(places_LK: np.ndarray, unit_QK: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        import faiss
    except ImportError as error:
        mend = "pip install 'gradientspace-ray[faiss]'"
        raise ValueError(f"clusters.search faiss: FAISS is not installed; {mend}") from error
    index = faiss.IndexFlatIP(places_LK.shape[1])
    index.add(np.ascontiguousarray(places_LK, dtype=np.float32))
    cosines_QM, indices_QM = index.search(np.ascontiguousarray(unit_QK, dtype=np.float32), neighbours)
    return cosines_QM.astype(np.float64), indices_QM
