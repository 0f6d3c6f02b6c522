"""Clusters of made-up gradients whose groups are known: whether they are found, how many, and in what time.

A group has a direction of its own, a few more that its members vary along, and every member its own noise. The noise is
that of real instruction data: two gradients of a group have a mean cosine of .04 to .1, so more than four fifths of a
gradient's energy are its own. Up to `EXACT_EXAMPLES` the gradients are made at full dimension and sketched by the
online SVD; beyond that, coordinates are drawn as such a sketch gives them.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sketch_methods import answer, peak_rss_bytes
from sklearn.metrics import adjusted_rand_score

from gradientspace_ray.clusters.description import describe
from gradientspace_ray.clusters.methods import clusters_of
from gradientspace_ray.clusters.outliers import outliers
from gradientspace_ray.clusters.quality import judge
from gradientspace_ray.clusters.selection import by_size, choose_count, merge_small
from gradientspace_ray.sketch.online_svd import OnlineSVD

EXACT_EXAMPLES, DIMENSION, RANK = 2000, 20_000, 64
SUBSPACE, SUBSPACE_ENERGY = 2, 0.1
SHARES = (0.3, 0.2, 0.16, 0.14, 0.12, 0.08)
SIZES = (2_000, 62_500, 125_000, 250_000, 500_000, 1_000_000)
KEPT_NOISE = 0.22
"""Energy of a gradient's own noise that the sketch's directions hold: with it, they hold about two fifths in all."""


class Planted(NamedTuple):
    """What is made and clustered."""

    examples: int
    cosine: float
    """Mean cosine of two gradients of a group."""
    max_count: int
    neighbours: int
    seed: int


def gradients(planted: Planted, rng: np.random.Generator, labels_N: np.ndarray) -> np.ndarray:
    """Unit gradients [N, D] float32 at full dimension."""
    groups = len(SHARES)
    directions_CD = _unit(rng, groups, DIMENSION)
    bases_CSD = _unit(rng, groups, SUBSPACE, DIMENSION)
    within_NS = rng.normal(size=(len(labels_N), SUBSPACE)) * np.sqrt(SUBSPACE_ENERGY / SUBSPACE)
    rows_ND = np.sqrt(planted.cosine) * directions_CD[labels_N]
    rows_ND += np.einsum("ns,nsd->nd", within_NS, bases_CSD[labels_N])
    rows_ND += np.sqrt(1 - planted.cosine - SUBSPACE_ENERGY) * _unit(rng, len(labels_N), DIMENSION)
    return rows_ND.astype(np.float32)


def coordinates(planted: Planted, rng: np.random.Generator, labels_N: np.ndarray) -> np.ndarray:
    """Coordinates [N, RANK] float32 as a sketch of such gradients has them, made a part at a time."""
    groups = len(SHARES)
    places_KK = np.linalg.qr(rng.normal(size=(RANK, RANK)))[0]
    directions_CK, bases_CSK = places_KK[:groups], places_KK[groups : groups * (1 + SUBSPACE)]
    bases_CSK = bases_CSK.reshape(groups, SUBSPACE, RANK)
    rows_NK = np.empty((len(labels_N), RANK), dtype=np.float32)
    for start in range(0, len(labels_N), 100_000):
        part = labels_N[start : start + 100_000]
        within_NS = rng.normal(size=(len(part), SUBSPACE)) * np.sqrt(SUBSPACE_ENERGY / SUBSPACE)
        rows = np.sqrt(planted.cosine) * directions_CK[part] + np.einsum("ns,nsk->nk", within_NS, bases_CSK[part])
        rows_NK[start : start + len(part)] = rows + np.sqrt(KEPT_NOISE) * _unit(rng, len(part), RANK)
    return rows_NK


def measure(planted: Planted) -> dict[str, Any]:
    """Make, cluster, judge and describe: seconds of each part, and the most memory that the process held."""
    rng = np.random.default_rng(planted.seed)
    truth_N = rng.choice(len(SHARES), size=planted.examples, p=SHARES)
    if planted.examples <= EXACT_EXAMPLES:
        sketch = OnlineSVD(RANK)
        sketch.update(torch.from_numpy(gradients(planted, rng, truth_N)), normalise=True)
        rows_NK = (sketch.coordinates * sketch.singular_values).float().numpy()
    else:
        rows_NK = coordinates(planted, rng, truth_N)
    seconds: dict[str, float] = {}

    def timed(part: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        seconds[part] = time.perf_counter() - began
        return result

    settings = {"method": "graph", "neighbours": planted.neighbours, "seed": planted.seed}
    count, _ = timed("choose", lambda: choose_count(rows_NK, planted.max_count, **settings))
    labels_N = timed("cluster", lambda: by_size(merge_small(rows_NK, clusters_of(rows_NK, count, **settings), 8)))
    left_out_N = timed("outliers", lambda: outliers(rows_NK, planted.neighbours, planted.seed))
    tokens_N = rng.integers(50, 500, planted.examples)
    judged = timed(
        "judge",
        lambda: judge(
            rows_NK,
            labels_N,
            domains=[str(label) for label in truth_N],
            tokens_N=tokens_N,
            response_tokens_N=tokens_N // 2,
            cluster_again=lambda chosen: clusters_of(rows_NK[chosen], count, **settings),
            seed=planted.seed,
        ),
    )
    timed(
        "describe",
        lambda: describe(
            [str(index) for index in range(planted.examples)],
            rows_NK,
            labels_N,
            texts_of=lambda chosen: [_text(int(truth_N[index]), int(index)) for index in chosen],
            longer=judged["length"]["longer"],
            reserved=(),
            seed=planted.seed,
        ),
    )
    return {
        "examples": planted.examples,
        "cosine": planted.cosine,
        "groups": len(SHARES),
        "count": count,
        "ari": float(adjusted_rand_score(truth_N, labels_N)),
        "outliers": int(left_out_N.sum()),
        "nn_purity": judged["nn_purity"],
        "stability": judged["stability"],
        "seconds": sum(seconds.values()),
        **{f"{part}_seconds": taken for part, taken in seconds.items()},
        "peak_gb": peak_rss_bytes() / 1e9,
    }


def show_planted(results: list[dict[str, Any]], console: Console) -> None:
    """A table of all sizes."""
    table = Table(title="made-up gradients with known groups; seconds of each part", padding=(0, 0))
    parts = [name.removesuffix("_seconds") for name in results[0] if name.endswith("_seconds")]
    headings = ("examples", "cosine", "found", "ARI", "nn", "left out", "seconds", *parts)
    headings += ("peak GB",)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results:
        shown = (f"{row['examples']:,}", f"{row['cosine']:.2f}", f"{row['count']} of {row['groups']}")
        shown += (f"{row['ari']:.3f}", f"{row['nn_purity']:.3f}", str(row["outliers"]), f"{row['seconds']:.1f}")
        table.add_row(*shown, *(f"{row[f'{part}_seconds']:.1f}" for part in parts), f"{row['peak_gb']:.2f}")
    console.print(table)


def _text(group: int, index: int) -> str:
    """A text of some 40 words, a few of which are its group's own."""
    return " ".join(f"word{(index * step) % 5000}" for step in range(1, 38)) + f" skill{group} topic{group}"


def _unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    answer(lambda: measure(Planted(**fields)))
