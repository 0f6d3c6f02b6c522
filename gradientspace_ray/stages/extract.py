"""Per-sample gradients of the training examples, sketched where they are made: one Ray Data row = one shard = one task.

Gradients never leave the actor that makes them: a shard's name goes in, and a small row comes out; the sketch is
committed to the run directory under a digest of everything that decides it. So a shard that is tried again, or met by
a later run, is the same shard.
"""

import logging
import math
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from ray.exceptions import RayActorError

from gradientspace_ray.errors import one_line
from gradientspace_ray.gradients.per_sample import Example, ExampleTooLargeError, PerSampleGradients
from gradientspace_ray.models.fingerprint import model_fingerprint
from gradientspace_ray.models.loading import as_dtype, load_adapter, load_base
from gradientspace_ray.models.moments import load_moments, moments_digest
from gradientspace_ray.recipe import Recipe
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.run import RunDirectory, digest_of
from gradientspace_ray.sketch.columns import is_committed, open_sketch, save_shard
from gradientspace_ray.sketch.online_svd import NonFiniteRowError, OnlineSVD
from gradientspace_ray.sketch.projection import RandomProjection
from gradientspace_ray.sketch.refinement import Refinement
from gradientspace_ray.sketch.tree import BASIS, LEAVES, QUARANTINE
from gradientspace_ray.stages.progress import MERGE_SHARE, POLL_INTERVAL_S, on_this_node

LINES = {False: "gradients", True: "second pass"}
"""Of the progress, by whether a pass is the refining one."""
SPEED_SETTINGS = {"tokens_per_batch", "workers", "checkpointing"}
"""Of `gradients`: what changes how fast a result comes, not the result."""
EXAMPLES = "examples/train.parquet"


class ShardError(RuntimeError):
    """A shard that could not be sketched; the message names it in one line."""


class _RemoteError(RuntimeError):
    """The traceback of an error on a worker, ending with its message."""


@dataclass(frozen=True)
class Shard:
    """A fixed list of examples: the unit of work, retry and commit."""

    name: str
    """`<index>.<digest>`."""
    ids: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Where its sketch is committed, relative to the run directory."""
        return f"{LEAVES}/{self.name}"


def plan(recipe: Recipe, run: RunDirectory, basis: str | None = None) -> list[Shard]:
    """All shards of a pass over the training examples.

    Args:
        recipe: the run's.
        run: the run directory.
        basis: for a second pass, name of the sketch of the first one, saved at `BASIS`.

    Raises:
        ShardError: there are no examples.
    """
    ids = run.read_table(EXAMPLES, ["id"])["id"].to_pylist()
    if not ids:
        raise ShardError(f"{run.path(EXAMPLES)} holds no examples; give more data or smaller held-out shares")
    return plan_shards(ids, recipe.gradients.examples_per_shard, {**_decisive(recipe, run), "basis": basis})


def extract(
    recipe: Recipe,
    run: RunDirectory,
    board: Any,
    shards: Sequence[Shard],
    wanted: Collection[str],
    refining: bool = False,
) -> Iterator[str]:
    """Run shards through a fixed pool of actors, and yield their names as their sketches are committed.

    Args:
        recipe: the run's.
        run: the run directory.
        board: where progress is reported.
        shards: of the pass.
        wanted: names of those that are to be made.
        refining: whether this is the second pass.

    Raises:
        ShardError: a shard failed, and is not to be skipped; raised when all others are committed.
    """
    compute = recipe.compute
    todo, total = [shard for shard in shards if shard.name in wanted], sum(len(shard.ids) for shard in shards)
    done = total - sum(len(shard.ids) for shard in todo)
    board.begin.remote(LINES[refining], done, total)
    bad_before, counts = set(run.names(QUARANTINE)), {shard.name: len(shard.ids) for shard in todo}
    items = [{"name": shard.name, "ids": list(shard.ids)} for shard in todo]
    deaths = Deaths.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    arguments = {"recipe": recipe, "run_uri": run.uri, "board": board, "deaths": deaths, "total": total}
    failures = []
    with _quiet_ray_data(compute.retries):
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Extractor,
            fn_constructor_kwargs={**arguments, "refining": refining},
            batch_size=1,
            batch_format="numpy",
            # One shard at a time: what waits at a busy actor could be done by an idle one.
            compute=ray.data.ActorPoolStrategy(
                size=min(recipe.gradients.workers, len(items)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=compute.cpus_per_worker * (1 - MERGE_SHARE),
            num_gpus=compute.gpus_per_worker or None,
        )
        for row in dataset.iter_rows():
            if row["failure"]:
                failures.append(row)
                shown, count = f"{row['name']}: {row['failure']}", counts[row["name"]]
                board.report.remote("failed shards", len(failures), len(failures), shown)
                # Its examples are not waited for.
                board.report.remote(LINES[refining], count, total, part=row["name"])
                continue
            if f"{row['name']}.json" in bad_before:
                run.delete(f"{QUARANTINE}/{row['name']}.json")
            yield row["name"]
    if failures:
        _quarantine(recipe, run, todo, failures)


def plan_shards(ids: Sequence[str], examples_per_shard: int, decisive: Any) -> list[Shard]:
    """Cut the sorted ids into shards whose sizes differ by one at most.

    Args:
        ids: of the training examples, in any order.
        examples_per_shard: the largest size.
        decisive: everything else that decides a shard's sketch; JSON-able.
    """
    parts = np.array_split(np.array(sorted(ids), dtype=object), math.ceil(len(ids) / examples_per_shard))
    digests = [digest_of([part.tolist(), decisive]) for part in parts]
    return [
        Shard(f"{index:05d}.{digest}", tuple(part))
        for index, (part, digest) in enumerate(zip(parts, digests, strict=True))
    ]


class Extractor:
    """The Ray Data actor: holds the model, and turns one shard into one committed sketch. It keeps no other state."""

    def __init__(self, recipe: Recipe, run_uri: str, board: Any, deaths: Any, total: int, refining: bool) -> None:
        """Prepare; what is large is loaded for the first shard, so that its errors come back in a row.

        Args:
            recipe: the run's.
            run_uri: the run directory.
            board: where progress is reported.
            deaths: the `Deaths` of the pool.
            total: examples of all shards.
            refining: make sums for the sketch at `BASIS`, instead of a sketch.
        """
        torch.set_num_threads(max(1, int(recipe.compute.cpus_per_worker)))
        self._recipe, self._board, self._deaths, self._total = recipe, board, deaths, total
        self._refining = refining
        self._run = RunDirectory(run_uri)

    @cached_property
    def _examples(self) -> pa.Table:
        return self._run.read_table(EXAMPLES, ["id", "input_ids", "labels"])

    @cached_property
    def _engine(self) -> PerSampleGradients:
        settings, generalist = self._recipe.gradients, self._run.fetch("generalist")
        model, device = self._recipe.model, self._recipe.compute.device
        base = load_base(model.name, model.dtype, device, model.quantization, model.compute_dtype)
        return PerSampleGradients(
            load_adapter(base, generalist, trainable=True),
            labels=settings.labels,
            loss=settings.loss,
            # The sketch normalises at no cost.
            preconditioner=settings.preconditioner,
            moments=load_moments(generalist) if settings.preconditioner != "none" else None,
            dtype=as_dtype(settings.dtype),
            compute_dtype=as_dtype(model.compute_dtype),
            checkpointing=settings.checkpointing,
            tokens_per_batch=settings.tokens_per_batch,
        )

    @cached_property
    def _buffer_BD(self) -> torch.Tensor:
        """Scratch for gradients, written before it is read: one for all shards."""
        rows = self._empty_sketch().buffer_rows
        dtype = as_dtype(self._recipe.gradients.dtype)
        return torch.empty(rows, self._engine.dimension, dtype=dtype, device=self._recipe.compute.device)

    @cached_property
    def _basis_KD(self) -> torch.Tensor:
        return open_sketch(self._run, BASIS).rows().to(self._recipe.compute.device)

    @cached_property
    def _projection(self) -> RandomProjection | None:
        settings = self._recipe.sketch
        # Once, in the pass whose shards are there at the end.
        if settings.projection is None or self._refining != settings.refine:
            return None
        return RandomProjection(self._engine.dimension, settings.projection, self._recipe.compute.device)

    @cached_property
    def _layers(self) -> list[slice] | None:
        """The columns of each adapted layer, where these are to count alike."""
        if self._recipe.gradients.normalisation != "module":
            return None
        starts = [column.offset for column in self._engine.columns[::2]]
        return [slice(*ends) for ends in zip(starts, [*starts[1:], self._engine.dimension], strict=True)]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Commit the sketch of the one shard in the batch: a pure function of it, safe to repeat.

        A failure is returned, not raised, so that the other shards finish and stay committed.
        """
        shard = Shard(str(batch["name"][0]), tuple(str(id_) for id_ in batch["ids"][0]))
        self._wait_for_merges()
        deaths = ray.get(self._deaths.begin.remote(shard.name, ray.get_runtime_context().get_node_id()))
        if deaths > self._recipe.compute.retries:
            mend = "if memory ran out, lower gradients.tokens_per_batch or sketch.rank"
            failure, trace = f"its worker died {deaths} times; {mend}", ""
        else:
            failure, trace = self._try(shard)
        self._deaths.end.remote(shard.name)
        return {"name": [shard.name], "failure": [failure], "trace": [trace]}

    def _try(self, shard: Shard) -> tuple[str, str]:
        """Try a shard until it is committed, or has failed as often as it may: why, and the traceback; else empty."""
        failure, trace = "", ""
        for _ in range(self._recipe.compute.retries + 1):
            try:
                # Ray Data may repeat what is finished, and even merged.
                if not is_committed(self._run, shard.folder, shard.name):
                    self._commit(shard)
                return "", ""
            except Exception as error:  # noqa: BLE001 - whatever it is, the other shards go on, and the run names it
                failure, trace = one_line(error), traceback.format_exc()
        return failure, trace

    def _commit(self, shard: Shard) -> None:
        started = time.monotonic()
        engine, buffer_BD, sketch, projection = self._engine, self._buffer_BD, self._empty(), self._projection
        examples = self._read(shard.ids)
        unit = self._recipe.gradients.normalisation != "none"
        done, tokens, sketching_s = 0, 0, 0.0
        projections: list[torch.Tensor] = []

        def report(rows: Sequence[int]) -> None:
            nonlocal done, tokens
            done, tokens = done + len(rows), tokens + sum(len(part[row][0]) for row in rows)
            self._board.report.remote(LINES[self._refining], done, self._total, part=shard.name, tokens=tokens)

        report([])
        for start in range(0, len(examples), len(buffer_BD)):
            part = examples[start : start + len(buffer_BD)]
            try:
                gradients_BD = engine.gradients(part, out=buffer_BD[: len(part)], on_batch=report)
                sketching_s -= self._clock()
                if projection:
                    projections.append(projection.project(gradients_BD, unit, self._layers).cpu())
                sketch.update(gradients_BD, normalise=unit, parts=self._layers)
                sketching_s += self._clock()
            except ExampleTooLargeError as error:
                raise ShardError(f"example {shard.ids[start + error.row]} ({EXAMPLES}): {error.reason}") from error
            except NonFiniteRowError as error:
                raise ShardError(
                    f"the gradient of example {shard.ids[start + error.row]} ({EXAMPLES}) is not finite; "
                    "remove it from the data, or lower warmup.learning_rate"
                ) from error
        sketching_s -= self._clock()
        save_shard(self._run, shard.folder, sketch, shard.ids, self._recipe.sketch.rank, shard.name, projections)
        sketching_s += self._clock()
        self._board.count.remote(shards=1, tokens=tokens, sketching_s=sketching_s, working_s=time.monotonic() - started)

    def _wait_for_merges(self) -> None:
        """What is made faster than it is merged would pile up in the run directory."""
        # A board that is out of reach, as of a machine that is going down, is no reason to wait.
        with suppress(RayActorError):
            while ray.get(self._board.backlog.remote()) > self._recipe.gradients.workers:
                time.sleep(POLL_INTERVAL_S)

    def _empty(self) -> OnlineSVD | Refinement:
        """The memory of the rows is taken before the gradients, whose token budget may be what memory is left."""
        if self._refining:
            return Refinement(self._basis_KD)
        sketch = self._empty_sketch()
        sketch.reserve(self._engine.dimension, self._recipe.compute.device)
        return sketch

    def _empty_sketch(self) -> OnlineSVD:
        settings = self._recipe.sketch
        return OnlineSVD(settings.rank, settings.shrink, as_dtype(settings.dtype), settings.oversampling)

    def _clock(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self._recipe.compute.device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def _read(self, ids: Sequence[str]) -> list[Example]:
        """(input_ids, labels) in the order of the ids."""
        places = pc.index_in(pa.array(ids, pa.string()), self._examples["id"].combine_chunks())
        rows = self._examples.take(places)
        return list(zip(rows["input_ids"].to_pylist(), rows["labels"].to_pylist(), strict=True))


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Deaths:
    """Counts how often a shard was begun and never ended, because its worker died.

    Ray Data tries such a shard for ever, and one that takes too much memory would kill a worker each time. What dies
    with its machine says nothing about the shard.
    """

    def __init__(self) -> None:
        self._begun: dict[str, list[str]] = {}

    def begin(self, shard: str, node_id: str) -> int:
        """Note that a worker on that machine begins a shard; how many died of it before."""
        begun = self._begun.setdefault(shard, [])
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        died = sum(node in alive for node in begun)
        begun.append(node_id)
        return died

    def end(self, shard: str) -> None:
        """Note that the worker has seen the shard's end."""
        self._begun.pop(shard, None)


def _quarantine(recipe: Recipe, run: RunDirectory, shards: Sequence[Shard], failures: Sequence[dict[str, Any]]) -> None:
    """Write down why shards failed, and stop unless they are to be skipped."""
    ids = {shard.name: shard.ids for shard in shards}
    attempts = recipe.compute.retries + 1
    for row in failures:
        facts = {"error": row["failure"], "traceback": row["trace"], "attempts": attempts, "ids": ids[row["name"]]}
        run.write_json(f"{QUARANTINE}/{row['name']}.json", facts)
    if recipe.gradients.on_bad_shard == "skip":
        return
    first = failures[0]
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    message = f"shard {first['name']}: {first['failure']}{more}"
    raise ShardError(message) from _RemoteError(f"{first['trace']}\n{message}")


def _decisive(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    """What decides a shard's sketch beside its examples; settings of speed alone are left out."""
    settings, generalist = recipe.gradients, run.fetch("generalist")
    # Shards are named by their examples, and those that fail have no sketch.
    ignored = SPEED_SETTINGS | {"examples_per_shard", "on_bad_shard"}
    unused = {"refine"} if recipe.sketch.projection else {"refine", "projection"}
    return {
        "generalist": adapter_digest(generalist),
        "moments": moments_digest(generalist) if settings.preconditioner != "none" else None,
        "model": [recipe.model.model_dump(mode="json"), model_fingerprint(recipe.model.name)],
        "lora": recipe.lora.model_dump(mode="json"),
        "gradients": settings.model_dump(mode="json", exclude=ignored),
        "sketch": recipe.sketch.model_dump(mode="json", exclude=unused),
    }


@contextmanager
def _quiet_ray_data(retries: int) -> Iterator[None]:
    """Ray Data without its own bars and log lines (its log file stays); an actor that dies loading is replaced."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.max_consecutive_actor_init_deaths = retries
    consoles = [
        handler for handler in logging.getLogger("ray.data").handlers if isinstance(handler, logging.StreamHandler)
    ]
    levels = [handler.level for handler in consoles]
    for handler in consoles:
        handler.setLevel(logging.CRITICAL)
    # A shard may take as long as it takes.
    context.execution_no_progress_timeout_s = -1
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)
