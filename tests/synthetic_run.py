"""A small run directory with everything that stands before the router stage, made without running the stages."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from gradientspace_ray.models.loading import add_lora, load_base, load_tokenizer, save_adapter
from gradientspace_ray.recipe import Recipe, parse_recipe
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.run import RunDirectory, StageRecord
from gradientspace_ray.sketch.spectrum import describe_spectrum

DOMAINS = ("sums", "stories")
EXAMPLE_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "prompt": pa.string(),
        "tokens": pa.int32(),
        "label_tokens": pa.int32(),
        "source": pa.string(),
        "domain": pa.string(),
        "split_key": pa.string(),
    }
)


def synthetic_recipe(model_dir: Path, encoder_dir: Path, **sections: dict) -> Recipe:
    """A recipe for the tiny models."""
    tree = {
        "name": "synthetic",
        "model": {"name": str(model_dir), "compute_dtype": "float32"},
        "data": {"sources": ["quickstart"]},
        "router": {"encoder": str(encoder_dir), "max_tokens": 64},
        "evaluate": {"tokens_per_batch": 256, "workers": 2},
    }
    return parse_recipe(tree | sections)


def text_of(domain: str, number: int) -> tuple[str, str]:
    if domain == "sums":
        a, b = number * 7 % 90, number * 13 % 80
        return f"{a} + {b} = ? ({number})", f"{a + b}"
    beast = ("fox", "owl", "whale", "wolf")[number % 4]
    return f"Please tell me a gentle story about the {beast}, part {'i' * (number % 9 + 1)}.", f"A {beast} sang. " * 2


def write_examples(run: RunDirectory, model_dir: Path, split: str, count: int, labelled: bool, first: int) -> list[str]:
    """`count` examples, the domains in turn; returns their ids."""
    tokenizer = load_tokenizer(str(model_dir))
    rows = []
    for number in range(first, first + count):
        domain = DOMAINS[number % len(DOMAINS)]
        question, answer = text_of(domain, number)
        prompt_ids, answer_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
        rows.append(
            {
                "id": hashlib.sha256(f"{question}{number}".encode()).hexdigest()[:16],
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                "input_ids": prompt_ids + answer_ids,
                "labels": [-100] * len(prompt_ids) + answer_ids,
                "prompt": question,
                "tokens": len(prompt_ids) + len(answer_ids),
                "label_tokens": len(answer_ids),
                "source": "synthetic",
                "domain": domain if labelled else None,
                "split_key": question,
            }
        )
    run.write_table(f"examples/{split}.parquet", pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA))
    return [row["id"] for row in rows]


def write_adapter(run: RunDirectory, folder: str, model_dir: Path, seed: int, **training: object) -> None:
    """A LoRA adapter with a random, non-zero effect."""
    adapted = add_lora(load_base(str(model_dir)), 4, 8, "all-linear", seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    with run.staged(folder) as staging:
        save_adapter(adapted, staging)
        (staging / "training.json").write_text(json.dumps({"key": folder, "losses": [1.0], **training}))


def synthetic_run(
    folder: Path,
    model_dir: Path,
    *,
    clusters: int = 2,
    validation: int = 24,
    test: int = 24,
    labelled: bool = True,
    single_lora: bool = True,
) -> RunDirectory:
    """Examples, adapters, clusters (= the domains, when there are two) and sketch."""
    run = RunDirectory(folder)
    ids = write_examples(run, model_dir, "train", 40, labelled, 0)
    write_examples(run, model_dir, "validation", validation, labelled, 1000)
    write_examples(run, model_dir, "test", test, labelled, 2000)
    cluster_N = np.arange(len(ids)) % clusters
    table = {"id": ids, "cluster": pa.array(cluster_N, pa.int32())}
    run.write_table("clusters/assignments.parquet", pa.table(table))
    names = [f"expert-{'abc'[index]}" for index in range(clusters)]
    quality = {
        "count": clusters,
        "names": names,
        "terms": [[f"<term{index}>", "two"] for index in range(clusters)],
        "typical": [[ids[index]] for index in range(clusters)],
        "coherence": [0.1] * clusters,
    } | ({"ari": 0.9} if labelled else {})
    run.write_json("clusters/quality.json", quality)
    coordinates_NK = np.random.default_rng(0).normal(size=(len(ids), 6)) + 4 * np.eye(6)[cluster_N]
    columns = {"id": ids, "coordinates": pa.array(coordinates_NK.tolist(), pa.list_(pa.float32()))}
    run.write_table("sketch/coordinates.parquet", pa.table(columns))
    values_K = [3.0, 2.0, 1.5, 1.0, 0.5, 0.2]
    spectrum = describe_spectrum(values_K, 40.0, coordinates_NK, np.square(coordinates_NK).sum(axis=1) * 2)
    run.write_json("sketch/spectrum.json", {"rank": 6, "dimension": 1000, "examples": 40} | spectrum)
    write_adapter(run, "generalist", model_dir, 1)
    if single_lora:
        write_adapter(run, "single_lora", model_dir, 2)
    for cluster, name in reversed(list(enumerate(names))):
        write_adapter(run, f"experts/{name}@0", model_dir, 3 + cluster, name=name, cluster=cluster, examples=20)
        digest = adapter_digest(run.fetch(f"experts/{name}@0"))
        run.fetch(f"experts/{name}@0").rename(run.path(f"experts/{name}@{digest}"))
    run.record("prepare", StageRecord(status="done", digest="0", seconds=1.5, made="64 examples"))
    return run
