"""The finetunes: the generalist (warmup), the experts, and the single LoRA. Ray Train runs them, DeepSpeed steps them.

Every finetune is a Ray Train run of its own. A small launcher task holds it, so that several run side by side, one that
fails leaves the others alone, and Ctrl-C ends them all. What is committed carries a key, the digest of everything that
decides it: a run that starts again trains only what is missing.
"""

import dataclasses
import logging
import shutil
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray
import ray.train
import torch
from peft import PeftModel
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from gradientspace_ray.errors import one_line
from gradientspace_ray.models import loading
from gradientspace_ray.models.fingerprint import model_fingerprint
from gradientspace_ray.models.moments import AdamMoments
from gradientspace_ray.recipe import Recipe, TrainingSection, parse_recipe
from gradientspace_ray.registry import adapter_digest, committed_digest
from gradientspace_ray.run import RunDirectory, RunError, Summary, digest_of
from gradientspace_ray.stages.progress import watched_board
from gradientspace_ray.training import checkpoints, loop
from gradientspace_ray.training.loop import TrainingError
from gradientspace_ray.training.schedule import plan_steps

TRAIN_FILE, ASSIGNMENTS, QUALITY = "examples/train.parquet", "clusters/assignments.parquet", "clusters/quality.json"
GENERALIST, EXPERTS, SINGLE_LORA = "generalist", "experts", "single_lora"
SCRATCH, FAILURES = ".staging/train", "failures"
STOP_TIMEOUT_S = 15.0
# The second part of a seed: one recipe seed gives independent orders to the stages.
ORDER_PURPOSE = {"warmup": 1, "experts": 2}
NOT_IN_KEY = {"max_concurrent", "single_lora", "tokens_per_batch"}
# Mistakes that a second try would repeat, but that one worker of several may meet alone.
LASTING_ERRORS = (loading.ModelError, RunError)
LAUNCHER_ENV = {
    # The controller asks its workers for news this often; the default of two seconds is long beside a short finetune.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A recipe may name local files relative to where the driver was started.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Nothing here answers a preemption notice, and each watcher is a process.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@dataclass(frozen=True)
class Finetune:
    """One adapter to train."""

    name: str
    section: str
    """Recipe section with its settings: `warmup` or `experts`."""
    cluster: int | None
    """Trained on this cluster; None is the whole training split, or all clusters for the single LoRA."""
    start: str | None
    """Folder of the adapter that it continues; None is a fresh one."""
    key: str
    tokens: int
    """Tokens of one epoch: the largest finetune starts first."""
    steps: int


def warmup(recipe: Recipe, run: RunDirectory) -> Summary:
    """Train the generalist on the whole training split, and commit it as `generalist/`.

    Raises:
        TrainingError: the finetune failed.
    """
    finetune = _plan(recipe, run, GENERALIST, "warmup", None, None)
    made = _train_missing(recipe, run, [finetune], 1)[GENERALIST]
    record = made.record
    return Summary(
        made=f"generalist from {record.examples} examples, loss {record.losses[0]:.2f} to {record.losses[-1]:.2f}",
        counts={"examples": record.examples, "steps": record.steps, "tokens": record.tokens},
        output=made.digest,
    )


def experts(recipe: Recipe, run: RunDirectory) -> Summary:
    """Continue the generalist on every cluster, and on all of them together for the single LoRA.

    Commits `experts/<name>@<digest>/` and `single_lora/`. What another recipe or clustering left there is removed.

    Raises:
        TrainingError: a finetune failed; the others are committed.
    """
    names = run.read_json(QUALITY)["names"]
    finetunes = [_plan(recipe, run, name, "experts", cluster, GENERALIST) for cluster, name in enumerate(names)]
    if recipe.experts.single_lora:
        finetunes.append(_plan(recipe, run, SINGLE_LORA, "experts", None, GENERALIST))
    made = _train_missing(recipe, run, finetunes, recipe.experts.max_concurrent)
    folders = {adapter.folder for adapter in made.values()}
    for folder in [*(f"{EXPERTS}/{name}" for name in run.names(EXPERTS)), SINGLE_LORA]:
        if folder not in folders:
            run.delete(folder)
    records = {name: adapter.record for name, adapter in made.items() if name != SINGLE_LORA}
    baseline = " and the single LoRA" if recipe.experts.single_lora else ""
    return Summary(
        made=f"{len(records)} experts{baseline}: {', '.join(records)}",
        counts={
            "experts": len(records),
            "steps": sum(record.steps for record in records.values()),
            "tokens": sum(record.tokens for record in records.values()),
        },
        output=digest_of({adapter.folder: adapter.digest for adapter in made.values()}),
        outputs=tuple(sorted(folders)),
    )


def _plan(
    recipe: Recipe, run: RunDirectory, name: str, section: str, cluster: int | None, start: str | None
) -> Finetune:
    table = _examples(run, section, cluster, ["id", "tokens"])
    settings: TrainingSection = getattr(recipe, section)
    key = {
        "name": name,
        "seed": recipe.seed,
        "model": [recipe.model.model_dump(mode="json"), model_fingerprint(recipe.model.name)],
        "lora": recipe.lora.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json", exclude=NOT_IN_KEY),
        "examples": table["id"].to_pylist(),
        "start": committed_digest(run, start) if start else None,
    }
    steps = len(_steps(recipe.seed, section, settings, table.num_rows))
    return Finetune(name, section, cluster, start, digest_of(key), pc.sum(table["tokens"]).as_py(), steps)


def _steps(seed: int, section: str, settings: TrainingSection, count: int) -> list[list[int]]:
    return plan_steps(count, settings.examples_per_step, settings.epochs, [seed, ORDER_PURPOSE[section]])


def _examples(run: RunDirectory, section: str, cluster: int | None, columns: list[str]) -> Any:
    """Columns of what a finetune trains on, as an Arrow table in the order of the file.

    The single LoRA is measured against the experts, so it sees what they see: no outlier, whose cluster is -1.
    """
    table = run.read_table(TRAIN_FILE, columns=list({"id", *columns}))
    if section == "experts":
        found = run.read_table(ASSIGNMENTS)
        own = pc.greater_equal(found["cluster"], 0) if cluster is None else pc.equal(found["cluster"], cluster)
        table = table.filter(pc.is_in(table["id"], value_set=found["id"].filter(own).combine_chunks()))
    if table.num_rows == 0:
        where = TRAIN_FILE if cluster is None else f"cluster {cluster} of {ASSIGNMENTS}"
        raise TrainingError(f"{run.path()}: {where} holds no training examples; run the stage that makes it again")
    return table.select(columns)


def _train_missing(
    recipe: Recipe, run: RunDirectory, finetunes: Sequence[Finetune], concurrent: int
) -> dict[str, checkpoints.Committed]:
    """Train every finetune whose adapter is not committed yet. Returns all of them, by name."""
    made = {finetune.name: _committed(run, finetune) for finetune in finetunes}
    missing = [finetune for finetune in finetunes if made[finetune.name] is None]
    missing.sort(key=lambda finetune: finetune.tokens, reverse=True)
    run.delete(FAILURES)
    failures = _run_bounded(recipe, run, missing, concurrent) if missing else {}
    run.delete(SCRATCH)
    if failures:
        listed = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise TrainingError(
            f"{len(failures)} of {len(finetunes)} finetunes failed ({listed}; tracebacks in {run.path(FAILURES)}); "
            "mend that and run again, what is finished is kept"
        )
    made |= {finetune.name: _committed(run, finetune) for finetune in missing}
    lost = [name for name, adapter in made.items() if adapter is None]
    if lost:
        raise TrainingError(f"{run.path()}: {', '.join(lost)} was trained but is not there; run again")
    return {name: adapter for name, adapter in made.items() if adapter}


def _committed(run: RunDirectory, finetune: Finetune) -> checkpoints.Committed | None:
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


def _run_bounded(recipe: Recipe, run: RunDirectory, finetunes: Sequence[Finetune], concurrent: int) -> dict[str, str]:
    """Run finetunes in this order, at most `concurrent` at once. Returns the reasons of those that failed, by name."""
    # Ray Train's watchdog asks the State API whether its controller lives, and without this address it asks the newest
    # Ray on the machine: when that is another one, it hears of no such controller and kills the workers.
    environment = LAUNCHER_ENV | {"RAY_API_SERVER_ADDRESS": ray.get_runtime_context().gcs_address}
    launch = _launch.options(runtime_env={"env_vars": environment})
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
                    running[launch.remote(recipe, run.uri, finetune, board)] = finetune
                done = ray.wait(list(running), num_returns=1)[0][0]
                finetune = running.pop(done)
                failure = _outcome(done)
                if failure:
                    failures[finetune.name] = failure
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


# The type checker reads ray.train's old interface: the three ignored lines are of the new one, which runs.
@ray.remote(num_cpus=0, max_retries=0)
def _launch(recipe: Recipe, run_uri: str, finetune: Finetune, board: Any) -> str | None:
    """Hold one Ray Train run until it ends. Returns the reason in one line if it failed."""
    run = RunDirectory(run_uri)
    compute, settings = recipe.compute, getattr(recipe, finetune.section)
    on_gpu = compute.device == "cuda"
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if on_gpu else {})
    trainer = TorchTrainer(
        _finetune,  # type: ignore[arg-type]
        # Plain values: the controller reads them too, and need not import what the workers do.
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "run": run_uri,
            "finetune": dataclasses.asdict(finetune),
            "board": board,
        },
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"{recipe.name}-{finetune.name}-{finetune.key}",
            storage_path=run.uri_of(SCRATCH),
            failure_config=FailureConfig(max_failures=compute.retries),
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": compute.device}},
        ),
    )
    try:
        failure = trainer.fit().return_value  # type: ignore[attr-defined]
    except ray.train.TrainingFailedError as error:
        run.write_bytes(f"{FAILURES}/{finetune.name}.log", traceback.format_exc().encode())
        return _reason(error)
    if failure:
        run.write_bytes(f"{FAILURES}/{finetune.name}.log", failure["traceback"].encode())
        return failure["reason"]
    return None


def _reason(error: ray.train.TrainingFailedError) -> str:
    """What the first failed worker said last, in one line."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    return one_line(next(iter(failures.values())))


def _finetune(config: dict[str, Any]) -> dict[str, str] | None:
    """One worker of a Ray Train run. Returns the error if another try would meet it again; raises any other."""
    try:
        _train_and_commit(
            parse_recipe(config["recipe"]),
            RunDirectory(config["run"]),
            Finetune(**config["finetune"]),
            config["board"],
        )
    except (TrainingError, *LASTING_ERRORS) as error:
        # The others would wait for a worker that returns; one that raises ends them.
        if isinstance(error, LASTING_ERRORS) and ray.train.get_context().get_world_size() > 1:
            raise
        return {"reason": str(error), "traceback": traceback.format_exc()}
    return None


def _train_and_commit(recipe: Recipe, run: RunDirectory, finetune: Finetune, board: Any) -> None:
    started = time.monotonic()
    context = ray.train.get_context()
    settings: TrainingSection = getattr(recipe, finetune.section)
    if recipe.compute.device == "cpu":
        torch.set_num_threads(max(1, int(recipe.compute.cpus_per_worker)))
    device = ray.train.torch.get_device() if recipe.compute.device == "cuda" else torch.device("cpu")
    table = _examples(run, finetune.section, finetune.cluster, ["input_ids", "labels"])
    examples = list(zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True))
    start = run.fetch(finetune.start) if finetune.start else None
    model = checkpoints.load(recipe.model, recipe.lora, recipe.seed, start, device)
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    # DeepSpeed picks its accelerator when it is imported, and only a worker's environment names the right one.
    deepspeed = import_module("deepspeed")
    engine = build_engine(deepspeed, model, trainable, settings, loading.as_dtype(recipe.model.compute_dtype))
    first = context.get_world_rank() == 0

    def on_step(step: int, total: int, loss: float) -> None:
        if first:
            board.report.remote(finetune.name, step, total, f"loss {loss:.2f}")

    outcome = loop.train(
        engine,
        examples,
        _steps(recipe.seed, finetune.section, settings, len(examples)),
        peak=settings.learning_rate,
        warmup_share=settings.warmup_share,
        tokens_per_batch=settings.tokens_per_batch,
        world_rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        on_step=on_step,
    )
    record = checkpoints.TrainingRecord(
        key=finetune.key,
        name=finetune.name,
        cluster=finetune.cluster,
        examples=len(examples),
        tokens=outcome.tokens,
        steps=len(outcome.losses),
        seconds=round(time.monotonic() - started, 2),
        workers=context.get_world_size(),
        zero_stage=engine.zero_optimization_stage(),
        losses=outcome.losses,
    )
    moments = None
    if finetune.start is None:
        # Under ZeRO a worker holds a part of the optimizer's state; all take part in gathering it.
        full_state = deepspeed.utils.safe_get_full_optimizer_state
        moments = checkpoints.gather_moments(model, engine.basic_optimizer, full_state)
    # Under ZeRO 3 a worker holds a part of every weight; all take part in gathering them.
    with deepspeed.zero.GatheredParameters(trainable, enabled=engine.zero_optimization_stage() == 3):
        if first:
            _commit(run, finetune, model, record, moments)


def build_engine(
    deepspeed: Any,
    model: PeftModel,
    trainable: list[torch.nn.Parameter],
    settings: TrainingSection,
    compute_dtype: torch.dtype,
) -> Any:
    """A DeepSpeed engine around the token losses of an adapted model; see `training.loop.Engine`."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed compiles a shared-memory collective where it finds this op; gloo does the same and needs no compiler.
    deepspeed.ops.__compatible_ops__ = {}
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    config = {
        # Steps have as many backward passes as their examples need: the loop counts them, DeepSpeed must not.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage, "overlap_comm": False},
    }
    token_losses = loop.TokenLosses(model, compute_dtype)
    return deepspeed.initialize(model=token_losses, model_parameters=trainable, optimizer=optimizer, config=config)[0]


def _commit(
    run: RunDirectory,
    finetune: Finetune,
    model: PeftModel,
    record: checkpoints.TrainingRecord,
    moments: AdamMoments | None,
) -> None:
    """Write the adapter, then give it its name; an expert's holds the digest of its files."""
    with tempfile.TemporaryDirectory(prefix="gradientspace-") as scratch:
        checkpoints.save(model, record, Path(scratch), moments)
        folder = finetune.name
        if finetune.cluster is not None:
            folder = f"{EXPERTS}/{finetune.name}@{adapter_digest(Path(scratch))}"
        with run.staged(folder, last=checkpoints.RECORD_FILE) as staged:
            shutil.copytree(scratch, staged, dirs_exist_ok=True)
