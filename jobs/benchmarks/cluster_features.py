"""The sets of features that the cluster benchmark compares, each by its name.

Shapes: N examples, K numbers of a feature, H width of an encoding.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from cluster_gradients import PRECONDITIONERS, PROJECTED, PROJECTION_SEEDS, RANK, Pass, coordinates_of_products

from gradientspace_ray.gradients.per_sample import Normalisation
from gradientspace_ray.sketch.projection import fold

DEFAULT, FULL = f"svd_{RANK}", "full_gradient"
OTHER_RANKS = (16, 32, 128)
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


def all_features(
    made: Mapping[Pass, Mapping[str, np.ndarray]],
    normalisation: Normalisation,
    encodings_NH: np.ndarray,
    tokens_N: np.ndarray,
) -> list[Features]:
    """All sets of features; variants are named by what they change.

    Args:
        made: of each pass, what `features_of_pass` makes; the first is what the others are compared with.
        normalisation: of a run's gradients.
        encodings_NH: of the prompts.
        tokens_N: of the examples.
    """
    first, *others = made
    main = made[first]
    product_NN = _product(main, normalisation)
    features = {DEFAULT: [main[f"svd.{normalisation}"]], FULL: [coordinates_of_products(product_NN)]}
    for width in PROJECTED:
        widest = [main[f"projection.{normalisation}.{seed}"] for seed in range(PROJECTION_SEEDS)]
        features[f"random_projection_{width}"] = [fold(projection_NP, width) for projection_NP in widest]
    features |= {"embedding": [encodings_NH], "length": [on_quarter_circle(tokens_N)]}
    for rank in (RANK, *OTHER_RANKS):
        features[f"exact_svd_{rank}"] = [coordinates_of_products(product_NN, rank)]
    for other in others:
        features[f"{other}"] = [coordinates_of_products(_product(made[other], normalisation), RANK)]
    for kind in ("example", "module", "none"):
        whole_NN = _product(main, kind)
        features[f"normalised: {kind}"] = [coordinates_of_products(whole_NN, RANK, unit=kind != "none")]
    features |= {name: [coordinates_of_products(main[f"products.{name}"], RANK)] for name in PRECONDITIONERS}
    for name, wanted in PARTS.items():
        # Models of two layers have no last third.
        if parts := _parts(main, wanted):
            features[name] = [coordinates_of_products(sum(parts), RANK)]
    return [Features(name, tuple(made_NK)) for name, made_NK in features.items()]


def on_quarter_circle(tokens_N: np.ndarray) -> np.ndarray:
    """Places [N, 2]: cosines fall with the difference of log tokens; the shortest and the longest are orthogonal."""
    logs_N = np.log(np.maximum(tokens_N, 1))
    angles_N = (logs_N - logs_N.min()) / max(np.ptp(logs_N), 1e-9) * np.pi / 2
    return np.stack([np.cos(angles_N), np.sin(angles_N)], axis=1).astype(np.float32)


def _product(made: Mapping[str, np.ndarray], normalisation: Normalisation) -> np.ndarray:
    """Inner products [N, N] of whole gradients, with layers made alike for `module`."""
    return made["products.module"] if normalisation == "module" else sum(_parts(made, *WHOLE))


def _parts(made: Mapping[str, np.ndarray], *wanted: str) -> list[np.ndarray]:
    """Inner products, [N, N] float64, of the parts whose name has one of these words."""
    names = [name for name in made if name.startswith("products.") and set(name.split(".")[1:]) & set(wanted)]
    return [made[name].astype(np.float64) for name in names]
