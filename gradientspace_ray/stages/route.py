"""The router: encode the training prompts, fit the head on their clusters, calibrate it on validation losses."""

from dataclasses import asdict
from typing import Any

import numpy as np

from gradientspace_ray.recipe import Recipe
from gradientspace_ray.registry import (
    GENERALIST,
    Adapter,
    Registry,
    TrainedExpert,
    adapter_digest,
    router_digest,
    trained_experts,
    write_registry,
)
from gradientspace_ray.router.calibration import Calibration, calibrate
from gradientspace_ray.router.classifier import (
    SETTINGS_FILE,
    HeadFit,
    RouterSettings,
    fit_head,
    save_router,
)
from gradientspace_ray.router.novelty import FALSE_ALARM_RATE, NoveltyFit, fit_novelty
from gradientspace_ray.run import RunDirectory, Summary
from gradientspace_ray.stages.encode import encodings


def router(recipe: Recipe, run: RunDirectory) -> Summary:
    """Commit `router/`, then `registry.json`.

    The head learns prompt -> cluster on the training examples; temperature and threshold come from
    `evaluation/losses.validation.parquet`; training and validation prompts say what is out of distribution.

    `threshold`, `validation_loss` and `validation_abstained` are those of the head on each conversation's own prompt,
    the view at its last turn. Evaluation and endpoints also send what is out of distribution to the generalist, and
    fold the decisions at all turns (`conversation.fold`); so their losses and shares, which `evaluation/` has, differ
    from these where either matters.
    """
    experts = trained_experts(run)
    train_NH, validation_NH = encodings(recipe, run, ("train", "validation"))
    clustered_N, labels_N = _clusters(run)
    groups = run.read_table("examples/train.parquet", ["split_key"])["split_key"].take(clustered_N).to_pylist()
    fit = fit_head(train_NH[clustered_N], labels_N, len(experts), recipe.seed)
    losses = run.read_table("evaluation/losses.validation.parquet")
    calibration = calibrate(
        fit.head.logits(validation_NH),
        np.stack([losses[f"nll/{expert.name}"].to_numpy() for expert in experts], axis=1),
        losses[f"nll/{GENERALIST}"].to_numpy(),
        fit.heldout_logits_NK,
        labels_N[fit.heldout_N],
    )
    novelty = fit_novelty(train_NH[clustered_N], labels_N, groups, validation_NH, recipe.seed)
    accuracy = _accuracy(fit, labels_N)
    settings = RouterSettings(
        encoder=recipe.router.encoder,
        view=recipe.router.view,
        max_tokens=recipe.router.max_tokens,
        labels=tuple(expert.name for expert in experts),
        temperature=calibration.temperature,
        threshold=calibration.threshold.value,
        min_similarity=novelty.min_similarity,
        calibration=_numbers(fit, accuracy, calibration, novelty),
    )
    with run.staged("router", last=SETTINGS_FILE) as folder:
        save_router(folder, fit.head, settings, novelty.sample_MH)
    write_registry(run, _registry(recipe, run, experts))
    accuracy_text = f"accuracy {accuracy:.0%} in cross-validation" if accuracy is not None else "not cross-validated"
    return Summary(
        made=f"router over {len(experts)} experts, {accuracy_text}, {_habit(settings)}",
        counts={"experts": len(experts), "accuracy": accuracy, "temperature": settings.temperature},
    )


def _habit(settings: RouterSettings) -> str:
    if settings.threshold > 1:
        return "always abstains"
    cases = [f"below {settings.threshold:.2f}"] if settings.threshold else []
    if settings.min_similarity is not None:
        cases.append("out of distribution")
    return f"abstains {' and '.join(cases)}" if cases else "never abstains"


def _clusters(run: RunDirectory) -> tuple[np.ndarray, np.ndarray]:
    """Places in `examples/train.parquet` of the examples that have a cluster, and these clusters, both [N].

    Outliers, whose cluster is -1, are left out: no expert trains on them. Examples of shards that failed, and were
    skipped, have no entry.
    """
    assignments = run.read_table("clusters/assignments.parquet").to_pydict()
    cluster_of = dict(zip(assignments["id"], assignments["cluster"], strict=True))
    ids = run.read_table("examples/train.parquet", ["id"])["id"].to_pylist()
    if strangers := cluster_of.keys() - set(ids):
        raise ValueError(
            f"clusters/assignments.parquet has {len(strangers)} examples that examples/train.parquet lacks "
            f"({min(strangers)}, ...); run the cluster stage again"
        )
    clustered = [place for place, id_ in enumerate(ids) if cluster_of.get(id_, -1) >= 0]
    return np.array(clustered, dtype=int), np.array([cluster_of[ids[place]] for place in clustered], dtype=int)


def _accuracy(fit: HeadFit, labels_N: np.ndarray) -> float | None:
    """Share of the training prompts that a head which had not seen them sends to their cluster's expert."""
    if not len(fit.heldout_N):
        return None
    return float((fit.heldout_logits_NK.argmax(axis=1) == labels_N[fit.heldout_N]).mean())


def _numbers(fit: HeadFit, accuracy: float | None, calibration: Calibration, novelty: NoveltyFit) -> dict[str, Any]:
    numbers = asdict(calibration)
    threshold = numbers.pop("threshold")
    return {
        "inverse_penalty": fit.inverse_penalty,
        "cross_validated_accuracy": accuracy,
        **numbers,
        "validation_loss": threshold["loss"],
        "validation_abstained": threshold["abstained"],
        "out_of_distribution": {
            "false_alarm_rate": FALSE_ALARM_RATE,
            "training_prompts": novelty.training_prompts,
            "training_false_alarms": novelty.training_false_alarms,
            "validation_prompts": novelty.validation_prompts,
            "validation_false_alarms": novelty.validation_false_alarms,
        },
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
