"""Adam's moments of one adapter, beside its weights: what gradients are scaled by, and what experts go on with.

`optimizer_moments.safetensors` holds float32 tensors `first.<name>` and `second.<name>`, where <name> is a LoRA
weight's name in PEFT's files, and the optimizer's settings as JSON in its metadata.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

MOMENTS_FILE = "optimizer_moments.safetensors"
FIRST, SECOND = "first.", "second."
# One key for all settings: safetensors writes several in a random order.
SETTINGS = "adam"
Decay = Annotated[float, Field(ge=0, lt=1)]
MEND = "run the warmup stage again: gradientspace run ... --again warmup"


class MomentsError(ValueError):
    """Optimizer moments that cannot be used; the message names the place and the mend in one line."""


@dataclass(frozen=True, eq=False)
class AdamMoments:
    """State of Adam, or AdamW, after its last step: running averages of one adapter's gradients, and its settings."""

    first: Mapping[str, torch.Tensor]
    """m: LoRA weight's name in PEFT's files -> float32, of the weight's shape; biased towards zero as Adam keeps it."""
    second: Mapping[str, torch.Tensor]
    """v: the same of the squared gradients."""
    step: int
    """t: steps taken."""
    betas: tuple[float, float]
    """Decay of the first and of the second average."""
    eps: float


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    step: Annotated[int, Field(ge=0)]
    betas: tuple[Decay, Decay]
    eps: Annotated[float, Field(gt=0)]


def save_moments(moments: AdamMoments, folder: Path) -> None:
    """Write `optimizer_moments.safetensors`; equal moments give equal bytes.

    Args:
        moments: no two tensors share memory.
        folder: made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = ((FIRST, moments.first), (SECOND, moments.second))
    tensors = {
        prefix + name: tensor.to("cpu", torch.float32).contiguous()
        for prefix, part in parts
        for name, tensor in part.items()
    }
    settings = _Settings(step=moments.step, betas=moments.betas, eps=moments.eps)
    save_file(tensors, folder / MOMENTS_FILE, metadata={SETTINGS: settings.model_dump_json()})


def load_moments(folder: Path) -> AdamMoments:
    """Read the moments beside an adapter, onto the CPU.

    Raises:
        MomentsError: the file is missing, damaged, or of another kind.
    """
    path = _existing(folder)
    try:
        with safe_open(path, framework="pt") as file:
            settings = _Settings.model_validate_json((file.metadata() or {}).get(SETTINGS, ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValidationError) as error:
        raise MomentsError(f"{path}: not an optimizer's moments ({_reason(error)}); {MEND}") from error
    first, second = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (FIRST, SECOND)
    )
    shapes = [{name: tensor.shape for name, tensor in part.items()} for part in (first, second)]
    is_float32 = all(tensor.dtype == torch.float32 for tensor in tensors.values())
    if shapes[0] != shapes[1] or len(first) + len(second) != len(tensors) or not is_float32:
        raise MomentsError(f"{path}: not two float32 moments of every weight; {MEND}")
    return AdamMoments(first, second, settings.step, settings.betas, settings.eps)


def moments_digest(folder: Path) -> str:
    """Twelve hex digits of the SHA-256 of the moments beside an adapter.

    Raises:
        MomentsError: the file is missing.
    """
    return hashlib.sha256(_existing(folder).read_bytes()).hexdigest()[:12]


def _existing(folder: Path) -> Path:
    path = folder / MOMENTS_FILE
    if not path.is_file():
        raise MomentsError(f"{path} is missing, which gradients are scaled by and experts begin with; {MEND}")
    return path


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return "".join(f"{part}: " for part in first["loc"]) + first["msg"]
    return str(error).splitlines()[0]
