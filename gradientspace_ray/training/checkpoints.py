"""What a finetune starts from, and what it leaves: a PEFT folder with `training.json`, and Adam's moments if wanted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict

from gradientspace_ray.models.loading import add_lora, load_adapter, load_base, save_adapter
from gradientspace_ray.models.moments import AdamMoments, save_moments
from gradientspace_ray.recipe import LoraSection, ModelSection
from gradientspace_ray.training.engine import TrainingError

RECORD_FILE = "training.json"


class TrainingRecord(BaseModel):
    """How an adapter was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: str
    """Digest of everything that decides the adapter: recipe parts, examples, the finetune that it continues."""
    name: str
    cluster: int | None = None
    """The cluster that it was trained on; None is the whole mixture."""
    examples: int
    heldout_examples: int = 0
    """Of the finetune's own, not trained on."""
    tokens: int
    """Tokens seen in training, prompts included."""
    steps: int
    seconds: float
    """From the first step to the last, held-out losses and checkpoints among them; of all tries, up to the checkpoint
    that the next one went on from."""
    workers: int
    zero_stage: int
    """As the engine reports it."""
    losses: list[float]
    """Mean loss of each step, nats per label token."""
    heldout: list[tuple[int, float]] = []
    """(steps made, loss of the held-out part)."""
    best_step: int | None = None
    """Steps made by the weights that were kept, those of the lowest held-out loss; None where they are the last."""


class Committed(NamedTuple):
    """An adapter that is in the run directory."""

    folder: str
    digest: str
    """Of the adapter's files, as they are there."""
    record: TrainingRecord


def load(model: ModelSection, lora: LoraSection, seed: int, start: Path | None, device: torch.device) -> PeftModel:
    """The base model with the adapter to train: a fresh one, or, continued, that of the PEFT folder `start`."""
    base = load_base(model.name, model.dtype, device, model.quantization, model.compute_dtype)
    if start:
        return load_adapter(base, start, trainable=True)
    return add_lora(base, lora.rank, lora.alpha, lora.target_modules, seed)


def save(
    model: PeftModel,
    weights: Mapping[str, torch.Tensor],
    record: TrainingRecord,
    folder: Path,
    moments: AdamMoments | None = None,
) -> None:
    """Write adapter and record, and moments if given, into a local folder.

    Args:
        model: whose adapter it is; its own weights are not read.
        weights: name in PEFT's files -> float32 on the CPU.
        record: written as `training.json`.
        folder: made if missing.
        moments: of the optimizer.

    Raises:
        TrainingError: a weight is not finite.
    """
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise TrainingError(f"{name} is not finite after {record.steps} steps; lower learning_rate")
    save_adapter(model, folder, weights=weights)
    if moments:
        save_moments(moments, folder)
    (folder / RECORD_FILE).write_text(json.dumps(record.model_dump(mode="json"), indent=2) + "\n")
