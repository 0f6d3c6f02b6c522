"""The router: a linear head on the prompt's encoding picks one expert, or abstains to the generalist.

Shapes: N prompts, H width of the encoder, K experts, M training prompts kept to tell strangers by.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from gradientspace_ray.examples.rendering import View
from gradientspace_ray.registry import HEAD_FILE, ROUTER_FILES, SETTINGS_FILE
from gradientspace_ray.router.calibration import calibrated, nll
from gradientspace_ray.router.encoder import PromptEncoder
from gradientspace_ray.router.novelty import NEIGHBOURS, similarities

Reason = Literal["routed", "low_confidence", "out_of_distribution"]
INVERSE_PENALTIES = (0.1, 1.0, 10.0, 100.0)
FOLDS = 5


class RouterError(ValueError):
    """A router that cannot be loaded; the message names the file and the mend in one line."""


class Encoder(Protocol):
    """What a router needs of a `PromptEncoder`."""

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Encodings [N, H], float32, unit length."""
        ...


@dataclass(frozen=True)
class Decision:
    """What the router says about one prompt, or about a conversation."""

    expert: str | None
    """None means the generalist."""
    confidence: float
    """Calibrated probability that this is the right expert; where the generalist answers, that of the best expert."""
    reason: Reason
    """Why that one answers: the generalist does where the prompt is unlike those of the training
    (`out_of_distribution`), else where no expert is probable enough (`low_confidence`)."""
    probabilities: dict[str, float]
    """Expert -> calibrated probability, in the order of the labels."""

    @property
    def second_best(self) -> str | None:
        """The most probable expert beside the one that answers; None where there is no other."""
        others = [name for name in self.probabilities if name != self.expert]
        return max(others, key=self.probabilities.__getitem__, default=None)


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
    view: View
    """The part of a prompt that the router was trained on; serving must read the same one."""
    max_tokens: int
    labels: tuple[str, ...]
    """Expert names, in the order of the head's rows."""
    temperature: float
    threshold: float
    min_similarity: float | None = None
    """Prompts of less similarity to the training's are out of distribution; see `novelty`. None calls none so."""
    neighbours: int = NEIGHBOURS
    """Training prompts that a similarity is the mean of."""
    switch_margin: float = 0.2
    """How much more probable than its expert another has to be, for a conversation to go over to it."""
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
    """Encoder, head, thresholds and temperature. Not bound to a thread; calls may come from several."""

    def __init__(
        self, encoder: Encoder, head: LinearHead, settings: RouterSettings, sample_MH: np.ndarray | None = None
    ) -> None:
        """Put a router together.

        Args:
            encoder: the one that `settings` names.
            head: its rows are in the order of `settings.labels`.
            settings: what it decides by.
            sample_MH: encodings of training prompts; needed if `settings.min_similarity` is set.
        """
        self.encoder, self.head, self.settings = encoder, head, settings
        # Kept in the type of the products, so that no request has to convert it.
        self._sample_MH = None if sample_MH is None else sample_MH.astype(np.float32)

    @property
    def labels(self) -> tuple[str, ...]:
        """Expert names."""
        return self.settings.labels

    @property
    def view(self) -> View:
        """The part of a prompt to give to `route`; see `examples.rendering.prompt_view`."""
        return self.settings.view

    def route(self, prompts: Sequence[str]) -> list[Decision]:
        """One decision for each prompt (already in the router's view), in their order.

        An endpoint decides on whole conversations; see `conversation.route_conversations`.
        """
        return self.decide(self.encoder.encode(prompts))

    def decide(self, encodings_NH: np.ndarray) -> list[Decision]:
        """`route` for prompts that are encoded already."""
        similarity_N = None
        if self._sample_MH is not None:
            similarity_N = similarities(encodings_NH, self._sample_MH, self.settings.neighbours)
        return decide(self.head.logits(encodings_NH), self.settings, similarity_N)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Router":
        """Read what `save_router` wrote, and the encoder that it names.

        Raises:
            RouterError: the folder holds no router.
            ModelError: the encoder cannot be found.
        """
        return cls.of_files(_read(folder), str(folder), lambda name, tokens: PromptEncoder(name, tokens, device))

    @classmethod
    def of_files(
        cls, files: Mapping[str, bytes], place: str, load_encoder: Callable[[str, int], Encoder] = PromptEncoder
    ) -> "Router":
        """A router out of the contents of its files.

        Args:
            files: the name of each of `ROUTER_FILES` -> what it holds.
            place: where they are, for the message of an error.
            load_encoder: name and `max_tokens` of an encoder -> the encoder.

        Raises:
            RouterError: the files are not those of a router.
            ModelError: the encoder cannot be found.
        """
        head, settings, sample_MH = _parse(files, place)
        return cls(load_encoder(settings.encoder, settings.max_tokens), head, settings, sample_MH)


def decide(logits_NK: np.ndarray, settings: RouterSettings, similarity_N: np.ndarray | None = None) -> list[Decision]:
    """Calibrate the scores and pick the most probable expert; abstain from strangers, and below the threshold.

    Args:
        logits_NK: the head's scores.
        settings: temperature, threshold and least similarity.
        similarity_N: see `novelty.similarities`; None takes no prompt for a stranger.
    """
    strange_N = np.zeros(len(logits_NK), dtype=bool)
    if similarity_N is not None and settings.min_similarity is not None:
        strange_N = similarity_N < settings.min_similarity
    decisions = []
    for row_K, strange in zip(calibrated(logits_NK, settings.temperature), strange_N, strict=True):
        best = int(row_K.argmax())
        confidence = float(row_K[best])
        reason: Reason = "routed" if confidence >= settings.threshold else "low_confidence"
        if strange:
            reason = "out_of_distribution"
        expert = settings.labels[best] if reason == "routed" else None
        probabilities = dict(zip(settings.labels, row_K.tolist(), strict=True))
        decisions.append(Decision(expert, confidence, reason, probabilities))
    return decisions


def save_router(folder: Path, head: LinearHead, settings: RouterSettings, sample_MH: np.ndarray | None = None) -> None:
    """Write `head.safetensors` (`weight`, `bias` and, if given, `sample` in float16) and `router.json`.

    Equal routers give equal bytes.
    """
    arrays = {"weight": np.ascontiguousarray(head.weight_KH), "bias": np.ascontiguousarray(head.bias_K)}
    if sample_MH is not None:
        arrays["sample"] = np.ascontiguousarray(sample_MH, dtype=np.float16)
    (folder / HEAD_FILE).write_bytes(save(arrays))
    (folder / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2) + "\n")


def load_head(folder: Path) -> tuple[LinearHead, RouterSettings]:
    """The head and the settings of a router folder, without the encoder.

    Raises:
        RouterError: a file is missing or not what it should be.
    """
    head, settings, _ = _parse(_read(folder), str(folder))
    return head, settings


def _read(folder: Path) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in ROUTER_FILES}
    except OSError as error:
        raise RouterError(f"{folder}: not a router ({error}); run the router stage again") from error


def _parse(files: Mapping[str, bytes], place: str) -> tuple[LinearHead, RouterSettings, np.ndarray | None]:
    again = "run the router stage again"
    try:
        arrays = load(files[HEAD_FILE])
        settings = RouterSettings.model_validate_json(files[SETTINGS_FILE])
        head, sample_MH = LinearHead(arrays["weight"], arrays["bias"]), arrays.get("sample")
    except (SafetensorError, ValidationError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise RouterError(f"{place}: not a router ({reason}); {again}") from error
    rows, width = head.weight_KH.shape
    if rows != len(settings.labels):
        raise RouterError(f"{place}: {rows} rows for {len(settings.labels)} labels; {again}")
    if settings.min_similarity is not None and (sample_MH is None or sample_MH.shape[1:] != (width,)):
        raise RouterError(f"{place}: no training prompts of width {width} to tell strangers by; {again}")
    return head, settings, sample_MH
