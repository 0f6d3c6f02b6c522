"""What a finetune starts from, and what it leaves: a PEFT folder with `training.json`, and Adam's moments if wanted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict
from torch import nn

from gradientspace_ray.models.loading import add_lora, load_adapter, load_base, save_adapter
from gradientspace_ray.models.moments import AdamMoments, save_moments
from gradientspace_ray.recipe import LoraSection, ModelSection
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


def load(model: ModelSection, lora: LoraSection, seed: int, start: Path | None, device: torch.device) -> PeftModel:
    """The base model with the adapter to train: a fresh one, or, continued, that of the PEFT folder `start`."""
    base = load_base(model.name, model.dtype, device)
    if start:
        return load_adapter(base, start, trainable=True)
    return add_lora(base, lora.rank, lora.alpha, lora.target_modules, seed)


def gather_moments(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    full_state: Callable[[nn.Parameter, str], torch.Tensor | None],
    adapter: str = "default",
) -> AdamMoments:
    """Adam's moments of every trainable weight, whole, on the CPU. All workers call it: they meet in `full_state`.

    Args:
        model: the adapted model.
        optimizer: the Adam or AdamW that has stepped the weights, or this worker's parts of them; of one group.
        full_state: (weight, key of its state) -> the state of the whole weight on every worker, or None where the
            optimizer itself holds it; of DeepSpeed, `deepspeed.utils.safe_get_full_optimizer_state`.
        adapter: name of the adapter that was trained.
    """
    moments: dict[str, dict[str, torch.Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if not name.endswith(f".{adapter}.weight"):
            raise TrainingError(f"{name} is trained, but is no weight of adapter {adapter!r}; freeze it")
        for key, part in moments.items():
            state = full_state(weight, key)
            state = optimizer.state[weight][key] if state is None else state
            part[name.removesuffix(f".{adapter}.weight") + ".weight"] = state.detach().to("cpu", torch.float32)
    group = optimizer.param_groups[0]
    # All weights, and parts of weights, are stepped together: the counts agree.
    step = max(int(state["step"]) for state in optimizer.state.values())
    return AdamMoments(moments["exp_avg"], moments["exp_avg_sq"], step, tuple(group["betas"]), group["eps"])


def save(model: PeftModel, record: TrainingRecord, folder: Path, moments: AdamMoments | None = None) -> None:
    """Write adapter and record, and moments if given, into a local folder.

    Args:
        model: its trainable weights are whole on this worker (ZeRO 3 gathers them first).
        record: written as `training.json`.
        folder: made if missing.
        moments: see `gather_moments`.

    Raises:
        TrainingError: a weight is not finite.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise TrainingError(f"{name} is not finite after {record.steps} steps; lower learning_rate")
    save_adapter(model, folder)
    if moments:
        save_moments(moments, folder)
    (folder / RECORD_FILE).write_text(json.dumps(record.model_dump(mode="json"), indent=2) + "\n")
