"""The stages in order, what decides each one's output, and the connection to Ray."""

import contextlib
import functools
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import joblib
import ray
from rich.console import Console
from rich.markup import escape

from gradientspace_ray import __version__
from gradientspace_ray.errors import one_line
from gradientspace_ray.examples import formats
from gradientspace_ray.lease import Lease
from gradientspace_ray.models.fingerprint import model_fingerprint
from gradientspace_ray.models.loading import chosen_compute_dtype
from gradientspace_ray.recipe import Recipe, dump_recipe
from gradientspace_ray.run import RunDirectory, StageRecord, Summary, digest_of
from gradientspace_ray.stages import cluster, conclude, extract, merge, prepare, report, route, score, train
from gradientspace_ray.stages.progress import watched_board

StageFunction = Callable[[Recipe, RunDirectory], Summary]
LOCAL_OBJECT_STORE_BYTES = 256 * 2**20
REPORTED_PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "scikit-learn", "numpy")
# Settings that change how fast a result comes, not the result.
SPEED_SETTINGS = {
    "experts": {"max_concurrent", *train.SPEED_SETTINGS},
    "warmup": train.SPEED_SETTINGS,
    "gradients": extract.SPEED_SETTINGS,
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
    outputs: tuple[str, ...] = ()
    """Names in the run directory; when one has gone, the stage runs again."""
    leaves: tuple[str, ...] = ()
    """What else `--again` removes."""


def _score_validation(recipe: Recipe, run: RunDirectory) -> Summary:
    return score.score(recipe, run, "validation")


def _score_test(recipe: Recipe, run: RunDirectory) -> Summary:
    return score.score(recipe, run, "test")


def _gradients(recipe: Recipe, run: RunDirectory) -> Summary:
    """Sketches of shards are merged while others are being made."""
    with watched_board() as board:
        shards = extract.plan(recipe, run)
        leaves = [shard.name for shard in shards]
        if not conclude.is_finished(recipe, run, leaves):
            make = functools.partial(extract.extract, recipe, run, board, shards)
            if first := conclude.must_be_made_first(recipe, run, leaves):
                list(make(first))
            # It says that all else is there.
            run.delete(conclude.SPECTRUM)
            root = merge.merge(recipe, run, board, leaves, make)
            if recipe.sketch.refine:
                # A shard that has failed is not tried again.
                good = {leaf.name for leaf in root.leaves}
                second = extract.plan(recipe, run, basis=root.name)
                second = [again for first, again in zip(shards, second, strict=True) if first.name in good]
                make = functools.partial(extract.extract, recipe, run, board, second, refining=True)
                root = merge.merge(recipe, run, board, [shard.name for shard in second], make, refining=True)
            conclude.finish(recipe, run, board, leaves, root)
        return conclude.clear(run, board)


STAGES = (
    Stage(
        "prepare",
        (prepare.prepare,),
        ("seed", "data"),
        outputs=tuple(f"examples/{split}.parquet" for split in prepare.SPLITS),
    ),
    Stage(
        "warmup",
        (train.warmup,),
        ("seed", "model", "lora", "warmup", "budget"),
        ("prepare",),
        ("generalist",),
        ("checkpoints",),
    ),
    Stage(
        "gradients",
        (_gradients,),
        ("model", "gradients", "sketch"),
        ("prepare", "warmup"),
        ("sketch/rows", "sketch/coordinates.parquet", "sketch/spectrum.json"),
    ),
    Stage(
        "cluster",
        (cluster.cluster,),
        ("seed", "clusters"),
        ("prepare", "gradients"),
        ("clusters/assignments.parquet", "clusters/centroids.safetensors", "clusters/quality.json"),
    ),
    Stage(
        "experts",
        (train.experts,),
        ("seed", "model", "lora", "warmup", "experts", "single_lora", "budget"),
        ("prepare", "warmup", "cluster"),
        ("experts",),
        ("single_lora", "merged", "checkpoints"),
    ),
    Stage(
        "router",
        (_score_validation, route.router),
        ("seed", "model", "router"),
        ("prepare", "cluster", "experts"),
        ("evaluation/losses.validation.parquet", "router", "registry.json"),
    ),
    Stage(
        "evaluate",
        (_score_test, score.evaluate),
        ("seed", "model", "evaluate"),
        ("prepare", "experts", "router"),
        ("evaluation/losses.parquet", "evaluation/scores.json"),
    ),
    Stage(
        "report",
        (report.report,),
        ("name",),
        ("prepare", "gradients", "cluster", "experts", "router", "evaluate"),
        ("report.html",),
    ),
)


def local_cpus() -> int:
    """CPUs of a local Ray: those that this process may use, by affinity and a container's quota, and two at least."""
    return max(2, joblib.cpu_count())


def connect(device: str) -> None:
    """Join the Ray cluster that RAY_ADDRESS names, or start a local one; nothing happens when already connected."""
    if ray.is_initialized():
        return
    worker_env = {"TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        worker_env["DS_ACCELERATOR"] = "cpu"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        with _keeping_sigterm():
            ray.init(runtime_env={"env_vars": worker_env}, **quiet)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A local Ray listens on this machine alone; with tokens it would write one into the home folder.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.update(worker_env)
    with _keeping_sigterm():
        ray.init(
            address="local",
            num_cpus=local_cpus(),
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            **quiet,
        )


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Ray sets a handler of its own when it starts; one that stood there comes back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def disconnecting() -> Iterator[None]:
    """Leave Ray at the end of the block if it was joined inside it; a local Ray that `connect` started ends with it."""
    connected_before = ray.is_initialized()
    try:
        yield
    finally:
        if ray.is_initialized() and not connected_before:
            ray.shutdown()


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
    if "model" in parts:
        inputs["model"] = model_fingerprint(recipe.model.name)
    if "router" in parts:
        inputs["encoder"] = model_fingerprint(recipe.router.encoder)
    if stage.name == "warmup":
        # The generalist leaves these out.
        inputs["heldout_share"] = max(recipe.warmup.heldout_share, recipe.experts.heldout_share)
    if stage.name == "cluster" and recipe.clusters.method == "embedding":
        inputs["encoder"] = [tree["router"], model_fingerprint(recipe.router.encoder)]
    if stage.name == "prepare":
        inputs = {
            "columns": prepare.SCHEMA.names,
            "tokenizer": model_fingerprint(recipe.model.name),
            "view": recipe.router.view,
            "sources": [formats.fingerprint(source) for source in recipe.data.sources],
        }
    return digest_of({"stage": stage.name, "recipe": parts, "inputs": inputs})


def _with_dtypes(recipe: Recipe) -> Recipe:
    """The recipe with `auto` decided here, once for all workers, so that digests know what was computed."""
    compute_dtype = chosen_compute_dtype(recipe.model.compute_dtype, recipe.compute.device)
    dtype = compute_dtype if recipe.model.dtype == "auto" else recipe.model.dtype
    model = recipe.model.model_copy(update={"dtype": dtype, "compute_dtype": compute_dtype})
    return recipe.model_copy(update={"model": model})


def run_pipeline(
    recipe: Recipe, run: RunDirectory, console: Console, until: str | None = None, again: str | None = None
) -> dict[str, StageRecord]:
    """Run the stages in order, skipping those whose output is committed and current.

    Args:
        recipe: the run's.
        run: where stages meet.
        console: where the stages are announced.
        until: the last stage; None runs all.
        again: a stage whose output is removed first; it and all that follow run.

    Returns:
        Stage name -> record, for the stages up to `until`.

    Raises:
        RunError: another driver holds the run directory, or took it over.
        StageFailedError: a stage ended with an error; what was committed before is kept.
    """
    names = [stage.name for stage in STAGES]
    train.check(recipe)
    recipe = train.with_learning_rate(_with_dtypes(recipe))
    chosen = STAGES[: names.index(until) + 1] if until else STAGES
    # Ray's C++ core warns on the driver's terminal about what Ray Data does; errors come back as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with Lease(run) as lease, _noticing_interrupts() as check_interrupts:
        run.write_bytes("recipe.yaml", dump_recipe(recipe).encode())
        run.sweep()
        _mark_stale(recipe, run, again)
        for stage in chosen:
            digest = stage_digest(stage, recipe, run)
            forced = again is not None and names.index(stage.name) >= names.index(again)
            record = None if forced else _current_record(stage, digest, run)
            if record:
                if record.status == "stale":
                    run.record(stage.name, record.model_copy(update={"status": "done"}))
                console.print(f"[dim]{stage.name:<10} done before: {escape(record.made)}[/dim]")
                continue
            lease.check()
            connect(recipe.compute.device)
            console.print(f"[bold]{stage.name}[/bold]")
            if stage.name == again:
                _forget(stage, run)
            record = _run_stage(stage, digest, recipe, run, lease, check_interrupts)
            console.print(f"[green]{stage.name:<10}[/green] {record.seconds:.0f} s: {escape(record.made)}")
    records = run.manifest().stages
    return {stage.name: records[stage.name] for stage in chosen}


@contextlib.contextmanager
def _noticing_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; where a library swallowed that, the check yielded here raises it."""
    pressed = threading.Event()

    def press(number: int, frame: Any) -> None:
        pressed.set()
        signal.default_int_handler(number, frame)

    def check() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main one may handle signals
        yield check
        return
    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _current_record(stage: Stage, digest: str, run: RunDirectory) -> StageRecord | None:
    """The record of a stage that need not run: finished, decided by the same inputs, and all outputs there."""
    record = run.manifest().stages.get(stage.name)
    if record is None or record.status not in ("done", "stale") or record.digest != digest:
        return None
    return record if all(run.exists(name) for name in (*stage.outputs, *record.outputs)) else None


def _mark_stale(recipe: Recipe, run: RunDirectory, again: str | None) -> None:
    """Mark the finished stages whose inputs differ now, and all that follow from them, for those that read `status`.

    A stage that turns out to be current, or runs, is done again.
    """
    changed = {again}
    for stage in STAGES:
        record = run.manifest().stages.get(stage.name)
        if record is None or record.digest != stage_digest(stage, recipe, run) or changed & set(stage.inputs):
            changed.add(stage.name)
        if record and record.status == "done" and stage.name in changed:
            run.record(stage.name, record.model_copy(update={"status": "stale"}))


def _forget(stage: Stage, run: RunDirectory) -> None:
    record = run.manifest().stages.get(stage.name)
    for name in (*stage.outputs, *stage.leaves, *(record.outputs if record else ())):
        run.delete(name)


def _run_stage(
    stage: Stage, digest: str, recipe: Recipe, run: RunDirectory, lease: Lease, check_interrupts: Callable[[], None]
) -> StageRecord:
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
            check_interrupts()
    except KeyboardInterrupt:
        end(status="interrupted")
        raise
    except Exception as error:
        end(status="failed", error=one_line(error))
        run.write_bytes("error.log", "".join(traceback.format_exception(error)).encode())
        raise StageFailedError(f"{stage.name}: {one_line(error)} (traceback: {run.path('error.log')})") from error
    lease.check()
    return end(
        status="done", output=summary.output or digest, made=summary.made, counts=counts, outputs=summary.outputs
    )
