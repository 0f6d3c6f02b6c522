"""Where a finetune stands: what a checkpoint holds, so that one who goes on from it does what an undisturbed one does.

A checkpoint is a folder of two files: `state.safetensors`, with the adapter, both moments of Adam and the best weights
so far, with their moments where these are kept; and `state.json`, which is written last. The base model is never in it,
nor is a worker's part: whole tensors fit any number of workers and any ZeRO stage. The learning rate, the order of the
examples and the random numbers follow from the number of steps made; see `loop.train`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gradientspace_ray.models.moments import AdamMoments

STATE_FILE, TENSORS_FILE = "state.json", "state.safetensors"
WEIGHTS, FIRST, SECOND, BEST = "weights.", "first.", "second.", "best."
BEST_FIRST, BEST_SECOND = "best_first.", "best_second."


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why in one line."""


@dataclass(frozen=True, eq=False)
class TrainingState:
    """A finetune after some of its steps."""

    losses: tuple[float, ...]
    """Mean loss of each step made, before its update, nats per label token."""
    heldout: tuple[tuple[int, float], ...]
    """(steps made, loss of the held-out part there)."""
    seconds: float
    """From the first step to this one, held-out losses and checkpoints among them."""
    weights: Mapping[str, torch.Tensor]
    """LoRA weight's name in PEFT's files -> float32 on the CPU."""
    moments: AdamMoments
    best: Mapping[str, torch.Tensor] | None
    """The weights of the lowest held-out loss."""
    best_moments: AdamMoments | None = None
    """Theirs, where they are kept."""

    @property
    def step(self) -> int:
        """Steps made."""
        return len(self.losses)

    @property
    def best_step(self) -> int | None:
        """Steps made when the held-out loss was lowest; None without a held-out part."""
        return min(self.heldout, key=lambda found: found[1])[0] if self.heldout else None


class _StateFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    losses: tuple[float, ...]
    heldout: tuple[tuple[int, float], ...]
    seconds: float
    adam_step: int
    betas: tuple[float, float]
    eps: float
    best_adam_step: int | None
    sha256: str


def save_state(state: TrainingState, folder: Path) -> None:
    """Write a checkpoint into a local folder, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {WEIGHTS: state.weights, FIRST: state.moments.first, SECOND: state.moments.second, BEST: state.best or {}}
    if state.best_moments:
        parts |= {BEST_FIRST: state.best_moments.first, BEST_SECOND: state.best_moments.second}
    tensors = {prefix + name: value.contiguous() for prefix, part in parts.items() for name, value in part.items()}
    save_file(tensors, folder / TENSORS_FILE)
    written = _StateFile(
        losses=state.losses,
        heldout=state.heldout,
        seconds=state.seconds,
        adam_step=state.moments.step,
        betas=state.moments.betas,
        eps=state.moments.eps,
        best_adam_step=state.best_moments.step if state.best_moments else None,
        sha256=_sha256(folder / TENSORS_FILE),
    )
    (folder / STATE_FILE).write_text(written.model_dump_json() + "\n")


def load_state(folder: Path) -> TrainingState:
    """Read a checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged, or of another version.
    """
    try:
        written = _StateFile.model_validate_json((folder / STATE_FILE).read_bytes())
        if _sha256(folder / TENSORS_FILE) != written.sha256:
            raise CheckpointError(f"{folder / TENSORS_FILE} is damaged: its checksum is another")
        tensors = load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError, ValidationError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint ({str(error).splitlines()[0]})") from error
    weights, first, second, best, best_first, best_second = (
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in (WEIGHTS, FIRST, SECOND, BEST, BEST_FIRST, BEST_SECOND)
    )
    moments = AdamMoments(first, second, written.adam_step, written.betas, written.eps)
    best_moments = None
    if written.best_adam_step is not None:
        best_moments = AdamMoments(best_first, best_second, written.best_adam_step, written.betas, written.eps)
    return TrainingState(written.losses, written.heldout, written.seconds, weights, moments, best or None, best_moments)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
