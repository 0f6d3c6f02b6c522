"""One worker of a finetune, inside of a Ray Train run: it loads, trains, saves checkpoints, and commits the adapter."""

import logging
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from errno import ENOSPC
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
import ray.train.torch
import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict

from gradientspace_ray.models import loading
from gradientspace_ray.models.checkpointing import activation_checkpointing
from gradientspace_ray.models.reading import is_out_of_memory
from gradientspace_ray.recipe import Recipe, TrainingSection, parse_recipe
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.run import RunDirectory, RunError, digest_of
from gradientspace_ray.stages.deepspeed_engine import DeepSpeedEngine
from gradientspace_ray.training import checkpoints
from gradientspace_ray.training.engine import TrainingError, set_weights
from gradientspace_ray.training.finetune import Data, PreemptedError, finetune
from gradientspace_ray.training.loop import Step, Worker
from gradientspace_ray.training.schedule import heldout_part
from gradientspace_ray.training.state import STATE_FILE, CheckpointError, TrainingState, load_state, save_state
from gradientspace_ray.training.tracking import trackers

log = logging.getLogger(__name__)
TRAIN_FILE, ASSIGNMENTS = "examples/train.parquet", "clusters/assignments.parquet"
EXPERTS, CHECKPOINTS, EVENTS = "experts", "checkpoints", "tensorboard"
# The second part of a seed: one recipe seed gives independent orders to the stages.
ORDER_PURPOSE = {"warmup": 1, "experts": 2}
# Mistakes that a second try would repeat, but that one worker of several may meet alone.
LASTING_ERRORS = (loading.ModelError, RunError)


class Finetune(BaseModel):
    """One adapter to train."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    section: Literal["warmup", "experts"]
    """Recipe section that it belongs to."""
    settings: TrainingSection
    """That section's, with what the budget and the cluster decide."""
    cluster: int | None
    """Trained on this cluster; None is the whole training split, or all clusters for the single LoRA."""
    start: str | None
    """Folder of the adapter that it continues; None is a fresh one."""
    key: str
    """Digest of everything that decides the adapter."""
    tokens: int
    """To train on: the largest finetune starts first."""
    steps: int

    @property
    def checkpoints(self) -> str:
        """Folder of its checkpoints in the run directory."""
        return f"{CHECKPOINTS}/{self.name}.{self.key}"


def examples_of(
    run: RunDirectory, section: str, cluster: int | None, heldout_share: float, seed: int, columns: list[str]
) -> tuple[pa.Table, pa.Table]:
    """Columns of what a finetune trains on, and of what it holds out, in the order of the file.

    The single LoRA is measured against the experts, so it sees what they see, part for part: no outlier, whose cluster
    is -1.

    Raises:
        TrainingError: there is nothing to train on.
    """
    grouping = ["group", "prompt"] if heldout_share else []
    table = run.read_table(TRAIN_FILE, columns=list({"id", *columns, *grouping}))
    clusters_N = np.zeros(table.num_rows, dtype=np.int64)
    if section == "experts":
        found = run.read_table(ASSIGNMENTS, columns=["id", "cluster"])
        places = pc.index_in(table["id"], value_set=found["id"].combine_chunks())
        clusters_N = pc.fill_null(pc.take(found["cluster"], places), -1).to_numpy().astype(np.int64)
    heldout_N = np.zeros(table.num_rows, dtype=bool)
    if heldout_share:
        groups = np.array(pc.coalesce(table["group"], table["prompt"]).to_pylist(), dtype=object)
        for place in np.unique(clusters_N[clusters_N >= 0]):
            members = np.flatnonzero(clusters_N == place)
            heldout_N[members[heldout_part(groups[members].tolist(), heldout_share, seed)]] = True
    own_N = clusters_N >= 0 if cluster is None else clusters_N == cluster
    if not own_N.any():
        where = TRAIN_FILE if cluster is None else f"cluster {cluster} of {ASSIGNMENTS}"
        raise TrainingError(f"{run.path()}: {where} holds no training examples; run the stage that makes it again")
    table = table.select(columns)
    return table.filter(pa.array(own_N & ~heldout_N)), table.filter(pa.array(own_N & heldout_N))


def work(config: dict[str, Any]) -> dict[str, str] | None:
    """One worker of a Ray Train run. Returns the error if another try would meet it again; raises any other."""
    recipe, run, plan = parse_recipe(config["recipe"]), RunDirectory(config["run"]), Finetune(**config["finetune"])
    try:
        with _explained(run, plan):
            _train_and_commit(recipe, run, plan, config["board"])
    except PreemptedError as error:
        if ray.train.get_context().get_world_size() > 1:
            # The first worker saves; the others must not end it meanwhile.
            torch.distributed.barrier()
        # So that Ray Train counts no failure, and starts the workers elsewhere at once.
        raise ray.exceptions.RayActorError(error_msg=f"{plan.name}: {error}", preempted=True) from error
    except (TrainingError, *LASTING_ERRORS) as error:
        # The others would wait for a worker that returns; one that raises ends them.
        alone = isinstance(error, (_AloneError, *LASTING_ERRORS))
        if alone and ray.train.get_context().get_world_size() > 1:
            raise
        return {"reason": str(error), "traceback": traceback.format_exc()}
    return None


class _AloneError(TrainingError):
    """One worker of several may meet it alone."""


@contextmanager
def _explained(run: RunDirectory, plan: Finetune) -> Iterator[None]:
    """Say how to mend memory or a disk that is full."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        settings, section = plan.settings, plan.section
        more = "" if settings.checkpointing else f", set {section}.checkpointing"
        raise _AloneError(
            f"out of memory; lower {section}.tokens_per_batch (now {settings.tokens_per_batch}){more}, "
            f"or raise {section}.zero_stage with more {section}.workers"
        ) from error
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        raise _AloneError(f"no space is left for {error.filename or run.path()}; make room there") from error


def _train_and_commit(recipe: Recipe, run: RunDirectory, plan: Finetune, board: Any) -> None:
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size())
    if recipe.compute.device == "cpu":
        torch.set_num_threads(max(1, int(recipe.compute.cpus_per_worker)))
    device = ray.train.torch.get_device() if recipe.compute.device == "cuda" else torch.device("cpu")
    data = _data(run, recipe, plan)
    state = _latest(run, plan, worker)
    start = run.fetch(plan.start) if plan.start else None
    model = checkpoints.load(recipe.model, recipe.lora, recipe.seed, start, device)
    if state:
        set_weights(model, state.weights)
    engine = DeepSpeedEngine(model, plan.settings, loading.as_dtype(recipe.model.compute_dtype), plan.section)
    with (
        activation_checkpointing(model) if plan.settings.checkpointing else nullcontext(),
        _observed(recipe, run, plan, board, state.step if state else 0, worker) as observer,
    ):
        outcome = finetune(
            engine,
            data,
            plan.settings,
            seed=[recipe.seed, ORDER_PURPOSE[plan.section]],
            worker=worker,
            state=state,
            on_step=observer.on_step,
            save=observer.save,
            must_leave=_must_leave,
        )
    if worker.world_rank == 0:
        record = checkpoints.TrainingRecord(
            key=plan.key,
            name=plan.name,
            cluster=plan.cluster,
            examples=len(data.train),
            heldout_examples=len(data.heldout),
            tokens=outcome.tokens,
            steps=outcome.state.step,
            seconds=round(outcome.state.seconds, 2),
            workers=worker.world_size,
            zero_stage=engine.zero_stage,
            losses=list(outcome.state.losses),
            heldout=list(outcome.state.heldout),
            best_step=outcome.state.best_step,
        )
        _commit(run, plan, model, record, outcome.state)
        run.delete(plan.checkpoints)


def _must_leave(step: Step) -> bool:
    """Whether a machine of this finetune is about to go; all workers meet in it."""
    return ray.train.get_preemption_info() is not None


def _data(run: RunDirectory, recipe: Recipe, plan: Finetune) -> Data:
    share = plan.settings.heldout_share
    tables = examples_of(run, plan.section, plan.cluster, share, recipe.seed, ["input_ids", "labels"])
    return Data(*(list(zip(t["input_ids"].to_pylist(), t["labels"].to_pylist(), strict=True)) for t in tables))


def _latest(run: RunDirectory, plan: Finetune, worker: Worker) -> TrainingState | None:
    """The last whole checkpoint, the same one on every worker; None where there is none."""
    for name in reversed(_agreed(run.names(plan.checkpoints), worker)):
        try:
            return load_state(run.fetch(f"{plan.checkpoints}/{name}"))
        except (CheckpointError, RunError) as error:
            log.warning("%s: an earlier checkpoint is taken: %s", plan.name, error)
    return None


def _agreed(names: list[str], worker: Worker) -> list[str]:
    """What the first worker sees, while all of them look at a store that may change."""
    if worker.world_size == 1:
        return names
    shared = [names]
    torch.distributed.broadcast_object_list(shared)
    return shared[0]


class _Silent:
    """What the other workers tell: nothing."""

    def on_step(self, step: Step, heldout: float | None) -> None:
        """See `training.finetune.finetune`."""

    def save(self, state: TrainingState) -> None:
        """See `training.finetune.finetune`."""


class _Observer:
    """Tells of every step, and keeps checkpoints; on the first worker alone."""

    def __init__(
        self, run: RunDirectory, plan: Finetune, board: Any, events: Path, tell: Callable[[int, dict[str, float]], None]
    ) -> None:
        self._run, self._plan, self._board, self._events, self._tell = run, plan, board, events, tell
        self._clock = time.monotonic()

    def on_step(self, step: Step, heldout: float | None) -> None:
        """See `training.finetune.finetune`."""
        before, self._clock = self._clock, time.monotonic()
        values = {"loss": step.loss, "learning_rate": step.learning_rate}
        values["tokens_per_second"] = step.tokens / max(self._clock - before, 1e-9)
        values |= {} if step.grad_norm is None else {"grad_norm": step.grad_norm}
        values |= {} if heldout is None else {"heldout_loss": heldout}
        self._tell(step.number, values)
        note = f"loss {step.loss:.2f}, {values['tokens_per_second']:,.0f} tokens/s"
        self._board.report.remote(self._plan.name, step.number, step.total, note)

    def save(self, state: TrainingState) -> None:
        """See `training.finetune.finetune`; the checkpoint before goes when this one is whole."""
        run, folder = self._run, self._plan.checkpoints
        with run.staged(f"{folder}/{state.step:08d}", last=STATE_FILE) as staged:
            save_state(state, staged)
        run.delete(*(f"{folder}/{name}" for name in run.names(folder)[:-1]))
        self.put_events()

    def put_events(self) -> None:
        """Bring TensorBoard's files to where the run is, unless they are written there."""
        if not self._run.is_local:
            for file in self._events.iterdir():
                self._run.write_bytes(f"{EVENTS}/{self._plan.name}/{file.name}", file.read_bytes())


@contextmanager
def _observed(
    recipe: Recipe, run: RunDirectory, plan: Finetune, board: Any, start_step: int, worker: Worker
) -> Iterator[_Observer | _Silent]:
    if worker.world_rank:
        yield _Silent()
        return
    board.report.remote(plan.name, start_step, plan.steps, "loading")
    folder = f"{EVENTS}/{plan.name}"
    if not start_step:
        run.delete(folder)
    with tempfile.TemporaryDirectory(prefix="gradientspace-") as scratch:
        events = Path(run.path(folder) if run.is_local else scratch)
        with trackers(
            recipe.trackers,
            folder=events,
            run_name=recipe.name,
            finetune=plan.name,
            # One recipe may have two run directories, whose curves are not one.
            key=digest_of([run.uri, plan.key]),
            settings=plan.settings.model_dump(mode="json"),
            start_step=start_step,
        ) as tell:
            observer = _Observer(run, plan, board, events, tell)
            yield observer
        observer.put_events()


def _commit(
    run: RunDirectory,
    plan: Finetune,
    model: PeftModel,
    record: checkpoints.TrainingRecord,
    state: TrainingState,
) -> None:
    """Write the adapter, then give it its name; an expert's holds the digest of its files."""
    moments = state.moments if plan.section == "warmup" else None
    with tempfile.TemporaryDirectory(prefix="gradientspace-") as scratch:
        checkpoints.save(model, state.best or state.weights, record, Path(scratch), moments)
        folder = plan.name
        if plan.cluster is not None:
            folder = f"{EXPERTS}/{plan.name}@{adapter_digest(Path(scratch))}"
        with run.staged(folder, last=checkpoints.RECORD_FILE) as staged:
            shutil.copytree(scratch, staged, dirs_exist_ok=True)
