"""Every kind of adapter that the per-sample gradients do not compute is refused by name."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from test_per_sample import adapted, oracle, ragged, relative_error
from tiny_models import random_causal_lm, tiny_llama_config
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig

from gradientspace_ray.gradients.coverage import CoverageError, check_coverage
from gradientspace_ray.gradients.per_sample import PerSampleGradients

NESTED = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
ARROW = ArrowConfig()
ARROW.task_adapter_names, ARROW.gks_adapter_names = [], []
# What each variant of PEFT's linear LoRA layer is called and how it is asked for.
VARIANTS: dict[str, tuple[str, dict]] = {
    "use_dora": ("DoraLinearVariant", {"use_dora": True}),
    "arrow_config": ("ArrowLinearVariant", {"arrow_config": ARROW}),
    "use_bdlora": ("BdLoraLinearVariant", {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"])}),
    "alora_invocation_tokens": ("ALoraLinearVariant", {"alora_invocation_tokens": [5, 6]}),
    "velora_config": ("VeloraLinearVariant", {"velora_config": VeloraConfig(num_groups=4)}),
    "monteclora_config": ("MontecloraLinearVariant", {"monteclora_config": MontecloraConfig()}),
    "mica": ("MiCALinearVariant", {"init_lora_weights": "mica"}),
    "kasa_config": ("KasaLinearVariant", {"kasa_config": KasaConfig()}),
}


def q_proj(model: PeftModel, layer: int = 0) -> LoraLinear:
    return model.get_base_model().model.layers[layer].self_attn.q_proj


def test_accepts_a_plain_adapter_in_the_order_of_its_parameters() -> None:
    model = adapted(r=4)
    sites = check_coverage(model)
    assert len(sites) == 14
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == [f"{site.name}.{factor}.default.weight" for site in sites for factor in ("lora_A", "lora_B")]


def test_knows_every_variant_of_the_installed_peft() -> None:
    assert {name for names in q_proj(adapted(r=2)).lora_variants for name in names} == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_refuses_every_variant(variant: str) -> None:
    kind, config = VARIANTS[variant]
    with pytest.raises(CoverageError, match=f"{Q_PROJ}: {kind} changes the LoRA formula; train"):
        check_coverage(adapted(r=2, target_modules=["q_proj"], **config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_bias": True}, r"q_proj.lora_B.default.bias: lora_bias is not covered"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens: lora.layer.Embedding is not PEFT's plain lin"),
        ({"modules_to_save": ["lm_head"]}, "lm_head: trained whole"),
        ({"target_modules": ["lm_head"]}, "lm_head: the head sees label tokens only"),
        ({"trainable_token_indices": [3, 4]}, "embed_tokens: trained whole"),
        ({"bias": "lora_only"}, r"q_proj.base_layer.bias: requires a gradient, but is no lora_A"),
    ],
)
def test_refuses_adapters_of_other_kinds(config: dict, message: str) -> None:
    base = random_causal_lm(tiny_llama_config(attention_bias=True))
    with pytest.raises(CoverageError, match=message):
        check_coverage(adapted(base, **{"r": 2, "target_modules": ["q_proj"], **config}))


def test_refuses_experts_adapted_as_parameters() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, pad_token_id=None,
    )  # fmt: skip
    model = adapted(random_causal_lm(config), r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    with pytest.raises(CoverageError, match=r"experts.*target_parameters"):
        check_coverage(model)


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.MultiheadAttention(4, 2)])
def test_refuses_layers_that_are_not_linear(layer: nn.Module) -> None:
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(CoverageError, match=f"lora.layer.{type(layer).__name__} is not PEFT's plain linear"):
        check_coverage(model)


def test_refuses_classes_that_derive_from_the_plain_layer() -> None:
    class OtherForward(LoraLinear):
        pass

    config = LoraConfig(r=2, target_modules=["q_proj"])
    config._register_custom_module({nn.Linear: OtherForward})
    model = get_peft_model(random_causal_lm(tiny_llama_config()), config)
    with pytest.raises(CoverageError, match=r"q_proj: .*OtherForward is not PEFT's plain linear"):
        check_coverage(model)


def test_refuses_other_tuners() -> None:
    base = random_causal_lm(tiny_llama_config())
    prompts = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(CoverageError, match="'default' is of PEFT's type PROMPT_TUNING; train a LORA one"):
        check_coverage(prompts)
    scaled = inject_adapter_in_model(IA3Config(target_modules=["k_proj"], feedforward_modules=[]), base)
    model = adapted(scaled, r=2, target_modules=["q_proj"])
    with pytest.raises(CoverageError, match=r"k_proj: ia3.layer.Linear is no LoRA layer"):
        check_coverage(model)


def test_refuses_a_parameter_trained_beside_the_adapter() -> None:
    model = adapted(r=2)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(CoverageError, match=r"model.norm.weight: requires a gradient"):
        check_coverage(model)


def test_refuses_an_adapter_that_is_not_there() -> None:
    with pytest.raises(CoverageError, match="no adapter called 'expert'"):
        check_coverage(adapted(r=2), "expert")
    with pytest.raises(CoverageError, match="no adapter called 'default' in this LlamaForCausalLM"):
        check_coverage(random_causal_lm(tiny_llama_config()))


def test_refuses_several_inactive_disabled_or_merged_adapters() -> None:
    model = adapted(r=2)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.eval()
    with pytest.raises(CoverageError, match=r"active adapters are \['default'\]"):
        check_coverage(model, "other")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(CoverageError, match=r"active adapters are \['default', 'other'\]"):
        check_coverage(model)
    model.set_adapter("default")
    check_coverage(model)
    with model.disable_adapter(), pytest.raises(CoverageError, match="adapters are disabled"):
        check_coverage(model)
    model.merge_adapter()
    with pytest.raises(CoverageError, match=r"\['default'\] is merged"):
        check_coverage(model)
    model.unmerge_adapter()
    check_coverage(model)


def test_refuses_another_adapter_in_layers_that_this_one_leaves_alone() -> None:
    model = adapted(r=2, target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    check_coverage(model.eval())
    model.base_model.set_adapter(["default", "other"], inference_mode=True)
    with pytest.raises(CoverageError, match=r"v_proj: adapter \['other'\] acts here beside 'default'"):
        check_coverage(model)
    model.set_adapter("default")
    model.merge_adapter(["other"])
    with pytest.raises(CoverageError, match=r"v_proj: adapter \['other'\] acts here beside 'default'"):
        check_coverage(model)
    model.unmerge_adapter()
    model.set_requires_grad("other", requires_grad=True)
    with pytest.raises(CoverageError, match=r"v_proj.lora_A.other.weight: requires a gradient"):
        check_coverage(model)


def test_refuses_live_dropout_also_later() -> None:
    model = adapted(r=2, lora_dropout=0.1)
    engine = PerSampleGradients(model)
    model.train()
    with pytest.raises(CoverageError, match=r"lora_dropout.default: dropout is live; call model.eval\(\)"):
        engine.gradients(ragged([5]))
    attention = adapted(random_causal_lm(tiny_llama_config(attention_dropout=0.1)), r=2).train()
    with pytest.raises(CoverageError, match=r"self_attn: dropout is live"):
        check_coverage(attention)
    check_coverage(adapted(r=2).train())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layerdrop", 0.1, "model.model: dropout is live"),
        ("jitter_noise", 0.1, "model.model: jitter is live"),
        ("noise", nn.AlphaDropout(0.1), "model.noise: dropout is live"),
        ("noise", nn.Dropout1d(0.1), "model.noise: dropout is live"),
        ("norm", nn.BatchNorm1d(64, affine=False), "model.norm: batch statistics mix the examples"),
    ],
)
def test_refuses_what_training_mode_makes_random(name: str, value: float | nn.Module, message: str) -> None:
    model = adapted(r=2).train()
    setattr(model.get_base_model().model, name, value)
    with pytest.raises(CoverageError, match=message):
        check_coverage(model)
    check_coverage(model.eval())


def test_refuses_a_weight_that_stands_elsewhere_too() -> None:
    model = adapted(r=2)
    weight = q_proj(model).lora_A["default"].weight
    q_proj(model, 1).lora_A["default"].weight = weight
    with pytest.raises(CoverageError, match=rf"1.*lora_A.default.weight: is the same weight as {Q_PROJ}.lora_A.def"):
        check_coverage(model)
    model = adapted(r=2)
    model.get_base_model().model.reader = nn.ParameterDict({"weight": q_proj(model).lora_A["default"].weight})
    with pytest.raises(CoverageError, match=r"is the same weight as"):
        check_coverage(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.lora_A["default"].register_forward_hook(lambda *_: None), "lora_A.default: has hooks"),
        (lambda layer: layer.lora_B["default"].register_forward_pre_hook(lambda *_: None), "lora_B.default: has hooks"),
        (lambda layer: layer.lora_A["default"].register_full_backward_hook(lambda *_: None), "lora_A.default: has hoo"),
        (lambda layer: layer.lora_dropout["default"].register_forward_hook(lambda *_: None), "dropout.default: has ho"),
        (lambda layer: setattr(layer.lora_B["default"], "forward", lambda x: x), "lora_B.default: has hooks"),
        (lambda layer: setattr(layer, "forward", lambda x: x), "q_proj: its forward method has been replaced"),
        (lambda layer: layer.lora_A["default"].weight.register_hook(lambda g: 0 * g), "A.default.weight: has a hook"),
        (lambda layer: layer.lora_dropout.update({"default": nn.Tanh()}), "lora_dropout is a Tanh"),
        (lambda layer: layer.lora_A.update({"default": nn.Bilinear(2, 2, 2)}), "lora_A.default: a Bilinear, not a pl"),
        (lambda layer: parametrizations.orthogonal(layer.lora_A["default"]), "A.default: a ParametrizedLinear, not"),
        (lambda layer: prune.identity(layer.lora_B["default"], "weight"), r"B.default.weight: a Tensor \(sharded, pr"),
        (lambda layer: layer.lora_B.pop("default"), "lora_B.default: missing; load"),
        (lambda layer: layer.lora_B["default"].bfloat16(), r"\[2, 64\] torch.float32 and \[64, 2\] torch.bfloat16, wh"),
        (lambda layer: setattr(layer.lora_A["default"].weight, "data", torch.empty(0)), r"are \[0\] torch.float32 and"),
        (lambda layer: layer.lora_A["default"].to("meta"), "the model is on cpu, meta; load the whole of it onto one"),
        (lambda layer: layer.set_scale("default", 0), "q_proj: its scaling is 0.0; it must be one finite number"),
        (lambda layer: layer.set_scale("default", float("nan")), "q_proj: its scaling is nan"),
        (lambda layer: layer.scaling.update(default=torch.ones(64)), "q_proj: its scaling is nan"),
        (lambda layer: layer.scaling.update(default=nn.Parameter(torch.ones(()))), "scaling requires a gradient"),
    ],
)
def test_refuses_a_layer_that_does_not_compute_the_formula(change: Callable, message: str) -> None:
    model = adapted(r=2)
    change(q_proj(model))
    with pytest.raises(CoverageError, match=message):
        check_coverage(model)


def test_refuses_routed_experts() -> None:
    class Routed(nn.Module):
        """All tokens reach the one expert, in another order."""

        def __init__(self, expert: nn.Module) -> None:
            super().__init__()
            self.experts = nn.ModuleList([expert])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[0](x.flip(1)).flip(1)

    base = random_causal_lm(tiny_llama_config())
    base.model.layers[0].mlp = Routed(base.model.layers[0].mlp)
    with pytest.raises(CoverageError, match=r"layers.0.mlp.experts.0.gate_proj: an expert sees the tokens that"):
        check_coverage(adapted(base, r=2))


def test_refuses_a_layer_that_sees_part_of_the_tokens() -> None:
    class EveryOther(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, ::2] = self.inner(x[:, ::2])
            return x

    base = random_causal_lm(tiny_llama_config())
    base.model.layers[0].mlp = EveryOther(base.model.layers[0].mlp)
    model: PeftModel = adapted(base, r=2)
    with pytest.raises(CoverageError, match=r"layers.0.mlp.inner.gate_proj: sees .*3.* of .*5.* tokens"):
        PerSampleGradients(model).gradients([([3, 4, 5, 6, 7], [3, 4, 5, 6, 7])])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: prepare_model_for_compiled_hotswap(model, target_rank=7),
        lambda model: q_proj(model).register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda model: q_proj(model).set_scale("default", 0.3),
        lambda model: get_peft_model(model.get_base_model(), NESTED),
    ],
    ids=["hotswap", "hook-on-the-layer", "scale", "adapted-twice"],
)
def test_what_is_accepted_is_exact(change: Callable) -> None:
    model = adapted(r=4, lora_alpha=16)
    changed = change(model)
    model = changed.eval() if isinstance(changed, PeftModel) else model
    examples = ragged([12, 5, 30])
    gradients = PerSampleGradients(model, tokens_per_batch=64).gradients(examples)
    assert relative_error(gradients, oracle(model, examples)) < 1e-5


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_adapters_of_half_precision_are_covered(dtype: torch.dtype, error: float) -> None:
    model = adapted(r=4, lora_alpha=16)
    examples = ragged([12, 5, 30])
    exact = oracle(model, examples)
    for site in check_coverage(model):
        site.module.lora_A.to(dtype)
        site.module.lora_B.to(dtype)
    assert relative_error(PerSampleGradients(model).gradients(examples), exact) < error


class Params4bit(nn.Parameter):
    """Stands in for bitsandbytes' weights, which PEFT too knows by the names of their classes."""


class Int8Params(nn.Parameter):
    """See `Params4bit`."""


def test_refuses_quantised_bases_by_name() -> None:
    model = adapted(r=2)
    model.get_base_model().quantization_method = "gptq"
    with pytest.raises(CoverageError, match="base model is quantised by gptq; load it unquantised"):
        check_coverage(model)
    model.get_base_model().quantization_method = "bitsandbytes"
    layer = q_proj(model).base_layer
    weight = layer.weight.data
    layer.weight = Int8Params(weight, requires_grad=False)
    with pytest.raises(CoverageError, match=r"q_proj.base_layer: bitsandbytes' 8-bit product depends on the other ex"):
        check_coverage(model)
    layer.weight = Params4bit(weight, requires_grad=False)
    check_coverage(model)
    layer.support_avx512bf16_for_cpu = True
    with pytest.raises(CoverageError, match=r"q_proj.base_layer: bitsandbytes packs 4-bit weights on this CPU"):
        check_coverage(model)
    layer.support_avx512bf16_for_cpu = False
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(CoverageError, match=r"q_proj.base_layer: bitsandbytes packs 4-bit weights on this CPU"):
        check_coverage(model)


def quantised(folder: Path, dtype: torch.dtype = torch.float32, **config: object) -> PeftModel:
    random_causal_lm(tiny_llama_config()).save_pretrained(folder)
    settings = BitsAndBytesConfig(**config)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype, device_map="cpu")
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return adapted(base, r=4, lora_alpha=16)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_a_4_bit_base_is_exact(tmp_path: Path, kind: str, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    config = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    model = quantised(tmp_path, load_in_4bit=True, **config)
    assert type(q_proj(model)).__name__ == "Linear4bit"
    examples = ragged([7, 40, 3, 18, 25, 2])
    gradients = PerSampleGradients(model, tokens_per_batch=64).gradients(examples)
    assert relative_error(gradients, oracle(model, examples)) < 1e-5
    # And neither a product that rounds more coarsely.
    model = quantised(tmp_path, torch.bfloat16, load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **config)
    gradients = PerSampleGradients(model, tokens_per_batch=64).gradients(examples)
    assert torch.cosine_similarity(gradients, oracle(model, examples)).min() > 0.99


def test_an_8_bit_base_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(CoverageError, match="8-bit product depends on the other examples of a row"):
        check_coverage(quantised(tmp_path, load_in_8bit=True))
