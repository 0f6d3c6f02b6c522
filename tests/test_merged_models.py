"""Adapters merged into their base model: plain folders that transformers opens with nothing else."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tiny_models import byte_tokenizer, random_causal_lm, tiny_llama_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gradientspace_ray.models.loading import ModelError, add_lora, load_base, save_adapter
from gradientspace_ray.models.merging import write_merged

IDS = torch.tensor([[5, 9, 30, 7, 11, 200]])
FILES = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def write_adapter(model_folder: Path, folder: Path, target_modules: str | list[str] = "all-linear") -> Path:
    model = add_lora(load_base(str(model_folder)), 4, 8, target_modules, seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.2, generator=generator)
    save_adapter(model, folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def spread(difference: torch.Tensor, of: torch.Tensor) -> float:
    return float(difference.norm() / (of - of.mean(dim=1, keepdim=True)).norm())


def test_the_merged_model_is_the_adapted_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_model_dir, tmp_path / "adapter")
    write_merged(str(tiny_model_dir), "float32", adapter, tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == FILES
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, adapter))
    assert spread(adapted - plain, plain) > 0.1
    assert spread(logits(merged) - adapted, adapted) < 1e-5

    assert merged.generation_config.to_dict() == GenerationConfig.from_pretrained(tiny_model_dir).to_dict()
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(tiny_model_dir)
    messages = [{"role": "user", "content": "A café?"}]
    assert tokenizer.apply_chat_template(messages) == own.apply_chat_template(messages)
    assert tokenizer.eos_token_id == own.eos_token_id


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tmp_path: Path, tied: bool) -> None:
    random_causal_lm(tiny_llama_config(tie_word_embeddings=tied)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_merged(str(tmp_path / "model"), "float32", write_adapter(tmp_path / "model", tmp_path / "a"), tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["tie_word_embeddings"] is tied
    with safe_open(tmp_path / "m/model.safetensors", framework="pt") as weights:
        assert ("lm_head.weight" in weights.keys()) is not tied  # noqa: SIM118
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    head, embedding = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied


def test_weights_are_of_the_type_asked_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_model_dir, tmp_path / "adapter")
    write_merged(str(tiny_model_dir), "bfloat16", adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "merged/model.safetensors", framework="pt") as weights:
        found = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    # The sum is rounded once, from bfloat16 weights and a float32 adapter.
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as factors:
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            a, b = (factors.get_tensor(f"base_model.model.{name}.lora_{side}.weight").double() for side in "AB")
            exact = base.get_submodule(name).weight.double() + 8 / 4 * b @ a
            assert ((found[f"{name}.weight"].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_the_same_bytes_every_time_and_no_bars(
    tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tiny_model_dir, tmp_path / "adapter")
    capfd.readouterr()
    for folder in ("first", "second"):
        write_merged(str(tiny_model_dir), "float32", adapter, tmp_path / folder)
    assert "".join(capfd.readouterr()) == ""
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_a_tied_head_is_not_merged(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_model_dir, tmp_path / "adapter", ["q_proj", "lm_head"])
    with pytest.raises(
        ModelError, match=r"adapts lm_head, whose weight another layer shares.*experts\.merge"
    ) as caught:
        write_merged(str(tiny_model_dir), "float32", adapter, tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_a_model_that_is_stored_quantised_is_not_merged(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    load_base(str(tiny_model_dir), "float32", "cpu", "nf4").save_pretrained(tmp_path / "stored")
    adapter = write_adapter(tiny_model_dir, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"stored: its weights are stored quantised.*experts\.merge=false"):
        write_merged(str(tmp_path / "stored"), "float32", adapter, tmp_path / "merged")


def test_an_adapter_of_another_model_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    random_causal_lm(tiny_llama_config(hidden_size=32)).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="made for another base model"):
        write_merged(
            str(tmp_path / "other"), "float32", write_adapter(tiny_model_dir, tmp_path / "adapter"), tmp_path / "merged"
        )
