"""Finetunes that cannot go on: a clear line, and nothing lost that was committed."""

import shutil
import subprocess

import pytest
import torch
from test_train_stage import EXAMPLES, EXPERTS, WARMUP, on_ray, recipe_for, record, write_examples

from gradientspace_ray.models.reading import is_out_of_memory
from gradientspace_ray.recipe import TrainingSection
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages import train
from gradientspace_ray.stages.finetune_worker import Finetune, _explained
from gradientspace_ray.training.engine import TrainingError

DISK_BYTES = 4 * 2**20


def finetune(**settings):
    section = TrainingSection(**settings)
    parts = {"cluster": 0, "start": None, "key": "0", "tokens": 1, "steps": 1}
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
    with pytest.raises(TrainingError, match=r"low-bytes: no space is left for \S+; make room there") as error:
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
