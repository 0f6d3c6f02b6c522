"""Who is told of every step of a finetune: TensorBoard's event files, MLflow, Weights & Biases.

A tracker that fails warns once, is told no more, and never ends a finetune.
"""

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from gradientspace_ray.training.engine import TrainingError

log = logging.getLogger(__name__)

FLUSH_S, SEND_S = 1.0, 5.0
"""Seconds from one flush of an event file, and from one request to MLflow, to the next: the finetune waits for each."""
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}
"""Where the environment does not say: by default MLflow holds a finetune for minutes when its server is away."""
MLFLOW_KEY = "gradientspace.key"
"""The tag by which the MLflow run of a finetune is found again."""
WANDB_FINISH_S = 60.0
"""How long a finetune waits at its end for W&B's process, which by default tries for ever."""

Tell = Callable[[int, Mapping[str, float]], None]


class Tracker(NamedTuple):
    """One place where the steps of a finetune are kept; `close` is told whether an exception ends this try."""

    tell: Tell
    close: Callable[[bool], None]


class TrackerError(TrainingError):
    """A tracker that is not there; of several workers, only the first one tells trackers."""


def check_trackers(names: Sequence[str]) -> None:
    """Look for the packages of trackers, without loading them.

    Raises:
        TrackerError: one is not installed.
    """
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise _missing(name, "not installed")


@contextmanager
def trackers(
    names: Sequence[str],
    *,
    folder: Path,
    run_name: str,
    finetune: str,
    key: str,
    settings: Mapping[str, Any],
    start_step: int = 0,
) -> Iterator[Tell]:
    """Open trackers for one try of a finetune, and close them whatever happens.

    A try that goes on from a checkpoint repeats the steps that an earlier one made beyond it. TensorBoard forgets the
    earlier ones; MLflow and W&B forget nothing, and keep the first value that they got for a step.

    Args:
        names: of the recipe's `trackers`; MLflow and W&B are set up by their own environment variables.
        folder: where TensorBoard's event files of the finetune are written, on this machine.
        run_name: W&B's project and MLflow's experiment.
        finetune: the name in them.
        key: decides which run of W&B and of MLflow is continued; all tries of a finetune have the same.
        settings: shown beside the curves; plain values.
        start_step: steps done before this try.

    Yields:
        A function of the step, 1 the first, and its values by name; more values of a step may follow.

    Raises:
        TrackerError: the package of a tracker is not installed.
    """
    check_trackers(names)
    start: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: _tensorboard(folder, start_step),
        "mlflow": lambda: _mlflow(run_name, finetune, key, settings),
        "wandb": lambda: _wandb(run_name, finetune, key, settings),
    }
    opened: dict[str, Tracker] = {}

    def attempt(name: str, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except ImportError as error:
            raise _missing(name, error) from error
        except _failures(name) as error:
            opened.pop(name, None)
            told = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("finetune %s: %s is told no more (%s); the finetune goes on", finetune, name, told[0])

    def tell(step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(opened.items()):
            attempt(name, tracker.tell, step, {tag: float(value) for tag, value in values.items()})

    failed = True
    try:
        for name in dict.fromkeys(names):
            if tracker := attempt(name, start[name]):
                opened[name] = tracker
        yield tell
        failed = False
    finally:
        for name, tracker in list(opened.items()):
            attempt(name, tracker.close, failed)


def _missing(name: str, reason: object) -> TrackerError:
    return TrackerError(f"trackers: {name} cannot be loaded ({reason}); pip install 'gradientspace-ray[{name}]'")


def _failures(name: str) -> tuple[type[Exception], ...]:
    """What a tracker raises when the disk is full, or the server is away, refuses, or is not set up."""
    if name == "wandb":
        from wandb import Error

        return Error, OSError
    if name == "mlflow":
        from mlflow import MlflowException

        # What opening a database raises is passed on by MLflow, which has loaded this by then; a server needs none.
        database = sys.modules.get("sqlalchemy.exc")
        return (MlflowException, OSError, database.SQLAlchemyError) if database else (MlflowException, OSError)
    return (OSError,)


def _tensorboard(folder: Path, start_step: int) -> Tracker:
    """Event files, flushed as the steps come: TensorBoard on their folder is live. Values are kept as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not SummaryWriter, whose thread ends on a full disk: its queue then blocks the finetune for ever. The file's name
    # begins with the time in seconds; the rest keeps tries of the same second apart.
    writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{start_step}")
    flushed = time.monotonic()
    # From this step on, TensorBoard forgets what files before this one say.
    begin = SessionLog(status=SessionLog.START)
    writer.write_event(Event(wall_time=time.time(), step=start_step + 1, session_log=begin))

    def tell(step: int, values: Mapping[str, float]) -> None:
        nonlocal flushed
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - flushed >= FLUSH_S:
            writer.flush()
            flushed = time.monotonic()

    return Tracker(tell, lambda failed: writer.close())


def _mlflow(run_name: str, finetune: str, key: str, settings: Mapping[str, Any]) -> Tracker:
    """A run at `MLFLOW_TRACKING_URI`."""
    from mlflow import MlflowClient, set_experiment
    from mlflow.entities import Metric, Param

    for variable, value in MLFLOW_PATIENCE.items():
        os.environ.setdefault(variable, value)
    client = MlflowClient()
    # Unlike the client's own call, this one stands another finetune that makes the experiment at the same time.
    experiment_id = set_experiment(run_name).experiment_id
    found = client.search_runs([experiment_id], f"tags.`{MLFLOW_KEY}` = '{key}'", max_results=1)
    run = found[0] if found else client.create_run(experiment_id, tags={MLFLOW_KEY: key}, run_name=finetune)
    run_id = run.info.run_id
    client.update_run(run_id, status="RUNNING")
    if not run.data.params:
        # They are for good: another try may have other workers, and MLflow refuses a second value.
        client.log_batch(run_id, params=[Param(name, str(value)) for name, value in settings.items()])
    seen = {tag: max(metric.step for metric in client.get_metric_history(run_id, tag)) for tag in run.data.metrics}
    waiting, sent = list[Metric](), time.monotonic()

    def send() -> None:
        nonlocal sent
        client.log_batch(run_id, metrics=waiting)
        waiting.clear()
        sent = time.monotonic()

    def tell(step: int, values: Mapping[str, float]) -> None:
        now_ms = int(1000 * time.time())
        waiting.extend(Metric(tag, value, now_ms, step) for tag, value in values.items() if step > seen.get(tag, 0))
        if time.monotonic() - sent >= SEND_S:
            send()

    def close(failed: bool) -> None:
        send()
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    return Tracker(tell, close)


def _wandb(run_name: str, finetune: str, key: str, settings: Mapping[str, Any]) -> Tracker:
    """A run for the account of `WANDB_API_KEY` or `wandb login`; in files where `WANDB_MODE=offline`."""
    import wandb

    run = wandb.init(
        project=run_name,
        name=finetune,
        id=key,
        resume="allow",
        config=dict(settings),
        allow_val_change=True,
        # Another finetune's run in this process, or the recipe's own, is none of this one's business.
        reinit="create_new",
        settings=wandb.Settings(console="off", finish_timeout=WANDB_FINISH_S),
    )
    next_step = run.step

    def tell(step: int, values: Mapping[str, float]) -> None:
        # W&B ignores values of steps behind its last, with a warning for each.
        if step >= next_step:
            run.log(dict(values), step=step)

    return Tracker(tell, lambda failed: run.finish(exit_code=int(failed)))
