"""The stage that trains experts, timed on a local Ray in a process of its own: how it starts, and several at once.

All arrangements share one budget, the CPUs of this machine: so many finetunes at once, each with an equal part of them.
One finetune alone tells what the stage costs around its training: Ray Train's start, imports, loading, committing.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from expert_trainers import LEARNING_RATE

from gradientspace_ray.examples.packing import Example
from gradientspace_ray.pipeline import connect, disconnecting
from gradientspace_ray.recipe import Recipe, parse_recipe
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages import train


class Job(NamedTuple):
    """What is timed."""

    model: str
    """A local folder, or a Hugging Face name."""
    examples: str
    """JSON file of token ids and labels; each expert has as many, and no two the same."""
    experts: int
    examples_per_step: int
    tokens_per_batch: int
    dtype: str
    at_once: list[int]
    """Numbers of finetunes that run side by side."""
    rounds: int
    scratch: str


def measure(job: Job) -> dict[str, Any]:
    """Seconds by round: until Ray runs, of one finetune and of the training in it, and of each arrangement."""
    examples: list[Example] = [(ids, labels) for ids, labels in json.loads(Path(job.examples).read_text())]
    # Another cluster has other machines.
    os.environ.pop("RAY_ADDRESS", None)
    began = time.perf_counter()
    connect("cpu")
    report: dict[str, Any] = {"ray_seconds": time.perf_counter() - began, "alone": [], "arrangements": []}
    with disconnecting():
        report["cpus"] = cpus = int(ray.cluster_resources()["CPU"])
        for number in range(job.rounds):
            run = written(Path(job.scratch) / f"alone-{number}", examples[: len(examples) // job.experts], 1)
            report["alone"].append(alone(recipe_of(job, 1, cpus), run))
            turn = number % len(job.at_once)
            for at_once in job.at_once[turn:] + job.at_once[:turn]:
                run = written(Path(job.scratch) / f"{at_once}-at-once-{number}", examples, job.experts)
                found = together(recipe_of(job, at_once, cpus), run)
                report["arrangements"].append({"at_once": at_once, "cpus_each": cpus / at_once, **found})
    return report


def alone(recipe: Recipe, run: RunDirectory) -> dict[str, float]:
    """One finetune: seconds of the stage, and of the training itself."""
    began = time.perf_counter()
    train.warmup(recipe, run)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "training_seconds": run.read_json("generalist/training.json")["seconds"]}


def together(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    """All experts: seconds of the stage, of each one's training, and their tokens."""
    began = time.perf_counter()
    train.experts(recipe, run)
    seconds = time.perf_counter() - began
    records = [run.read_json(f"experts/{name}/training.json") for name in run.names("experts")]
    return {
        "seconds": seconds,
        "training_seconds": [record["seconds"] for record in records],
        "tokens": sum(record["tokens"] for record in records),
    }


def recipe_of(job: Job, at_once: int, cpus: int) -> Recipe:
    """Every expert begins with a fresh adapter, so that no generalist is needed."""
    section = {
        "epochs": 1,
        "learning_rate": LEARNING_RATE,
        "examples_per_step": job.examples_per_step,
        "tokens_per_batch": job.tokens_per_batch,
    }
    return parse_recipe(
        {
            "name": "benchmark",
            "model": {"name": job.model, "dtype": job.dtype, "compute_dtype": job.dtype},
            "data": {"sources": ["quickstart"]},
            "warmup": section,
            "experts": {**section, "start": "fresh", "max_concurrent": at_once},
            "single_lora": {"train": False},
            "compute": {"cpus_per_worker": cpus / at_once, "retries": 0},
        }
    )


def written(folder: Path, examples: list[Example], experts: int) -> RunDirectory:
    """A run directory as prepare and cluster leave it, for what the finetunes read; clusters are of equal size."""
    run = RunDirectory(folder)
    ids = pa.array([f"{index:016x}" for index in range(len(examples))])
    columns = {
        "id": ids,
        "input_ids": pa.array([ids for ids, _ in examples], pa.list_(pa.int32())),
        "labels": pa.array([labels for _, labels in examples], pa.list_(pa.int32())),
        "tokens": pa.array([len(ids) for ids, _ in examples], pa.int32()),
    }
    run.write_table("examples/train.parquet", pa.table(columns))
    clusters = pa.array([index % experts for index in range(len(examples))], pa.int32())
    run.write_table("clusters/assignments.parquet", pa.table({"id": ids, "cluster": clusters}))
    run.write_json("clusters/quality.json", {"count": experts, "names": [f"part-{index}" for index in range(experts)]})
    return run


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.argv[1])))))
