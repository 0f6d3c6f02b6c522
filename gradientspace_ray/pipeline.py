"""The stages in order, and what decides each one's output."""

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from rich.console import Console

from gradientspace_ray import __version__
from gradientspace_ray.connection import connect
from gradientspace_ray.examples import formats
from gradientspace_ray.recipe import Recipe, dump_recipe
from gradientspace_ray.run import RunDirectory, StageRecord, Summary, digest_of
from gradientspace_ray.stages import cluster, extract, merge, prepare, report, route, score, train

StageFunction = Callable[[Recipe, RunDirectory], Summary]
REPORTED_PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "scikit-learn", "numpy")
# Settings that change how fast a result comes, not the result.
SPEED_SETTINGS = {
    "experts": {"max_concurrent", "tokens_per_batch"},
    "warmup": {"tokens_per_batch"},
    "gradients": {"tokens_per_batch", "workers"},
    "evaluate": {"tokens_per_batch", "workers"},
}


class StageFailedError(RuntimeError):
    """A stage that ended with an error; the message is one line, the traceback is in the run directory."""


@dataclass(frozen=True)
class Stage:
    """One step of the run."""

    name: str
    functions: tuple[StageFunction, ...]
    """Called in order; the last one's summary is the stage's, with the counts of all."""
    sections: tuple[str, ...]
    """Recipe sections that decide the output."""
    inputs: tuple[str, ...] = ()
    """Stages whose outputs are read."""


def _score_validation(recipe: Recipe, run: RunDirectory) -> Summary:
    return score.score(recipe, run, "validation")


def _score_test(recipe: Recipe, run: RunDirectory) -> Summary:
    return score.score(recipe, run, "test")


STAGES = (
    Stage("prepare", (prepare.prepare,), ("seed", "data")),
    Stage("warmup", (train.warmup,), ("seed", "model", "lora", "warmup"), ("prepare",)),
    Stage("gradients", (extract.extract, merge.merge), ("model", "gradients", "sketch"), ("prepare", "warmup")),
    Stage("cluster", (cluster.cluster,), ("seed", "clusters"), ("prepare", "gradients")),
    Stage("experts", (train.experts,), ("seed", "model", "lora", "experts"), ("prepare", "warmup", "cluster")),
    Stage("router", (_score_validation, route.router), ("seed", "model", "router"), ("prepare", "cluster", "experts")),
    Stage("evaluate", (_score_test, score.evaluate), ("seed", "model", "evaluate"), ("prepare", "experts", "router")),
    Stage("report", (report.report,), ("name",), ("prepare", "gradients", "cluster", "experts", "router", "evaluate")),
)


def stage_digest(stage: Stage, recipe: Recipe, run: RunDirectory) -> str:
    """Digest of everything that decides a stage's output: its recipe sections and the outputs that it reads."""
    tree = recipe.model_dump(mode="json")
    parts: dict[str, Any] = {}
    for section in stage.sections:
        value = tree[section]
        ignored = SPEED_SETTINGS.get(section, set())
        parts[section] = {k: v for k, v in value.items() if k not in ignored} if isinstance(value, dict) else value
    records = run.manifest().stages
    inputs: dict[str, Any] = {name: records[name].output for name in stage.inputs if name in records}
    if stage.name == "prepare":
        inputs = {
            "tokenizer": recipe.model.name,
            "view": recipe.router.view,
            "sources": [formats.fingerprint(source) for source in recipe.data.sources],
        }
    return digest_of({"stage": stage.name, "recipe": parts, "inputs": inputs})


def run_pipeline(recipe: Recipe, run: RunDirectory, until: str | None, console: Console) -> dict[str, StageRecord]:
    """Run every stage up to `until` (all when None), skipping those whose output is committed and current.

    Returns:
        Stage name -> record, for the stages up to `until`.

    Raises:
        RunError: another driver holds the run directory.
        StageFailedError: a stage ended with an error; what was committed before is kept.
    """
    names = [stage.name for stage in STAGES]
    chosen = STAGES[: names.index(until) + 1] if until else STAGES
    # Ray's C++ core warns on the driver's terminal about what Ray Data does; errors come back as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with run.lease():
        run.write_bytes("recipe.yaml", dump_recipe(recipe).encode())
        run.delete(".staging")
        for stage in chosen:
            digest = stage_digest(stage, recipe, run)
            record = run.manifest().stages.get(stage.name)
            if record and record.status == "done" and record.digest == digest:
                console.print(f"[dim]{stage.name:<10} done before: {record.made}[/dim]")
                continue
            connect(recipe.compute.device)
            console.print(f"[bold]{stage.name}[/bold]")
            record = _run_stage(stage, digest, recipe, run)
            console.print(f"[green]{stage.name:<10}[/green] {record.seconds:.0f} s: {record.made}")
    records = run.manifest().stages
    return {stage.name: records[stage.name] for stage in chosen}


def _run_stage(stage: Stage, digest: str, recipe: Recipe, run: RunDirectory) -> StageRecord:
    started_at, clock = time.time(), time.monotonic()
    versions = {"gradientspace-ray": __version__} | {name: metadata.version(name) for name in REPORTED_PACKAGES}
    running = StageRecord(status="running", digest=digest, versions=versions, started_at=started_at)
    run.record(stage.name, running)

    def end(**changes: Any) -> StageRecord:
        record = running.model_copy(update={"seconds": round(time.monotonic() - clock, 2), **changes})
        run.record(stage.name, record)
        return record

    counts: dict[str, Any] = {}
    try:
        for function in stage.functions:
            summary = function(recipe, run)
            counts |= summary.counts
    except KeyboardInterrupt:
        end(status="interrupted")
        raise
    except Exception as error:
        end(status="failed", error=one_line(error))
        run.write_bytes("error.log", "".join(traceback.format_exception(error)).encode())
        raise StageFailedError(f"{stage.name}: {one_line(error)} (traceback: {run.path('error.log')})") from error
    return end(status="done", output=summary.output or digest, made=summary.made, counts=counts)


def one_line(error: BaseException) -> str:
    """What went wrong, in one line: the innermost cause of an error that crossed Ray, without its remote traceback."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__ or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
