"""An expert as a whole model: the adapter's weights added to the base's."""

from collections import Counter
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from gradientspace_ray.models.loading import ModelError, load_adapter, load_base, load_tokenizer, without_progress_bars


def write_merged(model_name: str, dtype: str | torch.dtype, adapter_folder: Path, folder: Path) -> None:
    """Write the base plus an adapter as a plain transformers folder, with tokenizer and generation configuration.

    The base's own weights are taken, not those of 4 bits that the adapter may have been trained on: one rounding to
    `dtype` is all that the merged model loses.

    Args:
        model_name: see `loading.resolve_model`.
        dtype: type of the weights.
        adapter_folder: a local PEFT folder.
        folder: made if missing.

    Raises:
        ModelError: model or adapter cannot be read or do not fit, or their sum cannot be written.
    """
    base = load_base(model_name, dtype)
    if getattr(base, "quantization_method", None) is not None:
        mend = "give the model in full, or set experts.merge=false"
        raise ModelError(f"{model_name}: its weights are stored quantised, and merging would round them again; {mend}")
    adapted = load_adapter(base, adapter_folder)
    _refuse_shared_weights(adapted, adapter_folder)
    merged = adapted.merge_and_unload()
    with without_progress_bars():
        merged.save_pretrained(folder)
    load_tokenizer(model_name).save_pretrained(folder)


def _refuse_shared_weights(adapted: PeftModel, adapter_folder: Path) -> None:
    """Refuse an adapted layer whose weight is another's too, as of a head tied to the embedding: both would change."""
    modules = dict(adapted.get_base_model().named_modules())
    places = Counter(id(weight) for module in modules.values() for weight in module._parameters.values())
    for name, module in modules.items():
        if isinstance(module, LoraLayer) and places[id(module.get_base_layer().weight)] > 1:
            raise ModelError(
                f"{adapter_folder}: adapts {name}, whose weight another layer shares, which cannot be merged; leave "
                "it out of lora.target_modules, or set experts.merge=false"
            )
