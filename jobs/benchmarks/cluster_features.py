"""The sets of features that the cluster benchmark compares, each by its name.

Shapes: N examples, K numbers of a feature, H width of an encoding.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from cluster_gradients import PRECONDITIONERS, Pass, coordinates_of_products
from gradient_task import SEED

from gradientspace_ray.sketch.online_svd import OnlineSVD

RANK, OTHER_RANKS = 64, (16, 32, 128)
PROJECTED, PROJECTION_SEEDS = (64, 512, 8192), 3
DEFAULT, FULL = f"svd_{RANK}", "full_gradient"
SCALINGS = ("plain", "module", *PRECONDITIONERS)
"""Of gradients: `plain` only scales each to unit length."""
WHOLE = ("attention", "mlp")
"""The parts of this beginning are, together, all columns of the gradients."""
PARTS = {
    "attention only": "attention",
    "mlp only": "mlp",
    "early third": "early",
    "middle third": "middle",
    "late third": "late",
    "A only": "A",
    "B only": "B",
}
"""Variant -> a word between the dots of the names of its parts."""


class Features(NamedTuple):
    """One set of features, made once or with several seeds: [N, K] float32 each."""

    name: str
    made_NK: tuple[np.ndarray, ...]
    dimensions: int
    """Numbers of a feature: D of the full gradients, which rows of N stand for."""


def all_features(
    made: Mapping[Pass, Mapping[str, np.ndarray]], scaling: str, encodings_NH: np.ndarray, tokens_N: np.ndarray
) -> list[Features]:
    """All sets of features; variants are named by what they change.

    Args:
        made: of each pass, what `products_of_pass` makes; the first is what the others are compared with.
        scaling: one of `SCALINGS`, that of a run's gradients.
        encodings_NH: of the prompts.
        tokens_N: of the examples.
    """
    first, *others = made
    main = made[first]
    product_NN = _product(main, scaling)
    full_NN = coordinates_of_products(product_NN)
    features = {DEFAULT: [online_svd(full_NN)], FULL: [full_NN]}
    for width in PROJECTED:
        features[f"random_projection_{width}"] = [projected(full_NN, width, seed) for seed in range(PROJECTION_SEEDS)]
    features |= {"embedding": [encodings_NH], "length": [on_quarter_circle(tokens_N)]}
    for rank in (RANK, *OTHER_RANKS):
        features[f"exact_svd_{rank}"] = [coordinates_of_products(product_NN, rank)]
    for other in others:
        features[f"{other}"] = [coordinates_of_products(_product(made[other], scaling), RANK)]
    for name in SCALINGS:
        features[f"scaled: {name}"] = [coordinates_of_products(_product(main, name), RANK)]
    features["scaled: none"] = [coordinates_of_products(_product(main, "plain"), RANK, unit=False)]
    for name, wanted in PARTS.items():
        # Models of two layers have no last third.
        if parts := _parts(main, wanted):
            features[name] = [coordinates_of_products(sum(parts), RANK)]
    return [
        Features(name, tuple(made_NK), int(main["dimension"]) if name == FULL else made_NK[0].shape[1])
        for name, made_NK in features.items()
    ]


def online_svd(full_NN: np.ndarray) -> np.ndarray:
    """Coordinates [N, K] of a run's sketch in one pass, from rows with the gradients' inner products."""
    sketch = OnlineSVD(RANK)
    sketch.update(torch.from_numpy(full_NN), normalise=True)
    return (sketch.coordinates * sketch.singular_values).float().numpy()


def projected(full_NN: np.ndarray, width: int, seed: int) -> np.ndarray:
    """Random projections [N, width] by a matrix of normal numbers, from rows with the gradients' inner products."""
    matrix = np.random.default_rng([SEED, seed, width]).normal(size=(full_NN.shape[1], width)) / np.sqrt(width)
    return (full_NN @ matrix).astype(np.float32)


def on_quarter_circle(tokens_N: np.ndarray) -> np.ndarray:
    """Places [N, 2]: cosines fall with the difference of log tokens; the shortest and the longest are orthogonal."""
    logs_N = np.log(np.maximum(tokens_N, 1))
    angles_N = (logs_N - logs_N.min()) / max(np.ptp(logs_N), 1e-9) * np.pi / 2
    return np.stack([np.cos(angles_N), np.sin(angles_N)], axis=1).astype(np.float32)


def _product(made: Mapping[str, np.ndarray], scaling: str) -> np.ndarray:
    """Inner products [N, N] of whole gradients."""
    return sum(_parts(made, *WHOLE)) if scaling == "plain" else made[scaling]


def _parts(made: Mapping[str, np.ndarray], *wanted: str) -> list[np.ndarray]:
    """Inner products, [N, N] float64, of the parts whose name has one of these words."""
    return [product_NN.astype(np.float64) for name, product_NN in made.items() if set(name.split(".")) & set(wanted)]
