"""What clusters are about: their terms, names and typical examples, for people.

Shapes: N examples, S examples whose texts are read, K coordinates, C clusters, V terms. A label below 0 is an example
that was left out of every cluster.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

from gradientspace_ray.clusters.rows import sample, unit_blocks
from gradientspace_ray.clusters.sums import cluster_count, cluster_sums

TEXT_EXAMPLES, MIN_TEXT_EXAMPLES = 20_000, 300
"""Texts that are shared out by size, and how many a small cluster has at least, where there are few clusters."""
TEXT_CHARACTERS = 20_000
"""A text is read up to here."""
TERMS, TYPICAL = 8, 5
MAX_VOCABULARY = 20_000
LONG, SHORT = "long answers", "short answers"
LENGTH_AUC = 0.9
"""From here on, length tells a cluster from the others well enough for a name."""
MAX_SLUG_CHARACTERS = 24
"""Of one term: names become folder names, which have a limit."""
WORD = r"(?u)\b[^\W\d_][\w]*[^\W\d_]\b"
"""Two characters or more, a letter at both ends."""
INSTRUCTION_WORDS = {"did", "didn", "does", "doesn", "doing", "don", "following", "isn", "just", "let", "like", "using"}
STOP_WORDS = sorted(ENGLISH_STOP_WORDS | INSTRUCTION_WORDS | {"ll", "ve"})
"""scikit-learn's, and those that tell how something is asked, not what."""


def describe(
    ids: Sequence[str],
    coordinates_NK: np.ndarray,
    labels_N: np.ndarray,
    *,
    texts_of: Callable[[np.ndarray], Sequence[str]],
    longer: Sequence[float | None],
    reserved: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """The part of `quality.json` that says what the clusters are about.

    Args:
        ids: of the examples.
        coordinates_NK: coordinates of the examples.
        labels_N: cluster of each, 0 .. C - 1, every one present; below 0 where it was left out.
        texts_of: sorted indices of examples -> what they say; asked once, for those of `text_sample`.
        longer: probability that an answer of a cluster is longer than one of another, see `quality.length`.
        reserved: names that no cluster may have.
        seed: decides which texts are read.

    Returns:
        What `json` can write; lists have one entry for each cluster:
        `names`: unique slugs, see `cluster_names`.
        `terms`: up to 8 words, best first, see `distinguishing_terms`.
        `typical`: ids of the 5 examples nearest the middle, nearest first.
        `called`: "long answers", "short answers" or "", see `called_by_length`.
    """
    chosen = text_sample(labels_N, seed)
    vocabulary, shares_CV = term_shares(texts_of(chosen), labels_N[chosen])
    terms = distinguishing_terms(vocabulary, shares_CV, TERMS)
    called = called_by_length(longer, term_auc(shares_CV, np.bincount(labels_N[labels_N >= 0])))
    return {
        "names": cluster_names(terms, called, reserved),
        "terms": terms,
        "typical": typical(ids, coordinates_NK, labels_N, TYPICAL),
        "called": called,
    }


def text_sample(labels_N: np.ndarray, seed: int) -> np.ndarray:
    """Sorted indices of the examples whose texts are read: of each cluster its share, but enough of a small one.

    Of each cluster its share of 20,000, or if that is more, 300 or an equal part of 20,000, whichever is the smaller;
    all of a cluster that has no more than this. So it is 40,000 at most, for up to 20,000 clusters.
    """
    placed, clusters = int((labels_N >= 0).sum()), cluster_count(labels_N)
    least = max(1, min(MIN_TEXT_EXAMPLES, TEXT_EXAMPLES // max(clusters, 1)))
    chosen = []
    for label in range(clusters):
        members = np.flatnonzero(labels_N == label)
        wanted = max(least, TEXT_EXAMPLES * len(members) // placed)
        chosen.append(members[sample(len(members), wanted, [seed, 6, label])])
    return np.sort(np.concatenate(chosen)) if chosen else np.arange(0)


def term_shares(texts: Sequence[str], labels_S: np.ndarray) -> tuple[list[str], np.ndarray]:
    """In what share of each cluster's texts a word stands: (V words, shares [C, V]); no words, V = 0.

    Args:
        texts: one for each example.
        labels_S: cluster of each, 0 or above, every one present.
    """
    clusters = cluster_count(labels_S)
    vectorizer = CountVectorizer(
        binary=True, dtype=np.float64, token_pattern=WORD, stop_words=STOP_WORDS, max_features=MAX_VOCABULARY
    )
    try:
        held_SV = vectorizer.fit_transform(text[:TEXT_CHARACTERS] for text in texts)
    except ValueError as error:
        # scikit-learn's way of saying that the texts have no words.
        if not str(error).startswith("empty vocabulary"):
            raise
        return [], np.zeros((clusters, 0))
    members_CS = csr_matrix((np.ones(len(labels_S)), (labels_S, np.arange(len(labels_S)))))
    shares_CV = (members_CS @ held_SV).toarray() / np.bincount(labels_S)[:, None]
    return vectorizer.get_feature_names_out().tolist(), shares_CV


def distinguishing_terms(vocabulary: Sequence[str], shares_CV: np.ndarray, count: int) -> list[list[str]]:
    """Words that tell one cluster's texts from the others', best first.

    Class-based TF-IDF (Grootendorst, arXiv 2203.05794, eq. 2) with two changes. It counts the share of a cluster's
    texts that hold a word, not the number of times, so that one long text does not speak for its cluster. And of the
    share it counts what is above the mean of the other clusters, so that a word of all clusters speaks for none:
        score(t, c) = (share(t, c) - mean_(b != c) share(t, b)) log(1 + 1 / sum_b share(t, b)).

    Args:
        vocabulary: V words.
        shares_CV: share of each cluster's texts that hold them.
        count: terms wanted; fewer where no more are more frequent in the cluster than in the others.

    Returns:
        One list for each cluster.
    """
    total_V = shares_CV.sum(axis=0)
    others_CV = (total_V - shares_CV) / max(len(shares_CV) - 1, 1)
    scores_CV = (shares_CV - others_CV) * np.log1p(1 / total_V)
    best_CV = np.argsort(-scores_CV, axis=1, kind="stable")[:, :count]
    return [
        [vocabulary[index] for index in best_V if scores_V[index] > 1e-9]
        for best_V, scores_V in zip(best_CV, scores_CV, strict=True)
    ]


def term_auc(shares_CV: np.ndarray, sizes_C: np.ndarray) -> list[float]:
    """How well the best single word, by being there or not, tells each cluster's texts from all others.

    Args:
        shares_CV: share of each cluster's texts that hold a word.
        sizes_C: examples of each cluster, by which the others count.

    Returns:
        Area under the ROC curve, .5 .. 1: (1 + |share - share of the others|) / 2; .5 where there is nothing to tell.
    """
    held_V = sizes_C @ shares_CV
    others_C = sizes_C.sum() - sizes_C
    gaps_CV = shares_CV - (held_V - sizes_C[:, None] * shares_CV) / np.maximum(others_C, 1)[:, None]
    best_C = np.abs(gaps_CV).max(axis=1, initial=0.0)
    return np.where(others_C > 0, (1 + best_C) / 2, 0.5).tolist()


def called_by_length(longer: Sequence[float | None], best_term_auc: Sequence[float]) -> list[str]:
    """Clusters whose answers' length tells them from the others with an AUC of .9 or more, and better than any word.

    Args:
        longer: see `quality.length`.
        best_term_auc: see `term_auc`.

    Returns:
        "long answers", "short answers", or "" where words tell more.
    """
    called = []
    for probability, words in zip(longer, best_term_auc, strict=True):
        auc = 0.5 if probability is None else max(probability, 1 - probability)
        kind = LONG if probability is not None and probability > 0.5 else SHORT
        called.append(kind if auc >= LENGTH_AUC and auc > words else "")
    return called


def cluster_names(terms: Sequence[Sequence[str]], called: Sequence[str], reserved: Sequence[str]) -> list[str]:
    """Unique slugs of `[a-z0-9-]`: two of a cluster's terms, or what it is called and one of them.

    Terms that no earlier cluster's name has go first, and no two that are forms of one word. `cluster-<index>` where
    nothing is left of the terms. A name that is reserved, or that an earlier cluster has, gets its cluster's index
    behind it.

    Args:
        terms: of each cluster, best first.
        called: see `called_by_length`.
        reserved: names that no cluster may have.
    """
    names: list[str] = []
    used: set[str] = set()
    for index, (words, kind) in enumerate(zip(terms, called, strict=True)):
        parts = _name_parts(words, used, 1 if kind else 2)
        used.update(parts)
        name = "-".join([_slug(kind), *parts] if kind else parts) or f"cluster-{index}"
        while name in names or name in reserved:
            name = f"{name}-{index}"
        names.append(name)
    return names


def typical(ids: Sequence[str], coordinates_NK: np.ndarray, labels_N: np.ndarray, count: int) -> list[list[str]]:
    """Ids of the examples nearest each cluster's middle, by cosine, nearest first."""
    sums_CK = cluster_sums(coordinates_NK, labels_N).sums_CK
    # Within a cluster the length of its sum does not change the order.
    closeness_N = np.empty(len(labels_N))
    for block, unit_BK in unit_blocks(coordinates_NK):
        # Left-out examples meet the last cluster here, and nobody looks.
        closeness_N[block] = np.einsum("bk,bk->b", unit_BK, sums_CK[labels_N[block]]) if len(sums_CK) else 0.0
    nearest = []
    for label in range(len(sums_CK)):
        members = np.flatnonzero(labels_N == label)
        order = np.argsort(-closeness_N[members], kind="stable")[:count]
        nearest.append([ids[index] for index in members[order]])
    return nearest


def _name_parts(words: Sequence[str], used: set[str], count: int) -> list[str]:
    """Slugs of at most `count` words, in their order, those not used first."""
    slugs = list(dict.fromkeys(slug for word in words if (slug := _slug(word))))
    chosen: list[str] = []
    for slug in sorted(slugs, key=lambda slug: slug in used):
        if len(chosen) < count and not any(_alike(slug, other) for other in chosen):
            chosen.append(slug)
    return sorted(chosen, key=slugs.index)


def _alike(first: str, second: str) -> bool:
    """Whether two words look like forms of one, as `egg` and `eggs`, `story` and `stories` do."""
    shorter = min(len(first), len(second))
    # Of short words, the last letter makes another one: car, cat.
    stem = shorter - 1 if shorter > 4 else shorter
    return first[:stem] == second[:stem]


def _slug(word: str) -> str:
    plain = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:MAX_SLUG_CHARACTERS].strip("-")
