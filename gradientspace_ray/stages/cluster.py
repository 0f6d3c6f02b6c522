"""Clusters of the training examples in gradient space; driver work, for coordinates are small."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import save

from gradientspace_ray.clusters.baselines import birch_labels, length_labels, random_labels
from gradientspace_ray.clusters.description import describe
from gradientspace_ray.clusters.kmeans import centroids, spherical_kmeans
from gradientspace_ray.clusters.methods import Method, clusters_of
from gradientspace_ray.clusters.outliers import outliers
from gradientspace_ray.clusters.quality import judge
from gradientspace_ray.clusters.selection import Candidates, by_size, choose_count, merge_small
from gradientspace_ray.recipe import Recipe, projected_numbers
from gradientspace_ray.registry import AUTO, BASE, GENERALIST
from gradientspace_ray.run import RunDirectory, RunError, Summary, digest_of
from gradientspace_ray.sketch.projection import fold
from gradientspace_ray.stages.encode import encodings
from gradientspace_ray.stages.progress import Bars

LINE = "clusters"
EXAMPLES, COORDINATES, PROJECTION = "examples/train.parquet", "sketch/coordinates.parquet", "sketch/projection.parquet"
AGAIN = "run the gradients stage again"
Cluster = Callable[[np.ndarray, int], np.ndarray]
"""(indices of examples, number of clusters) -> their labels."""


def cluster(recipe: Recipe, run: RunDirectory) -> Summary:
    """Write `clusters/`: every example's cluster, the clusters' directions, and what they are worth and about.

    Clusters are numbered by falling size; -1 is an example that `clusters.outliers` leaves out. The hidden `domain`
    serves to judge them afterwards and nothing else.

    Raises:
        RunError: coordinates and examples do not belong together.
        ValueError: `clusters.count` asks for more clusters than there are examples.
    """
    ids, coordinates_NK = _matrix(run, COORDINATES, "coordinates")
    examples = _examples(run, ids)
    settings, seed = recipe.clusters, recipe.seed
    clusters_among = _clusterer(recipe, run, ids, coordinates_NK, examples["tokens"].to_numpy())
    candidates: Candidates = {}
    with Bars() as bars:
        bars.update(LINE, 0, 4, "looking for outliers")
        kept = np.arange(len(ids))
        if settings.outliers == "leave_out":
            kept = _kept(outliers(coordinates_NK, settings.neighbours, seed, settings.search))
        bars.update(LINE, 1, 4, "choosing the count")
        count = settings.count
        if count == "auto":
            method: Method = "kmeans" if settings.method == "kmeans" else "graph"
            kept_NK = coordinates_NK[kept]
            count, candidates = choose_count(kept_NK, settings.max_count, method, settings.neighbours, seed)
        bars.update(LINE, 2, 4, "clustering")
        labels_N = np.full(len(ids), -1)
        found = clusters_among(kept, count)
        labels_N[kept] = by_size(merge_small(coordinates_NK[kept], found, settings.min_examples))
        bars.update(LINE, 3, 4, "judging")
        judged = judge(
            coordinates_NK,
            labels_N,
            domains=examples["domain"].to_pylist(),
            tokens_N=examples["tokens"].to_numpy(),
            response_tokens_N=examples["label_tokens"].to_numpy(),
            cluster_again=lambda chosen: clusters_among(chosen, min(count, len(chosen))),
            seed=seed,
        )
        described = describe(
            ids,
            coordinates_NK,
            labels_N,
            texts_of=lambda chosen: _texts(run, [ids[index] for index in chosen]),
            longer=judged["length"]["longer"],
            reserved=(AUTO, BASE, GENERALIST),
            seed=seed,
        )
        bars.update(LINE, 4, 4)
    table = pa.table({"id": ids, "cluster": pa.array(labels_N, pa.int32())})
    run.write_table("clusters/assignments.parquet", table)
    directions_CK = centroids(coordinates_NK, labels_N).astype(np.float32)
    run.write_bytes("clusters/centroids.safetensors", save({"centroids": directions_CK}))
    chosen = {"method": settings.method, "chosen_count": count, "candidates": candidates}
    quality = judged | described | chosen
    run.write_json("clusters/quality.json", quality)
    shown = ("sizes", "stability", "nmi", "ari")
    return Summary(
        made=_made(quality["names"], quality["sizes"], quality["left_out"]["examples"]),
        counts={"clusters": quality["count"]} | {key: quality[key] for key in shown if key in quality},
        output=digest_of([ids, labels_N.tolist(), quality["names"]]),
    )


def _clusterer(
    recipe: Recipe, run: RunDirectory, ids: Sequence[str], coordinates_NK: np.ndarray, tokens_N: np.ndarray
) -> Cluster:
    """The recipe's method, with what it reads."""
    settings, seed = recipe.clusters, recipe.seed
    method = settings.method
    if method == "random":
        return lambda chosen, count: random_labels(len(chosen), count, seed)
    if method == "length":
        return lambda chosen, count: length_labels(tokens_N[chosen], count, seed)
    if method == "embedding":
        encodings_NH = _encodings(recipe, run, ids)
        return lambda chosen, count: spherical_kmeans(encodings_NH[chosen], count, seed)
    if width := projected_numbers(method):
        projection_NP = _projection(run, ids, width)
        return lambda chosen, count: birch_labels(projection_NP[chosen], count, seed)
    assert method in ("graph", "kmeans")
    return lambda chosen, count: clusters_of(
        coordinates_NK[chosen], count, method, settings.neighbours, seed, settings.search
    )


def _kept(left_out_N: np.ndarray) -> np.ndarray:
    """Indices of the examples that are clustered: all but the outliers, unless that is none."""
    return np.flatnonzero(~left_out_N) if not left_out_N.all() else np.arange(len(left_out_N))


def _matrix(run: RunDirectory, name: str, column: str) -> tuple[list[str], np.ndarray]:
    """Ids of the training examples and their rows, [N, .] float32."""
    table = run.read_table(name, ["id", column])
    ids = table["id"].to_pylist()
    if not ids:
        raise RunError(f"{run.path(name)} holds no examples; {AGAIN}")
    return ids, table[column].combine_chunks().flatten().to_numpy().reshape(len(ids), -1)


def _projection(run: RunDirectory, ids: Sequence[str], width: int) -> np.ndarray:
    found, projection_NP = _matrix(run, PROJECTION, "projection")
    if found != ids:
        raise RunError(f"{run.path(PROJECTION)} is not about {run.path(COORDINATES)}; {AGAIN}")
    return fold(projection_NP, width)


def _encodings(recipe: Recipe, run: RunDirectory, ids: Sequence[str]) -> np.ndarray:
    """Encodings of the prompts, [N, H] float32, in the order of the ids."""
    (encodings_NH,) = encodings(recipe, run, ["train"])
    return encodings_NH[_places(run, ids).to_numpy()]


def _examples(run: RunDirectory, ids: Sequence[str]) -> pa.Table:
    """Numbers of tokens, and the hidden label, in the order of the ids."""
    return run.read_table(EXAMPLES, ["tokens", "label_tokens", "domain"]).take(_places(run, ids))


def _texts(run: RunDirectory, ids: Sequence[str]) -> list[str]:
    """What examples say, all messages together."""
    rows = run.read_table(EXAMPLES, ["messages"]).take(_places(run, ids))["messages"].to_pylist()
    return [" ".join(message["content"] for message in messages) for messages in rows]


def _places(run: RunDirectory, ids: Sequence[str]) -> pa.Array:
    """Where the examples stand; those of shards that failed, and were skipped, are not asked for."""
    places = pc.index_in(pa.array(ids, pa.string()), run.read_table(EXAMPLES, ["id"])["id"].combine_chunks())
    if places.null_count:
        raise RunError(f"{run.path('sketch')} is not about {EXAMPLES}; {AGAIN}")
    return places


def _made(names: Sequence[str], sizes: Sequence[int], left_out: int) -> str:
    shown = ", ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
    rest = f"; {left_out} left out" if left_out else ""
    return f"{len(names)} {'cluster' if len(names) == 1 else 'clusters'}: {shown}{rest}"
