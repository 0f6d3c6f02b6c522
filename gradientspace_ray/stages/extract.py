"""Per-sample gradients of the training examples, sketched where they are made: one Ray Data row = one shard = one task.

Gradients never leave the actor that makes them: a shard's name goes in, and a small row comes out; the sketch is
committed to the run directory under a digest of everything that decides it. So a shard that is tried again, or met by
a later run, is the same shard.
"""

import logging
import math
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch

from gradientspace_ray.gradients.per_sample import Example, ExampleTooLargeError, PerSampleGradients
from gradientspace_ray.models.fingerprint import model_fingerprint
from gradientspace_ray.models.loading import as_dtype, load_adapter, load_base
from gradientspace_ray.models.moments import load_moments, moments_digest
from gradientspace_ray.recipe import Recipe
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.run import RunDirectory, Summary, digest_of
from gradientspace_ray.sketch.columns import RECORD, SketchError, check_sketch, is_complete, save_sketch
from gradientspace_ray.sketch.online_svd import NonFiniteRowError, OnlineSVD
from gradientspace_ray.sketch.tree import LEAVES, Node, merge_tree, missing, to_read
from gradientspace_ray.stages.progress import watched_board

LINE = "gradients"
EXAMPLES = "examples/train.parquet"
PLAN = "sketch/plan.json"


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


def extract(recipe: Recipe, run: RunDirectory) -> Summary:
    """Sketch the gradients of every shard that is not sketched or merged yet, and write the plan that `merge` reads.

    Raises:
        ShardError: a shard failed; those that were finished stay committed.
    """
    ids = run.read_table(EXAMPLES, ["id"])["id"].to_pylist()
    if not ids:
        raise ShardError(f"{run.path(EXAMPLES)} holds no examples; give more data or smaller held-out shares")
    shards = plan_shards(ids, recipe.gradients.examples_per_shard, _decisive(recipe, run))
    run.write_json(PLAN, {"leaves": [shard.name for shard in shards], "examples": len(ids)})
    root = merge_tree([shard.name for shard in shards])
    damaged = _delete_damaged(recipe, run, to_read(_missing(run, root)))
    needed = {node.name for node in _missing(run, root)}
    todo = [shard for shard in shards if shard.name in needed]
    if todo:
        _sketch(recipe, run, todo)
    reused = len(shards) - len(todo)
    made = f"gradients of {len(ids)} examples in {len(shards)} shards" + (f", {reused} made before" if reused else "")
    counts = {"examples": len(ids), "shards": len(shards), "shards_reused": reused, "sketches_damaged": damaged}
    return Summary(made=made, counts=counts)


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

    def __init__(self, recipe: Recipe, run_uri: str, board: Any, total: int) -> None:
        """Prepare; what is large is loaded for the first shard, so that its errors are a shard's errors.

        Args:
            recipe: the run's.
            run_uri: the run directory.
            board: where progress is reported.
            total: examples of all shards.
        """
        torch.set_num_threads(max(1, int(recipe.compute.cpus_per_worker)))
        self._recipe, self._board, self._total = recipe, board, total
        self._run = RunDirectory(run_uri)

    @cached_property
    def _examples(self) -> pa.Table:
        return self._run.read_table(EXAMPLES, ["id", "input_ids", "labels"])

    @cached_property
    def _engine(self) -> PerSampleGradients:
        recipe = self._recipe
        settings, generalist = recipe.gradients, self._run.fetch("generalist")
        base = load_base(recipe.model.name, recipe.model.dtype, recipe.compute.device)
        return PerSampleGradients(
            load_adapter(base, generalist, trainable=True),
            labels=settings.labels,
            loss=settings.loss,
            # The sketch scales examples to unit length at no cost.
            normalisation="module" if settings.normalisation == "module" else "none",
            preconditioner=settings.preconditioner,
            moments=load_moments(generalist) if settings.preconditioner != "none" else None,
            dtype=as_dtype(settings.dtype),
            compute_dtype=as_dtype(recipe.model.compute_dtype),
            checkpointing=settings.checkpointing,
            tokens_per_batch=settings.tokens_per_batch,
        )

    @cached_property
    def _buffer_BD(self) -> torch.Tensor:
        """Scratch for gradients, written before it is read: one for all shards."""
        rows = OnlineSVD(self._recipe.sketch.rank).buffer_rows
        dtype = as_dtype(self._recipe.gradients.dtype)
        return torch.empty(rows, self._engine.dimension, dtype=dtype, device=self._recipe.compute.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Commit the sketch of the one shard in the batch: a pure function of it, safe to repeat.

        A failure is returned, not raised, so that the other shards finish and stay committed.
        """
        shard = Shard(str(batch["name"][0]), tuple(str(id_) for id_ in batch["ids"][0]))
        failure, trace = "", ""
        try:
            if not is_complete(self._run.filesystem, self._run.path(shard.folder), shard.name):
                self._commit_with_retries(shard)
        except (ValueError, RuntimeError, OSError) as error:
            failure, trace = f"shard {shard.name}: {error}", traceback.format_exc()
        return {"name": [shard.name], "failure": [failure], "trace": [trace]}

    def _commit_with_retries(self, shard: Shard) -> None:
        for attempt in range(self._recipe.compute.retries + 1):
            try:
                return self._commit(shard)
            except OSError:
                if attempt == self._recipe.compute.retries:
                    raise
        return None

    def _commit(self, shard: Shard) -> None:
        recipe, engine, buffer_BD = self._recipe, self._engine, self._buffer_BD
        unit = recipe.gradients.normalisation == "example"
        sketch = OnlineSVD(recipe.sketch.rank)
        # Before the gradients, whose token budget may be what memory is left.
        sketch.reserve(engine.dimension, recipe.compute.device)
        examples = self._read(shard.ids)
        started, tokens = time.monotonic(), 0
        for start in range(0, len(examples), len(buffer_BD)):
            part = examples[start : start + len(buffer_BD)]
            try:
                gradients_BD = engine.gradients(part, out=buffer_BD[: len(part)])
                sketch.update(gradients_BD, normalise=unit)
            except ExampleTooLargeError as error:
                raise ShardError(f"example {shard.ids[start + error.row]} ({EXAMPLES}): {error.reason}") from error
            except NonFiniteRowError as error:
                raise ShardError(
                    f"the gradient of example {shard.ids[start + error.row]} ({EXAMPLES}) is not finite; "
                    "remove it from the data, or lower warmup.learning_rate"
                ) from error
            tokens += sum(len(input_ids) for input_ids, _ in part)
            speed = f"{tokens / (time.monotonic() - started):.0f} tokens/s a worker"
            self._board.report.remote(LINE, start + len(part), self._total, speed, part=shard.name)
        with self._run.staged(shard.folder, last=RECORD) as folder:
            save_sketch(folder, sketch, shard.ids, recipe.sketch.dtype, name=shard.name)

    def _read(self, ids: Sequence[str]) -> list[Example]:
        """(input_ids, labels) in the order of the ids."""
        places = pc.index_in(pa.array(ids, pa.string()), self._examples["id"].combine_chunks())
        rows = self._examples.take(places)
        return list(zip(rows["input_ids"].to_pylist(), rows["labels"].to_pylist(), strict=True))


def _sketch(recipe: Recipe, run: RunDirectory, shards: Sequence[Shard]) -> None:
    """Run the shards through a fixed pool of actors."""
    compute, total = recipe.compute, sum(len(shard.ids) for shard in shards)
    items = [{"name": shard.name, "ids": list(shard.ids)} for shard in shards]
    with watched_board() as board, _quiet_ray_data(compute.retries):
        board.report.remote(LINE, 0, total, "loading")
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Extractor,
            fn_constructor_kwargs={"recipe": recipe, "run_uri": run.uri, "board": board, "total": total},
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(recipe.gradients.workers, len(items))),
            num_cpus=compute.cpus_per_worker,
            num_gpus=compute.gpus_per_worker or None,
        )
        failed = [row for row in dataset.iter_rows() if row["failure"]]
    if failed:
        more = f" ({len(failed) - 1} more shards failed)" if len(failed) > 1 else ""
        message = failed[0]["failure"].splitlines()[0] + more
        raise ShardError(message) from _RemoteError(f"{failed[0]['trace']}\n{message}")


def _decisive(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    """What decides a shard's sketch beside its examples; settings of speed alone are left out."""
    settings, generalist = recipe.gradients, run.fetch("generalist")
    speed = {"tokens_per_batch", "workers", "examples_per_shard", "checkpointing"}
    return {
        "generalist": adapter_digest(generalist),
        "moments": moments_digest(generalist) if settings.preconditioner != "none" else None,
        "model": [recipe.model.model_dump(mode="json"), model_fingerprint(recipe.model.name)],
        "lora": recipe.lora.model_dump(mode="json"),
        "gradients": settings.model_dump(mode="json", exclude=speed),
        "sketch": recipe.sketch.model_dump(mode="json"),
    }


def _missing(run: RunDirectory, root: Node) -> list[Node]:
    return list(missing(root, lambda node: is_complete(run.filesystem, run.path(node.folder), node.name)))


def _delete_damaged(recipe: Recipe, run: RunDirectory, nodes: Sequence[Node]) -> int:
    """Compare sketches of an earlier attempt with their checksums, and delete those that differ. Returns how many."""
    check = _is_intact.options(
        num_cpus=recipe.compute.cpus_per_worker, max_retries=recipe.compute.retries, retry_exceptions=[OSError]
    )
    intact = ray.get([check.remote(run.uri, node.folder) for node in nodes])
    damaged = [node for node, good in zip(nodes, intact, strict=True) if not good]
    for node in damaged:
        run.delete(node.folder)
    return len(damaged)


@ray.remote
def _is_intact(run_uri: str, folder: str) -> bool:
    run = RunDirectory(run_uri)
    local = run.fetch(folder)
    try:
        check_sketch(local)
    except SketchError:
        return False
    finally:
        if not run.is_local:
            shutil.rmtree(local)
    return True


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
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)
