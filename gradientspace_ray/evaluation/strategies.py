"""Strategies of serving, compared on one loss matrix: nothing is run twice.

Means are over examples, each example's loss being the mean over its own label tokens.

Shapes: N examples, A adapters, E experts. Losses in nats per label token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradientspace_ray.evaluation.losses import BASE

GENERALIST, SINGLE_LORA = "generalist", "single_lora"


@dataclass(frozen=True)
class LossMatrix:
    """Losses of held-out examples under every adapter."""

    nll_NA: np.ndarray
    adapters: tuple[str, ...]
    """Names of the columns: base, generalist, single_lora if it was trained, and the experts."""

    @property
    def experts(self) -> tuple[str, ...]:
        """The columns that are experts, in their order."""
        return tuple(name for name in self.adapters if name not in (BASE, GENERALIST, SINGLE_LORA))

    def column(self, adapter: str) -> np.ndarray:
        """[N] losses under one adapter."""
        return self.nll_NA[:, self.adapters.index(adapter)]

    def columns(self, adapters: Sequence[str]) -> np.ndarray:
        """[N, len(adapters)] losses."""
        return self.nll_NA[:, [self.adapters.index(name) for name in adapters]]

    def served(self, names_N: Sequence[str]) -> np.ndarray:
        """[N] losses when example i is served by adapter `names_N[i]`."""
        index_N = [self.adapters.index(name) for name in names_N]
        return self.nll_NA[np.arange(len(index_N)), index_N]

    def best_single(self) -> str:
        """The one expert that, had it served every example, would have lost least: chosen in hindsight."""
        means_E = self.columns(self.experts).mean(axis=0)
        return self.experts[int(np.argmin(means_E))]


def strategy_losses(matrix: LossMatrix, served_N: Sequence[str]) -> dict[str, np.ndarray]:
    """Strategy -> [N] losses.

    `routed` is what the router serves; `oracle` the lowest of the experts and the generalist, example by example;
    `best_single` the one expert that is best for all, in hindsight.

    Args:
        matrix: losses of the examples.
        served_N: name of the adapter that the router serves each example with.
    """
    losses = {name: matrix.column(name) for name in (BASE, GENERALIST, SINGLE_LORA) if name in matrix.adapters}
    return losses | {
        "routed": matrix.served(served_N),
        "oracle": matrix.columns([GENERALIST, *matrix.experts]).min(axis=1),
        "best_single": matrix.column(matrix.best_single()),
    }


def gap_closed(losses: dict[str, np.ndarray]) -> float | None:
    """Share of the way from the generalist to the oracle that the router goes; None when there is no way to go."""
    gap = float(losses[GENERALIST].mean() - losses["oracle"].mean())
    return float(losses[GENERALIST].mean() - losses["routed"].mean()) / gap if gap > 0 else None


def regret(losses: dict[str, np.ndarray]) -> float:
    """Mean loss of what the router serves over the oracle's; never negative."""
    return float((losses["routed"] - losses["oracle"]).mean())


def lowest_loss_accuracy(matrix: LossMatrix, served_N: Sequence[str]) -> float:
    """Share of the examples that were served well.

    A routed example counts when no other expert has a lower loss; an abstention counts when no expert has a lower loss
    than the generalist, which then serves.
    """
    best_N = matrix.columns(matrix.experts).min(axis=1)
    return float((matrix.served(served_N) <= best_N).mean())


def majority_domains(
    experts: Sequence[str], expert_N: Sequence[str], domains_N: Sequence[str | None]
) -> dict[str, str]:
    """Expert -> the most frequent domain of its training examples; an expert without labels is left out.

    Args:
        experts: expert names.
        expert_N: expert of each training example.
        domains_N: hidden label of each training example; None where there is none.
    """
    majority = {}
    for expert in experts:
        own = [domain for name, domain in zip(expert_N, domains_N, strict=True) if name == expert and domain]
        if own:
            majority[expert] = max(sorted(set(own)), key=own.count)
    return majority


def domain_accuracy(majority: dict[str, str], served_N: Sequence[str], domains_N: Sequence[str | None]) -> float | None:
    """Share of the labelled examples served by an expert of their own domain; an abstention does not count as one.

    None when no example has a label.
    """
    hits = [majority.get(name) == domain for name, domain in zip(served_N, domains_N, strict=True) if domain]
    return float(np.mean(hits)) if hits else None


def group_means(values: dict[str, np.ndarray], groups_N: Sequence[str]) -> dict[str, dict[str, float]]:
    """Group -> {"examples": count, name: mean over the group's examples}, groups sorted by name."""
    labels_N = np.asarray(groups_N, dtype=object)
    table: dict[str, dict[str, float]] = {}
    for group in sorted(set(groups_N)):
        rows = labels_N == group
        means = {name: float(column_N[rows].mean()) for name, column_N in values.items()}
        table[group] = {"examples": int(rows.sum()), **means}
    return table
