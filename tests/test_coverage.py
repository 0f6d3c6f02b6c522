"""Every kind of adapter that the per-sample gradients do not compute is refused by name."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_per_sample import adapted, ragged
from tiny_models import random_causal_lm, tiny_llama_config
from transformers import MixtralConfig

from gradientspace_ray.gradients.coverage import CoverageError, check_coverage
from gradientspace_ray.gradients.per_sample import PerSampleGradients

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def test_accepts_a_plain_adapter_in_the_order_of_its_parameters() -> None:
    model = adapted(r=4)
    sites = check_coverage(model)
    assert len(sites) == 14
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == [f"{site.name}.{factor}.default.weight" for site in sites for factor in ("lora_A", "lora_B")]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, f"{Q_PROJ}: DoraLinearVariant changes the LoRA formula"),
        ({"lora_bias": True}, r"q_proj.lora_B.default.bias: lora_bias is not covered"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens: layer.Embedding is not PEFT's plain linear"),
        ({"modules_to_save": ["lm_head"]}, "lm_head: trained whole"),
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


def test_refuses_a_convolution() -> None:
    base = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(CoverageError, match="Conv1d is not PEFT's plain linear"):
        check_coverage(model)


def test_refuses_a_parameter_trained_beside_the_adapter() -> None:
    model = adapted(r=2)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(CoverageError, match=r"model.norm.weight: requires a gradient"):
        check_coverage(model)


def test_refuses_an_adapter_that_is_not_there() -> None:
    with pytest.raises(CoverageError, match="no adapter called 'expert'"):
        check_coverage(adapted(r=2), "expert")
    with pytest.raises(CoverageError, match="no adapter called"):
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


def test_refuses_live_dropout_also_later() -> None:
    model = adapted(r=2, lora_dropout=0.1)
    engine = PerSampleGradients(model)
    model.train()
    with pytest.raises(CoverageError, match=r"lora_dropout.default: dropout is live; call model.eval\(\)"):
        engine.gradients(ragged([5]))
    layers = adapted(r=2).train()
    layers.get_base_model().model.layerdrop = 0.1
    with pytest.raises(CoverageError, match=r"model.model: dropout is live"):
        check_coverage(layers)
    attention = adapted(random_causal_lm(tiny_llama_config(attention_dropout=0.1)), r=2).train()
    with pytest.raises(CoverageError, match=r"self_attn: dropout is live"):
        check_coverage(attention)
    check_coverage(adapted(r=2).train())


def test_refuses_a_weight_shared_between_layers() -> None:
    model = adapted(r=2)
    layers = model.get_base_model().model.layers
    layers[1].self_attn.q_proj.lora_A["default"].weight = layers[0].self_attn.q_proj.lora_A["default"].weight
    with pytest.raises(CoverageError, match="shares one LoRA weight"):
        check_coverage(model)


def test_refuses_a_layer_that_sees_part_of_the_tokens() -> None:
    class EveryOther(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, ::2] = self.inner(x[:, ::2])
            return x

    base = random_causal_lm(tiny_llama_config())
    base.model.layers[0].mlp = EveryOther(base.model.layers[0].mlp)
    model: PeftModel = adapted(base, r=2)
    with pytest.raises(CoverageError, match=r"layers.0.mlp.inner.gate_proj: sees 3 of 5 tokens"):
        PerSampleGradients(model).gradients([([3, 4, 5, 6, 7], [3, 4, 5, 6, 7])])
