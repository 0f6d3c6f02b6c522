"""The router: a linear head on the prompt's encoding picks one expert, or abstains to the generalist.

Shapes: N prompts, H width of the encoder, K experts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from gradientspace_ray.router.calibration import calibrated, nll
from gradientspace_ray.router.encoder import PromptEncoder

HEAD_FILE, SETTINGS_FILE = "head.safetensors", "router.json"
INVERSE_PENALTIES = (0.1, 1.0, 10.0, 100.0)
FOLDS = 5


class RouterError(ValueError):
    """A router that cannot be loaded; the message names the file and the mend in one line."""


@dataclass(frozen=True)
class Decision:
    """What the router says about one prompt."""

    expert: str | None
    """None means the generalist."""
    confidence: float
    """Calibrated probability that `best` is the right expert."""
    reason: Literal["routed", "low_confidence"]
    probabilities: dict[str, float]
    """Expert -> calibrated probability, in the order of the labels."""
    best: str
    """The most probable expert, also when the router abstains."""
    second_best: str | None
    """None when there is only one expert."""


@dataclass(frozen=True)
class LinearHead:
    """Scores of K experts: logits = encodings @ weight.T + bias."""

    weight_KH: np.ndarray
    bias_K: np.ndarray

    def logits(self, encodings_NH: np.ndarray) -> np.ndarray:
        """[N, K] float64."""
        return encodings_NH.astype(np.float64) @ self.weight_KH.astype(np.float64).T + self.bias_K.astype(np.float64)


@dataclass(frozen=True)
class HeadFit:
    """A fitted head and what cross-validation says about it."""

    head: LinearHead
    inverse_penalty: float
    """scikit-learn's C."""
    heldout_N: np.ndarray = field(repr=False)
    """Indices of the training prompts that were predicted by a head that had not seen them."""
    heldout_logits_NK: np.ndarray = field(repr=False)
    """Those predictions, in the order of `heldout_N`."""


class RouterSettings(BaseModel):
    """Contents of `router.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = 1
    encoder: str
    view: str
    """The part of a prompt that the router was trained on; serving must read the same one."""
    max_tokens: int
    labels: tuple[str, ...]
    """Expert names, in the order of the head's rows."""
    temperature: float
    threshold: float
    calibration: dict[str, Any] = {}
    """Numbers for the report; nothing here changes a decision."""


def fit_head(encodings_NH: np.ndarray, labels_N: np.ndarray, count: int, seed: int) -> HeadFit:
    """Multinomial logistic regression with an L2 penalty, its strength chosen by stratified cross-validation.

    Classes weigh the same whatever their sizes. The penalty with the lowest held-out NLL wins. With one expert the
    head is constant; with an expert of a single example there is no cross-validation, and C = 1.

    Args:
        encodings_NH: unit-length encodings of the training prompts.
        labels_N: the cluster of each, in 0 .. count - 1, every cluster present.
        count: number of experts K.
        seed: decides the folds.
    """
    width = encodings_NH.shape[1]
    nothing_N, nothing_NK = np.zeros(0, dtype=int), np.zeros((0, count))
    if count == 1:
        head = LinearHead(np.zeros((1, width), np.float32), np.zeros(1, np.float32))
        return HeadFit(head, 1.0, nothing_N, nothing_NK)
    smallest = int(np.bincount(labels_N, minlength=count).min())
    if smallest == 0:
        raise ValueError("a cluster has no training prompt; run the cluster stage again")
    if smallest == 1:
        return HeadFit(_fit(encodings_NH, labels_N, 1.0), 1.0, nothing_N, nothing_NK)
    folds = StratifiedKFold(min(FOLDS, smallest), shuffle=True, random_state=seed)
    predictions = {}
    for inverse_penalty in INVERSE_PENALTIES:
        logits_NK = np.zeros((len(labels_N), count))
        for fitted, held_out in folds.split(encodings_NH, labels_N):
            head = _fit(encodings_NH[fitted], labels_N[fitted], inverse_penalty)
            logits_NK[held_out] = head.logits(encodings_NH[held_out])
        predictions[inverse_penalty] = logits_NK
    best = min(predictions, key=lambda inverse_penalty: nll(predictions[inverse_penalty], labels_N))
    return HeadFit(_fit(encodings_NH, labels_N, best), best, np.arange(len(labels_N)), predictions[best])


def _fit(encodings_NH: np.ndarray, labels_N: np.ndarray, inverse_penalty: float) -> LinearHead:
    model = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=2000)
    model.fit(encodings_NH.astype(np.float64), labels_N)
    weight_KH, bias_K = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one score z: softmax of (-z/2, z/2) is the sigmoid of z
        weight_KH, bias_K = np.concatenate([-weight_KH, weight_KH]) / 2, np.concatenate([-bias_K, bias_K]) / 2
    return LinearHead(weight_KH.astype(np.float32), bias_K.astype(np.float32))


class Router:
    """Encoder, head, temperature and threshold. Not bound to a thread; calls may come from several."""

    def __init__(self, encoder: PromptEncoder, head: LinearHead, settings: RouterSettings) -> None:
        self.encoder, self.head, self.settings = encoder, head, settings

    @property
    def labels(self) -> tuple[str, ...]:
        """Expert names."""
        return self.settings.labels

    @property
    def view(self) -> str:
        """The part of a prompt to give to `route`; see `examples.rendering.prompt_view`."""
        return self.settings.view

    def route(self, prompts: Sequence[str]) -> list[Decision]:
        """One decision for each prompt (already in the router's view), in their order."""
        return self.decide(self.encoder.encode(prompts))

    def decide(self, encodings_NH: np.ndarray) -> list[Decision]:
        """`route` for prompts that are encoded already."""
        return decide(self.head.logits(encodings_NH), self.settings)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Router":
        """Read what `save_router` wrote, and the encoder that it names.

        Raises:
            RouterError: the folder holds no router.
            ModelError: the encoder cannot be found.
        """
        head, settings = load_head(folder)
        return cls(PromptEncoder(settings.encoder, settings.max_tokens, device), head, settings)


def decide(logits_NK: np.ndarray, settings: RouterSettings) -> list[Decision]:
    """Calibrate the scores, pick the most probable expert, abstain below the threshold."""
    decisions = []
    for row_K in calibrated(logits_NK, settings.temperature):
        best, *others = np.argsort(-row_K, kind="stable")
        confidence = float(row_K[best])
        routed = confidence >= settings.threshold
        decisions.append(
            Decision(
                expert=settings.labels[best] if routed else None,
                confidence=confidence,
                reason="routed" if routed else "low_confidence",
                probabilities=dict(zip(settings.labels, row_K.tolist(), strict=True)),
                best=settings.labels[best],
                second_best=settings.labels[others[0]] if others else None,
            )
        )
    return decisions


def save_router(folder: Path, head: LinearHead, settings: RouterSettings) -> None:
    """Write `head.safetensors` and `router.json`; equal routers give equal bytes."""
    arrays = {"weight": np.ascontiguousarray(head.weight_KH), "bias": np.ascontiguousarray(head.bias_K)}
    save_file(arrays, folder / HEAD_FILE)
    (folder / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2) + "\n")


def router_digest(folder: Path) -> str:
    """Twelve hex digits of the SHA-256 of a router's files: what the registry knows it by.

    Raises:
        OSError: a file is missing.
    """
    content = hashlib.sha256()
    for name in (HEAD_FILE, SETTINGS_FILE):
        content.update(name.encode())
        content.update((folder / name).read_bytes())
    return content.hexdigest()[:12]


def load_head(folder: Path) -> tuple[LinearHead, RouterSettings]:
    """The head and the settings of a router folder, without the encoder.

    Raises:
        RouterError: a file is missing or not what it should be.
    """
    try:
        arrays = load_file(folder / HEAD_FILE)
        settings = RouterSettings.model_validate_json((folder / SETTINGS_FILE).read_text())
        head = LinearHead(arrays["weight"], arrays["bias"])
    except (OSError, SafetensorError, ValidationError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise RouterError(f"{folder}: not a router ({reason}); run the router stage again") from error
    if head.weight_KH.shape[0] != len(settings.labels):
        rows = head.weight_KH.shape[0]
        raise RouterError(f"{folder}: {rows} rows for {len(settings.labels)} labels; run the router stage again")
    return head, settings
