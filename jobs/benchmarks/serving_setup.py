"""What a serving benchmark needs on disk: prompts, random experts, and a run directory to serve them from."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gradient_task import LORA_ALPHA, LORA_B_STD, LORA_RANK, mixture_folder, read_labelled_examples
from serving_load import Prompt
from transformers import PreTrainedModel

from gradientspace_ray.examples.rendering import Renderer, View, prompt_view, until_last_answer
from gradientspace_ray.models.loading import add_lora, load_tokenizer, save_adapter
from gradientspace_ray.registry import Adapter, Registry, adapter_digest, router_digest, write_registry
from gradientspace_ray.router.classifier import LinearHead, RouterSettings, save_router
from gradientspace_ray.router.encoder import PromptEncoder
from gradientspace_ray.run import RunDirectory

SEED = 0
VIEW: View = "last_user"
ENCODER_TOKENS = 256


def read_prompts(data: str | None, count: int, model: str, scratch: Path) -> list[Prompt]:
    """Ragged prompts out of instruction data, equally many from each file.

    Args:
        data: a folder of JSONL files; None takes the built-in mixture.
        count: how many different ones.
        model: its tokenizer reads them, by its chat template.
        scratch: for the built-in mixture's files.

    Raises:
        TaskError: a file has too few examples of 32 to 512 tokens.
    """
    renderer = Renderer(load_tokenizer(model))
    rows = read_labelled_examples(data or mixture_folder(scratch, count), count, model)
    asked = [until_last_answer(row.record.messages)[:-1] for row in rows]
    return [Prompt([dict(message) for message in messages], tuple(renderer.prompt(messages))) for messages in asked]


def write_adapters(model: PreTrainedModel, root: Path, count: int) -> tuple[Path, ...]:
    """PEFT folders of random LoRA adapters on all linear layers, B not zero, so that each has answers of its own.

    Args:
        model: the base model; it is as before afterwards.
        root: where the folders go.
        count: number of adapters.
    """
    folders = []
    adapted = add_lora(model, LORA_RANK, LORA_ALPHA, "all-linear", SEED)
    weights = [(name, weight) for name, weight in adapted.named_parameters() if "lora_" in name]
    for number in range(count):
        generator = torch.Generator().manual_seed(SEED + number)
        for name, weight in weights:
            # PEFT draws A uniformly from +-1 / sqrt(width).
            std = LORA_B_STD if "lora_B" in name else (3 * weight.shape[1]) ** -0.5
            weight.data.copy_(std * torch.randn(weight.shape, generator=generator))
        folders.append(root / f"expert{number}")
        save_adapter(adapted, folders[-1])
    adapted.unload()
    return tuple(folders)


def write_run(root: Path, model: str, encoder: str, folders: Sequence[Path], prompts: Sequence[Prompt]) -> RunDirectory:
    """A run directory as the pipeline leaves it, without training: the adapters, and a router that nothing was taught.

    Its head is random, around the mean of the prompts' encodings, so that every expert gets some of them.

    Args:
        root: the run directory.
        model: name of the base model.
        encoder: name of the router's.
        folders: of the experts; the first is the generalist too.
        prompts: what will be asked.
    """
    names = [folder.name for folder in folders]
    found = {}
    for name, folder in (("generalist", folders[0]), *zip(names, folders, strict=True)):
        digest = adapter_digest(folder)
        place = name if name == "generalist" else f"experts/{name}@{digest}"
        shutil.copytree(folder, root / place)
        found[name] = Adapter(name=name, digest=digest, folder=place)
    encodings_NH = PromptEncoder(encoder, ENCODER_TOKENS).encode([prompt_view(p.messages, VIEW) for p in prompts])
    weight_KH = np.random.default_rng(SEED).normal(size=(len(names), encodings_NH.shape[1])).astype(np.float32)
    head = LinearHead(weight_KH, -weight_KH @ encodings_NH.mean(0))
    settings = RouterSettings(
        encoder=encoder, view=VIEW, max_tokens=ENCODER_TOKENS, labels=tuple(names), temperature=1.0, threshold=0.0
    )
    (root / "router").mkdir()
    save_router(root / "router", head, settings)
    registry = Registry(
        base_model=model,
        max_tokens=max(len(prompt.ids) for prompt in prompts),
        generalist=found["generalist"],
        experts=tuple(found[name] for name in names),
        router_digest=router_digest(root / "router"),
    )
    run = RunDirectory(root)
    write_registry(run, registry)
    return run
