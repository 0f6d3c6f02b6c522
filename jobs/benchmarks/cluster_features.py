"""The sets of features that the cluster benchmark compares, each by its name.

Shapes: N examples, K numbers of a feature, H width of an encoding.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from cluster_gradients import PRECONDITIONERS, PROJECTED, RANK, Pass, coordinates_of_products

OTHER_RANKS = (16, 32, 128)
WHOLE = ("attention", "mlp")
"""The parts of this beginning are, together, all columns of the gradients."""


class Variant(NamedTuple):
    """The parts of the products that are added up."""

    name: str
    wanted: str
    """A word between the dots of a part's name."""


VARIANTS = (
    Variant("attention only", "attention"),
    Variant("mlp only", "mlp"),
    Variant("early third", "early"),
    Variant("middle third", "middle"),
    Variant("late third", "late"),
    Variant("A only", "A"),
    Variant("B only", "B"),
)


def features_by_name(
    made: Mapping[Pass, Mapping[str, np.ndarray]], encodings_NH: np.ndarray, tokens_N: np.ndarray
) -> dict[str, np.ndarray]:
    """All sets of features, [N, K] float32 by name; variants are named by what they change.

    Args:
        made: of each pass, what `features_of_pass` makes; the first is what the others are compared with.
        encodings_NH: of the prompts.
        tokens_N: of the examples.
    """
    first, *others = made
    main = made[first]
    whole_NN = _whole(main)
    features = {f"svd_{RANK}": main["svd"], "full_gradient": coordinates_of_products(whole_NN)}
    features |= {f"random_projection_{width}": main[f"random_projection_{width}"] for width in PROJECTED}
    features |= {"embedding": encodings_NH, "length": on_quarter_circle(tokens_N)}
    features[f"exact_svd_{RANK}"] = coordinates_of_products(whole_NN, RANK)
    for rank in OTHER_RANKS:
        features[f"exact_svd_{rank}"] = coordinates_of_products(whole_NN, rank)
    features["scale kept"] = coordinates_of_products(whole_NN, RANK, unit=False)
    features |= {f"{name} layers": coordinates_of_products(main[f"products.{name}"], RANK) for name in ("module",)}
    features |= {name: coordinates_of_products(main[f"products.{name}"], RANK) for name in PRECONDITIONERS}
    for variant in VARIANTS:
        # Models of two layers have no last third.
        if parts := _parts(main, variant.wanted):
            features[variant.name] = coordinates_of_products(sum(parts), RANK)
    for other in others:
        features[str(other)] = coordinates_of_products(_whole(made[other]), RANK)
    return features


def on_quarter_circle(tokens_N: np.ndarray) -> np.ndarray:
    """Places [N, 2]: cosines fall with the difference of log tokens; the shortest and the longest are orthogonal."""
    logs_N = np.log(np.maximum(tokens_N, 1))
    angles_N = (logs_N - logs_N.min()) / max(np.ptp(logs_N), 1e-9) * np.pi / 2
    return np.stack([np.cos(angles_N), np.sin(angles_N)], axis=1).astype(np.float32)


def _whole(made: Mapping[str, np.ndarray]) -> np.ndarray:
    """Products, [N, N], over all columns."""
    return sum(_parts(made, *WHOLE))


def _parts(made: Mapping[str, np.ndarray], *wanted: str) -> list[np.ndarray]:
    """Products, [N, N] float64, of the parts whose name has one of these words."""
    names = [name for name in made if name.startswith("products.") and set(name.split(".")[1:]) & set(wanted)]
    return [made[name].astype(np.float64) for name in names]
