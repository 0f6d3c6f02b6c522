"""What the per-sample gradients cover, and a refusal by name of all else.

A parameter that is trained but not covered would be missing from every gradient without a sign, so each one is checked.
"""

from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class CoverageError(ValueError):
    """An adapter whose gradients are not computed; the message names the parameter or layer, and the reason."""


@dataclass(frozen=True)
class LoraSite:
    """One adapted linear layer: y = W x + scaling * B A x."""

    name: str
    """Name of the layer inside the PEFT model."""
    module: LoraLinear
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
    if adapter not in getattr(model, "peft_config", {}):
        raise CoverageError(f"no adapter called {adapter!r} in this model; load or add it first")
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in _adapters(module):
            sites.append(_checked_site(name, module, adapter))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise CoverageError(
                f"{name}: trained whole (modules_to_save or trainable tokens), not by lora_A and lora_B"
            )
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            raise CoverageError(f"{name}: a {type(module).__name__} layer, not a LoRA one")
    if not sites:
        raise CoverageError(f"adapter {adapter!r} adapts no linear layer of this model")
    covered = {id(parameter) for site in sites for parameter in (site.lora_a, site.lora_b)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            raise CoverageError(f"{name}: requires a gradient, but is no lora_A or lora_B of adapter {adapter!r}")
    if len(covered) != 2 * len(sites):
        raise CoverageError(f"adapter {adapter!r} shares one LoRA weight between layers; give each layer its own")
    _check_dropout(model)
    return sites


def _adapters(layer: LoraLayer) -> set[str]:
    return {*layer.lora_A, *layer.lora_B, *layer.lora_embedding_A}


def _checked_site(name: str, layer: LoraLayer, adapter: str) -> LoraSite:
    """The layer as a site; refuses what is not y = W x + scaling * B A x with this adapter alone."""
    if isinstance(layer, ParamWrapper):
        raise CoverageError(f"{name}: adapts a parameter (target_parameters), whose LoRA weights are no linear layers")
    # Not isinstance: classes for quantised or replaced layers derive from it with a forward pass of their own.
    if not isinstance(layer, LoraLinear) or type(layer) is not LoraLinear:
        kind = f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}"
        raise CoverageError(f"{name}: {kind} is not PEFT's plain linear LoRA layer; leave it out of target_modules")
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__
        raise CoverageError(f"{name}: {kind} changes the LoRA formula; train the adapter without it")
    if layer.lora_B[adapter].bias is not None:
        raise CoverageError(f"{name}.lora_B.{adapter}.bias: lora_bias is not covered; train the adapter without it")
    if layer.merged:
        raise CoverageError(f"{name}: adapter {layer.merged_adapters} is merged into the base weight; unmerge it first")
    if layer.disable_adapters:
        raise CoverageError(f"{name}: its adapters are disabled; enable them first")
    # Other adapters may be active by name and yet absent from this layer.
    active = [other for other in layer.active_adapters if other in _adapters(layer)]
    if active != [adapter]:
        raise CoverageError(f"{name}: active adapters are {active}; call model.set_adapter({adapter!r}) first")
    return LoraSite(name, layer, _parameter(layer.lora_A[adapter]), _parameter(layer.lora_B[adapter]))


def _parameter(factor: nn.Module) -> nn.Parameter:
    weight = factor.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _check_dropout(model: PeftModel) -> None:
    """Refuse live dropout: a random gradient is no property of the example."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        # Layers that drop by a function keep the rate under a name of their own: attention_dropout, layerdrop, ...
        rates = [value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]
        if isinstance(module, nn.Dropout):
            rates.append(module.p)
        if any(rate > 0 for rate in rates):
            raise CoverageError(f"{name}: dropout is live; call model.eval() first")
