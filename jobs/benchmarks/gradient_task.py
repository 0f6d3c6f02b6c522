"""What the gradient benchmark computes: a model with a LoRA adapter, and examples of ragged lengths."""

import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from gradientspace_ray.examples.formats import Record, read_source
from gradientspace_ray.examples.packing import IGNORED, Example
from gradientspace_ray.examples.quickstart import quickstart_examples
from gradientspace_ray.examples.rendering import Renderer, RenderingError
from gradientspace_ray.gradients.layout import Column
from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.models.loading import add_lora, load_base, load_tokenizer
from gradientspace_ray.models.reading import set_attention

SHORTEST, LONGEST = 32, 512
LORA_RANK, LORA_ALPHA, LORA_B_STD = 8, 16, 0.02
SEED = 0
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "tie_word_embeddings": True,
    },
}


class TaskError(ValueError):
    """Examples that cannot be had; the message says why in one line."""


class LabelledExample(NamedTuple):
    """Tokens of an example, and the conversation they are of."""

    example: Example
    record: Record


@dataclass(frozen=True)
class Task:
    """Whose gradients are wanted: the mean loss over each example's labels, for all LoRA weights of the model."""

    model: PeftModel
    """Without dropout, with "sdpa" attention, the base frozen and the adapter `default` trainable."""
    examples: Sequence[Example]
    """Each ends with a label."""
    columns: tuple[Column, ...]
    """The engine's: where each weight stands in a gradient."""
    compute_dtype: torch.dtype
    """bfloat16: under autocast."""
    peers_head: Literal["all", "labels"] = "all"
    """Where the peers compute the head: at every token, as their own pipelines do, or where a label is predicted."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dimension(self) -> int:
        """D, the LoRA weights."""
        return sum(rows * width for _, _, (rows, width) in self.columns)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(ids) for ids, _ in self.examples]

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(self.lengths)

    @property
    def weights(self) -> dict[str, tuple[Column, nn.Parameter]]:
        """The LoRA weights by their names in the model, in the order of the columns."""
        trained = {name: weight for name, weight in self.model.named_parameters() if "lora_" in name}
        assert [name.replace(".default.", ".") for name in trained] == [column.name for column in self.columns]
        return {name: (column, weight) for column, (name, weight) in zip(self.columns, trained.items(), strict=True)}

    @property
    def multiplied_weights(self) -> int:
        """Weights of the base that a token is multiplied with: all but an embedding table that is only looked up."""
        base = self.model.get_base_model()
        total = sum(weight.numel() for name, weight in base.named_parameters() if "lora_" not in name)
        return total if base.config.tie_word_embeddings else total - base.get_input_embeddings().weight.numel()

    def part(self, indices: Sequence[int]) -> "Task":
        """The same task with some of the examples."""
        return replace(self, examples=[self.examples[index] for index in indices])

    def autocast(self) -> torch.autocast:
        """What the forward pass runs under."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)


def make_task(
    model: str,
    shape: str | None,
    data: str | None,
    count: int,
    dtype: torch.dtype,
    device: str,
    peers_head: Literal["all", "labels"] = "all",
) -> Task:
    """The model with an adapter whose B is not zero, and the examples.

    Args:
        model: a local folder or a Hugging Face name; with `data` its tokenizer reads them.
        shape: random weights of this shape instead of the model's.
        data: a folder of JSONL files, or whatever else a recipe may name; None makes examples up.
        count: number of examples.
        dtype: of the base's weights and of the products; the adapter is float32.
        device: where they live.
        peers_head: see `Task`.

    Raises:
        TaskError: the data have too few examples, or tokens that the shape does not know.
        UnsupportedModelError: the model has no "sdpa" attention.
    """
    base = random_base(shape, dtype, device) if shape else load_base(model, dtype, device)
    set_attention(base, "sdpa")
    vocabulary = base.config.vocab_size
    examples = read_examples(data, count, model) if data else made_up_examples(count, vocabulary)
    if max(max(ids) for ids, _ in examples) >= vocabulary:
        raise TaskError(f"{shape} has fewer words than {model}, whose tokenizer reads {data}; leave --data out")
    adapted = add_lora(base, LORA_RANK, LORA_ALPHA, "all-linear", SEED)
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(LORA_B_STD * torch.randn(weight.shape, generator=generator))
    return Task(adapted, examples, PerSampleGradients(adapted).columns, dtype, peers_head)


def random_base(shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A Llama with random weights, frozen."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=LONGEST)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def made_up_examples(count: int, vocabulary: int) -> list[Example]:
    """Random tokens: lengths log-uniform from 32 to 512, prompts about half of it."""
    draw = random.Random(SEED)
    examples: list[Example] = []
    for _ in range(count):
        length = round(math.exp(draw.uniform(math.log(SHORTEST), math.log(LONGEST))))
        prompt = round(length * draw.uniform(0.35, 0.65))
        ids = [draw.randrange(vocabulary) for _ in range(length)]
        examples.append((ids, [IGNORED] * prompt + ids[prompt:]))
    return examples


def read_examples(data: str, count: int, model: str) -> list[Example]:
    """Equally many from each file, drawn among those of 32 to 512 tokens; see `read_labelled_examples`."""
    return [row.example for row in read_labelled_examples(data, count, model)]


def read_labelled_examples(data: str, count: int, model: str) -> list[LabelledExample]:
    """Equally many from each file, drawn among those of 32 to 512 tokens, with what they say and are about.

    Raises:
        TaskError: a file has too few.
    """
    files: dict[str, list[Record]] = defaultdict(list)
    for row in read_source(data):
        if isinstance(row, Record):
            files[row.source].append(row)
    renderer = Renderer(load_tokenizer(model))
    draw = random.Random(SEED)
    examples: list[LabelledExample] = []
    for number, (file, records) in enumerate(files.items()):
        share = count * (number + 1) // len(files) - count * number // len(files)
        draw.shuffle(records)
        fitting = (LabelledExample(example, record) for record in records if (example := _fitting(renderer, record)))
        found = [example for _, example in zip(range(share), fitting, strict=False)]
        if len(found) < share:
            raise TaskError(f"{file}: {len(found)} examples of {SHORTEST} to {LONGEST} tokens, needed are {share}")
        examples += found
    draw.shuffle(examples)
    return examples


def mixture_folder(scratch: Path, count: int) -> str:
    """The built-in mixture in a folder, one file for each skill, with `count` different examples at the least."""
    folder = scratch / "mixture"
    folder.mkdir()
    rows = {json.dumps(row): row for seed in range(2 + count // 200) for row in quickstart_examples(seed)}
    for text, row in rows.items():
        with (folder / f"{row['domain']}.jsonl").open("a") as file:
            file.write(f"{text}\n")
    return str(folder)


def _fitting(renderer: Renderer, record: Record) -> Example | None:
    """The example, cut after its last label, if it has the length that is wanted."""
    try:
        rendered = renderer.example(record.messages)
    except RenderingError:
        return None
    end = max(place + 1 for place, label in enumerate(rendered.labels) if label != IGNORED)
    return (rendered.input_ids[:end], rendered.labels[:end]) if SHORTEST <= end <= LONGEST else None
