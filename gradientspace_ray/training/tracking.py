"""Who is told of every step of a finetune: TensorBoard's event files, MLflow, Weights & Biases.

A tracker that fails warns once and never ends a finetune. Those with a server are told by a thread of their own, so
that no step waits for the network; what a server could not take is kept and sent again.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from gradientspace_ray.training.engine import TrainingError

log = logging.getLogger(__name__)

FLUSH_S = 1.0
"""Seconds from one flush of an event file to the next: each waits for the disk."""
SEND_S, LONGEST_SEND_S = 5.0, 300.0
"""Seconds from one message to a server to the next; twice as long after each that failed in a row, up to this."""
LAST_TRIES, LAST_WAIT_S = 3, 2.0
"""At the end of a finetune, how often what is left is sent, and how far apart."""
CLOSE_S, FAILED_CLOSE_S = 60.0, 5.0
"""How long a finetune waits for that; one that failed, or must yield its machine, has less time."""
MAX_WAITING = 100_000
"""Steps kept for a server that is away, the latest."""
MLFLOW_BATCH, MLFLOW_CHARACTERS = 1000, 6000
"""Metrics that MLflow takes in one request, and characters in one setting."""
MLFLOW_KEY = "gradientspace.key"
"""The tag by which the MLflow run of a finetune is found again."""


class Tracker(Protocol):
    """One place where the steps of a finetune are kept."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of an optimizer step; the first is 1. More values of a step may follow."""
        ...

    def close(self, failed: bool) -> None:
        """Finish what is on its way. `failed`: an exception ends this try of the finetune."""
        ...


class About(NamedTuple):
    """The finetune as trackers know it; see `trackers`."""

    run_name: str
    finetune: str
    key: str
    settings: Mapping[str, Any]
    start_step: int


class Point(NamedTuple):
    """The values of a step, with the time of the epoch in seconds."""

    step: int
    time_s: float
    values: dict[str, float]


class Connection(NamedTuple):
    """A server that has been told of the finetune."""

    send: Callable[[Sequence[Point]], None]
    finish: Callable[[bool], None]
    """Called once, with `failed` of `Tracker.close`."""


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
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
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
        A function of the step, 1 the first, and its values by name.

    Raises:
        TrainingError: the package of a tracker is not installed.
    """
    about = About(run_name, finetune, key, settings, start_step)
    with ExitStack() as stack:
        opened: list[Tracker] = []
        for name in dict.fromkeys(names):
            tracker = TensorBoard(folder, start_step) if name == "tensorboard" else REMOTE[name](about)
            stack.push(lambda kind, error, trace, tracker=tracker: tracker.close(kind is not None))
            opened.append(tracker)

        def tell(step: int, values: Mapping[str, float]) -> None:
            for tracker in opened:
                tracker.log(step, values)

        yield tell


class TensorBoard:
    """Event files, written as the steps come: TensorBoard on their folder is live.

    tensorboardX's own writer has a thread between, and blocks the finetune for ever when that meets a full disk.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._writer: EventsWriter | None = None
        self._flushed = time.monotonic()
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The name begins with the time in seconds: the rest keeps tries of the same second apart.
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{start_step}")
        except OSError as error:
            self._give_up(error)
        # From this step on, TensorBoard forgets what files before this one say.
        self._write(Event(wall_time=time.time(), step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; values are kept as float32."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        if self._writer:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)

    def _write(self, event: Event) -> None:
        if not self._writer:
            return
        try:
            self._writer.write_event(event)
            if time.monotonic() - self._flushed >= FLUSH_S:
                self._writer.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # A record may be half written, after which TensorBoard reads nothing: the file ends here.
        self._writer = None
        log.warning("%s: TensorBoard is told no more (%s); the finetune goes on", self._folder, error)


class Remote:
    """A server that is told of the steps by a thread, which also connects to it and tries again what failed.

    Args:
        name: for warnings.
        connect: tells the server of the finetune.
        failures: what it and the connection raise when the server is away, refuses, or is not set up. Any other
            error ends the thread with a traceback on the log, and not the finetune.
    """

    def __init__(self, name: str, connect: Callable[[], Connection], failures: tuple[type[Exception], ...]) -> None:
        self._name, self._connect, self._failures = name, connect, failures
        self._queue: SimpleQueue[Point | bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; returns at once."""
        self._queue.put(Point(step, time.time(), {name: float(value) for name, value in values.items()}))

    def close(self, failed: bool) -> None:
        """See `Tracker`; waits `CLOSE_S` at most."""
        self._queue.put(failed)
        patience_s = FAILED_CLOSE_S if failed else CLOSE_S
        self._thread.join(patience_s)
        if self._thread.is_alive():
            log.warning("%s did not take the last steps within %.0f s; the finetune goes on", self._name, patience_s)

    def _work(self) -> None:
        waiting: list[Point] = []
        connection: Connection | None = None
        failed: bool | None = None
        last_tries = away = 0
        warned = False
        while failed is None or last_tries < LAST_TRIES:
            if failed is None:
                failed = self._take(waiting, min(SEND_S * 2**away, LONGEST_SEND_S))
            else:
                time.sleep(LAST_WAIT_S)
            last_tries += failed is not None
            try:
                connection = connection or self._connect()
                connection.send(waiting)
                waiting.clear()
                away = 0
                if failed is not None:
                    return connection.finish(failed)
            except self._failures as error:
                del waiting[:-MAX_WAITING]
                away = min(away + 1, 16)
                if not warned:
                    told = str(error).strip().splitlines() or [type(error).__name__]
                    log.warning("%s does not take the steps yet (%s); the finetune goes on", self._name, told[0])
                    warned = True
        log.warning("%s was not told of the last %d steps, or not of the end", self._name, len(waiting))
        return None

    def _take(self, waiting: list[Point], seconds: float) -> bool | None:
        """Move what comes within so many seconds to `waiting`. Returns what `close` was told, once it was called."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                item = self._queue.get(timeout=left)
            except Empty:
                break
            if isinstance(item, bool):
                return item
            waiting.append(item)
        return None


def _mlflow(about: About) -> Remote:
    """MLflow, at `MLFLOW_TRACKING_URI`.

    Raises:
        TrainingError: it is not installed.
    """
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise _missing("mlflow", error) from error

    def find_experiment(client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(about.run_name)
        if experiment:
            return experiment.experiment_id
        try:
            return client.create_experiment(about.run_name)
        except MlflowException:
            # A finetune beside this one may have made it in between.
            experiment = client.get_experiment_by_name(about.run_name)
            if not experiment:
                raise
            return experiment.experiment_id

    def connect() -> Connection:
        client = MlflowClient()
        experiment_id = find_experiment(client)
        found = client.search_runs([experiment_id], f"tags.`{MLFLOW_KEY}` = '{about.key}'", max_results=1)
        tags = {MLFLOW_KEY: about.key}
        run = found[0] if found else client.create_run(experiment_id, tags=tags, run_name=about.finetune)
        run_id = run.info.run_id
        client.update_run(run_id, status="RUNNING")
        if not run.data.params:
            # They are for good: another try may have other workers, and MLflow refuses a second value.
            params = [Param(name, str(value)[:MLFLOW_CHARACTERS]) for name, value in about.settings.items()]
            client.log_batch(run_id, params=params)
        seen = {
            name: max(metric.step for metric in client.get_metric_history(run_id, name)) for name in run.data.metrics
        }

        def send(points: Sequence[Point]) -> None:
            metrics = [
                Metric(name, value, int(1000 * point.time_s), point.step)
                for point in points
                for name, value in point.values.items()
                if point.step > seen.get(name, 0)
            ]
            for first in range(0, len(metrics), MLFLOW_BATCH):
                client.log_batch(run_id, metrics=metrics[first : first + MLFLOW_BATCH])

        def finish(failed: bool) -> None:
            client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

        return Connection(send, finish)

    return Remote("MLflow", connect, (MlflowException, SQLAlchemyError, OSError))


def _wandb(about: About) -> Remote:
    """Weights & Biases, for the account of `WANDB_API_KEY` or `wandb login`; into files where `WANDB_MODE=offline`.

    Raises:
        TrainingError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb", error) from error

    def connect() -> Connection:
        run = wandb.init(
            project=about.run_name,
            name=about.finetune,
            id=about.key,
            resume="allow",
            config=dict(about.settings),
            allow_val_change=True,
            # Another finetune's run in this process, or the recipe's own, is none of this one's business.
            reinit="create_new",
            settings=wandb.Settings(console="off", finish_timeout=CLOSE_S),
        )
        next_step = run.step

        def send(points: Sequence[Point]) -> None:
            for point in points:
                # W&B ignores values of steps behind its last, with a warning for each.
                if point.step >= next_step:
                    run.log(point.values, step=point.step)

        return Connection(send, lambda failed: run.finish(exit_code=int(failed)))

    return Remote("Weights & Biases", connect, (wandb.Error, OSError))


REMOTE: dict[str, Callable[[About], Remote]] = {"mlflow": _mlflow, "wandb": _wandb}


def _missing(name: str, error: ImportError) -> TrainingError:
    return TrainingError(f"trackers: {name} cannot be loaded ({error}); pip install 'gradientspace-ray[{name}]'")
