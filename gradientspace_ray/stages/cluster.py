"""Clusters of the training examples in gradient space; driver work, for coordinates are small."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from gradientspace_ray.clusters import quality
from gradientspace_ray.clusters.graph import graph_clusters
from gradientspace_ray.clusters.kmeans import centroids, spherical_kmeans
from gradientspace_ray.clusters.selection import SELECTION_EXAMPLES, by_size, choose_count, merge_small
from gradientspace_ray.recipe import ClustersSection, Recipe
from gradientspace_ray.registry import AUTO, BASE, GENERALIST
from gradientspace_ray.run import RunDirectory, RunError, Summary, digest_of
from gradientspace_ray.stages.progress import Bars

TERMS, TYPICAL = 8, 5
STABILITY_REPEATS = 10
LINE = "clusters"


def cluster(recipe: Recipe, run: RunDirectory) -> Summary:
    """Write `clusters/`: every example's cluster, the clusters' directions, and what they are worth and about.

    Clusters are numbered by falling size. The hidden `domain` serves to judge them afterwards and nothing else.

    Raises:
        RunError: coordinates and examples do not belong together.
        ValueError: `clusters.count` asks for more clusters than there are examples.
    """
    ids, coordinates_NK = _coordinates(run)
    settings, seed = recipe.clusters, recipe.seed
    candidates: dict[int, dict[str, float]] = {}
    with Bars() as bars:
        bars.update(LINE, 0, 3, "choosing the count")
        count = settings.count
        if count == "auto":
            arguments = (settings.max_count, settings.method, seed, settings.neighbours)
            count, candidates = choose_count(coordinates_NK, *arguments)
        bars.update(LINE, 1, 3, "clustering")
        labels_N = _labels(coordinates_NK, count, settings, seed)
        labels_N = by_size(merge_small(coordinates_NK, labels_N, settings.min_examples))
        bars.update(LINE, 2, 3, "judging")
        judged = _judge(recipe, run, ids, coordinates_NK, labels_N)
        bars.update(LINE, 3, 3)
    clusters = {"id": ids, "cluster": pa.array(labels_N, pa.int32())}
    run.write_table("clusters/assignments.parquet", pa.table(clusters))
    directions_CK = centroids(coordinates_NK, labels_N).astype(np.float32)
    run.write_bytes("clusters/centroids.safetensors", save({"centroids": directions_CK}))
    chosen = {"method": settings.method, "chosen_count": count, "candidates": candidates}
    run.write_json("clusters/quality.json", judged | chosen)
    sizes = ", ".join(f"{name} {size}" for name, size in zip(judged["names"], judged["sizes"], strict=True))
    noun = "cluster" if judged["count"] == 1 else "clusters"
    return Summary(
        made=f"{judged['count']} {noun}: {sizes}",
        counts={"clusters": judged["count"]}
        | {key: judged[key] for key in ("sizes", "stability", "ari") if key in judged},
        output=digest_of([ids, labels_N.tolist(), judged["names"]]),
    )


def _coordinates(run: RunDirectory) -> tuple[list[str], np.ndarray]:
    """Ids of the training examples and their coordinates, [N, K] float64."""
    table = run.read_table("sketch/coordinates.parquet", ["id", "coordinates"])
    ids = table["id"].to_pylist()
    if not ids:
        raise RunError(f"{run.path('sketch/coordinates.parquet')} holds no examples; run the gradients stage again")
    coordinates = table["coordinates"].combine_chunks()
    return ids, coordinates.flatten().to_numpy().reshape(len(ids), -1).astype(np.float64)


def _labels(coordinates_NK: np.ndarray, count: int, settings: ClustersSection, seed: int) -> np.ndarray:
    if settings.method == "graph":
        return graph_clusters(coordinates_NK, count, settings.neighbours, seed)
    return spherical_kmeans(coordinates_NK, count, seed)


def _judge(
    recipe: Recipe, run: RunDirectory, ids: Sequence[str], coordinates_NK: np.ndarray, labels_N: np.ndarray
) -> dict[str, Any]:
    """Contents of `quality.json`, all but how the number of clusters came about."""
    texts, domains = _texts_and_domains(run, ids)
    terms = quality.distinguishing_terms(texts, labels_N, TERMS)
    sizes = np.bincount(labels_N).tolist()
    judged_places = quality.sample(len(ids), SELECTION_EXAMPLES, [recipe.seed, 3])
    judged_NK = coordinates_NK[judged_places]

    def cluster_again(chosen: np.ndarray) -> np.ndarray:
        count = min(len(sizes), len(chosen))
        return _labels(judged_NK[chosen], count, recipe.clusters, recipe.seed)

    conflicts = quality.conflicting_pairs(coordinates_NK, labels_N, recipe.seed)
    return {
        "count": len(sizes),
        "sizes": sizes,
        "names": quality.cluster_names(terms, reserved=(AUTO, BASE, GENERALIST)),
        "terms": terms,
        "typical": quality.typical(ids, coordinates_NK, labels_N, TYPICAL),
        "coherence": quality.coherence(coordinates_NK, labels_N),
        "conflicting_pairs": conflicts,
        "stability": quality.stability(labels_N[judged_places], cluster_again, STABILITY_REPEATS, recipe.seed),
        **quality.agreement(labels_N, domains),
    }


def _texts_and_domains(run: RunDirectory, ids: Sequence[str]) -> tuple[list[str], list[str | None]]:
    """What an example says, all messages together, and its hidden label, in the order of the ids."""
    table = run.read_table("examples/train.parquet", ["id", "messages", "domain"]).to_pylist()
    rows = {row["id"]: row for row in table}
    # Examples of shards that failed, and were skipped, have no coordinates.
    if not set(ids) <= set(rows):
        raise RunError(f"{run.path('sketch')} is not about examples/train.parquet; run the gradients stage again")
    texts = [" ".join(message["content"] for message in rows[id_]["messages"]) for id_ in ids]
    return texts, [rows[id_]["domain"] for id_ in ids]
