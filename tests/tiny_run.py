"""A run directory that serving can load, without training: random adapters, and a router fitted on eight prompts."""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from gradientspace_ray.engine.adapters import AdapterFiles
from gradientspace_ray.models.loading import load_base, save_adapter
from gradientspace_ray.registry import Adapter, Registry, adapter_digest, router_digest, write_registry
from gradientspace_ray.router.classifier import RouterSettings, fit_head, save_router
from gradientspace_ray.router.encoder import PromptEncoder
from gradientspace_ray.run import RunDirectory

EXPERTS = ("count-sum", "story-door")
COUNTING = ["what is 2 + 2", "what is 31 + 5", "what is 7 + 18", "what is 11 + 40"]
STORIES = ["once upon a time a door", "once upon a night a hill", "once upon a day a king", "once upon a road a fox"]


def make_adapter(model_dir: Path, folder: Path, seed: int, **changes: object) -> AdapterFiles:
    """A PEFT adapter whose B is not zero, so that it changes every logit."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(load_base(str(model_dir)), LoraConfig(**settings))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    save_adapter(model, folder)
    return AdapterFiles(f"{folder.name}@{seed}", folder)


def make_run(
    root: Path, model_dir: Path, encoder_dir: Path, experts: tuple[str, str] = EXPERTS, seed: int = 11
) -> RunDirectory:
    """A generalist, two experts, and a router that tells counting from stories and doubts everything else."""
    run = RunDirectory(root)
    adapters = {}
    for number, name in enumerate(("generalist", *experts), start=seed):
        folder = "generalist" if name == "generalist" else f"experts/{name}"
        make_adapter(model_dir, root / folder, number)
        digest = adapter_digest(root / folder)
        if name != "generalist":
            (root / folder).rename(root / f"{folder}@{digest}")
            folder = f"{folder}@{digest}"
        adapters[name] = Adapter(name=name, digest=digest, folder=folder, title=name.replace("-", " "), examples=number)
    encoder = PromptEncoder(str(encoder_dir), 64, "cpu")
    encodings_NH = encoder.encode(COUNTING + STORIES)
    head = fit_head(encodings_NH, np.repeat([0, 1], 4), 2, seed=0).head
    settings = RouterSettings(
        encoder=str(encoder_dir), view="last_user", max_tokens=64, labels=experts, temperature=1.0, threshold=0.0
    )
    (root / "router").mkdir()
    save_router(root / "router", head, settings, encodings_NH)
    registry = Registry(
        base_model=str(model_dir),
        max_tokens=512,
        generalist=adapters["generalist"],
        experts=tuple(adapters[name] for name in experts),
        router_digest=router_digest(root / "router"),
    )
    write_registry(run, registry)
    return run
