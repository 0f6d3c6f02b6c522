"""Clusters of the training examples in gradient space; driver work, for coordinates are small."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

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
# Names in tables of losses, beside those of the experts.
RESERVED = (AUTO, BASE, GENERALIST, "routed", "oracle")
EXAMPLES, COORDINATES, PROJECTION = "examples/train.parquet", "sketch/coordinates.parquet", "sketch/projection.parquet"
AGAIN = "run the gradients stage again"
Cluster = Callable[[np.ndarray, int], np.ndarray]
"""(indices of examples, number of clusters) -> their labels."""


def cluster(recipe: Recipe, run: RunDirectory) -> Summary:
    """Write `clusters/`: every example's cluster, the clusters' directions, and what they are worth and about.

    Clusters are numbered by falling size; -1 is an example that `clusters.outliers` leaves out. The hidden `domain`
    serves to judge them afterwards and nothing else.

    Raises:
        RunError: coordinates and examples do not belong together, or are damaged.
        ValueError: `clusters.count` asks for more clusters than there are examples.
    """
    ids, coordinates_NK = _matrix(run, COORDINATES, "coordinates")
    examples = _Examples(run, ids)
    settings, seed = recipe.clusters, recipe.seed
    clusters_among = _clusterer(recipe, run, coordinates_NK, examples)
    candidates: Candidates = {}
    with Bars() as bars:
        kept = np.arange(len(ids))
        if settings.outliers == "leave_out":
            bars.update(LINE, 0, 4, "looking for outliers")
            kept = _kept(outliers(coordinates_NK, settings.neighbours, seed), settings.count)
        bars.update(LINE, 1, 4, "choosing the count")
        count = settings.count
        if count == "auto":
            method: Method = "kmeans" if settings.method == "kmeans" else "graph"
            count, candidates = choose_count(
                _at(coordinates_NK, kept), settings.max_count, method, settings.neighbours, seed
            )

        def settled(chosen: np.ndarray, count: int) -> np.ndarray:
            # Of a part of the examples, a cluster has that part.
            smallest = math.ceil(settings.min_examples * len(chosen) / len(kept))
            return merge_small(_at(coordinates_NK, chosen), clusters_among(chosen, count), smallest)

        bars.update(LINE, 2, 4, "clustering")
        labels_N = np.full(len(ids), -1)
        labels_N[kept] = by_size(settled(kept, count))
        bars.update(LINE, 3, 4, "judging")
        judged = judge(
            coordinates_NK,
            labels_N,
            domains=examples.domains,
            tokens_N=examples.tokens_N,
            response_tokens_N=examples.response_tokens_N,
            cluster_again=lambda chosen: settled(chosen, min(count, len(chosen))),
            seed=seed,
        )
        described = describe(
            ids,
            coordinates_NK,
            labels_N,
            texts_of=examples.texts,
            longer=judged["length"]["longer"],
            reserved=RESERVED,
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


class _Examples:
    """What is known of the examples, in the order of the ids; those of shards that failed are not asked for.

    Raises:
        RunError: an id is not among the training examples.
    """

    def __init__(self, run: RunDirectory, ids: Sequence[str]) -> None:
        self._run = run
        table = run.read_table(EXAMPLES, ["id", "tokens", "label_tokens", "domain"])
        places = pc.index_in(pa.array(ids, pa.string()), table["id"].combine_chunks())
        if places.null_count:
            raise RunError(f"{run.path('sketch')} is not about {EXAMPLES}; {AGAIN}")
        rows = table.take(places)
        self.places_N: np.ndarray = places.to_numpy()
        """Rows of `examples/train.parquet`."""
        self.tokens_N: np.ndarray = rows["tokens"].to_numpy()
        self.response_tokens_N: np.ndarray = rows["label_tokens"].to_numpy()
        self.domains: list[str | None] = rows["domain"].to_pylist()

    def texts(self, chosen: np.ndarray) -> list[str]:
        """What some of them say, all messages together."""
        wanted = self.places_N[chosen]
        texts: dict[int, str] = {}
        start = 0
        for batch in self._run.read_batches(EXAMPLES, ["messages"]):
            inside = wanted[(wanted >= start) & (wanted < start + len(batch))]
            for place, messages in zip(inside, batch["messages"].take(pa.array(inside - start)), strict=True):
                texts[int(place)] = " ".join(message["content"] for message in messages.as_py())
            start += len(batch)
        return [texts[int(place)] for place in wanted]


def _clusterer(recipe: Recipe, run: RunDirectory, coordinates_NK: np.ndarray, examples: _Examples) -> Cluster:
    """The recipe's method, with what it reads."""
    settings, seed = recipe.clusters, recipe.seed
    method = settings.method
    if method == "random":
        return lambda chosen, count: random_labels(len(chosen), count, seed)
    if method == "length":
        return lambda chosen, count: length_labels(examples.tokens_N[chosen], count, seed)
    if method == "embedding":
        (encodings_NH,) = encodings(recipe, run, ["train"])
        return lambda chosen, count: spherical_kmeans(encodings_NH[examples.places_N[chosen]], count, seed)
    if width := projected_numbers(method):
        # Written with the coordinates, and in their order.
        _, projection_NP = _matrix(run, PROJECTION, "projection", width)
        if len(projection_NP) != len(coordinates_NK):
            raise RunError(f"{run.path(PROJECTION)} is not about {run.path(COORDINATES)}; {AGAIN}")
        return lambda chosen, count: birch_labels(_at(projection_NP, chosen), count, seed)
    assert method in ("graph", "kmeans")
    return lambda chosen, count: clusters_of(
        _at(coordinates_NK, chosen), count, method, settings.neighbours, seed, settings.search
    )


def _at(rows_NK: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Some of the rows, without a copy of all of them."""
    return rows_NK if len(chosen) == len(rows_NK) else rows_NK[chosen]


def _kept(left_out_N: np.ndarray, count: int | Literal["auto"]) -> np.ndarray:
    """Indices of the examples that are clustered: all but the outliers, unless that is none."""
    kept = np.flatnonzero(~left_out_N)
    if not len(kept):
        return np.arange(len(left_out_N))
    if count != "auto" and len(kept) < count <= len(left_out_N):
        raise ValueError(
            f"clusters.outliers leaves {len(kept)} of {len(left_out_N)} examples, which cannot form {count} clusters; "
            "set it to assign, or lower clusters.count"
        )
    return kept


def _matrix(run: RunDirectory, name: str, column: str, width: int | None = None) -> tuple[list[str], np.ndarray]:
    """Ids of the training examples and their rows, [N, .] float32, folded to `width` numbers where that is given.

    Raises:
        RunError: there are none, or one is not finite.
    """
    ids: list[str] = []
    parts = []
    for batch in run.read_batches(name, ["id", column]):
        rows_NK = batch[column].flatten().to_numpy().reshape(len(batch), -1)
        finite_N = np.isfinite(rows_NK).all(axis=1)
        if not finite_N.all():
            bad = batch["id"][int(finite_N.argmin())]
            raise RunError(f"{run.path(name)}: the numbers of example {bad} are not finite; {AGAIN}")
        ids += batch["id"].to_pylist()
        parts.append(fold(rows_NK, width) if width else rows_NK)
    if not ids:
        raise RunError(f"{run.path(name)} holds no examples; {AGAIN}")
    return ids, np.concatenate(parts)


def _made(names: Sequence[str], sizes: Sequence[int], left_out: int) -> str:
    shown = ", ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
    rest = f"; {left_out} left out" if left_out else ""
    return f"{len(names)} {'cluster' if len(names) == 1 else 'clusters'}: {shown}{rest}"
