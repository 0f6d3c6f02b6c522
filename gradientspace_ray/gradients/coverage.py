"""What the per-sample gradients cover, and a refusal by name of all else.

A parameter that is trained but not covered would be missing from every gradient without a sign, so each one is checked;
so is what would give a covered one another gradient than the formula of a LoRA layer does.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import get_bnb_param_type
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

COVERED_LAYERS: tuple[type, ...] = (LoraLinear,)
"""PEFT's layers whose forward pass is base_layer(x) + scaling * B A x, up to where it rounds."""
if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    COVERED_LAYERS += (LoraLinear4bit,)

COVERED_QUANTISATION = "bitsandbytes"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
NOISE = ("drop", "jitter")
"""Parts of the names under which modules keep the rate of a function that is random in training mode."""
ROUTED_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")


class CoverageError(ValueError):
    """An adapter whose gradients are not computed; the message names the parameter or layer, and the reason."""


@dataclass(frozen=True)
class LoraSite:
    """One adapted linear layer: y = W x + scaling * B A x."""

    name: str
    """Name of the layer inside the PEFT model."""
    module: LoraLayer
    lora_a: nn.Parameter
    """A, [r, in]."""
    lora_b: nn.Parameter
    """B, [out, r]."""


def check_coverage(model: PeftModel, adapter: str = "default") -> list[LoraSite]:
    """The adapted layers, in the order of `model.named_parameters()`, once all about them is known to be covered.

    Args:
        model: a PEFT model.
        adapter: name of the adapter whose gradients are wanted.

    Raises:
        CoverageError: a trainable parameter, or a layer, is of a kind that the per-sample gradients do not compute.
    """
    if not isinstance(model, PeftModel) or adapter not in model.peft_config:
        raise CoverageError(f"no adapter called {adapter!r} in this {type(model).__name__}; load or add it first")
    kind = model.peft_config[adapter].peft_type
    if kind != PeftType.LORA:
        raise CoverageError(f"adapter {adapter!r} is of PEFT's type {getattr(kind, 'value', kind)}; train a LORA one")
    _check_base(model)
    sites = list(_sites(model, adapter))
    if not sites:
        raise CoverageError(f"adapter {adapter!r} adapts no layer of this model; name linear ones in target_modules")
    _check_parameters(model, adapter, sites)
    _check_noise(model)
    return sites


def _check_base(model: PeftModel) -> None:
    """Refuse a quantised base whose output depends on the other examples of a row, or loses its gradient."""
    method = getattr(model.get_base_model(), "quantization_method", None)
    method = getattr(method, "value", method)
    if method not in (None, COVERED_QUANTISATION):
        raise CoverageError(
            f"the base model is quantised by {method}; load it unquantised, or in {COVERED_QUANTISATION}' 4 bits"
        )
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        bits = get_bnb_param_type(weight) if weight is not None else False
        if bits == "8bit":
            raise CoverageError(
                f"{name}: bitsandbytes' 8-bit product depends on the other examples of a row; load the base in 4 bits"
            )
        if bits == "4bit" and weight.device.type == "cpu":
            # bitsandbytes repacks such a weight in the first forward pass without gradients, and cannot differentiate
            # through it from then on: gradients of the layers below come out wrong, without a sign.
            packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
            if packed or getattr(module, "support_avx512bf16_for_cpu", False):
                raise CoverageError(
                    f"{name}: bitsandbytes packs 4-bit weights on this CPU, which ends their gradients; use a GPU, or "
                    f"set support_avx512bf16_for_cpu = False on its Linear4bit layers as soon as they are loaded"
                )


def _sites(model: PeftModel, adapter: str) -> Iterator[LoraSite]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in _adapters(module):
            yield _checked_site(name, module, adapter)
        elif isinstance(module, LoraLayer):
            active = [] if module.disable_adapters else _active_adapters(module)
            if module.merged_adapters or active:
                raise CoverageError(
                    f"{name}: adapter {module.merged_adapters or active} acts here beside {adapter!r}; unmerge it, and "
                    f"call model.set_adapter({adapter!r}) first"
                )
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise CoverageError(
                f"{name}: trained whole (modules_to_save or trainable tokens), not by lora_A and lora_B; train the "
                f"adapter without it"
            )
        elif isinstance(module, BaseTunerLayer):
            raise CoverageError(f"{name}: {_kind(module)} is no LoRA layer; train the adapter without it")


def _kind(layer: BaseTunerLayer) -> str:
    return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"


def _adapters(layer: LoraLayer) -> set[str]:
    return {*layer.lora_A, *layer.lora_B, *layer.lora_embedding_A}


def _active_adapters(layer: LoraLayer) -> list[str]:
    """Adapters may be active by name and yet absent from a layer."""
    return [adapter for adapter in layer.active_adapters if adapter in _adapters(layer)]


def _checked_site(name: str, layer: LoraLayer, adapter: str) -> LoraSite:
    """The layer as a site; refuses what is not y = W x + scaling * B A x with this adapter alone."""
    if isinstance(layer, ParamWrapper):
        raise CoverageError(
            f"{name}: adapts the parameter {layer.parameter_name}, whose LoRA weights are no linear layers; train the "
            f"adapter without target_parameters"
        )
    # Not isinstance: classes for quantised or replaced layers derive from it with a forward pass of their own.
    if type(layer) not in COVERED_LAYERS:
        raise CoverageError(
            f"{name}: {_kind(layer)} is not PEFT's plain linear LoRA layer; leave it out of target_modules"
        )
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__
        raise CoverageError(f"{name}: {kind} changes the LoRA formula; train the adapter without it")
    if layer.merged:
        raise CoverageError(f"{name}: adapter {layer.merged_adapters} is merged into the base weight; unmerge it first")
    if layer.disable_adapters:
        raise CoverageError(f"{name}: its adapters are disabled; enable them first")
    active = _active_adapters(layer)
    if active != [adapter]:
        raise CoverageError(f"{name}: active adapters are {active}; call model.set_adapter({adapter!r}) first")
    if "forward" in vars(layer):
        raise CoverageError(f"{name}: its forward method has been replaced; load the model without what replaced it")
    if ROUTED_EXPERT.search(name):
        raise CoverageError(
            f"{name}: an expert sees the tokens that a router sends it, in an order that does not tell whose they are; "
            f"leave it out of target_modules"
        )
    _check_scaling(name, layer.scaling[adapter])
    dropout = layer.lora_dropout[adapter]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        raise CoverageError(f"{name}: lora_dropout is a {type(dropout).__name__}; replace it by nn.Dropout")
    _check_hooks(f"{name}.lora_dropout.{adapter}", dropout)
    lora_a, lora_b = (_factor(name, side, getattr(layer, side), adapter) for side in ("lora_A", "lora_B"))
    expected = ((lora_a.shape[0], layer.in_features), (layer.out_features, lora_a.shape[0]))
    if (lora_a.shape, lora_b.shape) != expected or lora_a.dtype != lora_b.dtype:
        found = " and ".join(f"{list(weight.shape)} {weight.dtype}" for weight in (lora_a, lora_b))
        raise CoverageError(f"{name}: lora_A and lora_B are {found}, which do not fit together; load the adapter again")
    return LoraSite(name, layer, lora_a, lora_b)


def _check_scaling(name: str, scaling: Any) -> None:
    """A number, or the one-element tensor that PEFT makes of it before it compiles a model."""
    if isinstance(scaling, torch.Tensor) and scaling.requires_grad:
        raise CoverageError(f"{name}: its scaling requires a gradient, but is no lora_A or lora_B; make it a number")
    value = scaling if not isinstance(scaling, torch.Tensor) else scaling.item() if scaling.numel() == 1 else math.nan
    if value == 0 or not math.isfinite(value):
        raise CoverageError(f"{name}: its scaling is {value}; it must be one finite number other than zero")


def _check_hooks(place: str, module: nn.Module) -> None:
    """Refuse what would change a module's result, or its gradient, if the module itself were called."""
    if any(getattr(module, hooks) for hooks in HOOKS) or "forward" in vars(module):
        raise CoverageError(f"{place}: has hooks, which the per-sample gradients would pass by; remove them")


def _factor(name: str, side: str, factors: nn.ModuleDict, adapter: str) -> nn.Parameter:
    """The weight of lora_A or lora_B, if its use is one plain matrix product."""
    place = f"{name}.{side}.{adapter}"
    if adapter not in factors:
        raise CoverageError(f"{place}: missing; load the adapter again")
    factor = factors[adapter]
    if type(factor) is not nn.Linear:
        raise CoverageError(f"{place}: a {type(factor).__name__}, not a plain linear layer; take off what wraps it")
    if factor.bias is not None:
        raise CoverageError(f"{place}.bias: lora_bias is not covered; train the adapter without it")
    weight = factor._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter:
        kind = type(factor.weight).__name__
        raise CoverageError(f"{place}.weight: a {kind} (sharded, pruned, ...), not a plain parameter; undo that first")
    _check_hooks(place, factor)
    if weight._backward_hooks:
        raise CoverageError(f"{place}.weight: has a hook on its gradient, which would not be called; remove it")
    return weight


def _check_parameters(model: PeftModel, adapter: str, sites: list[LoraSite]) -> None:
    """Every trainable parameter is a LoRA weight of a site, and each of these has one place in the model."""
    covered = {id(parameter) for site in sites for parameter in (site.lora_a, site.lora_b)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            raise CoverageError(
                f"{name}: requires a gradient, but is no lora_A or lora_B of adapter {adapter!r}; freeze it"
            )
    places: dict[int, str] = {}
    # A module that is used twice is listed once: its layer adds up both uses.
    for name, module in model.named_modules():
        for key in (key for key, parameter in module._parameters.items() if id(parameter) in covered):
            place = places.setdefault(id(module._parameters[key]), f"{name}.{key}")
            if place != f"{name}.{key}":
                raise CoverageError(f"{name}.{key}: is the same weight as {place}; give each layer its own")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise CoverageError(f"the model is on {', '.join(sorted(devices))}; load the whole of it onto one device")
    head = getattr(model.get_base_model(), "get_output_embeddings", lambda: None)()
    for site in sites:
        if site.module is head:
            raise CoverageError(f"{site.name}: the head sees label tokens only; leave it out of target_modules")


def _check_noise(model: PeftModel) -> None:
    """Refuse live dropout and its like: a random gradient, or one of other examples, is no property of the example."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, _BatchNorm):
            raise CoverageError(f"{name}: batch statistics mix the examples; call model.eval() first")
        # Layers that drop by a function keep the rate under a name of their own: attention_dropout, layerdrop, ...
        rates = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, float) and any(part in key for part in NOISE)
        }
        if isinstance(module, _DropoutNd):
            rates["dropout"] = module.p
        for key, rate in rates.items():
            if rate > 0:
                kind = "jitter" if "jitter" in key else "dropout"
                raise CoverageError(f"{name}: {kind} is live; call model.eval() first")
