"""Finetunes that cannot go on: a clear line, and nothing lost that was committed."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from test_train_stage import EXAMPLES, EXPERTS, WARMUP, on_ray, recipe_for, record, write_examples

from gradientspace_ray.models.moments import AdamMoments
from gradientspace_ray.models.reading import is_out_of_memory
from gradientspace_ray.recipe import RecipeError
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages import train
from gradientspace_ray.stages.finetune_worker import Finetune, _explained, _Observer, _read_latest
from gradientspace_ray.stages.finetunes import _reason
from gradientspace_ray.training.budget import TrainingSettings
from gradientspace_ray.training.engine import TrainingError
from gradientspace_ray.training.state import TrainingState, save_state

DISK_BYTES = 4 * 2**20


def finetune(**settings):
    section = TrainingSettings(learning_rate=1e-3, **settings)
    parts = {"cluster": 0, "start": None, "cosine": (0.0, 1.0), "key": "0", "tokens": 1, "steps": 1}
    return Finetune(name="poems", section="experts", settings=section, **parts)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_that_runs_out_is_told_with_what_to_lower(tmp_path, checkpointing):
    more = "" if checkpointing else ", set experts.checkpointing"
    with (
        pytest.raises(TrainingError) as error,
        _explained(RunDirectory(tmp_path), finetune(checkpointing=checkpointing)),
    ):
        torch.empty(2**50)
    assert is_out_of_memory(error.value.__cause__)
    assert str(error.value) == (
        f"out of memory; lower experts.tokens_per_batch (now 1024){more}, or raise experts.zero_stage with more "
        "experts.workers"
    )


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"), _explained(RunDirectory(tmp_path), finetune()):
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(FileNotFoundError), _explained(RunDirectory(tmp_path), finetune()):
        (tmp_path / "missing").read_bytes()


def test_a_disk_that_is_full_is_told_with_its_place(tmp_path):
    with pytest.raises(TrainingError) as error, _explained(RunDirectory(tmp_path), finetune()):
        Path("/dev/full").write_bytes(b"weights")
    assert str(error.value) == f"no space is left for {tmp_path} or {tempfile.gettempdir()}; make room there"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"experts": {"workers": 4, "examples_per_step": 3}},
            "experts.workers 4 would share 3 examples in a step; lower it, or raise experts.examples_per_step",
        ),
        (
            {"experts": {"start": "fresh"}, "single_lora": {"start": "generalist"}},
            "single_lora.start generalist would have tokens that experts.start fresh has not; give fresh",
        ),
        (
            {"budget": {"generalist_share": 0.3}},
            "budget.generalist_share needs budget.tokens; or set warmup.epochs and experts.epochs",
        ),
        (
            {"warmup": {"workers": 2}, "compute": {"device": "cuda", "gpus_per_worker": 0.5}},
            "warmup.workers above 1 need compute.gpus_per_worker 1: DeepSpeed gives each its own GPU",
        ),
        (
            {"experts": {"deepspeed": {"zero_optimization": {"stage": 3}}}},
            "experts.deepspeed: zero_optimization.stage is decided by experts.zero_stage; leave it out there",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_told_before_anything_starts(tmp_path, changes, message):
    recipe = recipe_for(tmp_path, **changes)
    with pytest.raises(RecipeError) as error:
        train.check(recipe)
    assert str(error.value) == message


def test_a_finetune_is_named_with_the_reason_of_the_worker_that_failed_first():
    broken = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    # As Ray Train has them of a worker that was killed.
    dead = WorkerHealthCheckFailedError("A worker health check failed.", RayActorError(error_msg="The actor died"))
    explained = TrainingError("out of memory; lower it")

    def reason(*failures):
        return _reason(WorkerGroupError("", dict(enumerate(failures))), finetune())

    assert reason(broken, dead, explained) == "out of memory; lower it"
    mend = "if memory ran out, lower experts.tokens_per_batch or experts.max_concurrent"
    assert reason(broken, dead) == f"a worker died (The actor died); {mend}"
    killed = OutOfMemoryError("The memory monitor killed it")
    assert reason(broken, killed) == f"a worker died (The memory monitor killed it); {mend}"
    assert reason(broken, ValueError("a bad value")) == "a bad value"


def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_a_saved_one_goes(tmp_path):
    run, plan = RunDirectory(tmp_path), finetune()
    weights, first, second = ({"x.lora_A.weight": torch.full((2,), value)} for value in (1.0, 2.0, 3.0))
    moments = AdamMoments(first, second, 3, (0.9, 0.999), 1e-8)
    for steps in (3, 6):
        state = TrainingState((1.0,) * steps, (), 1.0, weights, moments, None)
        save_state(state, tmp_path / plan.checkpoints / f"{steps:08d}")
    assert _read_latest(run, plan).step == 6
    tensors = tmp_path / plan.checkpoints / "00000006" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\0\0")
    assert _read_latest(run, plan).step == 3
    board, state = MagicMock(), TrainingState((1.0,) * 4, (), 1.0, weights, moments, None)
    _Observer(run, plan, board, tmp_path, lambda step, values: None).save(state)
    # One that is older stays, in case that the newest is damaged.
    assert run.names(plan.checkpoints) == ["00000003", "00000004", "00000006"]
    assert _read_latest(run, plan).step == 4
    run.delete(plan.checkpoints)
    assert _read_latest(run, plan) is None


@on_ray
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"warmup": {**WARMUP, "workers": 9, "examples_per_step": 9}},
            "warmup.workers 9 x compute.cpus_per_worker 1 is more than the 4 CPUs of this machine; lower one, "
            "or join a cluster (RAY_ADDRESS)",
        ),
        (
            {"experts": {**EXPERTS, "workers": 5, "examples_per_step": 5}},
            "experts.workers 5 x compute.cpus_per_worker 1 is more than the 4 CPUs of this machine; lower one, "
            "or join a cluster (RAY_ADDRESS)",
        ),
        (
            {"compute": {"device": "cuda", "gpus_per_worker": 1}},
            "warmup.workers 1 x compute.gpus_per_worker 1 is more than the 0 GPUs of this machine; lower one, "
            "set compute.device=cpu, or join a cluster (RAY_ADDRESS)",
        ),
    ],
)
def test_what_this_machine_cannot_hold_is_not_waited_for(ray_cluster, tiny_model_dir, tmp_path, changes, message):
    run = RunDirectory(tmp_path)
    write_examples(run, EXAMPLES)
    with pytest.raises(TrainingError) as error:
        train.warmup(recipe_for(tiny_model_dir, **changes), run)
    assert str(error.value) == message


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for a few adapters."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@on_ray
def test_a_full_disk_is_told_and_what_is_committed_stays_until_there_is_room(ray_cluster, tiny_model_dir, small_disk):
    run = RunDirectory(small_disk / "run")
    write_examples(run, EXAMPLES)
    recipe = recipe_for(
        tiny_model_dir,
        experts={**EXPERTS, "checkpoint_every": 1, "max_concurrent": 1},
        single_lora={"train": False},
        trackers=[],
    )
    train.warmup(recipe, run)
    generalist = adapter_digest(run.fetch("generalist"))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 40_000))
    with pytest.raises(TrainingError, match=r"low-bytes: no space is left for .*; make room there") as error:
        train.experts(recipe, run)
    assert "\n" not in str(error.value)
    assert adapter_digest(run.fetch("generalist")) == generalist
    assert run.names("experts") == []
    ballast.unlink()
    assert train.experts(recipe, run).counts["experts"] == 2


@on_ray
def test_fewer_examples_than_workers_and_a_batch_are_one_step(ray_cluster, tiny_model_dir, tmp_path):
    run = RunDirectory(tmp_path)
    write_examples(run, EXAMPLES[:1], [0])
    recipe = recipe_for(tiny_model_dir, warmup={**WARMUP, "epochs": 1, "workers": 2, "zero_stage": 3})
    assert train.warmup(recipe, run).counts == {"examples": 1, "steps": 1, "tokens": len(EXAMPLES[0][0])}
    made = record(run.fetch("generalist"))
    assert (made["workers"], made["zero_stage"]) == (2, 3)
    generalist = adapter_digest(run.fetch("generalist"))
    # The other cluster has lost its examples.
    with pytest.raises(TrainingError, match=r"cluster 1 of clusters/assignments.parquet holds no training examples"):
        train.experts(recipe, run)
    assert adapter_digest(run.fetch("generalist")) == generalist
