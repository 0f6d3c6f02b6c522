"""Several finetunes at once: each is a Ray Train run of its own, held by a small launcher task.

One that fails leaves the others alone, and Ctrl-C ends them all. What is committed carries a key, the digest of
everything that decides it: a run that starts again trains only what is missing, each from its last checkpoint.
"""

import os
import re
import shlex
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from gradientspace_ray.errors import one_line
from gradientspace_ray.recipe import ComputeSection, Recipe
from gradientspace_ray.registry import committed_digest
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.stages.finetune_worker import CHECKPOINTS, EXPERTS, LASTING_ERRORS, Finetune, work
from gradientspace_ray.stages.progress import on_this_node, watched_board
from gradientspace_ray.training import checkpoints
from gradientspace_ray.training.engine import TrainingError

FAILURES = "failures"
DEATHS = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""What Ray says of a worker that the system, or its own memory monitor, has killed."""
STOP_TIMEOUT_S = 15.0
TRACKERS_ENV = re.compile(r"(MLFLOW|WANDB)_(?!SERVICE)")
"""What sets the trackers up where the driver runs; their clients are in the workers."""
BROKEN_CONNECTION = ("Connection closed by peer", "Connection reset by peer")
"""What workers say whose fellow has died."""
LAUNCHER_ENV = {
    # The controller asks its workers for news this often; the default of two seconds is long beside a short finetune.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A worker that stands still for ten minutes, the default, keeps all others of its finetune waiting.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    # Finetunes that find no room wait for it; each timeout, a minute by default, is a page of traceback in the log.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    # A recipe may name local files relative to where the driver was started.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def check_room(recipe: Recipe, *sections: str) -> None:
    """Refuse finetunes that a local Ray could only wait for.

    Without RAY_ADDRESS Ray is this machine's alone, see `pipeline.connect`; other clusters may grow.

    Args:
        recipe: what a worker takes, and how many a finetune has.
        sections: `warmup`, `experts`.

    Raises:
        TrainingError: this machine has not as much.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    here = ray.cluster_resources()
    for section in sections:
        workers: int = getattr(recipe, section).workers
        for name, each in _worker_resources(recipe.compute).items():
            if workers * each > here.get(name, 0.0):
                other = ", set compute.device=cpu" if name == "GPU" else ""
                raise TrainingError(
                    f"{section}.workers {workers} x compute.{name.lower()}s_per_worker {each:g} is more than the "
                    f"{here.get(name, 0.0):g} {name}s of this machine; lower one{other}, or join a cluster "
                    "(RAY_ADDRESS)"
                )


def train_missing(
    recipe: Recipe, run: RunDirectory, finetunes: Sequence[Finetune], concurrent: int
) -> dict[str, checkpoints.Committed]:
    """Train every finetune whose adapter is not committed yet. Returns all of them, by name.

    Raises:
        TrainingError: a finetune failed; the others are committed.
    """
    made = {finetune.name: committed(run, finetune) for finetune in finetunes}
    missing = [finetune for finetune in finetunes if made[finetune.name] is None]
    missing.sort(key=lambda finetune: finetune.tokens, reverse=True)
    kept = {finetune.checkpoints for finetune in missing}
    run.delete(FAILURES, *(folder for folder in _checkpoints(run, finetunes) if folder not in kept))
    failures = _run_bounded(recipe, run, missing, concurrent) if missing else {}
    if failures:
        listed = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise TrainingError(
            f"{len(failures)} of {len(finetunes)} finetunes failed ({listed}; tracebacks in {run.path(FAILURES)}); "
            f"mend that, then: gradientspace resume {shlex.quote(run.uri)}, with --set for keys of the recipe"
        )
    run.delete(*_checkpoints(run, finetunes))
    if not run.names(CHECKPOINTS):
        run.delete(CHECKPOINTS)
    made |= {finetune.name: committed(run, finetune) for finetune in missing}
    lost = [name for name, adapter in made.items() if adapter is None]
    if lost:
        raise TrainingError(f"{run.path()}: {', '.join(lost)} was trained but is not there; run again")
    return {name: adapter for name, adapter in made.items() if adapter}


def _checkpoints(run: RunDirectory, finetunes: Sequence[Finetune]) -> list[str]:
    """Folders of checkpoints of this stage, whatever clusters they are of; the warm-up has but the generalist's."""
    alone = [finetune.name for finetune in finetunes if finetune.section == "warmup"]
    names = run.names(CHECKPOINTS)
    return [f"{CHECKPOINTS}/{name}" for name in names if not alone or name.rpartition(".")[0] in alone]


def committed(run: RunDirectory, finetune: Finetune) -> checkpoints.Committed | None:
    """The adapter of this finetune, if one with its key is there and whole."""
    folders = [finetune.name]
    if finetune.cluster is not None:
        folders = [f"{EXPERTS}/{name}" for name in run.names(EXPERTS) if name.rpartition("@")[0] == finetune.name]
    for folder in folders:
        try:
            record = run.read_model(f"{folder}/{checkpoints.RECORD_FILE}", checkpoints.TrainingRecord)
            if record.key != finetune.key:
                continue
            digest = committed_digest(run, folder)
        except RunError:
            # Missing or damaged, as a worker leaves it that is killed on the way: it is trained again.
            continue
        if finetune.cluster is None or folder == f"{EXPERTS}/{finetune.name}@{digest}":
            return checkpoints.Committed(folder, digest, record)
    return None


def _worker_resources(compute: ComputeSection) -> dict[str, float]:
    gpus = {"GPU": compute.gpus_per_worker} if compute.device == "cuda" else {}
    return {"CPU": compute.cpus_per_worker, **gpus}


def _run_bounded(recipe: Recipe, run: RunDirectory, finetunes: Sequence[Finetune], concurrent: int) -> dict[str, str]:
    """Run finetunes in this order, at most `concurrent` at once. Returns the reasons of those that failed, by name."""
    # Ray Train's watchdog asks the State API whether its controller lives, and without this address it asks the newest
    # Ray on the machine: when that is another one, it hears of no such controller and kills the workers.
    environment = LAUNCHER_ENV | {"RAY_API_SERVER_ADDRESS": ray.get_runtime_context().gcs_address}
    trackers_env = {name: value for name, value in os.environ.items() if TRACKERS_ENV.match(name)}
    # Beside the driver, a launcher and its controller die with it, and with no other machine.
    launch = _launch.options(runtime_env={"env_vars": environment}, scheduling_strategy=on_this_node())
    waiting = list(finetunes)
    running: dict[Any, Finetune] = {}
    failures: dict[str, str] = {}
    with watched_board() as board:
        for finetune in finetunes:
            board.report.remote(finetune.name, 0, finetune.steps, "waiting")
        try:
            while waiting or running:
                while waiting and len(running) < concurrent:
                    finetune = waiting.pop(0)
                    running[launch.remote(recipe, run.uri, finetune, board, trackers_env)] = finetune
                done = ray.wait(list(running), num_returns=1)[0][0]
                finetune = running.pop(done)
                failure = _outcome(done)
                if failure:
                    failures[finetune.name] = failure
                    board.begin.remote(finetune.name, 0, finetune.steps)
                    board.report.remote(finetune.name, 0, finetune.steps, f"failed: {failure}")
        finally:
            # Only Ctrl-C or an error leaves any.
            _stop(list(running))
    return failures


def _outcome(launcher: Any) -> str | None:
    try:
        return ray.get(launcher)
    except ray.exceptions.RayError as error:
        return one_line(error)


def _stop(launchers: list[Any]) -> None:
    """End launchers with their trainers, workers and reservations."""
    for launcher in launchers:
        # As Ctrl-C in the launcher: it aborts its trainer, which frees what it holds.
        ray.cancel(launcher, recursive=False)
    left = ray.wait(launchers, num_returns=len(launchers), timeout=STOP_TIMEOUT_S)[1] if launchers else []
    for launcher in left:
        ray.cancel(launcher, force=True)


@ray.remote(num_cpus=0, max_retries=0)
def _launch(recipe: Recipe, run_uri: str, finetune: Finetune, board: Any, environment: dict[str, str]) -> str | None:
    """Hold one Ray Train run until it ends. Returns the reason in one line if it failed."""
    run = RunDirectory(run_uri)
    # Ray Train keeps its own checkpoints there; it is given none, and a mark is all that it leaves.
    with tempfile.TemporaryDirectory(prefix="gradientspace-") as storage:
        trainer = _trainer(recipe, run_uri, finetune, board, environment, storage)
        try:
            failure = Retrying(
                # Its controller has died, or met a death while the workers were starting.
                retry=retry_if_exception_type((ray.train.ControllerError, ray.exceptions.RayActorError)),
                stop=stop_after_attempt(1 + recipe.compute.retries),
                reraise=True,
            )(trainer.fit).return_value  # type: ignore[attr-defined]
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            return _noted(run, finetune, traceback.format_exc(), _reason(error, finetune))
    return _noted(run, finetune, failure["traceback"], failure["reason"]) if failure else None


def _noted(run: RunDirectory, finetune: Finetune, log: str, reason: str) -> str:
    """Keep the traceback where there is room for it. Returns the reason."""
    try:
        run.write_bytes(f"{FAILURES}/{finetune.name}.log", log.encode())
    except OSError as error:
        return f"{reason} (the traceback could not be kept: {error})"
    return reason


# The type checker reads ray.train's old interface: the ignored lines are of the new one, which runs.
def _trainer(
    recipe: Recipe, run_uri: str, finetune: Finetune, board: Any, environment: dict[str, str], storage: str
) -> TorchTrainer:
    compute = recipe.compute
    on_gpu = compute.device == "cuda"
    return TorchTrainer(
        work,  # type: ignore[arg-type]
        # Plain values: the controller reads them too, and need not import what the workers do.
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "run": run_uri,
            "finetune": finetune.model_dump(mode="json"),
            "board": board,
            # Not in the runtime environment, which Ray shows: there are keys among them.
            "environment": environment,
        },
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=finetune.settings.workers, use_gpu=on_gpu, resources_per_worker=_worker_resources(compute)
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"{recipe.name}-{finetune.name}-{finetune.key}",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=compute.retries),
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": compute.device}},
        ),
    )


def _reason(error: Exception, finetune: Finetune) -> str:
    """What the worker that failed first said, in one line: it takes the others with it."""
    failures = list((getattr(error, "worker_failures", None) or {0: error}).values())
    causes = [_cause(failure) for failure in failures]
    explained = next((cause for cause in causes if isinstance(cause, (TrainingError, *LASTING_ERRORS))), None)
    if explained:
        return one_line(explained)
    dead = next((cause for cause in causes if isinstance(cause, DEATHS)), None)
    if dead:
        mend = f"lower {finetune.section}.tokens_per_batch or experts.max_concurrent"
        return f"a worker died ({one_line(dead)}); if memory ran out, {mend}"
    causes.sort(key=lambda cause: any(sign in str(cause) for sign in BROKEN_CONNECTION))
    return one_line(causes[0])


def _cause(failure: Exception) -> Exception:
    """What Ray Train has wrapped: the worker's own error, or that it is dead."""
    for name in ("_base_exc", "health_check_failure"):
        failure = getattr(failure, name, failure)
    return failure
