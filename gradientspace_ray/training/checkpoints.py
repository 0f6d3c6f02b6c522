"""What a finetune leaves: a PEFT folder, and `training.json` beside the adapter."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict

from gradientspace_ray.models.loading import save_adapter
from gradientspace_ray.training.loop import TrainingError

RECORD_FILE = "training.json"


class TrainingRecord(BaseModel):
    """How an adapter was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: str
    """Digest of everything that decides the adapter: recipe parts, examples, the adapter it started from."""
    name: str
    cluster: int | None = None
    """The cluster that it was trained on; None is the whole mixture."""
    examples: int
    tokens: int
    """Tokens seen in training, prompts included."""
    steps: int
    seconds: float
    workers: int
    zero_stage: int
    """As the engine reports it."""
    losses: list[float]
    """Mean loss of each step, nats per label token."""


class Committed(NamedTuple):
    """An adapter that is in the run directory."""

    folder: str
    digest: str
    """Of the adapter's files, as they are there."""
    record: TrainingRecord


def save(model: PeftModel, record: TrainingRecord, folder: Path) -> None:
    """Write adapter and record into a local folder.

    Args:
        model: its trainable weights are whole on this worker (ZeRO 3 gathers them first).
        record: written as `training.json`.
        folder: made if missing.

    Raises:
        TrainingError: a weight is not finite.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise TrainingError(f"{name} is not finite after {record.steps} steps; lower learning_rate")
    save_adapter(model, folder)
    (folder / RECORD_FILE).write_text(json.dumps(record.model_dump(mode="json"), indent=2) + "\n")
