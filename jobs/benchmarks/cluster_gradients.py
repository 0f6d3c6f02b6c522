"""Gradients of labelled examples at a warmed-up adapter, and the products of all pairs of them.

A pass writes the gradients of all examples to a file and reads it in blocks of columns. The products decide all that is
studied: the exact SVD, the online one and random projections by normal numbers (these in law) depend on gradients by
inner products alone, so rows that have the same ones, as those of `coordinates_of_products` in N dimensions instead of
D, give the same.

Shapes: N examples, D LoRA weights, C columns of a block, K coordinates.
"""

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gradient_task import LORA_ALPHA, LORA_RANK, SEED, LabelledExample
from peft import PeftModel
from sketch_methods import RowFile

from gradientspace_ray.examples.packing import Example, pack, plan_batches
from gradientspace_ray.gradients.layout import Column
from gradientspace_ray.gradients.per_sample import LabelPolicy, PerSampleGradients
from gradientspace_ray.gradients.preconditioner import Kind, Preconditioner
from gradientspace_ray.models.losses import example_nll, label_nll
from gradientspace_ray.models.moments import AdamMoments

BATCH, LEARNING_RATE, MAX_GRAD_NORM = 8, 5e-4, 1.0
TOKENS_PER_BATCH, ROWS_AT_ONCE = 512, 64
PRECONDITIONERS: tuple[Kind, ...] = ("adam", "less")
Tell = Callable[[str], None]


FACTS = {"lora": [LORA_RANK, LORA_ALPHA], "seed": SEED, "batch": BATCH, "learning_rate": LEARNING_RATE}
FACTS |= {"max_grad_norm": MAX_GRAD_NORM}
"""What decides the products, beside the model, the examples and the pass."""


class Pass(NamedTuple):
    """Whose gradients are taken."""

    warm_up_steps: int
    labels: LabelPolicy

    def __str__(self) -> str:
        return f"{self.labels} after {self.warm_up_steps} steps"


def warmed_up(
    model: PeftModel, examples: Sequence[Example], marks: Sequence[int], dtype: torch.dtype, tell: Tell
) -> Iterator[tuple[int, AdamMoments]]:
    """Train the adapter on the examples, at a constant learning rate, and stop at each mark.

    Yields:
        (steps made, Adam's moments there); the model stands at this step until the next is asked for.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, weight_decay=0.0)
    draw, order, losses = random.Random(SEED), list[int](), list[float]()
    for step in range(1, max(marks) + 1):
        if len(order) < BATCH:
            order += draw.sample(range(len(examples)), len(examples))
        batch, order = [examples[index] for index in order[:BATCH]], order[BATCH:]
        total = 0.0
        for rows in plan_batches([len(ids) for ids, _ in batch], TOKENS_PER_BATCH):
            packed = pack([batch[row] for row in rows])
            nll_L = label_nll(model, packed, dtype)
            loss = example_nll(nll_L, packed.label_examples, len(rows), "mean").sum() / len(batch)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(weights.values(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if step in marks:
            tell(f"warm-up: {step} steps, loss {np.mean(losses[:8]):.3f} at first, {np.mean(losses[-8:]):.3f} at last")
            yield step, _moments(optimizer, weights)


def _moments(optimizer: torch.optim.AdamW, weights: Mapping[str, torch.nn.Parameter]) -> AdamMoments:
    states = {name.replace(".default.", "."): optimizer.state[weight] for name, weight in weights.items()}
    settings = optimizer.param_groups[0]
    return AdamMoments(
        first={name: state["exp_avg"].clone() for name, state in states.items()},
        second={name: state["exp_avg_sq"].clone() for name, state in states.items()},
        step=int(next(iter(states.values()))["step"]),
        betas=settings["betas"],
        eps=settings["eps"],
    )


def products_of_pass(
    model: PeftModel,
    labelled: Sequence[LabelledExample],
    labels: LabelPolicy,
    moments: AdamMoments,
    dtype: torch.dtype,
    scratch: Path,
    tell: Tell,
) -> dict[str, np.ndarray]:
    """Inner products of all pairs of gradients, [N, N] float32 by name.

    `<attention or mlp>.<early, middle or late>.<A or B>` are of some of the columns, and add up to all; `module` of
    gradients whose layers all have one length; `adam` and `less` of those scaled by the warm-up's optimizer. Beside
    them, `dimension` is D.
    """
    engine = PerSampleGradients(model, compute_dtype=dtype, labels=labels, tokens_per_batch=TOKENS_PER_BATCH)
    with tempfile.TemporaryDirectory(prefix="gradients-", dir=scratch) as folder:
        path = Path(folder) / "gradients.f32"
        buffer_BD = torch.empty(ROWS_AT_ONCE, engine.dimension)
        with path.open("wb") as file:
            for start in range(0, len(labelled), ROWS_AT_ONCE):
                part = [row.example for row in labelled[start : start + ROWS_AT_ONCE]]
                file.write(engine.gradients(part, out=buffer_BD[: len(part)]).numpy().data)
                tell(f"{labels}: {start + len(part)} of {len(labelled)} gradients")
        products = _products(RowFile(str(path), len(labelled), engine.dimension), engine.columns, moments)
    found = {name: product_NN.float().numpy() for name, product_NN in products.items()}
    return found | {"dimension": np.array(engine.dimension)}


def _products(file: RowFile, columns: Sequence[Column], moments: AdamMoments) -> dict[str, torch.Tensor]:
    """[N, N] float64 of the plain gradients by part, and of the whole with layers alike or columns preconditioned."""
    products: dict[str, torch.Tensor] = {}

    def add(name: str, values_NC: torch.Tensor) -> None:
        products[name] = products.get(name, 0) + (values_NC @ values_NC.T).double()

    layers = 1 + max(_layer(column) for column in columns)
    # The A and B of one module stand side by side.
    for factor_a, factor_b in zip(columns[::2], columns[1::2], strict=True):
        end = factor_b.offset + factor_b.shape[0] * factor_b.shape[1]
        plain_NC = file.columns(slice(factor_a.offset, end))
        border = factor_b.offset - factor_a.offset
        depth = ("early", "middle", "late")[3 * _layer(factor_a) // layers]
        kind = "attention" if "attn" in factor_a.name or "attention" in factor_a.name else "mlp"
        for factor, values_NC in (("A", plain_NC[:, :border]), ("B", plain_NC[:, border:])):
            add(f"{kind}.{depth}.{factor}", values_NC)
        norms_N1 = plain_NC.norm(dim=1, keepdim=True)
        add("module", plain_NC / norms_N1.clamp(min=torch.finfo(torch.float32).tiny))
        own = [column._replace(offset=column.offset - factor_a.offset) for column in (factor_a, factor_b)]
        names = {column.name for column in own}
        parts = [{name: part[name] for name in names} for part in (moments.first, moments.second)]
        for preconditioner in PRECONDITIONERS:
            scaled_NC = plain_NC.clone()
            own_moments = AdamMoments(*parts, moments.step, moments.betas, moments.eps)
            Preconditioner(preconditioner, own_moments, own).apply(scaled_NC)
            add(preconditioner, scaled_NC)
    return products


def _layer(column: Column) -> int:
    """Number of the transformer block that a weight is in; 0 where its name has none."""
    return next((int(part) for part in column.name.split(".") if part.isdecimal()), 0)


def coordinates_of_products(product_NN: np.ndarray, rank: int | None = None, unit: bool = True) -> np.ndarray:
    """Coordinates [N, K] float32 of gradients by an exact SVD, from the products of all pairs.

    Args:
        product_NN: inner products.
        rank: K; None keeps all, and with them all inner products.
        unit: of the gradients scaled to unit length, else of the gradients as they are.
    """
    product_NN = product_NN.astype(np.float64)
    norms_N = np.sqrt(np.maximum(product_NN.diagonal(), 0))
    scale_N = np.divide(1.0, norms_N, out=np.zeros_like(norms_N), where=norms_N > 0)
    values_N, vectors_NN = np.linalg.eigh(product_NN * np.outer(scale_N, scale_N) if unit else product_NN)
    return (vectors_NN[:, ::-1] * np.sqrt(np.maximum(values_N[::-1], 0)))[:, :rank].astype(np.float32)
