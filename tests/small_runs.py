"""Run directories that can be published: files of a few hundred bytes each, of no model."""

import hashlib
import json

import numpy as np
from safetensors.numpy import save

from gradientspace_ray.publishing import stage_run
from gradientspace_ray.registry import Adapter, Registry, committed_digest, write_registry
from gradientspace_ray.releases import commit
from gradientspace_ray.run import RunDirectory

EXPERTS = ("count-sum", "story-door")
LAYERS = ("layers.0.q_proj", "layers.0.up_proj")


def adapter_files(seed, lora_rank=2, width=4, **changes):
    """A PEFT folder's files, by name."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in LAYERS:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = random.normal(size=(lora_rank, width)).astype(np.float32)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = random.normal(size=(width, lora_rank)).astype(np.float32)
    modules = [layer.rpartition(".")[2] for layer in LAYERS]
    config = {"peft_type": "LORA", "r": lora_rank, "lora_alpha": 4, "target_modules": modules, **changes}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


def router_files(seed, labels=EXPERTS):
    """A router folder's files, by name."""
    weight = np.random.default_rng(seed).normal(size=(len(labels), 3)).astype(np.float32)
    head = save({"weight": weight, "bias": np.zeros(len(labels), np.float32)})
    settings = {"encoder": "some/encoder", "view": "last_user", "max_tokens": 64, "labels": labels}
    return {
        "head.safetensors": head,
        "router.json": json.dumps(settings | {"temperature": 1.0, "threshold": 0}).encode(),
    }


def write_files(run, folder, files):
    for name, data in files.items():
        run.write_bytes(f"{folder}/{name}", data)


def digest_of_files(files, names):
    """What `adapter_digest` and `router_digest` promise, said again."""
    return hashlib.sha256(b"".join(name.encode() + files[name] for name in names)).hexdigest()[:12]


def make_small_run(place, seed, base_model="some/model", **shape):
    """Write a finished run there, as a first run or over another one. Returns the run and its registry."""
    run = RunDirectory(place)
    run.delete("experts", "generalist", "router")
    adapters = []
    for index, name in enumerate(("generalist", *EXPERTS)):
        files = adapter_files([seed, index], **shape)
        digest = digest_of_files(files, ("adapter_config.json", "adapter_model.safetensors"))
        folder = name if name == "generalist" else f"experts/{name}@{digest}"
        write_files(run, folder, files)
        adapters.append(Adapter(name=name, digest=committed_digest(run, folder), folder=folder))
    files = router_files(seed)
    write_files(run, "router", files)
    registry = Registry(
        base_model=base_model,
        max_tokens=512,
        generalist=adapters[0],
        experts=tuple(adapters[1:]),
        router_digest=digest_of_files(files, ("head.safetensors", "router.json")),
    )
    write_registry(run, registry)
    return run, registry


def publish_run(served, state, run_uri, canary_share=None):
    """What an endpoint does, without loading anything in between."""
    return commit(served, state, stage_run(served, state, run_uri, canary_share))
