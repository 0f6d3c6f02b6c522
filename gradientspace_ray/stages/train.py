"""The finetunes: the generalist (warmup), the experts, and the single LoRA. One loop trains all of them."""

import hashlib
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray

from gradientspace_ray.models.fingerprint import model_fingerprint
from gradientspace_ray.models.loading import hidden_size
from gradientspace_ray.models.merging import write_merged
from gradientspace_ray.models.moments import MOMENTS_FILE
from gradientspace_ray.recipe import BudgetSection, ExpertsSection, Recipe, RecipeError, TrainingSection
from gradientspace_ray.registry import committed_digest
from gradientspace_ray.run import RunDirectory, Summary, digest_of
from gradientspace_ray.stages.deepspeed_engine import configuration
from gradientspace_ray.stages.finetune_worker import (
    EVENTS,
    EXPERTS,
    ORDER_PURPOSE,
    Finetune,
    examples_of,
)
from gradientspace_ray.stages.finetunes import check_room, train_missing
from gradientspace_ray.training.budget import (
    TrainingSettings,
    cosine_of,
    experts_settings,
    one_expert,
    single_lora_settings,
    warmup_settings,
)
from gradientspace_ray.training.checkpoints import RECORD_FILE, Committed
from gradientspace_ray.training.schedule import lora_rate, plan_steps
from gradientspace_ray.training.tracking import check_trackers

QUALITY = "clusters/quality.json"
GENERALIST, SINGLE_LORA, MERGED = "generalist", "single_lora", "merged"
# What changes how a finetune is computed, and its result by rounding at most: not what it is.
SPEED_SETTINGS = {"workers", "zero_stage", "offload", "checkpointing", "tokens_per_batch", "checkpoint_every"}
NOT_IN_KEY = SPEED_SETTINGS | {"max_concurrent", "merge", "start", "min_steps"}


def check(recipe: Recipe) -> None:
    """Refuse what would fail, or mean nothing, when the hours before it are spent.

    Raises:
        RecipeError: two keys contradict each other.
        TrackerError: a tracker is not installed.
    """
    for name, section in (("warmup", recipe.warmup), ("experts", recipe.experts)):
        configuration(section, name)
        if section.workers > section.examples_per_step:
            raise RecipeError(
                f"{name}.workers {section.workers} would share {section.examples_per_step} examples in a step; "
                f"lower it, or raise {name}.examples_per_step"
            )
        if section.workers > 1 and recipe.compute.device == "cuda" and recipe.compute.gpus_per_worker != 1:
            raise RecipeError(
                f"{name}.workers above 1 need compute.gpus_per_worker 1: DeepSpeed gives each its own GPU"
            )
    baseline = recipe.single_lora
    if baseline.train and baseline.start == "generalist" and recipe.experts.start == "fresh":
        raise RecipeError("single_lora.start generalist would have tokens that experts.start fresh has not; give fresh")
    if recipe.budget.tokens is None and recipe.budget != BudgetSection():
        raise RecipeError("budget.generalist_share needs budget.tokens; or set warmup.epochs and experts.epochs")
    check_trackers(recipe.trackers)


def with_learning_rate(recipe: Recipe) -> Recipe:
    """The recipe with a learning rate for the generalist where it leaves that to the model.

    Raises:
        ModelError: the model cannot be found.
    """
    if recipe.warmup.learning_rate is not None:
        return recipe
    # Two digits are all that it means, and what recipe.yaml shows.
    rate = float(f"{lora_rate(hidden_size(recipe.model.name), recipe.warmup.examples_per_step):.2g}")
    return recipe.model_copy(update={"warmup": recipe.warmup.model_copy(update={"learning_rate": rate})})


def warmup(recipe: Recipe, run: RunDirectory) -> Summary:
    """Train the generalist on the training split, but for what is held out, and commit it as `generalist/`.

    Raises:
        TrainingError: the finetune failed, or this machine can hold no finetune, or no expert's.
    """
    check_room(recipe, "warmup", "experts")
    finetune = plan_generalist(recipe, run)
    made = train_missing(recipe, run, [finetune], 1)[GENERALIST]
    record = made.record
    return Summary(
        made=f"generalist from {record.examples} examples, loss {record.losses[0]:.2f} to {record.losses[-1]:.2f}",
        counts={"examples": record.examples, "steps": record.steps, "tokens": record.tokens},
        # The moments decide what gradients are scaled by, and what experts begin with.
        output=digest_of(_origin(run, GENERALIST)),
    )


def experts(recipe: Recipe, run: RunDirectory) -> Summary:
    """Train an adapter on every cluster, and one on all of them together, the single LoRA.

    Commits `experts/<name>@<digest>/` and `single_lora/`, and `merged/<name>@<digest>/` where the recipe asks for it.
    What another recipe or clustering left there is removed.

    Raises:
        TrainingError: a finetune failed, and the others are committed; or this machine can hold none.
    """
    check_room(recipe, "experts")
    made = train_missing(recipe, run, plan_experts(recipe, run), recipe.experts.max_concurrent)
    folders = {adapter.folder for adapter in made.values()}
    for folder in [*(f"{EXPERTS}/{name}" for name in run.names(EXPERTS)), SINGLE_LORA]:
        if folder not in folders:
            run.delete(folder)
    run.delete(*(f"{EVENTS}/{name}" for name in run.names(EVENTS) if name not in {GENERALIST, *made}))
    merged = _merge(recipe, run, [adapter for name, adapter in made.items() if name != SINGLE_LORA])
    records = {name: adapter.record for name, adapter in made.items() if name != SINGLE_LORA}
    baseline = " and the single LoRA" if recipe.single_lora.train else ""
    whole = [name for name, record in records.items() if not record.heldout_examples]
    unwatched = f"; too small for a held-out part: {', '.join(whole)}" if whole and recipe.experts.heldout_share else ""
    return Summary(
        made=f"{len(records)} experts{baseline}: {', '.join(records)}{unwatched}",
        counts={
            "experts": len(records),
            "steps": sum(record.steps for record in records.values()),
            "tokens": sum(record.tokens for record in records.values()),
        },
        output=digest_of({adapter.folder: adapter.digest for adapter in made.values()}),
        outputs=tuple(sorted({*folders, *merged})),
    )


def plan_generalist(recipe: Recipe, run: RunDirectory) -> Finetune:
    """The warm-up's finetune."""
    settings = warmup_settings(recipe.warmup, recipe.budget, _tokens(recipe, run, "warmup"))
    return _plan(recipe, run, GENERALIST, "warmup", settings, (0.0, settings.cosine_share))


def plan_experts(recipe: Recipe, run: RunDirectory) -> list[Finetune]:
    """A finetune for each cluster, and the baseline's."""
    names = run.read_json(QUALITY)["names"]
    tokens = _tokens(recipe, run, "experts")
    settings = experts_settings(recipe.experts, recipe.warmup, recipe.budget, tokens)
    cosine, origin = cosine_of(settings.start, recipe.warmup), _origin(run, settings.start)
    finetunes = [
        _plan(recipe, run, name, "experts", settings, cosine, origin, cluster) for cluster, name in enumerate(names)
    ]
    if recipe.single_lora.train:
        shared = 0 if settings.start == "fresh" else run.read_json(f"{GENERALIST}/{RECORD_FILE}")["tokens"]
        baseline = single_lora_settings(recipe.single_lora, recipe.warmup, settings, shared, tokens)
        cosine, origin = cosine_of(recipe.single_lora.start, recipe.warmup), _origin(run, recipe.single_lora.start)
        finetunes.append(_plan(recipe, run, SINGLE_LORA, "experts", baseline, cosine, origin))
    return finetunes


def _origin(run: RunDirectory, start: str) -> list[str] | None:
    """Digests of the weights and moments that a finetune with this `start` continues; None is a fresh adapter."""
    if start != GENERALIST:
        return None
    # Not from a copy that this process may have fetched before.
    moments = hashlib.sha256(run.read_bytes(f"{GENERALIST}/{MOMENTS_FILE}"))
    return [committed_digest(run, GENERALIST), moments.hexdigest()]


def _tokens(recipe: Recipe, run: RunDirectory, section: str) -> int:
    """Of one pass over the examples of all finetunes of a section."""
    table = examples_of(recipe, run, section, None, ["tokens"])[0]
    tokens: int = pc.sum(table["tokens"]).as_py()
    return tokens


def _plan(
    recipe: Recipe,
    run: RunDirectory,
    name: str,
    section: Literal["warmup", "experts"],
    settings: TrainingSection,
    cosine: tuple[float, float],
    origin: list[str] | None = None,
    cluster: int | None = None,
) -> Finetune:
    table, heldout = examples_of(recipe, run, section, cluster, ["id", "tokens", "input_ids", "labels"])
    if cluster is not None and isinstance(settings, ExpertsSection):
        settings = one_expert(settings, table.num_rows)
    tokens = table["tokens"].to_pylist()
    seed = [recipe.seed, ORDER_PURPOSE[section]]
    steps = plan_steps(len(tokens), settings.examples_per_step, settings.epochs, seed, tokens)
    key = {
        "name": name,
        "seed": recipe.seed,
        "model": [recipe.model.model_dump(mode="json"), model_fingerprint(recipe.model.name)],
        "lora": recipe.lora.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json", exclude=NOT_IN_KEY),
        "cluster": cluster,
        "steps": digest_of(steps),
        "examples": [[part["id"].to_pylist(), _content(part)] for part in (table, heldout)],
        "cosine": cosine,
        "start": origin,
    }
    return Finetune(
        name=name,
        section=section,
        settings=TrainingSettings.model_validate(settings.model_dump(include=set(TrainingSection.model_fields))),
        cluster=cluster,
        start=GENERALIST if origin else None,
        cosine=cosine,
        key=digest_of(key),
        tokens=sum(tokens[index] for step in steps for index in step),
        steps=len(steps),
    )


def _content(table: pa.Table) -> str:
    """Digest of the token ids and labels: an example's id is of its text alone."""
    content = hashlib.sha256()
    for column in (table["input_ids"], table["labels"]):
        for numbers in (pc.list_value_length(column), pc.list_flatten(column)):
            for chunk in numbers.chunks:
                content.update(chunk.to_numpy())
    return content.hexdigest()


def _merge(recipe: Recipe, run: RunDirectory, adapters: list[Committed]) -> list[str]:
    """Write the whole models that are missing, one after the other. Returns the folders of all."""
    folders = {f"{MERGED}/{Path(adapter.folder).name}": adapter for adapter in adapters if recipe.experts.merge}
    run.delete(*(f"{MERGED}/{name}" for name in run.names(MERGED) if f"{MERGED}/{name}" not in folders))
    task = _merge_one.options(
        num_cpus=recipe.compute.cpus_per_worker, max_retries=recipe.compute.retries, retry_exceptions=[OSError]
    )
    for folder, adapter in folders.items():
        if not run.exists(f"{folder}/config.json"):
            ray.get(task.remote(recipe, run.uri, adapter.folder, folder))
    return list(folders)


@ray.remote
def _merge_one(recipe: Recipe, run_uri: str, adapter: str, folder: str) -> None:
    run = RunDirectory(run_uri)
    with run.staged(folder, last="config.json") as staged:
        write_merged(recipe.model.name, recipe.model.dtype, run.fetch(adapter), staged)
