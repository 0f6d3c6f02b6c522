"""One way to ask for clusters, whatever makes them.

Shapes: N examples, K coordinates.
"""

from typing import Literal

import numpy as np

from gradientspace_ray.clusters.graph import graph_clusters
from gradientspace_ray.clusters.kmeans import spherical_kmeans
from gradientspace_ray.clusters.neighbours import Search

Method = Literal["graph", "kmeans"]


def clusters_of(
    coordinates_NK: np.ndarray, count: int, method: Method, neighbours: int, seed: int, search: Search = "exact"
) -> np.ndarray:
    """Labels [N], 0 to `count` - 1, by `graph_clusters` or `spherical_kmeans`; see these."""
    if method == "graph":
        return graph_clusters(coordinates_NK, count, neighbours, seed, search)
    return spherical_kmeans(coordinates_NK, count, seed)
