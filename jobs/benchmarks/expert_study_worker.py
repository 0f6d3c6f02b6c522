"""The tasks of the study of experts, each a function of what it is given, run in a process of one thread.

What a task comes to is kept under a digest of all that decides it, so that an interrupted study goes on where it was.

Shapes: N examples, D LoRA weights, K coordinates.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gradient_task import LORA_ALPHA, LORA_RANK, SEED
from peft import PeftModel

from gradientspace_ray.clusters.methods import clusters_of
from gradientspace_ray.clusters.selection import by_size, choose_count, merge_small
from gradientspace_ray.evaluation.losses import BASE, adapter_losses
from gradientspace_ray.examples.packing import Example
from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.models.fingerprint import model_fingerprint
from gradientspace_ray.models.loading import add_lora, as_dtype, load_adapter, load_base, save_adapter
from gradientspace_ray.models.moments import load_moments, save_moments
from gradientspace_ray.recipe import (
    ClustersSection,
    GradientsSection,
    RouterSection,
    SketchSection,
    TrainingSection,
)
from gradientspace_ray.router.classifier import fit_head
from gradientspace_ray.router.encoder import PromptEncoder
from gradientspace_ray.sketch.online_svd import OnlineSVD
from gradientspace_ray.training.engine import PlainEngine
from gradientspace_ray.training.loop import train
from gradientspace_ray.training.schedule import WHOLE_COSINE, plan_steps

RECORD = "record.json"
TOKENS_PER_BATCH = 1024
TRAINING, GRADIENTS, SKETCH = TrainingSection(), GradientsSection(), SketchSection()
CLUSTERS, ROUTER = ClustersSection(), RouterSection()


class Place(NamedTuple):
    """What all tasks share."""

    model: str
    dtype: str
    """Of the base's weights and of the products."""
    cache: str


class Finetune(NamedTuple):
    """One pass over the examples, in an order that the seed decides. Its answer: `steps`, `tokens`, `losses`."""

    start: str | None
    """Key of the finetune that it goes on with, weights and moments; None: a fresh adapter."""
    examples: list[Example]
    examples_per_step: int
    learning_rate: float
    cosine: tuple[float, float] = WHOLE_COSINE
    """The part of the cosine that its learning rate goes along."""


class Clusters(NamedTuple):
    """Gradients of the examples at an adapter, and their clusters, as a run makes them. Its answer: `labels`, ..."""

    adapter: str
    """Key of a finetune."""
    examples: list[Example]


class Losses(NamedTuple):
    """Mean NLL of each example under an adapter. Its answer: `nll`."""

    adapter: str | None
    """Key of a finetune; None: the base model."""
    examples: list[Example]


class Route(NamedTuple):
    """The router learns prompt -> label. Its answer: `labels` of other prompts, and its own `accuracy`."""

    prompts: list[str]
    labels: list[int]
    asked: list[str]


Task = Finetune | Clusters | Losses | Route

DEFAULTS: dict[type[Task], list[dict[str, Any]]] = {
    Finetune: [TRAINING.model_dump(include={"warmup_share", "weight_decay", "max_grad_norm"})],
    Clusters: [section.model_dump(mode="json") for section in (GRADIENTS, SKETCH, CLUSTERS)],
    Losses: [],
    Route: [ROUTER.model_dump(mode="json")],
}
"""What of a recipe's defaults decides a task."""


def key_of(place: Place, task: Task) -> str:
    """Sixteen hex digits of all that decides what a task comes to."""
    facts: list[Any] = [model_fingerprint(place.model), place.dtype, LORA_RANK, LORA_ALPHA, SEED, TOKENS_PER_BATCH]
    facts += DEFAULTS[type(task)]
    return hashlib.sha256(json.dumps([facts, type(task).__name__, task]).encode()).hexdigest()[:16]


def answer_of(place: Place, key: str) -> dict[str, Any] | None:
    """What a task came to; None: it was not done."""
    path = Path(place.cache) / key / RECORD
    return json.loads(path.read_text()) if path.exists() else None


def one_thread() -> None:
    """To be called first in a process of the study."""
    torch.set_num_threads(1)


def perform(place: Place, key: str, task: Task) -> dict[str, Any]:
    """Do a task, keep what it comes to, and return it."""
    folder = Path(place.cache) / key
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    began = time.perf_counter()
    match task:
        case Finetune():
            answer = _finetune(place, task, unfinished)
        case Clusters():
            answer = _clusters(place, task, unfinished)
        case Losses():
            answer = _losses(place, task)
        case Route():
            answer = _route(task)
    answer["seconds"] = time.perf_counter() - began
    (unfinished / RECORD).write_text(json.dumps(answer) + "\n")
    unfinished.replace(folder)
    return answer


def _model(place: Place, adapter: str | None) -> PeftModel:
    base = load_base(place.model, place.dtype)
    if adapter is None:
        return add_lora(base, LORA_RANK, LORA_ALPHA, "all-linear", SEED)
    return load_adapter(base, Path(place.cache) / adapter, trainable=True)


def _finetune(place: Place, task: Finetune, folder: Path) -> dict[str, Any]:
    model = _model(place, task.start)
    engine = PlainEngine(model, as_dtype(place.dtype), TRAINING.weight_decay, TRAINING.max_grad_norm)
    if task.start:
        engine.restore(load_moments(Path(place.cache) / task.start))
    made = train(
        engine,
        task.examples,
        plan_steps(len(task.examples), task.examples_per_step, 1, SEED),
        peak=task.learning_rate,
        warmup_share=0.0 if task.start else TRAINING.warmup_share,
        cosine=task.cosine,
        tokens_per_batch=TOKENS_PER_BATCH,
    )
    tokens, losses = zip(*((step.tokens, step.loss) for step in made), strict=True)
    save_adapter(model, folder)
    save_moments(engine.moments(), folder)
    return {"steps": len(losses), "tokens": sum(tokens), "losses": losses}


def _clusters(place: Place, task: Clusters, folder: Path) -> dict[str, Any]:
    adapter = Path(place.cache) / task.adapter
    engine = PerSampleGradients(
        _model(place, task.adapter),
        labels=GRADIENTS.labels,
        loss=GRADIENTS.loss,
        preconditioner=GRADIENTS.preconditioner,
        moments=load_moments(adapter) if GRADIENTS.preconditioner != "none" else None,
        compute_dtype=as_dtype(place.dtype),
        tokens_per_batch=TOKENS_PER_BATCH,
    )
    sketch = OnlineSVD(SKETCH.rank, SKETCH.shrink, oversampling=SKETCH.oversampling)
    buffer_BD = torch.empty(sketch.buffer_rows, engine.dimension)
    for start in range(0, len(task.examples), len(buffer_BD)):
        part = task.examples[start : start + len(buffer_BD)]
        sketch.update(engine.gradients(part, out=buffer_BD[: len(part)]), normalise=GRADIENTS.normalisation != "none")
    coordinates_NK = (sketch.coordinates * sketch.singular_values).numpy().astype(np.float32)
    np.save(folder / "coordinates.npy", coordinates_NK)
    labels_N, count = _labels(coordinates_NK)
    return {"labels": labels_N.tolist(), "chosen_count": count, "energy": sketch.energy.share}


def _labels(coordinates_NK: np.ndarray) -> tuple[np.ndarray, int]:
    """Clusters [N], numbered by falling size, and how many were asked for."""
    assert CLUSTERS.count == "auto"
    count, _ = choose_count(coordinates_NK, CLUSTERS.max_count, "graph", CLUSTERS.neighbours, SEED)
    labels_N = clusters_of(coordinates_NK, count, "graph", CLUSTERS.neighbours, SEED)
    return by_size(merge_small(coordinates_NK, labels_N, CLUSTERS.min_examples)), count


def _losses(place: Place, task: Losses) -> dict[str, Any]:
    model = _model(place, task.adapter)
    name = "default" if task.adapter else BASE
    nll_N1 = adapter_losses(model, [name], task.examples, TOKENS_PER_BATCH, as_dtype(place.dtype))
    return {"nll": nll_N1[:, 0].tolist()}


def _route(task: Route) -> dict[str, Any]:
    encoder = PromptEncoder(ROUTER.encoder, ROUTER.max_tokens)
    labels_N = np.array(task.labels)
    fit = fit_head(encoder.encode(task.prompts), labels_N, int(labels_N.max()) + 1, SEED)
    tested = labels_N[fit.heldout_N]
    accuracy = float((fit.heldout_logits_NK.argmax(axis=1) == tested).mean()) if len(tested) else None
    return {"labels": fit.head.logits(encoder.encode(task.asked)).argmax(axis=1).tolist(), "accuracy": accuracy}
