"""The router: encode the training prompts, fit the head on their clusters, calibrate it on validation losses."""

from dataclasses import asdict
from typing import Any

import numpy as np
import ray

from gradientspace_ray.recipe import Recipe
from gradientspace_ray.registry import (
    GENERALIST,
    Adapter,
    Registry,
    TrainedExpert,
    adapter_digest,
    trained_experts,
    write_registry,
)
from gradientspace_ray.router.calibration import Calibration, calibrate
from gradientspace_ray.router.classifier import (
    SETTINGS_FILE,
    HeadFit,
    RouterSettings,
    fit_head,
    router_digest,
    save_router,
)
from gradientspace_ray.router.encoder import PromptEncoder
from gradientspace_ray.run import RunDirectory, Summary
from gradientspace_ray.stages.progress import watched_board

PROMPTS_PER_UPDATE = 64


def router(recipe: Recipe, run: RunDirectory) -> Summary:
    """Commit `router/`, then `registry.json`.

    The head learns prompt -> cluster on the training examples; temperature and threshold come from
    `evaluation/losses.validation.parquet`.
    """
    experts = trained_experts(run)
    train_NH, validation_NH = _encodings(recipe, run)
    clustered_N, labels_N = _clusters(run)
    fit = fit_head(train_NH[clustered_N], labels_N, len(experts), recipe.seed)
    losses = run.read_table("evaluation/losses.validation.parquet")
    calibration = calibrate(
        fit.head.logits(validation_NH),
        np.stack([losses[f"nll/{expert.name}"].to_numpy() for expert in experts], axis=1),
        losses[f"nll/{GENERALIST}"].to_numpy(),
        fit.heldout_logits_NK,
        labels_N[fit.heldout_N],
    )
    accuracy = _accuracy(fit, labels_N)
    settings = RouterSettings(
        encoder=recipe.router.encoder,
        view=recipe.router.view,
        max_tokens=recipe.router.max_tokens,
        labels=tuple(expert.name for expert in experts),
        temperature=calibration.temperature,
        threshold=calibration.threshold.value,
        calibration=_numbers(fit, accuracy, calibration),
    )
    with run.staged("router", last=SETTINGS_FILE) as folder:
        save_router(folder, fit.head, settings)
    write_registry(run, _registry(recipe, run, experts))
    accuracy_text = f"accuracy {accuracy:.0%} in cross-validation" if accuracy is not None else "not cross-validated"
    return Summary(
        made=f"router over {len(experts)} experts, {accuracy_text}, {_habit(settings.threshold)}",
        counts={"experts": len(experts), "accuracy": accuracy, "temperature": settings.temperature},
    )


def _habit(threshold: float) -> str:
    if not threshold:
        return "never abstains"
    return f"abstains below {threshold:.2f}" if threshold <= 1 else "always abstains"


def _encodings(recipe: Recipe, run: RunDirectory) -> tuple[np.ndarray, np.ndarray]:
    """[N, H] encodings of the training prompts and of the validation prompts, made by the workers."""
    counts = {split: run.read_table(f"examples/{split}.parquet", ["id"]).num_rows for split in ("train", "validation")}
    task = _encode.options(
        num_cpus=recipe.compute.cpus_per_worker,
        num_gpus=recipe.compute.gpus_per_worker,
        max_retries=recipe.compute.retries,
        retry_exceptions=[OSError],
    )
    total = sum(counts.values())
    workers = max(1, min(recipe.evaluate.workers, total))
    with watched_board() as board:
        borders = np.linspace(0, total, workers + 1).astype(int).tolist()
        lines = [f"encoding prompts {i + 1}/{workers}" for i in range(workers)]
        running = [
            task.remote(recipe, run.uri, start, stop, board, line)
            for start, stop, line in zip(borders, borders[1:], lines, strict=False)
        ]
        encodings_NH = np.concatenate(ray.get(running))
    return encodings_NH[: counts["train"]], encodings_NH[counts["train"] :]


@ray.remote
def _encode(recipe: Recipe, run_uri: str, start: int, stop: int, board: Any, line: str) -> np.ndarray:
    """Encodings of prompts `start` to `stop`, counted over the training examples and then the validation examples."""
    run = RunDirectory(run_uri)
    prompts = [
        prompt
        for split in ("train", "validation")
        for prompt in run.read_table(f"examples/{split}.parquet", ["prompt"])["prompt"].to_pylist()
    ][start:stop]
    board.report.remote(line, 0, len(prompts), "loading")
    encoder = PromptEncoder(recipe.router.encoder, recipe.router.max_tokens, recipe.compute.device)
    chunks = [np.zeros((0, encoder.width), np.float32)]
    for first in range(0, len(prompts), PROMPTS_PER_UPDATE):
        chunk = prompts[first : first + PROMPTS_PER_UPDATE]
        chunks.append(encoder.encode(chunk))
        board.report.remote(line, first + len(chunk), len(prompts))
    return np.concatenate(chunks)


def _clusters(run: RunDirectory) -> tuple[np.ndarray, np.ndarray]:
    """Places in `examples/train.parquet` of the examples that have a cluster, and these clusters, both [N].

    Examples of shards that failed, and were skipped, have none.
    """
    assignments = run.read_table("clusters/assignments.parquet").to_pydict()
    cluster_of = dict(zip(assignments["id"], assignments["cluster"], strict=True))
    ids = run.read_table("examples/train.parquet", ["id"])["id"].to_pylist()
    if strangers := cluster_of.keys() - set(ids):
        raise ValueError(
            f"clusters/assignments.parquet has {len(strangers)} examples that examples/train.parquet lacks "
            f"({min(strangers)}, ...); run the cluster stage again"
        )
    clustered = [place for place, id_ in enumerate(ids) if id_ in cluster_of]
    return np.array(clustered, dtype=int), np.array([cluster_of[ids[place]] for place in clustered], dtype=int)


def _accuracy(fit: HeadFit, labels_N: np.ndarray) -> float | None:
    """Share of the training prompts that a head which had not seen them sends to their cluster's expert."""
    if not len(fit.heldout_N):
        return None
    return float((fit.heldout_logits_NK.argmax(axis=1) == labels_N[fit.heldout_N]).mean())


def _numbers(fit: HeadFit, accuracy: float | None, calibration: Calibration) -> dict[str, Any]:
    numbers = asdict(calibration)
    threshold = numbers.pop("threshold")
    return {
        "inverse_penalty": fit.inverse_penalty,
        "cross_validated_accuracy": accuracy,
        **numbers,
        "validation_loss": threshold["loss"],
        "validation_abstained": threshold["abstained"],
    }


def _registry(recipe: Recipe, run: RunDirectory, experts: list[TrainedExpert]) -> Registry:
    terms = run.read_json("clusters/quality.json").get("terms", [])
    generalist = Adapter(
        name=GENERALIST,
        digest=adapter_digest(run.fetch(GENERALIST)),
        folder=GENERALIST,
        title="the whole mixture",
        examples=run.read_table("examples/train.parquet", ["id"]).num_rows,
    )
    return Registry(
        base_model=recipe.model.name,
        dtype=recipe.model.dtype,
        compute_dtype=recipe.model.compute_dtype,
        max_tokens=recipe.data.max_tokens,
        generalist=generalist,
        experts=tuple(
            Adapter(
                name=expert.name,
                digest=adapter_digest(run.fetch(expert.folder)),
                folder=expert.folder,
                title=", ".join(terms[expert.cluster]) if expert.cluster < len(terms) else "",
                examples=expert.examples,
            )
            for expert in experts
        ),
        router_digest=router_digest(run.fetch("router")),
    )
