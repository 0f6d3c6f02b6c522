"""What clusters are worth, and what they are about.

Shapes: N examples, K coordinates, C clusters, V terms.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from gradientspace_ray.clusters.graph import unit_rows
from gradientspace_ray.clusters.kmeans import centroids

PAIR_EXAMPLES = 2000
"""Pairs are counted among a sample of this many examples."""
SUBSAMPLE_SHARE = 0.8
MAX_TERMS = 20000
MAX_SLUG_CHARACTERS = 24
"""Of one term: names become folder names, which have a limit."""
WORD = r"(?u)\b[^\W\d_][\w]*[^\W\d_]\b"
"""Two characters or more, a letter at both ends."""


def coherence(coordinates_NK: np.ndarray, labels_N: np.ndarray) -> list[float]:
    """Mean cosine between two different examples of a cluster, one number for each; 1 for a cluster of one.

    From the length of the sum of the n unit vectors, (|sum|^2 - n) / (n (n - 1)), so no pair is formed.
    """
    unit_NK = unit_rows(coordinates_NK)
    means = []
    for label in range(labels_N.max() + 1):
        rows = unit_NK[labels_N == label]
        pairs = len(rows) * (len(rows) - 1)
        squares = float(np.square(rows).sum())
        means.append((float(np.square(rows.sum(axis=0)).sum()) - squares) / pairs if pairs else 1.0)
    return means


def conflicting_pairs(coordinates_NK: np.ndarray, labels_N: np.ndarray, seed: int) -> dict[str, float | None]:
    """Share of pairs whose cosine is negative: steps that undo each other.

    Args:
        coordinates_NK: coordinates of the examples.
        labels_N: cluster of each.
        seed: decides which examples are taken when there are many.

    Returns:
        `inside` clusters and `between` them; None where there is no pair.
    """
    chosen = sample(len(labels_N), PAIR_EXAMPLES, [seed, 1])
    unit_NK, labels = unit_rows(coordinates_NK)[chosen], labels_N[chosen]
    upper = np.triu_indices(len(chosen), k=1)
    conflicts = (unit_NK @ unit_NK.T)[upper] < -1e-9
    inside = (labels[:, None] == labels)[upper]
    return {
        name: float(conflicts[pairs].mean()) if pairs.any() else None
        for name, pairs in (("inside", inside), ("between", ~inside))
    }


def stability(
    labels_N: np.ndarray, cluster_again: Callable[[np.ndarray], np.ndarray], repeats: int, seed: int
) -> float | None:
    """Mean adjusted Rand index between these labels and those of random subsamples, clustered anew.

    (von Luxburg, "Clustering stability: an overview", 2010; subsamples of 80 % without replacement.)

    Args:
        labels_N: cluster of each example.
        cluster_again: indices of a subsample -> its labels.
        repeats: number of subsamples.
        seed: decides the subsamples.

    Returns:
        About 0 for chance, 1 for the same clusters each time; None for fewer than 3 examples.
    """
    if len(labels_N) < 3:
        return None
    subsamples = subsample_indices(len(labels_N), repeats, seed)
    return float(np.mean([adjusted_rand_score(labels_N[chosen], cluster_again(chosen)) for chosen in subsamples]))


def subsample_indices(examples: int, repeats: int, seed: int) -> list[np.ndarray]:
    """Sorted indices of random subsamples of 80 % (at least two examples), without replacement."""
    size = max(2, round(SUBSAMPLE_SHARE * examples))
    return [sample(examples, size, [seed, 2, repeat]) for repeat in range(repeats)]


def sample(examples: int, size: int, seed: Sequence[int]) -> np.ndarray:
    """Sorted indices of at most `size` of the examples, drawn without replacement."""
    if examples <= size:
        return np.arange(examples)
    return np.sort(np.random.default_rng(seed).choice(examples, size, replace=False))


def agreement(labels_N: np.ndarray, truth: Sequence[str | None]) -> dict[str, float]:
    """ARI, NMI and purity against known labels, over the examples that have one; empty when none has.

    Purity is the share of examples whose label is the most frequent one of their cluster.
    """
    known = np.array([label is not None for label in truth], dtype=bool)
    if not known.any():
        return {}
    found, wanted = labels_N[known], [label for label in truth if label is not None]
    return {
        "ari": float(adjusted_rand_score(wanted, found)),
        "nmi": float(normalized_mutual_info_score(wanted, found)),
        "purity": float(contingency_matrix(wanted, found).max(axis=0).sum() / len(wanted)),
    }


def distinguishing_terms(texts: Sequence[str], labels_N: np.ndarray, count: int) -> list[list[str]]:
    """Words that tell one cluster's texts from the others', best first.

    Class-based TF-IDF (Grootendorst, arXiv 2203.05794, eq. 2), on the share of a cluster's texts that hold a word, not
    on the number of times, so that one long text does not speak for its cluster:
        score(t, c) = share(t, c) log(1 + 1 / sum_c share(t, c)),
    and only words more frequent in c than in the other clusters on average are taken.

    Args:
        texts: one for each example.
        labels_N: cluster of each.
        count: terms wanted; fewer where there are no more.

    Returns:
        One list for each cluster.
    """
    clusters = int(labels_N.max()) + 1
    vectorizer = CountVectorizer(
        binary=True, token_pattern=WORD, stop_words=sorted(ENGLISH_STOP_WORDS), max_features=MAX_TERMS
    )
    try:
        held_NV = vectorizer.fit_transform(texts)
    except ValueError:
        # scikit-learn's way of saying that the texts have no words.
        return [[] for _ in range(clusters)]
    terms = vectorizer.get_feature_names_out()
    shares_CV = np.stack([np.asarray(held_NV[labels_N == label].mean(axis=0)).ravel() for label in range(clusters)])
    total_V = shares_CV.sum(axis=0)
    scores_CV = shares_CV * np.log1p(1 / total_V)
    if clusters > 1:
        others_CV = (total_V - shares_CV) / (clusters - 1)
        scores_CV = np.where(shares_CV > others_CV + 1e-9, scores_CV, 0)
    best_CV = np.argsort(-scores_CV, axis=1, kind="stable")[:, :count]
    return [
        [str(terms[index]) for index in best_V if scores_V[index] > 0]
        for best_V, scores_V in zip(best_CV, scores_CV, strict=True)
    ]


def cluster_names(terms: Sequence[Sequence[str]], reserved: Sequence[str] = ()) -> list[str]:
    """Unique slugs of `[a-z0-9-]` from each cluster's first two terms; `cluster-<index>` where nothing is left of them.

    A name that is reserved, or that an earlier cluster has, gets its cluster's index behind it.
    """
    names: list[str] = []
    for index, words in enumerate(terms):
        slugs = list(dict.fromkeys(slug for word in words if (slug := _slug(word))))
        name = "-".join(slugs[:2]) or f"cluster-{index}"
        while name in names or name in reserved:
            name = f"{name}-{index}"
        names.append(name)
    return names


def typical(ids: Sequence[str], coordinates_NK: np.ndarray, labels_N: np.ndarray, count: int) -> list[list[str]]:
    """Ids of the examples nearest each cluster's middle, by cosine, nearest first."""
    closeness_NC = unit_rows(coordinates_NK) @ centroids(coordinates_NK, labels_N).T
    nearest = []
    for label in range(labels_N.max() + 1):
        members = np.flatnonzero(labels_N == label)
        order = np.argsort(-closeness_NC[members, label], kind="stable")[:count]
        nearest.append([ids[index] for index in members[order]])
    return nearest


def _slug(word: str) -> str:
    plain = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:MAX_SLUG_CHARACTERS].strip("-")
