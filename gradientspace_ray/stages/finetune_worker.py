"""One worker of a finetune, inside of a Ray Train run: it loads, trains, saves checkpoints, and commits the adapter."""

import logging
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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
from safetensors import SafetensorError

from gradientspace_ray.examples.packing import Example
from gradientspace_ray.examples.splits import hashed_position
from gradientspace_ray.models import loading
from gradientspace_ray.models.attention import UnsupportedModelError
from gradientspace_ray.models.checkpointing import activation_checkpointing
from gradientspace_ray.models.moments import MomentsError, load_moments
from gradientspace_ray.models.reading import is_out_of_memory
from gradientspace_ray.recipe import Recipe, parse_recipe
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.run import RunDirectory, RunError, digest_of
from gradientspace_ray.stages.deepspeed_engine import DeepSpeedEngine
from gradientspace_ray.training import checkpoints
from gradientspace_ray.training.budget import TrainingSettings
from gradientspace_ray.training.engine import TrainingError, set_weights
from gradientspace_ray.training.finetune import Data, PreemptedError, finetune
from gradientspace_ray.training.loop import Step, Worker
from gradientspace_ray.training.state import STATE_FILE, CheckpointError, TrainingState, load_state, save_state
from gradientspace_ray.training.tracking import TrackerError, trackers

log = logging.getLogger(__name__)
TRAIN_FILE, ASSIGNMENTS = "examples/train.parquet", "clusters/assignments.parquet"
EXPERTS, CHECKPOINTS, EVENTS = "experts", "checkpoints", "tensorboard"
HELD_OUT = "held out: "
"""Purpose of a hash, see `hashed_position`."""
# The second part of a seed: one recipe seed gives independent orders to the stages.
ORDER_PURPOSE = {"warmup": 1, "experts": 2}
# Mistakes that a second try would repeat, but that one worker of several may meet alone.
LASTING_ERRORS = (loading.ModelError, MomentsError, UnsupportedModelError, RunError)


class Finetune(BaseModel):
    """One adapter to train."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    section: Literal["warmup", "experts"]
    """Recipe section that it belongs to."""
    settings: TrainingSettings
    """That section's, with what the budget and the cluster decide."""
    cluster: int | None
    """Trained on this cluster; None is the whole training split, or all clusters for the single LoRA."""
    start: str | None
    """Folder of the finetune that it continues; None begins with a fresh adapter."""
    cosine: tuple[float, float]
    """The part of the cosine that its learning rate goes along."""
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
    recipe: Recipe, run: RunDirectory, section: str, cluster: int | None, columns: list[str]
) -> tuple[pa.Table, pa.Table]:
    """Columns of what a finetune trains on, and of what it holds out, in the order of the file.

    The generalist trains on nothing that an expert holds out, or the expert's loss there would be of what it knows. The
    single LoRA is measured against the experts, so it sees what they see: no outlier, whose cluster is -1. A cluster
    that would be held out as a whole is trained on as a whole, by both.

    Args:
        recipe: its `heldout_share` of both sections counts.
        run: examples, and clusters unless the section is `warmup`.
        section: `warmup` or `experts`.
        cluster: None for all.
        columns: of `examples/train.parquet`.

    Raises:
        TrainingError: there is nothing to train on.
    """
    share = getattr(recipe, section).heldout_share
    most = max(recipe.warmup.heldout_share, recipe.experts.heldout_share) if section == "warmup" else share
    table = run.read_table(TRAIN_FILE, columns=list({"id", *columns, *(["split_key"] if most else [])}))
    own_N = np.ones(table.num_rows, dtype=bool)
    position_N = np.ones(table.num_rows)
    if most:
        position_N = np.array([hashed_position(key, HELD_OUT) for key in table["split_key"].to_pylist()])
    if section == "experts":
        found = run.read_table(ASSIGNMENTS, columns=["id", "cluster"])
        places = pc.index_in(table["id"], value_set=found["id"].combine_chunks())
        clusters_N = pc.fill_null(pc.take(found["cluster"], places), -1).to_numpy()
        own_N = clusters_N >= 0 if cluster is None else clusters_N == cluster
        trained = np.unique(clusters_N[position_N >= share])
        position_N[~np.isin(clusters_N, trained)] = 1
    trained_N = own_N & (position_N >= most)
    if not trained_N.any():
        where = TRAIN_FILE if cluster is None else f"cluster {cluster} of {ASSIGNMENTS}"
        mend = "lower the heldout_share of warmup and experts" if own_N.any() else "run the stage that makes it again"
        raise TrainingError(f"{run.path()}: {where} holds no training examples; {mend}")
    table = table.select(columns)
    return table.filter(pa.array(trained_N)), table.filter(pa.array(own_N & (position_N < share)))


def work(config: dict[str, Any]) -> dict[str, str] | None:
    """One worker of a Ray Train run. Returns the error if another try would meet it again; raises any other."""
    os.environ.update(config["environment"])
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
        alone = isinstance(error, (_AloneError, TrackerError, *LASTING_ERRORS))
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
    except (OSError, SafetensorError) as error:
        # safetensors has errors of its own for what the system says.
        if getattr(error, "errno", None) != ENOSPC and os.strerror(ENOSPC) not in str(error):
            raise
        place = getattr(error, "filename", None) or f"{run.path()} or {tempfile.gettempdir()}"
        raise _AloneError(f"no space is left for {place}; make room there") from error


def _train_and_commit(recipe: Recipe, run: RunDirectory, plan: Finetune, board: Any) -> None:
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size())
    if recipe.compute.device == "cpu":
        torch.set_num_threads(max(1, int(recipe.compute.cpus_per_worker)))
    device = ray.train.torch.get_device() if recipe.compute.device == "cuda" else torch.device("cpu")
    data = _data(run, recipe, plan)
    state = _latest(run, plan, worker)
    if worker.world_rank == 0:
        done = state.step if state else 0
        board.begin.remote(plan.name, done, plan.steps)
        board.report.remote(plan.name, done, plan.steps, "loading")
    start = run.fetch(plan.start) if plan.start else None
    moments = load_moments(start) if start and not state else None
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
            cosine=plan.cosine,
            moments=moments,
            keep_best_moments=plan.section == "warmup",
            worker=worker,
            state=state,
            must_leave=_must_leave,
            on_step=observer.on_step if observer else None,
            save=observer.save if observer else None,
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
        # One that stopped early is done, too.
        board.report.remote(plan.name, record.steps, record.steps, f"loss {record.losses[-1]:.2f}")


def _must_leave(step: Step) -> bool:
    """Whether a machine of this finetune is about to go; all workers meet in it."""
    return ray.train.get_preemption_info() is not None


def _data(run: RunDirectory, recipe: Recipe, plan: Finetune) -> Data:
    train, heldout = examples_of(recipe, run, plan.section, plan.cluster, ["input_ids", "labels"])
    return Data(_Examples(train), _Examples(heldout))


class _Examples(Sequence[Example]):
    """Examples that stay in Arrow's memory until a step asks for them: as Python's numbers they take ten times more."""

    def __init__(self, table: pa.Table) -> None:
        self._input_ids, self._labels = table["input_ids"], table["labels"]

    def __len__(self) -> int:
        return len(self._input_ids)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # nobody slices
        return self._input_ids[index].as_py(), self._labels[index].as_py()


def _latest(run: RunDirectory, plan: Finetune, worker: Worker) -> TrainingState | None:
    """The last whole checkpoint, which the first worker reads for all of them; None where there is none."""
    found = [_read_latest(run, plan) if worker.world_rank == 0 else None]
    if worker.world_size > 1:
        torch.distributed.broadcast_object_list(found)
    return found[0]


def _read_latest(run: RunDirectory, plan: Finetune) -> TrainingState | None:
    for name in reversed(run.names(plan.checkpoints)):
        try:
            return load_state(run.fetch(f"{plan.checkpoints}/{name}"))
        except (CheckpointError, RunError) as error:
            log.warning("%s: an earlier checkpoint is taken: %s", plan.name, error)
    return None


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
        """See `training.finetune.finetune`; the checkpoint before stays beside this one, and those before it go."""
        run, folder, name = self._run, self._plan.checkpoints, f"{state.step:08d}"
        with run.staged(f"{folder}/{name}", last=STATE_FILE) as staged:
            save_state(state, staged)
        # Not what is above: a worker of an earlier try may still live, and this one saves less than its successors.
        earlier = [other for other in run.names(folder) if other < name]
        # A machine that loses power may leave the newest one damaged.
        run.delete(*(f"{folder}/{other}" for other in earlier[:-1]))
        self.put_events()

    def put_events(self) -> None:
        """Bring TensorBoard's files to where the run is, unless they are written there."""
        if self._run.is_local:
            return
        try:
            for file in self._events.iterdir():
                self._run.write_bytes(f"{EVENTS}/{self._plan.name}/{file.name}", file.read_bytes())
        except OSError as error:
            log.warning("%s: curves are not in the run directory yet: %s", self._plan.name, error)


@contextmanager
def _observed(
    recipe: Recipe, run: RunDirectory, plan: Finetune, board: Any, start_step: int, worker: Worker
) -> Iterator[_Observer | None]:
    """What tells of the steps, on the first worker; None on the others."""
    if worker.world_rank:
        yield None
        return
    folder = f"{EVENTS}/{plan.name}"
    if not start_step:
        run.delete(folder)
    with tempfile.TemporaryDirectory(prefix="gradientspace-") as scratch:
        observer = None
        try:
            with trackers(
                recipe.trackers,
                folder=(events := Path(run.path(folder) if run.is_local else scratch)),
                run_name=recipe.name,
                finetune=plan.name,
                # One recipe may have two run directories, whose curves are not one.
                key=digest_of([run.uri, plan.key]),
                settings=plan.settings.model_dump(mode="json"),
                start_step=start_step,
            ) as tell:
                observer = _Observer(run, plan, board, events, tell)
                yield observer
        finally:
            if observer:
                observer.put_events()


def _commit(
    run: RunDirectory,
    plan: Finetune,
    model: PeftModel,
    record: checkpoints.TrainingRecord,
    state: TrainingState,
) -> None:
    """Write the adapter, then give it its name; an expert's holds the digest of its files."""
    moments = (state.best_moments or state.moments) if plan.section == "warmup" else None
    with tempfile.TemporaryDirectory(prefix="gradientspace-") as scratch:
        checkpoints.save(model, state.best or state.weights, record, Path(scratch), moments)
        folder = plan.name
        if plan.cluster is not None:
            folder = f"{EXPERTS}/{plan.name}@{adapter_digest(Path(scratch))}"
        with run.staged(folder, last=checkpoints.RECORD_FILE) as staged:
            shutil.copytree(scratch, staged, dirs_exist_ok=True)
