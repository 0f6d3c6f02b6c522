"""The clusters as the page shows them, from what `quality.json` says; a key that an older run lacks is left out.

A cluster below 0 is that of the examples that were left out of every cluster.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gradientspace_ray.report import figures
from gradientspace_ray.report.figures import colour
from gradientspace_ray.report.page import ClusterCard, Figure, Headline, Section, Typical, shorten

AS_SKETCHED = (
    "Gradients are judged as the sketch sees them, in the directions it kept: a gradient's other energy is left out, "
    "so that cosines are larger, positive or negative, than those of full gradients."
)
TRIED = ("graph", "kmeans")
"""Values of `clusters.method` that make the very clusters whose number was chosen."""
TYPICAL_EXAMPLES = 3
TEXT_CHARACTERS = 900


def ordered_domains(
    examples: Mapping[str, Mapping[str, Any]], cluster_of: Mapping[str, int], clusters: int
) -> tuple[str, ...]:
    """Domains such that the one at place i is the most frequent in cluster i, where no earlier cluster took it.

    Args:
        examples: by id, with their `domain` or None.
        cluster_of: cluster of each id.
        clusters: how many there are.
    """
    counts = Counter(
        (cluster_of[id_], row["domain"]) for id_, row in examples.items() if row["domain"] and id_ in cluster_of
    )
    left = sorted({domain for _, domain in counts})
    ordered: list[str | None] = [None] * max(clusters, len(left))
    for (cluster, domain), _ in counts.most_common():
        if cluster >= 0 and domain in left and ordered[cluster] is None:
            ordered[cluster] = domain
            left.remove(domain)
    for place, domain in enumerate(ordered):
        if domain is None and left:
            ordered[place] = left.pop(0)
    return tuple(domain or "" for domain in ordered) if any(ordered) else ()


def cluster_cards(
    quality: Mapping[str, Any],
    names: Sequence[str],
    examples: Mapping[str, Mapping[str, Any]],
    cluster_of: Mapping[str, int],
    domains: Sequence[str],
) -> tuple[ClusterCard, ...]:
    """One card for each cluster.

    Args:
        quality: `quality.json`.
        names: of the clusters.
        examples: by id, with `messages` and `domain`.
        cluster_of: cluster of each id.
        domains: hidden labels; each one's place is its colour.
    """
    members: list[list[str]] = [[] for _ in names]
    for id_, cluster in cluster_of.items():
        if cluster >= 0:
            members[cluster].append(id_)
    cards = []
    for index, (name, ids) in enumerate(zip(names, members, strict=True)):
        counts = Counter(examples[id_]["domain"] for id_ in ids if id_ in examples)
        counts.pop(None, None)
        labelled = max(sum(counts.values()), 1)
        typical = (_at(quality.get("typical"), index) or [])[:TYPICAL_EXAMPLES]
        cards.append(
            ClusterCard(
                name=name,
                colour=colour(index),
                size=len(ids),
                share=len(ids) / max(len(cluster_of), 1),
                tokens=_at(quality.get("tokens"), index),
                terms=tuple(_at(quality.get("terms"), index) or ()),
                coherence=_at(quality.get("coherence"), index),
                note=_length_note(quality, index),
                composition=tuple(
                    (domain, colour(domains.index(domain)), count / labelled) for domain, count in counts.most_common()
                ),
                typical=tuple(_typical(examples[id_]) for id_ in typical if id_ in examples),
            )
        )
    return tuple(cards)


def worth(quality: Mapping[str, Any], clusters: int) -> Section | None:
    """What the clusters are worth, in numbers that are explained; None where there is nothing to say."""
    facts = (*_label_free(quality, clusters), *_against_labels(quality))
    figure = _counts(quality, clusters)
    if not facts and not figure:
        return None
    return Section(
        "worth",
        "What the clusters are worth",
        f"{AS_SKETCHED} Hidden labels had no say in the clusters." if "ari" in quality else AS_SKETCHED,
        (figure,) if figure else (),
        facts,
    )


def _label_free(quality: Mapping[str, Any], clusters: int) -> list[Headline]:
    facts = []
    stability, conflicts = quality.get("stability"), quality.get("conflicting_pairs") or {}
    variance, length, left_out = (quality.get(key) or {} for key in ("variance_inside", "length", "left_out"))
    several = clusters > 1
    if stability is not None and several:
        note = (
            "agreement (ARI) with the clusters of random four fifths of the examples, or of 2,000 of them where there "
            "are more: 1 the same, 0 chance"
        )
        facts.append(Headline(f"{stability:.2f}", "stability", note))
    if conflicts.get("inside") is not None:
        note = "pairs of examples that would undo each other's step (cosine below 0 in the sketch's directions)"
        value = f"{conflicts['inside']:.0%}"
        if conflicts.get("between") is not None:
            value += f" / {conflicts['between']:.0%}"
            note += "; the clusters separate conflicts where the first number is the smaller"
        facts.append(Headline(value, "conflicts inside / between" if several else "conflicts inside", note))
    if {"share", "at_random"} <= set(variance) and several:
        note = (
            "of the gradients' variance in the directions that the sketch kept is left inside the clusters; groups "
            f"drawn at random would leave {variance['at_random']:.1%}. Gradients stand nearly at right angles, so that "
            "little can be explained"
        )
        facts.append(Headline(f"{variance['share']:.1%}", "variance inside", note))
    if "explained" in length and several:
        note = "of the variance of the answers' (log) length lies between the clusters; near 100%, they sort by length"
        facts.append(Headline(f"{length['explained']:.0%}", "of answer length explained", note))
    if left_out.get("examples"):
        note = f"{left_out['tokens']:,} tokens: unlike all others, in no cluster; no expert trains on them"
        noun = "example" if left_out["examples"] == 1 else "examples"
        facts.append(Headline(f"{left_out['examples']:,}", f"{noun} left out", note))
    return facts


def _against_labels(quality: Mapping[str, Any]) -> list[Headline]:
    notes = {
        "ari": ("ARI", "agreement of pairs with the hidden labels (adjusted Rand index): 1 the same, 0 chance", ".2f"),
        "nmi": (
            "NMI",
            "what clusters and hidden labels tell of each other, 0 to 1 (normalised mutual information)",
            ".2f",
        ),
        "purity": ("purity", "of the examples have the hidden label that is the most frequent of their cluster", ".0%"),
        "nn_purity": (
            "nearest-neighbour purity",
            "of the examples share the hidden label with the example of nearest gradient, whatever the clusters",
            ".0%",
        ),
    }
    return [
        Headline(format(quality[key], form), label, note)
        for key, (label, note, form) in notes.items()
        if quality.get(key) is not None
    ]


def _counts(quality: Mapping[str, Any], clusters: int) -> Figure | None:
    """Why so many clusters: the score of every number that was tried on the gradients, whatever made the clusters."""
    candidates = quality.get("candidates") or {}
    if not candidates or not all({"score", "stability", "separation"} <= set(found) for found in candidates.values()):
        return None
    method, chosen = quality.get("method", ""), quality.get("chosen_count")
    rows = []
    for count, found in sorted(candidates.items(), key=lambda item: int(item[0])):
        name = f"chosen: {count}" if int(count) == chosen else str(count)
        parts = f"{found['score']:.3f}  (stability {found['stability']:.2f}, separation {found['separation']:.3f})"
        rows.append((name, max(found["score"], 0.0), parts))
    fewer = chosen not in (None, clusters)
    merged = f" Empty and small clusters were then merged away, which leaves {clusters}." if fewer else ""
    again = "k-means makes the same clusters of gradients" if method == "kmeans" else "it falls into the same clusters"
    other = "" if method in ("", *TRIED) else " The clusters of this page are made otherwise, at the chosen number."
    return Figure(
        "How many clusters the gradients' graph has",
        figures.bars(rows, "Score of each number of clusters"),
        f"Score of each number that was tried on the graph of nearest gradients: how surely {again} when examples are "
        f"left out (stability), and how clearly it falls into that many parts (separation).{other}{merged}",
    )


def _length_note(quality: Mapping[str, Any], index: int) -> str:
    called = _at(quality.get("called"), index)
    if not called:
        return ""
    longer = _at((quality.get("length") or {}).get("longer"), index)
    told = ""
    if longer is not None:
        kind, probability = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
        told = f"; an answer of it is {kind} than one of another cluster {probability:.0%} of the time"
    return f"{called.capitalize()}: length tells this cluster from the others better than any word does{told}."


def _typical(example: Mapping[str, Any]) -> Typical:
    asked = [message["content"] for message in example["messages"] if message["role"] == "user"]
    answered = [message["content"] for message in example["messages"] if message["role"] == "assistant"]
    return Typical(shorten(" ".join(asked[-1:]), TEXT_CHARACTERS), shorten(" ".join(answered[-1:]), TEXT_CHARACTERS))


def _at(values: Sequence[Any] | None, index: int) -> Any:
    return values[index] if values and index < len(values) else None
