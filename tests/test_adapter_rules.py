"""Adapters as the project writes them: PEFT and transformers open them as they are, and vLLM would serve them.

vLLM does not run here. `complaints` states what it asks of an adapter, read in vLLM 0.29.0: the configuration in
`vllm/lora/peft_helper.py`, names and modules in `vllm/lora/lora_model.py` and `utils.py`, the ranks in
`vllm/config/lora.py`, and how weights are placed in `vllm/lora/model_manager.py` and `layers/base_linear.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import random_causal_lm, tiny_llama_config
from torch import nn
from transformers import AutoModelForCausalLM

from gradientspace_ray.models.loading import CONFIG_FILE, WEIGHTS_FILE, add_lora, load_base
from gradientspace_ray.models.moments import AdamMoments
from gradientspace_ray.training import checkpoints

IDS = torch.tensor([[5, 9, 30, 7, 11, 200]])
RANK_LIMITS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_RANK_LIMIT = 16
# Layers beside the linear ones to which vLLM adds adapters.
EMBEDDINGS = {"embed_tokens", "lm_head"}
# What vLLM reads of a configuration, and what says nothing about the function that an adapter is.
READ = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_dora", "use_rslora"}
OF_TRAINING = {
    "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "peft_type", "peft_version",
    "revision", "task_type",
}  # fmt: skip
ALL_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def complaints(folder: Path, model: nn.Module, rank_limit: int = DEFAULT_RANK_LIMIT) -> list[str]:
    """Why vLLM would refuse an adapter of this model, or serve another function than the one that was trained."""
    assert rank_limit in RANK_LIMITS
    config = json.loads((folder / CONFIG_FILE).read_text())
    missing = {"r", "lora_alpha", "target_modules"} - set(config)
    if missing:
        return [f"no {name} in the configuration" for name in sorted(missing)]
    return _of_the_configuration(config, rank_limit) + _of_the_weights(load_file(folder / WEIGHTS_FILE), config, model)


def _of_the_configuration(config: dict[str, Any], rank_limit: int) -> list[str]:
    found = []
    if not (isinstance(config["r"], int) and 0 < config["r"] <= rank_limit):
        found.append(f"rank {config['r']}, of at most {rank_limit}")
    if config.get("bias", "none") != "none":
        found.append("bias")
    found += [name for name in ("modules_to_save", "use_dora") if config.get(name)]
    # What is not read is not heeded either: per-layer ranks and scalings, variants of LoRA, biases of B, ...
    plain = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    others = set(config) - READ - OF_TRAINING
    return found + [f"{name} is not read" for name in sorted(others) if config[name] and config[name] != plain[name]]


def _of_the_weights(weights: dict[str, torch.Tensor], config: dict[str, Any], model: nn.Module) -> list[str]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    served = {name.rpartition(".")[2] for name in linear} | EMBEDDINGS
    found, factors = [], dict[str, dict[str, torch.Tensor]]()
    for name, tensor in weights.items():
        module, _, kind = name.removesuffix(".weight").removeprefix("base_model.model.").rpartition(".")
        # Adapters of embeddings have other names, which this project does not write.
        if kind not in ("lora_A", "lora_B") or not name.endswith(".weight"):
            found.append(f"{name} is no LoRA weight")
        elif module.rpartition(".")[2] not in served:
            found.append(f"{module} cannot be adapted")
        elif module not in linear:
            found.append(f"{module} is not in the model, and is passed over")
        else:
            factors.setdefault(module, {})[kind] = tensor
    for module, pair in factors.items():
        layer = linear[module]
        wanted = {"lora_A": (config["r"], layer.in_features), "lora_B": (layer.out_features, config["r"])}
        if {kind: tuple(tensor.shape) for kind, tensor in pair.items()} != wanted:
            found.append(f"{module} has not the factors {wanted}")
    return found


def written(model: PeftModel, folder: Path) -> Path:
    """The adapter with random weights, written as a finetune's end does it."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data.normal_(std=0.2, generator=generator)
            weights[name.replace(".default.", ".")] = weight.detach()
    squares = {name: weight**2 for name, weight in weights.items()}
    moments = AdamMoments(weights, squares, 3, (0.9, 0.999), 1e-8)
    record = checkpoints.TrainingRecord(
        key="0", name="poets", examples=3, tokens=30, steps=3, seconds=1.0, workers=1, zero_stage=1, losses=[3.0]
    )
    checkpoints.save(model, weights, record, folder, moments)
    return folder


def by_peft(model_folder: Path, folder: Path, **config: Any) -> Path:
    """An adapter that PEFT makes and writes itself."""
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **config}
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    get_peft_model(base, LoraConfig(**settings)).save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("rank", "alpha", "target_modules"),
    [
        (8, 16.0, "all-linear"),
        (4, 8.0, ["q_proj", "v_proj"]),
        (16, 4.0, ALL_NAMES),
        (1, 0.5, ["down_proj"]),
        (3, 16.0, r".*\.1\..*\.(o_proj|gate_proj)"),
    ],
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_a_finetune_writes_is_opened_and_served(
    tiny_model_dir: Path, tmp_path: Path, rank: int, alpha: float, target_modules: str | list[str], quantization: Any
) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    base = load_base(str(tiny_model_dir), "float32", "cpu", quantization)
    folder = written(add_lora(base, rank, alpha, target_modules, seed=0), tmp_path / "poets@0")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert complaints(folder, plain) == []

    # As vLLM computes it, from the files: W + alpha / r B A.
    factors = load_file(folder / WEIGHTS_FILE)
    names = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    summed = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for name in names:
        delta = alpha / rank * factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
        summed.get_submodule(name.removeprefix("base_model.model.")).weight.data += delta
    wanted = logits(summed)
    assert (wanted - logits(plain)).norm() > 0.01 * wanted.norm()
    assert_close(logits(PeftModel.from_pretrained(plain, folder)), wanted)
    opened = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    opened.load_adapter(folder)
    assert_close(logits(opened), wanted)


@pytest.mark.parametrize("rank", [17, 600])
def test_a_rank_above_the_limit(tiny_model_dir: Path, tmp_path: Path, rank: int) -> None:
    folder = written(add_lora(load_base(str(tiny_model_dir)), rank, 16, ["q_proj"], seed=0), tmp_path / "a")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for limit in RANK_LIMITS:
        refused = [f"rank {rank}, of at most {limit}"] if rank > limit else []
        assert complaints(folder, plain, limit) == refused


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, []),
        ({"use_rslora": True}, []),
        ({"bias": "lora_only"}, ["bias"]),
        ({"bias": "all"}, ["bias"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "base_model.model.lm_head.weight is no LoRA weight"]),
        ({"use_dora": True}, ["use_dora", "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"]),
        ({"r": 32}, ["rank 32, of at most 16"]),
        ({"lora_bias": True}, ["lora_bias is not read", "base_model.model.model.layers.0.mlp.up_proj.lora_B.bias is"]),
        ({"rank_pattern": {"up_proj": 2}}, ["rank_pattern is not read", "model.layers.0.mlp.up_proj has not the fac"]),
        ({"alpha_pattern": {"up_proj": 2}}, ["alpha_pattern is not read"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_peft_may_write_and_vllm_does_not_serve(
    tiny_model_dir: Path, tmp_path: Path, config: dict[str, Any], found: list[str]
) -> None:
    folder = by_peft(tiny_model_dir, tmp_path / "a", **config)
    seen = complaints(folder, AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    assert bool(seen) == bool(found)
    for start in found:
        assert any(line.startswith(start) for line in seen), seen


UP_PROJ = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({f"{UP_PROJ}.steps": torch.zeros(1)}, f"{UP_PROJ}.steps is no LoRA weight"),
        ({f"{UP_PROJ}.bias": torch.zeros(128)}, f"{UP_PROJ}.bias is no LoRA weight"),
        ({f"{UP_PROJ}.lora_B.weight": None}, "model.layers.0.mlp.up_proj has not the factors"),
        ({f"{UP_PROJ}.lora_A.weight": torch.zeros(4, 65)}, "model.layers.0.mlp.up_proj has not the factors"),
        ({"base_model.model.model.layers.0.mlp.up.lora_A.weight": torch.zeros(4, 64)}, "model.layers.0.mlp.up cannot"),
        ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}, "model.layers.9.mlp.up_p"),
    ],
    ids=["extra tensor", "bias", "no lora_B", "another width", "unknown module", "another depth"],
)
def test_files_that_were_changed(
    tiny_model_dir: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], found: str
) -> None:
    folder = written(add_lora(load_base(str(tiny_model_dir)), 4, 8, ["q_proj", "up_proj"], seed=0), tmp_path / "a")
    weights = load_file(folder / WEIGHTS_FILE) | change
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / WEIGHTS_FILE)
    seen = complaints(folder, AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    assert len(seen) == 1
    assert seen[0].startswith(found)


def test_what_the_checker_asks_of_the_configuration(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = written(add_lora(load_base(str(tiny_model_dir)), 4, 8, ["q_proj"], seed=0), tmp_path / "a")
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({name: value for name, value in config.items() if name != "r"}))
    assert complaints(folder, random_causal_lm(tiny_llama_config())) == ["no r in the configuration"]
